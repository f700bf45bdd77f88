"""The recipe: one YAML file that names a model, its data, the passes and what to write.

    model: torchvision.models:resnet50          # or {source: ..., arguments: {...}}, or a .pt2 or .onnx file
    inputs: [[1, 3, 224, 224]]                  # or [{shape: [...], dtype: float32}]
    data: digits                                # or {source: package.module:callable, arguments: {...}, inputs:, labels:}
    target: rtx-sm86
    precision: fp16
    passes:
      - RemoveChannels: {ratio: 0.5}
      - Distill: {epochs: 10}
      - Fuse
    outputs: {engines: [rtx-sm86]}

Every mistake is one line: the file, the path of the field, what is wrong, and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from . import passes as library
from .graph.errors import BadInput, GraphcombError, named, nearest
from .graph.hints import checked, field_hints
from .passes.base import Pass
from .runtime.engines.options import NAMES, EngineOptions
from .sources import resolve

TEXT = "tag:yaml.org,2002:str"
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
POWER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class Section(BaseModel):
    """A part of a YAML file. Unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Source(Section):
    """A source of a model or data.

    source: `package.module:callable`, a file or a built-in name. arguments: keyword arguments of the callable.
    """

    source: str
    arguments: dict[str, Any] = {}


class Model(Source):
    """The source of the model. outputs: names of the outputs to capture (see `capture`); by default all."""

    outputs: list[str] | None = None


class Data(Source):
    """The source of the batches.

    inputs, labels: for batches of an unusual form, functions (`package.module:callable`) that return the model's inputs and
    the labels for loss and metric from a batch.
    """

    inputs: str | None = None
    labels: str | None = None


class Input(Section):
    """One example input of the model."""

    shape: list[PositiveInt]
    dtype: Literal["float32", "float16", "bfloat16", "float64", "int64", "int32", "bool"] = "float32"


def _short(key: str) -> BeforeValidator:
    """Return a validator that accepts `x` as a short form of `{key: x}`."""
    return BeforeValidator(lambda value: value if isinstance(value, dict) else {key: value})


@dataclasses.dataclass(frozen=True)
class EngineOutput:
    """One engine to build: its target and the options of the build, as in `graphcomb build --option`.

    In a recipe the options are beside the target: `{target: orin-nx, batch: [1, 8, 16], dla: 0}`.
    """

    target: str
    options: EngineOptions


class Outputs(Section):
    """The outputs of a run in addition to record.json and summary.json.

    - pt2, onnx, report: whether to write model.pt2, the ONNX files and report.html.
    - engines: engines to build; in a validated recipe an `EngineOutput` each.
    - bench: whether to measure the latency of the dense and the compressed model in ONNX Runtime.
    - opset: opset of the ONNX files; by default the one that `choose_opset` chooses and that all targets parse.
    - tolerance, keep_fp32, keep_io_types: arguments of `export_onnx` for the file in the recipe's precision.
    """

    pt2: bool = True
    onnx: bool = True
    engines: list[Any] = []
    report: bool = True
    bench: bool = True
    opset: PositiveInt | None = None
    tolerance: Annotated[float, Field(gt=0)] | None = None
    keep_fp32: list[str] = []
    keep_io_types: bool = False


