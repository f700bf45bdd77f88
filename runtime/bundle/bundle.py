"""Bench bundles: a folder that measures models on a device which has no graphcomb, and the results it brings back.

A bundle holds the ONNX files, reference inputs and outputs, the record of what was done to the model, and `bench_device.py`
with the files it needs, which take the device's own TensorRT and numpy. Source: ours.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph.errors import BadInput, GraphcombError, Refused, nearest
from ...graph.files import read_json, replacing, write_json
from ...graph.program import Program
from ...graph.workload.fusion import ONNXRUNTIME
from .. import kit
from ..devices.table import Target, get_target
from ..engines.ort import OrtEngine
from ..export.half import inexact, to_half
from ..export.half_file import half_file
from ..export.sparsity import sparse_weights
from ..export.to_onnx import export_onnx
from ..kit.bench_device import FORMAT, OPTIONS, TOLERANCES, digest
from ..measure.bench import random_inputs
from ..onnx_file import TensorSpec, check_model, opset_of, precision
from ..predict.measured import describe, name_nodes, read_results
from ..predict.roofline import Roofline

SCRIPT = "bench_device.py"
PARTS = ("cuda", "device_engines", "telemetry")  # what it imports; on the device they begin with graphcomb_
PATIENCE = 60  # seconds until a script that was interrupted must have written what it has
SOME, INTERRUPTED = 1, 130  # exit codes of the script when there are results: of some models, or until Ctrl-C
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
) -> Path:
    """Write a bundle of models to compare; returns the folder.

    models: by name, the one to compare with first: programs, or ONNX files in fp32 or in the wanted precision. kind:
    "fp32", "fp16" or "int8", of which every model keeps what it has: one that is quantised (Q/DQ nodes) is int8 in every
    kind, in "fp16" with the rest of it in half precision where that changes no quantised value; in "int8" the others stay
    as they are. target: checked for opset and precision, and named in the bundle with its library. batch: of models with
    a dynamic one. record: a run's record.json, to go along. layers: of models that are ONNX files, by name, as
    `measured.describe` gives them for the program and the batch; what is measured can then be compared with a prediction,
    layer by layer, and calibrate a roofline. shapes: of inputs, by name, where more than the batch is dynamic.
    opset: of programs, by default what the target's current releases parse; 17 for TensorRT 8, as JetPack 5 and 6.0 have it.

    Raises BadInput for a model that does not fit, and what `export_onnx` raises for programs.
    """
    folder = Path(folder)
    device = get_target(target) if isinstance(target, str) else target
    if device is not None:
        device.alignment(kind)
    if kind not in TOLERANCES:
        raise BadInput(f"precision {kind}: not known; {nearest(str(kind), TOLERANCES)}")
    if batch < 1:
        raise BadInput(f"batch: 1 or more, not {batch}")
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
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part") as part:
        for name, given in models.items():
            place, scratch = Path(part, name), Path(part, f"{name}.exact")
            place.mkdir()
            scratch.mkdir()
            with _naming(Path(part), name):
                make = functools.partial(random_inputs, batch=batch, shapes=shapes)
                exact, file, note = _lower(given, kind, device, place, scratch, opset, make)
                engine = OrtEngine(exact)
                inputs = inputs or random_inputs(engine.inputs, batch, shapes)
                if len(inputs) != len(engine.inputs):
                    raise BadInput(f"bundle: {name} takes {len(engine.inputs)} inputs, the first model {len(inputs)}")
                feeds = [x.astype(i.dtype) for x, i in zip(inputs, engine.inputs, strict=True)]
                outputs = engine.run(feeds)
                names = [o.name for o in engine.outputs]
                engine.close()
                model = check_model(file)
            arrays = {f"input:{i.name}": x for i, x in zip(engine.inputs, feeds, strict=True)}
            arrays |= {f"output:{n:03d}": y for n, y in enumerate(outputs)}
            np.savez(place / "reference.npz", allow_pickle=False, **arrays)
            rules = ONNXRUNTIME if device is None else Roofline(device, kind).rules
            rows = describe(given, batch, rules) if isinstance(given, Program) else (layers or {}).get(name, ())
            about[name] = {
                "file": f"{name}/{file.name}",
                "reference": f"{name}/reference.npz",
                "outputs": names,
                "sha256": digest(file),
                "data": {f"{name}/{data}": digest(place / data) for data in _weights(model, file)},
                "precision": precision(model),
                "sparse": any(w.pattern for w in sparse_weights(onnx.load(str(file)))),
                "opset": opset_of(model),
                "batch": int(feeds[0].shape[0]) if feeds and feeds[0].ndim else None,
                "note": note,
                "layers": name_nodes(rows, model),
            }
        if kind == "int8" and not any(row["precision"] == kind for row in about.values()):
            raise BadInput(f"bundle: no int8 in {', '.join(about)}; give a model with Q/DQ nodes, or another precision")
        for name in models:
            shutil.rmtree(folder / name, ignore_errors=True)
            Path(part, name).replace(folder / name)
    if record is not None:
        shutil.copyfile(record, folder / "record.json")
    for source, to in ((SCRIPT, SCRIPT), *((f"{part}.py", f"graphcomb_{part}.py") for part in PARTS)):
        text = Path(kit.__path__[0], source).read_text(encoding="utf-8")
        text = re.sub(
            r"^from \.(\w+) import", r"from graphcomb_\1 import", text, flags=re.MULTILINE
        )  # no package there
        (folder / to).write_text(text, encoding="utf-8")
    clocks = " && ".join(device.clocks) if device and device.clocks else "sudo nvpmodel -m 0 && sudo jetson_clocks"
    (folder / "README.txt").write_text(README.format(script=SCRIPT, models=", ".join(models), clocks=clocks))
    head: dict[str, Any] = {"format": FORMAT, "graphcomb": metadata.version("graphcomb"), "precision": kind}
    head |= {"target": device.name if device else None, "engine": device.backend if device else None}
    write_json(folder / "bundle.json", head | {"models": about}, indent=1)
    return folder


@contextmanager
def _naming(part: Path, name: str) -> Iterator[None]:
    """Errors about temporary files name the model instead."""
    try:
        yield
    except GraphcombError as error:
        raise type(error)(re.sub(rf"{re.escape(str(part))}\S*?\.onnx", name, str(error))) from error


def _lower(
    given: Program | str | Path,
    kind: str,
    device: Target | None,
    place: Path,
    scratch: Path,
    version: int | None,
    make: Callable[[list[TensorSpec]], list[np.ndarray]],
) -> tuple[Path, Path, str]:
    """The model as exactly as it is known, in the folder `scratch` or where it lies; as it is measured, in the folder
    `place`; and what became of it, in words, where that is not what was asked for."""
    file = place / "model.onnx"
    source = scratch / file.name if isinstance(given, Program) else Path(given)
    if isinstance(given, Program):
        export_onnx(given, source, "fp32", version, device)
    model = check_model(source)
    has, opset = precision(model), opset_of(model)
    if device is not None:
        device.alignment(has)
        if opset > device.opset:
            raise BadInput(f"{source}: opset {opset}, target {device.name} parses up to {device.opset}")
    if has not in (kind, "int8") and (has, kind) not in (("fp32", "fp16"), ("fp32", "int8"), ("fp16", "int8")):
        raise BadInput(f"{source}: is {has} and cannot be made {kind} here; export it in {kind}")
    if isinstance(given, Program) and (has, kind) == ("fp32", "fp16"):
        export_onnx(given, file, kind, version, device)  # which also compares the two
        return source, file, ""
    if kind != "fp16" or has == "fp16":
        _copy(source, model, file)
        wide = any(i.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for i in model.graph.input)
        return source, file, "INT8, with its floating-point parts in fp32" * ((has, kind) == ("int8", "int8") and wide)
    if has == "fp32":
        engine = OrtEngine(source)
        inputs = make(engine.inputs)
        engine.close()
        half_file(source, file, inputs)
        return source, file, ""
    graph = gs.import_onnx(onnx.load(str(source)))
    if has == "int8" and (why := inexact(graph)):
        _copy(source, model, file)
        return source, file, f"its floating-point parts stay as they are: {why}"
    try:
        to_half(graph)
    except Refused as error:
        raise Refused(f"{source}: {error}") from error
    half = gs.export_onnx(graph)
    onnx.helper.set_model_props(half, {p.key: p.value for p in model.metadata_props})
    onnx.save(half, str(file))
    return source, file, ""


def _copy(source: Path, model: onnx.ModelProto, to: Path) -> None:
    """Copy an ONNX file with the files that hold its weights, whose names it has inside."""
    for name in _weights(model, source):
        (to.parent / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.parent / name, to.parent / name)
    shutil.copyfile(source, to)


def _weights(model: onnx.ModelProto, path: Path) -> list[str]:
    """Places of the files with the model's weights, relative to the folder of its own."""
    places = [e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"]
    for place in places:
        if PurePath(place).is_absolute() or ".." in PurePath(place).parts:
            raise BadInput(f"{path}: its weights lie in {place}; save them in the model's folder or below it")
    return list(dict.fromkeys(places))


# -------------------------------------------------------------------------------------------------------------- running
def run_bundle(
    folder: str | Path,
    out: str | Path,
    host: str | None = None,
    arguments: Sequence[str] = (),
    python: str | None = None,
) -> dict[str, Any]:
    """Measure a bundle and return the results, which also go to the file `out`.

    host: "user@device", reached by ssh and scp (whose own settings hold: keys, ports, jump hosts); None measures on
    this machine. arguments: of bench_device.py (`script_arguments`). python: the interpreter; by default this one here,
    python3 on a host.

    Where some models failed, or Ctrl-C ended it, the results are of the others, or until then; `failed` has the reasons by
    model, and `interrupted` is true. Engines that TensorRT built on a host are brought back beside `out`.

    Raises BadInput for a folder that is no bundle, GraphcombError with the reason when the measurement fails,
    KeyboardInterrupt where Ctrl-C came before there were results.
    """
    folder, out = Path(folder).absolute(), Path(out).absolute()
    if not (folder / "bundle.json").is_file() or not (folder / SCRIPT).is_file():
        raise BadInput(f"{folder}: not a bench bundle; `graphcomb bundle` writes one")
    _make(out.parent)
    if host is None:
        before = _stamp(out)
        command = [python or sys.executable, str(folder / SCRIPT), "--out", str(out), "--attached", *arguments]
        _measure(command, "bench_device.py", lambda: _stamp(out) != before)
        return read_results(out)
    if not host or host.startswith("-") or any(c.isspace() or c == ":" for c in host):
        raise BadInput(f"--host {host}: expected user@device")
    away = f"graphcomb-bench-{digest(folder / 'bundle.json')[:12]}"  # in the home folder there
    _call(["ssh", host, f"mkdir -p {away} && rm -f {away}/results.json"], f"ssh {host}")
    _call(["scp", "-q", "-r", *map(str, _contents(folder)), f"{host}:{away}/"], f"scp to {host}")
    command = [python or "python3", f"{away}/{SCRIPT}", "--out", f"{away}/results.json", "--attached", *arguments]

    def fetch() -> bool:
        """Whether there are results; they are here then."""
        try:
            with replacing(out) as part:
                _call(["scp", "-q", f"{host}:{away}/results.json", str(part)], f"scp from {host}")
        except BadInput:
            raise
        except GraphcombError:
            return False
        return True

    if _measure(["ssh", host, shlex.join(command)], f"bench_device.py on {host}", fetch) == 0 and not fetch():
        raise GraphcombError(f"scp from {host} failed: {away}/results.json is not there")
    found = read_results(out)
    for file in _engines(found):
        with replacing(out.with_name(file)) as part:
            _call(["scp", "-q", f"{host}:{away}/{file}", str(part)], f"scp from {host}")
    return found


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out: {folder} cannot be made ({error.strerror})") from error


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced."""
    found = path.stat() if path.exists() else None
    return (found.st_ino, found.st_mtime_ns) if found else None


def _engines(results: Mapping[str, Any]) -> list[str]:
    """Names of the engine files that a device keeps beside its results."""
    names = [str(row.get("engine", {}).get("file", "")) for row in results["models"].values()]
    return [name for name in names if name and PurePath(name).name == name and not name.startswith((".", "-"))]


def _contents(folder: Path) -> list[Path]:
    """What a bundle consists of, without what was measured here."""
    try:
        models = list(read_json(folder / "bundle.json")["models"])
    except (KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'bundle.json'}: no models; bundle them again") from error
    parts = [f"graphcomb_{part}.py" for part in PARTS]
    names = [SCRIPT, *parts, "bundle.json", "README.txt", "record.json", *models]
    return [folder / name for name in names if (folder / name).exists()]


def script_arguments(options: Mapping[str, Any]) -> list[str]:
    """Options of bench_device.py as its command line takes them: {"dla": 0, "sparse": True} is --dla 0 --sparse.

    Raises BadInput for what it does not take.
    """
    found: list[str] = []
    for given, value in options.items():
        name = given.replace("_", "-")
        if name not in OPTIONS:
            raise BadInput(f"option {given}: not one of the bench bundle; {nearest(name, OPTIONS)}")
        about = OPTIONS[name]
        if "action" in about:  # it is a switch
            if not isinstance(value, bool):
                raise BadInput(f"option {given}: true or false, not {value}")
            found += [f"--{name}"] * value
            continue
        try:
            about.get("type", str)(str(value))
        except (ValueError, ArgumentTypeError) as error:
            raise BadInput(f"option {given}: {error}") from error
        if str(value) not in map(str, about.get("choices", (value,))):
            raise BadInput(f"option {given}={value}: {nearest(str(value), about['choices'])}")
        found.append(f"--{name}={value}")
    return found


def _call(command: list[str], what: str) -> None:
    """Run a command; what it prints is shown, its last error line is the message of what is raised."""
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    except FileNotFoundError as error:
        raise BadInput(f"{command[0]}: not installed here") from error
    if done.returncode:
        raise GraphcombError(f"{what} failed: {_last(done.stderr, done.returncode)}")


def _measure(command: list[str], what: str, results: Callable[[], bool]) -> int:
    """Run the script, here or over ssh, until it ends or Ctrl-C, after which it is told to write what it has by the end of
    its input. Returns its exit code where there are results (`results` says so), of all models or of some.

    Raises GraphcombError with its last error line, KeyboardInterrupt where it was interrupted before there were any.
    """
    if shutil.which(command[0]) is None:
        raise BadInput(f"{command[0]}: not installed here")
    reading, writing = os.pipe()
    # Ctrl-C reaches the whole group of processes: this one alone heeds it, so that ssh stays to the end.
    command = ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    process = subprocess.Popen(command, stdin=reading, stderr=subprocess.PIPE, text=True)
    os.close(reading)
    interrupted = False
    try:
        while True:
            try:
                _, said = process.communicate(timeout=PATIENCE if interrupted else None)
                break
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                os.close(writing)
    except BaseException as error:  # a second Ctrl-C, or it does not end
        process.kill()
        raise KeyboardInterrupt if isinstance(error, subprocess.TimeoutExpired) else error from None
    finally:
        if not interrupted:
            os.close(writing)
    code = process.returncode
    if code and not (code in (SOME, INTERRUPTED) and results()):
        if interrupted or code == INTERRUPTED:
            raise KeyboardInterrupt
        raise GraphcombError(f"{what} failed: {_last(said, code)}")
    return code


def _last(said: str, code: int) -> str:
    lines = [line for line in said.splitlines() if line.strip()] or [f"exit code {code}"]
    return lines[-1].removeprefix("error: ")
