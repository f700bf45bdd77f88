"""Bench bundles: a folder that measures models on a device which has no graphcomb, and the results it brings back.

A bundle holds the ONNX files, reference inputs and outputs, the record of what was done to the model, and `bench_device.py`,
which needs the device's own TensorRT and numpy. Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ..graph.errors import BadInput, GraphcombError
from ..graph.program import Program
from .bench import random_inputs
from .bench_device import FORMAT
from .engine import check_model, precision, replacing
from .half import to_half
from .measured import describe, name_nodes, read_results
from .onnx import export_onnx
from .onnxruntime import OrtEngine
from .targets import Target, get_target

SCRIPT = "bench_device.py"
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
) -> Path:
    """Write a bundle of models to compare; returns the folder.

    models: by name, the one to compare with first: programs, or ONNX files in fp32 or in the wanted precision. kind:
    "fp32", "fp16" or "int8" (with Q/DQ nodes in the files already). target: checked for opset and precision, and named
    in the bundle. batch: of models with a dynamic one. record: a run's record.json, to go along. layers: of models that are
    ONNX files, by name, as `measured.describe` gives them for the program and the batch; what is measured can then be
    compared with a prediction, layer by layer, and calibrate a roofline.

    Raises BadInput for a model that does not fit, and what `export_onnx` raises for programs.
    """
    folder = Path(folder)
    device = get_target(target) if isinstance(target, str) else target
    if device is not None:
        device.alignment(kind)
    if not models:
        raise BadInput("bundle: no models")
    if folder.exists() and any(folder.iterdir()) and not (folder / "bundle.json").is_file():
        raise BadInput(f"{folder}: not empty, and no bundle; name another folder")
    for name in models:
        if not name.isidentifier():
            raise BadInput(f"bundle: {name} is no name for a model; letters, digits and _ only")
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {}
    inputs: list[np.ndarray] | None = None
    for name, given in models.items():
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part") as part:
            place = Path(part) / name
            place.mkdir()
            exact, file = _lower(given, kind, device, place)
            engine = OrtEngine(exact)
            inputs = inputs or random_inputs(engine, batch)
            if len(inputs) != len(engine.inputs):
                raise BadInput(f"bundle: {name} takes {len(engine.inputs)} inputs, the first model {len(inputs)}")
            feeds = [x.astype(i.dtype) for x, i in zip(inputs, engine.inputs, strict=True)]
            outputs = engine.run(feeds)
            engine.close()
            arrays = {f"input:{i.name}": x for i, x in zip(engine.inputs, feeds, strict=True)}
            arrays |= {f"output:{n:03d}": y for n, y in enumerate(outputs)}
            np.savez(place / "reference.npz", allow_pickle=False, **arrays)
            if exact != file:
                _remove(exact)
            model = check_model(file)
            rows = describe(given, batch) if isinstance(given, Program) else (layers or {}).get(name, ())
            about[name] = {
                "file": f"{name}/{file.name}",
                "reference": f"{name}/reference.npz",
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "opset": next(o.version for o in model.opset_import if not o.domain),
                "batch": int(feeds[0].shape[0]) if feeds and feeds[0].ndim else None,
                "layers": name_nodes(rows, model),
            }
            shutil.rmtree(folder / name, ignore_errors=True)
            place.replace(folder / name)
    if record is not None:
        shutil.copyfile(record, folder / "record.json")
    for source, to in ((SCRIPT, SCRIPT), ("cuda.py", "graphcomb_cuda.py")):
        shutil.copyfile(Path(__file__).with_name(source), folder / to)
    clocks = " && ".join(device.clocks) if device and device.clocks else "sudo nvpmodel -m 0 && sudo jetson_clocks"
    (folder / "README.txt").write_text(README.format(script=SCRIPT, models=", ".join(models), clocks=clocks))
    head: dict[str, Any] = {"format": FORMAT, "graphcomb": metadata.version("graphcomb"), "precision": kind}
    head |= {"target": device.name if device else None}
    with replacing(folder / "bundle.json") as part:
        part.write_text(json.dumps(head | {"models": about}, indent=1) + "\n")
    return folder


def _lower(given: Program | str | Path, kind: str, device: Target | None, place: Path) -> tuple[Path, Path]:
    """The model in fp32 (as it is, where only that is known) and in the wanted precision, both in the folder `place`."""
    exact, file = place / "fp32.onnx", place / "model.onnx"
    if isinstance(given, Program):
        if kind == "int8":
            raise BadInput("bundle: programs are exported in fp32 or fp16; give an ONNX file with Q/DQ nodes for int8")
        export_onnx(given, file, kind, target=device)
        if kind == "fp32":
            return file, file
        export_onnx(given, exact, "fp32")
        return exact, file
    source = Path(given)
    model = check_model(source)
    has = precision(model)
    if device is not None and (opset := next(o.version for o in model.opset_import if not o.domain)) > device.opset:
        raise BadInput(f"{source}: opset {opset}, target {device.name} parses up to {device.opset}")
    if has != kind and (has, kind) != ("fp32", "fp16"):
        raise BadInput(f"{source}: is {has} and cannot be made {kind} here; export it in {kind}")
    if has == kind:
        _copy(source, model, file)
        return file, file
    _copy(source, model, exact)
    graph = gs.import_onnx(onnx.load(str(source)))
    to_half(graph)
    half = gs.export_onnx(graph)
    onnx.helper.set_model_props(half, {p.key: p.value for p in model.metadata_props})
    onnx.save(half, str(file))
    return exact, file


def _copy(source: Path, model: onnx.ModelProto, to: Path) -> None:
    """Copy an ONNX file with the files that hold its weights, whose names it has inside."""
    for name in _weights(model):
        shutil.copyfile(source.with_name(name), to.with_name(name))
    shutil.copyfile(source, to)


def _remove(path: Path) -> None:
    for name in _weights(onnx.load(str(path), load_external_data=False)):
        path.with_name(name).unlink(missing_ok=True)
    path.unlink()


def _weights(model: onnx.ModelProto) -> list[str]:
    places = [e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"]
    return list(dict.fromkeys(places))


# -------------------------------------------------------------------------------------------------------------- running
def run_bundle(
    folder: str | Path, out: str | Path, host: str | None = None, arguments: Sequence[str] = (), python: str = "python3"
) -> dict[str, Any]:
    """Measure a bundle and return the results, which also go to the file `out`.

    host: "user@device", reached by ssh and scp (whose own settings hold: keys, ports, jump hosts); None measures on
    this machine. arguments: of bench_device.py. python: the interpreter on the host.

    Raises BadInput for a folder that is no bundle, GraphcombError with the reason when the measurement fails.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / "bundle.json").is_file() or not (folder / SCRIPT).is_file():
        raise BadInput(f"{folder}: not a bench bundle; `graphcomb bundle` writes one")
    out.parent.mkdir(parents=True, exist_ok=True)
    if host is None:
        _call([sys.executable, str(folder / SCRIPT), "--out", str(out.absolute()), *arguments], "bench_device.py")
        return read_results(out)
    if not host or host.startswith("-") or any(c.isspace() or c == ":" for c in host):
        raise BadInput(f"--host {host}: expected user@device")
    digest = hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest()[:12]
    away = f"graphcomb-bench-{digest}"  # in the home folder there
    _call(["ssh", host, f"mkdir -p {away}"], f"ssh {host}")
    _call(["scp", "-q", "-r", *map(str, sorted(folder.iterdir())), f"{host}:{away}/"], f"scp to {host}")
    command = [python, f"{away}/{SCRIPT}", "--out", f"{away}/results.json", *arguments]
    _call(["ssh", host, shlex.join(command)], f"bench_device.py on {host}")
    with replacing(out) as part:
        _call(["scp", "-q", f"{host}:{away}/results.json", str(part)], f"scp from {host}")
    return read_results(out)


def _call(command: list[str], what: str) -> None:
    """Run a command; what it prints is shown, its last error line is the message of what is raised."""
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    except FileNotFoundError as error:
        raise BadInput(f"{command[0]}: not installed here") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise GraphcombError(f"{what} failed: {lines[-1].removeprefix('error: ')}")