class Recipe(Section):
    """A validated recipe.

    - model: the source of the model.
    - inputs: example inputs; by default a batch of the data, without data one input of 1 x 3 x 224 x 224.
    - dynamic_batch: whether the first dimension is dynamic; by default it is if there is data.
    - data: the source of the batches.
    - loss, metric: `package.module:callable`; by default cross-entropy and top-1 accuracy.
    - seed: seed of all random numbers.
    - target: name of the device. precision: "fp32" or "fp16", in which engines compute.
    - latency_table: source of predicted latencies. A JSON file is a latency table, which is created and completed by
      measurements on this machine; results.json of a bench bundle calibrates a roofline of the target; "roofline" takes the
      target's data sheet. By default passes with a latency as their goal use a latency table in the cache folder, and the
      report uses the data sheet.
    - passes: the passes, in a validated recipe as `Pass` objects.
    - outputs: what the run writes.
    """

    model: Annotated[Model, _short("source")]
    inputs: list[Annotated[Input, _short("shape")]] | None = None
    dynamic_batch: bool | None = None
    data: Annotated[Data, _short("source")] | None = None
    loss: str | None = None
    metric: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    target: str = "cpu"
    latency_table: str | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    passes: list[Any]
    outputs: Outputs = Outputs()

    def key(self) -> dict[str, Any]:
        """Return the fields on which finished passes depend: all but the passes themselves and the outputs."""
        return self.model_dump(mode="json", exclude={"passes", "outputs"})


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and validate it. overrides: texts such as `passes.0.ratio=0.3`, whose values are YAML.

    Raises a GraphcombError in one line that names the file and the path of the first wrong field.
    """
    tree = read_yaml(path)
    with named(str(path)):
        for text in overrides:
            override(tree, text)
        return parse_recipe(tree)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises BadInput, which names file and line, for any other file."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not a text file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise BadInput(f"{path}{place}: not valid YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(tree, dict):
        raise BadInput(f"{path}: expected a mapping at the top, found {type(tree).__name__}")
    return tree


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Validate a recipe given as plain data. Raises a GraphcombError that begins with the path of the first wrong field."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise BadInput(explain(error, Recipe)) from error
    outputs = recipe.outputs.model_copy(update={"engines": parse_engines(recipe.outputs.engines)})
    return recipe.model_copy(update={"passes": parse_passes(recipe.passes), "outputs": outputs})


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first validation error as one line: `path: what is wrong`, with the nearest key for an unknown one."""
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        owner = model
        for part in first["loc"][:-1]:
            owner = _inner(owner, part)
        return f"{path}: unknown key; {nearest(str(first['loc'][-1]), owner.model_fields)}"
    if first["type"] == "missing":
        return f"{path}: missing"
    message = first["msg"].removeprefix("Input ")
    return f"{path}: {message}, got {_brief(first['input'])}"


def _inner(owner: type[BaseModel], part: str | int) -> type[BaseModel]:
    """Return the section class of the value at a key (or an index) of a section."""
    if isinstance(part, int):
        return owner
    stack: list[Any] = [owner.model_fields[part].annotation]
    while stack:
        part_type = stack.pop()
        if inspect.isclass(part_type) and issubclass(part_type, BaseModel):
            return part_type
        stack.extend(get_args(part_type))
    return owner


