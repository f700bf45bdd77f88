"""`Program.to_source`: a module in readable Python beside a safetensors file, proven to be the program. Source: ours.

Operators that are exactly a layer of torch.nn become named submodules under the paths that the program has for their
tensors; the others are calls. None of this is trusted: the written module is run beside the program in float64, in eval
mode and in train mode, with gradients and buffers.
"""

from __future__ import annotations

import copy
import keyword
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx, nn

from ..capture.proof import distance
from ..compat import input_names, output_spec, pytree
from ..edit import copy_tensor, rebuild, tensor_at
from ..errors import Refused, reason
from ..files import replacing
from ..nodes import arguments, fetch, module_path
from ..trainable import TrainableModule
from .calls import Expressions, check_writable
from .layers import Layer, layers_of

TOLERANCE = 1e-10
RESERVED = {"torch", "nn", "F", "self", "math", "operator", "Path", "load_file", *keyword.kwlist}
HEAD = '''"""{title}

Written by graphcomb; needs PyTorch and safetensors. `load()` gives the module with its weights, in eval mode; it trains
as any other. Shapes in comments are those of the example input.
"""

{imports}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
{init}

    def forward(self{signature}):
{forward}


def load(path: str | Path = Path(__file__).with_suffix(".safetensors")) -> Model:
    model = Model()
    model.load_state_dict(load_file(path))
    return model.eval()
'''


def to_source(
    module: TrainableModule, args: tuple[Any, ...], kwargs: dict[str, Any], path: str | os.PathLike[str]
) -> Path:
    """Write a program's graph, with its example inputs, as Python source that needs only PyTorch, and its tensors into a
    safetensors file beside it; returns the path.

    Raises Refused, naming the node, for operators that cannot be written, and if the source computes something else.
    """
    path = Path(path)
    text = _Writer(module, args, kwargs).text()
    space: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(text, str(path), "exec"), space)
        made = space["Model"]()
        _fill(made, module)
        _prove(made, module, (args, kwargs))
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"to_source: what was written does not run ({type(error).__name__}: {reason(error)})") from error
    state = {name: value.detach().contiguous().clone() for name, value in made.state_dict().items()}
    with replacing(path.with_suffix(".safetensors")) as part:
        save_file(state, part)
    with replacing(path) as part:
        Path(part).write_text(text)
    return path


