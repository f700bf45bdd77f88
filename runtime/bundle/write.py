"""Write a bench bundle: a folder that measures models on a device without graphcomb.

A bundle contains ONNX files, reference inputs and outputs, the record of what the passes did, and `kit.pyz`, an
archive that Python runs and that needs only numpy and the device's own TensorRT. Source: ours.
"""

import functools
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from ...graph.errors import BadInput, GraphcombError, Refused, nearest
from ...graph.files import replacing, write_json
from ...graph.program import Program
from ...graph.workload.libraries import ONNXRUNTIME
from ..devices.table import NAMES, Target, get_target
from ..engines.base import UnparsedOp
from ..engines.ort import OrtEngine
from ..engines.trt.implicit import implicit
from ..export.compare import TOLERANCES, ranges_of, verdict
from ..export.half_precision.half import inexact, to_half
from ..export.half_precision.islands import islands
from ..export.parity import Case
from ..export.sparsity import sparse_weights
from ..export.to_onnx import export_onnx
from ..kit import PLUGINS, SCRIPT, write_archive
from ..kit.contents import FORMAT, digest
from ..kit.contents import TOLERANCES as DEVICE_TOLERANCES
from ..kit.options import LIBRARIES
from ..measure.inputs import random_inputs
from ..onnx_file import TensorSpec, check_model, opset_of, precision, tensor_specs
from ..prediction.layers import describe, name_nodes
from ..prediction.roofline import Roofline

QUANTISED, FLOAT = ("int8", "fp8"), ("fp32", "fp16")
IMPLICIT = "model.implicit.onnx"  # name of the form of a quantised model without Q/DQ nodes

README = """A graphcomb bench bundle. On the device, with its own TensorRT and numpy:

    python3 {script}

builds the engines, measures {models} in turns, and writes results.json, which `graphcomb report` reads.
Fix the clocks first, for instance: {clocks}
"""