def _brief(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------------------------------------------------- passes
def known_passes() -> dict[str, type[Pass]]:
    """Return all passes that a recipe may name, by name: the public ones of `graphcomb.passes`."""
    public = {name: getattr(library, name) for name in library.__all__}
    return {n: c for n, c in public.items() if inspect.isclass(c) and issubclass(c, Pass) and c is not Pass}


def parse_passes(steps: list[Any]) -> list[Pass]:
    """Return passes from a list of names and of single-key mappings `{name: {option: value}}`. Raises BadInput."""
    known = known_passes()
    result = []
    for i, step in enumerate(steps):
        if isinstance(step, str):
            step = {step: None}
        if not isinstance(step, dict) or len(step) != 1:
            raise BadInput(f"passes.{i}: expected a pass name or one {{name: options}}, got {_brief(step)}")
        [(name, options)] = step.items()
        if name not in known:
            raise BadInput(f'passes.{i}: unknown pass "{name}"; {nearest(str(name), known)}')
        result.append(parse_pass(known[name], options, f"passes.{i}.{name}"))
    return result


def parse_pass(cls: type[Pass], options: Any, path: str) -> Pass:
    """Return one pass from its class and its options. Raises BadInput, which begins with the path of the wrong option."""
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise BadInput(f"{path}: expected options as a mapping, got {_brief(options)}")
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    hints, arguments = field_hints(cls), {}
    for name, value in options.items():
        if name not in fields:
            raise BadInput(
                f"{path}.{name}: unknown option; {nearest(str(name), fields) if fields else 'the pass takes none'}"
            )
        hint = hints.get(name)
        inner = next((t for t in (hint, *get_args(hint)) if inspect.isclass(t) and issubclass(t, Pass)), None)
        if inner is not None and value is not None:
            value = parse_pass(inner, value, f"{path}.{name}")
        if isinstance(value, str) and ":" in value and any(get_origin(t) is Callable for t in get_args(hint)):
            value = resolve(value, f"{path}.{name}")
        # YAML reads a bare `no` as false.
        arguments[name] = "no" if value is False and "no" in get_args(hint) else value
    try:
        return cls(**arguments)
    except GraphcombError as error:
        text = str(error).removeprefix(cls.__name__)
        raise BadInput(path + (text if text[:1] in (":", ".") else f": {error}")) from error
    except TypeError as error:
        raise BadInput(f"{path}: {error}") from error


# ------------------------------------------------------------------------------------------------------------ engines
def parse_engines(entries: list[Any]) -> list[EngineOutput]:
    """Return the engines of a recipe from a list of targets and of mappings `{target: ..., option: value}`.

    A value of null means the default of the option. Raises BadInput, which begins with the path of the wrong field.
    """
    result = []
    for i, entry in enumerate(entries):
        path = f"outputs.engines.{i}"
        fields = dict(entry) if isinstance(entry, dict) else {"target": entry}
        if "target" not in fields:
            raise BadInput(f"{path}.target: missing")
        target = checked(str, fields.pop("target"), f"{path}.target")
        for name in fields:
            if name not in NAMES:
                raise BadInput(f"{path}.{name}: unknown key; {nearest(str(name), ('target', *NAMES))}")
        try:
            options = EngineOptions(**{name: value for name, value in fields.items() if value is not None})
        except BadInput as error:
            raise BadInput(f"{path}.{str(error).removeprefix('option ')}") from error
        result.append(EngineOutput(target, options))
    return result


# ---------------------------------------------------------------------------------------------------------- overrides
def override(tree: dict[str, Any], text: str) -> None:
    """Apply `path=value` to a recipe in place.

    A path consists of keys and indices; the name of a pass may be left out: `passes.0.ratio`. Raises BadInput for a text
    without a path, a value that is no YAML, and a path that does not exist.
    """
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise BadInput(f'--set {text}: expected path=value, as in "passes.0.ratio=0.3"')
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise BadInput(f'--set {text}: "{value}" is not valid YAML') from error
    _spell_out(tree)
    parts = path.split(".")
    here: Any = tree
    for part, following in pairwise(parts):
        step = isinstance(here, list)
        here = here[_index(here, part, text)] if step else here.setdefault(part, {})
        if step and isinstance(here, dict) and len(here) == 1 and following not in here:
            [here] = here.values()
        if not isinstance(here, (dict, list)):
            raise BadInput(f"--set {text}: {part} holds a single value")
    here[_index(here, parts[-1], text) if isinstance(here, list) else parts[-1]] = parsed


def _spell_out(tree: dict[str, Any]) -> None:
    """Replace short forms of model, data and passes by their full forms, so that a path can name every field."""
    for name in ("model", "data"):
        if isinstance(tree.get(name), str):
            tree[name] = {"source": tree[name]}
    if isinstance(tree.get("passes"), list):
        steps = [{s: {}} if isinstance(s, str) else s for s in tree["passes"]]
        full = [{k: {} if v is None else v for k, v in s.items()} if isinstance(s, dict) else s for s in steps]
        tree["passes"] = full


def _index(items: list[Any], part: str, text: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise BadInput(f'--set {text}: "{part}" is not an index below {len(items)}')
    return int(part)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with three changes: a duplicate key is an error, `2:4` is a text and not 124 in base 60, and
    `1e-4` is a number, as in YAML 1.2."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        if tag == TEXT and kind is yaml.ScalarNode and implicit[0] and POWER.fullmatch(value):  # not in quotes
            return NUMBERS[1]
        return TEXT if tag in NUMBERS and ":" in value else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f'key "{key.value}" twice', key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