class _Writer:
    def __init__(self, module: TrainableModule, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.module, self.args, self.kwargs = module, args, kwargs
        check_writable(self.module)
        self.layers = layers_of(self.module)
        self.names: dict[fx.Node, str] = {}
        self.placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        leaves = pytree.tree_leaves((args, kwargs))
        first = next(
            (n for n, leaf in zip(self.placeholders, leaves, strict=True) if isinstance(leaf, torch.Tensor)), None
        )
        self.expressions = Expressions(self.module, self._name, f"{self._name(first)}.device" if first else '"cpu"')
        self.stored = {str(n.target): fetch(self.module, str(n.target)) for n in self._attributes()}

    def text(self) -> str:
        forward, signature = [*self._inputs()], self._signature()
        forward += self._body()
        libraries = self.expressions.libraries
        imports = [f"import {name}" for name in sorted(libraries & {"math", "operator"})]
        imports += ["from pathlib import Path", "", "import torch"]
        imports += ["import torchvision  # its operators"] if "torchvision" in libraries else []
        imports += [
            "from safetensors.torch import load_file",
            "from torch import nn",
            "from torch.nn import functional as F",
        ]
        n = f"{sum(p.numel() for p in self.module.parameters()):,} parameters"
        init = [*self._modules()]
        return HEAD.format(
            title=f"A model of {n}.", imports="\n".join(imports), signature=signature,
            init="\n".join(f"        {line}" for line in init) or "        pass",
            forward="\n".join(f"        {line}" if line else "" for line in forward),
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------- __init__
    def _attributes(self) -> Iterator[fx.Node]:
        return (n for n in self.module.graph.nodes if n.op == "get_attr")

    def _modules(self) -> Iterator[str]:
        """The statements that create submodules, parameters and buffers, in the order of the graph."""
        made: set[str] = set()
        owners: dict[int, str] = {}
        by_path = {layer.path: layer for layer in self.layers.values()}
        aliases = []
        for name, value in self.stored.items():
            if not isinstance(value, torch.Tensor):
                raise Refused(f"to_source: {name} is a {type(value).__name__}, which cannot be written")
            holder, _, last = name.rpartition(".")
            first = owners.setdefault(id(value), name)
            if first != name:
                aliases.append((name, first))
            layer = by_path.get(holder)
            yield from self._containers(holder if layer is None else holder.rpartition(".")[0], made)
            frozen = isinstance(value, nn.Parameter) and not value.requires_grad
            if layer is not None:
                if holder not in made:
                    made.add(holder)
                    yield f"{self._place(holder)} = {layer.made}"
            elif first == name:
                owner = self._place(holder)
                kind = f", dtype={value.dtype}" if value.dtype != torch.float32 else ""
                empty = f"torch.empty({tuple(value.shape)}{kind})"
                if isinstance(value, nn.Parameter):
                    flag = ", requires_grad=False" if frozen else ""
                    yield f"{owner}.register_parameter({last!r}, nn.Parameter({empty}{flag}))"
                else:
                    yield f"{owner}.register_buffer({last!r}, {empty})"
            if layer is not None and frozen:
                yield f"{self._place(holder)}.{last}.requires_grad_(False)"
        for name, first in aliases:
            holder, _, last = name.rpartition(".")
            kind = "parameter" if isinstance(self.stored[name], nn.Parameter) else "buffer"
            yield f"{self._place(holder)}.register_{kind}({last!r}, {self._place(first)})"

    def _containers(self, path: str, made: set[str]) -> Iterator[str]:
        """The statements for modules that only hold others, outermost first."""
        parts = path.split(".") if path else []
        for i in range(1, len(parts) + 1):
            outer = ".".join(parts[:i])
            if outer not in made:
                made.add(outer)
                yield f"{self._place(outer)} = {'nn.ModuleDict' if self._keyed(outer) else 'nn.Module'}()"

    def _keyed(self, path: str) -> bool:
        """Whether a container holds a name that is no identifier, such as a number."""
        under = f"{path}."
        parts = {n.removeprefix(under).partition(".")[0] for n in self.stored if n.startswith(under)}
        return not all(p.isidentifier() and not keyword.iskeyword(p) for p in parts)

    def _place(self, path: str) -> str:
        """A dotted path as an expression."""
        text, before = "self", ""
        for part in path.split(".") if path else ():
            inner = f"{before}.{part}" if before else part
            plain = part.isidentifier() and not keyword.iskeyword(part)
            if plain and (not before or not self._keyed(before) or inner in self.stored):
                text += f".{part}"
            elif before:
                text += f"[{part!r}]"
            else:
                text += f"._modules[{part!r}]"  # the model itself is a sequence
            before = inner
        return text

    # ----------------------------------------------------------------------------------------------------- forward
    def _name(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return self._place(str(node.target))
        if node not in self.names:
            name = node.name.strip("_") or "x"
            name = f"v_{name}" if not name.isidentifier() else name
            used = RESERVED | set(self.names.values())
            while name in used:
                name += "_"
            self.names[node] = name
        return self.names[node]

    def _signature(self) -> str:
        return "".join(f", {name}" for name in self._arguments())

    def _arguments(self) -> list[str]:
        """The names of the forward's arguments: the model's, if they are known."""
        args, kwargs = self.args, self.kwargs
        known = input_names(self.module.graph) or []
        count = len(args) + len(kwargs)
        names = known if len(known) == count else [f"input_{i}" for i in range(len(args))] + list(kwargs)
        if list(kwargs) != names[len(args) :]:
            names = names[: len(args)] + list(kwargs)
        return [f"{n}_" if n in RESERVED else n for n in names]

    def _inputs(self) -> Iterator[str]:
        """The statements that take tensors out of nested arguments."""
        names = self._arguments()
        paths, _ = pytree.tree_flatten_with_path((self.args, self.kwargs))
        keys = list(self.kwargs)
        keyed: list[Any] = [path for path, _ in paths]
        for node, path in zip(self.placeholders, keyed, strict=True):
            which, place, *rest = path
            index = place.idx if which.idx == 0 else len(self.args) + keys.index(place.key)
            if not rest:
                self.names[node] = names[index]
                continue
            inner = "".join(f"[{getattr(k, 'key', getattr(k, 'idx', None))!r}]" for k in rest)
            yield f"{self._name(node)} = {names[index]}{inner}"

    def _body(self) -> Iterator[str]:
        at = None
        for node in self.module.graph.nodes:
            if node.op == "output":
                yield f"return {self._result(node)}"
            if node.op != "call_function":
                continue
            path = module_path(node).rpartition(".")[0] if node in self.layers else module_path(node)
            if path != at and path:
                yield f"# {path}"
            at = path
            layer = self.layers.get(node)
            text = self._layer(node, layer) if layer is not None else self.expressions.call(node)
            yield f"{self._name(node)} = {text}{self._shape(node)}"

    def _layer(self, node: fx.Node, layer: Layer) -> str:
        return f"{self._place(layer.path)}({self.expressions.value(arguments(node)[layer.operand])})"

    @staticmethod
    def _shape(node: fx.Node) -> str:
        value = node.meta.get("val")
        return f"  # {' x '.join(map(str, value.shape))}" if isinstance(value, torch.Tensor) and value.dim() else ""

    def _result(self, node: fx.Node) -> str:
        values = node.args[0]
        leaves = list(values) if isinstance(values, (list, tuple)) else [values]
        try:
            nested = pytree.tree_unflatten(leaves, output_spec(self.module.graph))
        except Exception:
            nested = values
        return self._nested(nested)

    def _nested(self, value: Any) -> str:
        if type(value) in (dict, OrderedDict):
            return "{" + ", ".join(f"{k!r}: {self._nested(v)}" for k, v in value.items()) + "}"
        if type(value) in (list, tuple):
            inner = ", ".join(map(self._nested, value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
        if value is None or isinstance(value, (fx.Node, bool, int, float, str)):
            return self.expressions.value(value)
        raise Refused(
            f"to_source: an output of type {type(value).__name__} cannot be written; tuples, lists and dicts can"
        )


# ---------------------------------------------------------------------------------------------------------------- proof
def _fill(made: nn.Module, module: TrainableModule) -> None:
    """Copy the program's tensors into the module by name. Raises Refused if one does not fit."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            tensor = tensor_at(made, name)
            if tensor is None or tensor.shape != value.shape or tensor.dtype != value.dtype:
                raise Refused(f"to_source: {name} has no place in what was written")
            tensor.copy_(value)


def _prove(made: nn.Module, module: TrainableModule, example: tuple[Any, ...]) -> None:
    """Raise Refused if the module computes other outputs in eval mode, or other outputs, buffers or gradients in train
    mode."""
    theirs, ours = rebuild(module, copy_tensor).double(), copy.deepcopy(made).double()
    for training in (False, True):
        runs = []
        for network in (theirs, ours):
            network.train(training)
            inputs = pytree.tree_map(_double, copy.deepcopy(example))
            runs.append(_run(network, inputs, training))
        missing = next((name for name in runs[0] if name not in runs[1]), None)
        if missing is not None:
            raise Refused(f"to_source: what was written has no {missing}")
        errors = {name: distance(value, runs[1][name]) for name, value in runs[0].items()}
        worst = max(errors, key=errors.__getitem__)
        if not errors[worst] <= TOLERANCE:
            mode = "train" if training else "eval"
            raise Refused(
                f"to_source: what was written computes something else in {mode} mode: {worst} is off by {errors[worst]:.1e}"
            )


def _double(value: Any) -> Any:
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floats else value


def _run(module: nn.Module, inputs: Any, training: bool) -> dict[str, torch.Tensor]:
    """A module's outputs; in training also buffers, and gradients for a fixed gradient of the outputs."""
    module.zero_grad()
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training):
        torch.manual_seed(0)
        leaves = pytree.tree_leaves(module(*inputs[0], **inputs[1]))
        outputs = [t for t in leaves if isinstance(t, torch.Tensor)]
        tensors = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        if training:
            floats = [t for t in outputs if t.requires_grad]
            weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape) for t in floats]
            if floats:
                torch.autograd.backward(
                    [t * w for t, w in zip(floats, weights, strict=True)], [t.detach() for t in floats]
                )
            tensors |= {f"gradient of {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
            tensors |= {f"buffer {n}": b.clone() for n, b in module.named_buffers()}
    return tensors