def write_bundle(
    folder: str | Path,
    models: Mapping[str, Program | str | Path],
    kind: str = "fp16",
    target: str | Target | None = None,
    batch: int = 1,
    record: str | Path | None = None,
    layers: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    opset: int | None = None,
    plugins: Sequence[str | Path] = (),
) -> Path:
    """Write a bench bundle: a folder that measures models on a device with only the device's own TensorRT and numpy.

    Returns the folder. It contains each model as an ONNX file with reference inputs and outputs (ONNX Runtime's for the
    most exact form of the model), bundle.json, which describes the models, and kit.pyz (`runtime/kit/`).

    - models: the models by name (letters, digits and _), the reference first. They are programs, or ONNX files in fp32 or
      in the precision asked for.
    - kind: "fp32", "fp16", "int8" or "fp8". A model with Q/DQ nodes is INT8 or FP8 with each of them; with "fp16" its other
      parts become half precision if that changes no quantised value. With "int8" and "fp8" models without Q/DQ nodes keep
      their precision.
    - target: the device. Opset and precision of the models are checked against it, and the bundle names it.
    - batch: batch size of the reference inputs of models with a dynamic batch.
    - record: record.json of a run, which is copied into the bundle.
    - layers: by name of a model that is an ONNX file, the rows that `prediction.layers.describe` gives for its program.
      With the layers known, as for programs, measured times can be compared with predicted ones, and calibrate a roofline.
    - shapes: shapes of inputs by name, needed for inputs with a dynamic dimension other than the batch.
    - opset: opset of programs; by default the one that `export_onnx` chooses for the target. TensorRT 8 (JetPack 5 and
      6.0) parses up to 17.
    - plugins: shared libraries, built for the device, with operators that TensorRT lacks. They are copied into the bundle,
      and their code is executed on the device. A model with operators that ONNX Runtime does not support gets a reference
      without outputs: its latency is measured, its outputs are not compared, and a note says so.

    Raises BadInput for a folder with other content, and for a model that does not fit the target, the precision or the
    other models; Refused for a model that half precision changes too much; and what `export_onnx` raises for programs.
    """
    folder = Path(folder)
    device = get_target(target) if isinstance(target, str) else target
    _check(folder, models, kind, device, batch)
    _check_plugins(plugins, device)
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {}
    inputs: list[np.ndarray] | None = None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part") as part:
        for name, source in models.items():
            place, scratch = Path(part, name), Path(part, f"{name}.exact")
            place.mkdir()
            scratch.mkdir()
            with _naming(Path(part), name):
                make = functools.partial(random_inputs, batch=batch, shapes=shapes)
                exact, file, note = _lower(source, kind, device, place, scratch, opset, make)
                model = check_model(file)
                graph = check_model(exact).graph
                weights = {tensor.name for tensor in graph.initializer}
                specs = tensor_specs(value for value in graph.input if value.name not in weights)
                inputs = inputs or random_inputs(specs, batch, shapes)
                if len(inputs) != len(specs):
                    raise BadInput(f"bundle: {name} takes {len(specs)} inputs, the first model {len(inputs)}")
                feeds = {i.name: x.astype(i.dtype) for x, i in zip(inputs, specs, strict=True)}
                outputs, missing = _run_reference(exact, list(feeds.values()), bool(plugins))
                _write_reference(place / "reference.npz", feeds, outputs)
                without, lost = _without_nodes(file, model, device)
                note = "; ".join(filter(None, [note, missing, lost]))
                data = [*_weights(model, file), *([without["file"]] if without else [])]
            rules = ONNXRUNTIME if device is None else Roofline(device, kind).rules
            rows = describe(source, batch, rules) if isinstance(source, Program) else (layers or {}).get(name, ())
            about[name] = {
                "file": f"{name}/{file.name}",
                "reference": f"{name}/reference.npz",
                "outputs": [output.name for output in graph.output],
                "sha256": digest(file),
                "data": {f"{name}/{path}": digest(place / path) for path in data},
                "precision": precision(model),
                "sparse": any(w.pattern for w in sparse_weights(onnx.load(str(file)))),
                "opset": opset_of(model),
                "batch": next((int(x.shape[0]) if x.ndim else None for x in feeds.values()), None),
                "note": note,
                "layers": name_nodes(rows, model),
                **({"implicit": without} if without else {}),
            }
        if kind in QUANTISED and not any(row["precision"] == kind for row in about.values()):
            raise BadInput(
                f"bundle: no {kind} in {', '.join(about)}; give a model with Q/DQ nodes, or another precision"
            )
        for name in models:
            shutil.rmtree(folder / name, ignore_errors=True)
            Path(part, name).replace(folder / name)
    if record is not None:
        shutil.copyfile(record, folder / "record.json")
    with replacing(folder / SCRIPT) as archive:
        write_archive(archive)
    clocks = " && ".join(device.clocks) if device and device.clocks else "sudo nvpmodel -m 0 && sudo jetson_clocks"
    (folder / "README.txt").write_text(README.format(script=SCRIPT, models=", ".join(models), clocks=clocks))
    head: dict[str, Any] = {"format": FORMAT, "graphcomb": metadata.version("graphcomb"), "precision": kind}
    head |= {"target": device.name if device else None, "engine": device.backend if device else None}
    head["plugins"] = _copy_plugins(plugins, folder / PLUGINS)
    write_json(folder / "bundle.json", head | {"models": about}, indent=1)
    return folder


def _check(
    folder: Path, models: Mapping[str, Program | str | Path], kind: str, device: Target | None, batch: int
) -> None:
    """Raise BadInput for arguments of `write_bundle` that do not fit, before anything is written."""
    if device is not None:
        device.alignment(kind)
        if device.backend not in LIBRARIES:
            raise BadInput(f"bundle: the kit has no {NAMES[device.backend]}; target cpu measures in ONNX Runtime")
    if kind not in DEVICE_TOLERANCES:
        raise BadInput(f"precision {kind}: not known; {nearest(str(kind), DEVICE_TOLERANCES)}")
    if batch < 1:
        raise BadInput(f"batch: 1 or more, not {batch}")
    if not models:
        raise BadInput("bundle: no models")
    if folder.exists() and any(folder.iterdir()) and not (folder / "bundle.json").is_file():
        raise BadInput(f"{folder}: not empty, and no bundle; name another folder")
    for name in models:
        if not name.isidentifier():
            raise BadInput(f"bundle: {name} is no name for a model; letters, digits and _ only")


def _check_plugins(plugins: Sequence[str | Path], device: Target | None) -> None:
    """Raise BadInput for plugins that cannot be bundled."""
    if plugins and device is not None and device.backend != "tensorrt":
        raise BadInput(f"plugins: are for TensorRT; target {device.name} runs {device.backend}")
    for path in map(Path, plugins):
        if not path.is_file():
            raise BadInput(f"plugins: {path}: no such file")
    if len({Path(path).name for path in plugins}) < len(plugins):
        raise BadInput("plugins: two files of the same name; rename one")


def _copy_plugins(plugins: Sequence[str | Path], folder: Path) -> dict[str, str]:
    """Copy the libraries to a folder and return their digests by path in the bundle."""
    shutil.rmtree(folder, ignore_errors=True)
    if plugins:
        folder.mkdir()
    return {f"{folder.name}/{Path(p).name}": digest(Path(shutil.copyfile(p, folder / Path(p).name))) for p in plugins}


def _run_reference(exact: Path, feeds: list[np.ndarray], plugins: bool) -> tuple[list[np.ndarray], str]:
    """Run a model in ONNX Runtime and return its outputs and "". If ONNX Runtime lacks an operator and there are plugins,
    return no outputs and the reason."""
    try:
        engine = OrtEngine(exact)
    except UnparsedOp as error:
        if not plugins:
            raise
        return [], f"its outputs are not compared: {str(error).removeprefix(f'{exact}: ')}"
    outputs = engine.run(feeds)
    engine.close()
    return outputs, ""


def _write_reference(file: Path, feeds: Mapping[str, np.ndarray], outputs: list[np.ndarray]) -> None:
    """Write reference inputs by name and outputs in order to a file of numpy arrays."""
    arrays = {f"input:{name}": array for name, array in feeds.items()}
    arrays |= {f"output:{n:03d}": array for n, array in enumerate(outputs)}
    np.savez(file, allow_pickle=False, **arrays)


@contextmanager
def _naming(part: Path, name: str) -> Iterator[None]:
    """Replace paths of temporary files in the messages of errors by the name of the model."""
    try:
        yield
    except GraphcombError as error:
        raise type(error)(re.sub(rf"{re.escape(str(part))}\S*?\.onnx", name, str(error))) from error


def _lower(
    model_or_path: Program | str | Path,
    kind: str,
    device: Target | None,
    place: Path,
    scratch: Path,
    version: int | None,
    make: Callable[[list[TensorSpec]], list[np.ndarray]],
) -> tuple[Path, Path, str]:
    """Return the ONNX file of a model in its most exact form, the file to measure, and a note.

    The first is in the folder `scratch`, or the given file; the second is in the folder `place`. The note says how the file
    to measure differs from what was asked for, else it is empty. make: returns inputs for the specs.
    """
    file = place / "model.onnx"
    source = scratch / file.name if isinstance(model_or_path, Program) else Path(model_or_path)
    if isinstance(model_or_path, Program):
        export_onnx(model_or_path, source, "fp32", version, device)
    model = check_model(source)
    has, opset = precision(model), opset_of(model)
    if device is not None:
        device.alignment(has)
        if opset > device.opset:
            raise BadInput(f"{source}: opset {opset}, target {device.name} parses up to {device.opset}")
    if has not in (kind, *QUANTISED) and (has, kind) != ("fp32", "fp16") and not (has in FLOAT and kind in QUANTISED):
        raise BadInput(f"{source}: is {has} and cannot be made {kind} here; export it in {kind}")
    if isinstance(model_or_path, Program) and kind == "fp16" and has in ("fp32", *QUANTISED):
        try:
            export_onnx(model_or_path, file, kind, version, device)  # also compares the file with the program
        except Refused as error:
            if has == "fp32":
                raise
            _copy(source, model, file)
            return source, file, f"{has.upper()}, with its floating-point parts in fp32: {error}"
        return source, file, ""
    if kind != "fp16" or has == "fp16":
        _copy(source, model, file)
        wide = any(i.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for i in model.graph.input)
        said = f"{has.upper()}, with its floating-point parts in fp32"
        return source, file, said * (has == kind and has in QUANTISED and wide)
    model = onnx.shape_inference.infer_shapes(onnx.load(str(source)))
    graph = gs.import_onnx(model)
    if has in QUANTISED and (why := inexact(graph)):
        _copy(source, model, file)
        return source, file, f"its floating-point parts stay as they are: {why}"
    known: list[Case] = []
    keep: dict[str, str] = {}
    io: set[str] = set()
    if has == "fp32":
        known = [_case(source, make)]
        keep, io = islands(graph, ranges_of(model, known))
    try:
        to_half(graph, keep, io)
    except Refused as error:
        raise Refused(f"{source}: {error}") from error
    half = gs.export_onnx(graph)
    onnx.helper.set_model_props(half, {p.key: p.value for p in model.metadata_props})
    onnx.save(half, str(file))
    if known and (wrong := verdict(half, model, file, known, TOLERANCES["fp16", "fp16"]).wrong):
        raise Refused(f"{source}: fp16 {wrong}; bundle it in fp32, or keep nodes in fp32 as `export_onnx` does")
    return source, file, ""


def _without_nodes(file: Path, model: onnx.ModelProto, device: Target | None) -> tuple[dict[str, Any], str]:
    """Write the form of a quantised model without Q/DQ nodes beside it, for a device whose DLA needs it, and return what the
    device has to know of it (docs/formats.md, BundledModel) and "". Without such a form return {} and the reason, if the
    DLA needs one."""
    if device is None or device.dla is None or precision(model) != "int8":
        return {}, ""
    if _weights(model, file):
        return {}, "a DLA runs none of it in INT8: its weights lie in a file of their own"
    try:
        plain = implicit(onnx.load(str(file)))
    except Refused as error:
        return {}, f"a DLA runs none of it in INT8: {error}"
    onnx.save(plain.model, str(file.with_name(IMPLICIT)))
    about = {"file": IMPLICIT, "scales": plain.scales, "int8": list(plain.int8), "notes": list(plain.notes)}
    return about, ""


def _case(source: Path, make: Callable[[list[TensorSpec]], list[np.ndarray]]) -> Case:
    """Return inputs and the outputs of an fp32 file, run node by node, to compare its half-precision form with."""
    engine = OrtEngine(source, plain=True)
    inputs = make(engine.inputs)
    outputs = [x.astype(np.float64) if x.dtype.kind == "f" else x for x in engine.run(inputs)]
    engine.close()
    return Case("random", None, tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in inputs), {}, outputs)


def _copy(source: Path, model: onnx.ModelProto, to: Path) -> None:
    """Copy an ONNX file and the files with its external weights, whose names the ONNX file contains."""
    for name in _weights(model, source):
        (to.parent / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / name, to.parent / name)
    shutil.copyfile(source, to)


def _weights(model: onnx.ModelProto, path: Path) -> list[str]:
    """Return the paths of the files with a model's external weights, relative to its folder.

    Raises BadInput for a path outside of that folder.
    """
    places = [e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"]
    for place in places:
        if PurePath(place).is_absolute() or ".." in PurePath(place).parts:
            raise BadInput(f"{path}: its weights lie in {place}; save them in the model's folder or below it")
    return list(dict.fromkeys(places))
