"""Build a TensorRT engine of a bundled model on the device, and keep it beside the results with a description.

A build runs in a process of its own, which has a time limit: if TensorRT crashes or does not end, the other models are
measured all the same, and Ctrl-C ends it at once. Sources: TensorRT developer guide, "Timing cache", "Working with DLA";
trtexec's help.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .calibrate import calibrate, calibrates
from .contents import Failure, complete, digest, write_bytes, write_json
from .trt import SUFFIXES, collector_off, made, new_logger

if TYPE_CHECKING:
    import tensorrt as types

OLD_OPSET = 17  # the highest opset that TensorRT 8.5 and 8.6 (JetPack 5 and 6.0) parse


def implied(trt: Any, arguments: argparse.Namespace, about: dict[str, Any]) -> dict[str, Any] | None:
    """Return the form of a quantised model without Q/DQ nodes (docs/formats.md, BundledModel) if it is to be built: for a
    DLA up to TensorRT 10; else None."""
    return about.get("implicit") if arguments.dla is not None and calibrates(trt) else None


def builder_flags(trt: Any, arguments: argparse.Namespace, about: dict[str, Any]) -> list[str]:
    """Return the names of the builder flags for a model. Raises Failure for one that the version lacks."""
    wanted = ["SPARSE_WEIGHTS"] if arguments.sparse or about.get("sparse") else []
    # Without strong typing TensorRT computes in fp32 unless flags permit a lower precision.
    calibrated = implied(trt, arguments, about) is not None
    wanted += ["OBEY_PRECISION_CONSTRAINTS"] if calibrated else []
    if calibrated or not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        wanted += ["FP16"] if about["precision"] != "fp32" else []
        wanted += ["INT8"] if about["precision"] == "int8" else []
    wanted += ["GPU_FALLBACK"] if arguments.dla is not None else []
    for name in wanted:
        if not hasattr(trt.BuilderFlag, name):
            raise Failure(f"{trt.__name__} {trt.__version__} has no builder flag {name}")
    return wanted


def engine_path(
    trt: Any, arguments: argparse.Namespace, feeds: dict[str, np.ndarray], about: dict[str, Any], gpu: Any
) -> Path:
    """Return the path of an engine file; its name depends on everything that the engine depends on. gpu: what identifies
    it."""
    shapes = {name: list(array.shape) for name, array in sorted(feeds.items())}
    depends = [about["sha256"], about.get("data", {}), trt.__name__, trt.__version__, gpu, arguments.device]
    depends += [builder_flags(trt, arguments, about), arguments.dla, shapes, sorted(arguments.plugins.values())]
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    return arguments.out.with_name(f"{Path(about['file']).parent.name}-{key}{SUFFIXES[arguments.engine]}")


def described(engine: Path) -> dict[str, Any]:
    """Return the description that `build` has written beside an engine; empty without one."""
    try:
        return dict(json.loads(engine.with_name(engine.name + ".json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


@collector_off()
def build(
    model: Path, engine: Path, arguments: argparse.Namespace, feeds: dict[str, np.ndarray], about: dict[str, Any]
) -> None:
    """Build an engine, write it to a file, and write its description beside it.

    The description has build_seconds, bytes, dla (number of layers, and those that run on the GPU with their types),
    calibration (see `implied`: its file, SHA-256, and number of tensors) and timing_cache (file and SHA-256), as far as they
    apply. Plug-ins are loaded already. Raises Failure with the
    library's reason.
    """
    trt = importlib.import_module(arguments.engine)
    who = f"{trt.__name__} {trt.__version__}"
    if arguments.engine == "tensorrt" and trt.__version__.startswith("8.") and about.get("opset", 0) > OLD_OPSET:
        limit = f"parses up to {OLD_OPSET}: bundle it with --opset {OLD_OPSET}"
        raise Failure(f"{model.name}: opset {about['opset']}; {who} {limit}")
    logger = new_logger(trt)
    start = time.perf_counter()
    builder: types.Builder = trt.Builder(logger)
    kinds = trt.NetworkDefinitionCreationFlag
    implicit = implied(trt, arguments, about)
    strong = getattr(kinds, "STRONGLY_TYPED", None) if implicit is None else None
    wanted = 1 << int(kinds.EXPLICIT_BATCH if strong is None else strong)
    network: types.INetworkDefinition = made(builder.create_network(wanted), "a network", logger)
    parser: types.OnnxParser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model if implicit is None else model.with_name(implicit["file"]))):
        reason = parser.get_error(0).desc() if parser.num_errors else logger.error()
        raise Failure(f"{model.name}: {who} cannot parse it: {reason}")
    config: types.IBuilderConfig = made(builder.create_builder_config(), "a configuration", logger)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for name in builder_flags(trt, arguments, about):
        config.set_flag(getattr(trt.BuilderFlag, name))
    facts: dict[str, Any] = {}
    if implicit is not None:
        scales = calibrate(trt, network, config, implicit["scales"], implicit["int8"])
        file = arguments.out.with_name(calibration_file(about))
        write_bytes(file, scales.encode())  # for `trtexec`
        facts["calibration"] = {"file": file.name, "sha256": digest(file), "tensors": len(implicit["scales"])}
    if arguments.dla is not None:
        facts["dla"] = _use_dla(trt, builder, network, config, arguments.dla, who)
    inputs: list[Any] = [network.get_input(index) for index in range(network.num_inputs)]
    complete(model, [tensor.name for tensor in inputs], feeds)
    if any(-1 in tuple(tensor.shape) for tensor in inputs):
        profile: Any = made(builder.create_optimization_profile(), "a profile", logger)
        for tensor in inputs:  # shapes may be tuples, although the stubs deny it
            shape = feeds[tensor.name].shape
            profile.set_shape(tensor.name, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            raise Failure(f"{model.name}: {who} refuses these shapes: {logger.error()}")
    cache = _timing_cache(trt, config, arguments)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Failure(f"{model.name}: {who} builds no engine: {logger.error()}")
    data = bytes(plan)
    facts.update(build_seconds=round(time.perf_counter() - start, 3), bytes=len(data))
    measured = config.get_timing_cache() if cache is not None else None
    timings = measured.serialize() if measured is not None else None
    if cache is not None and timings is not None:
        write_bytes(cache, bytes(timings))
        facts["timing_cache"] = {"file": cache.name, "sha256": digest(cache)}
    write_bytes(engine, data)
    write_json(engine.with_name(engine.name + ".json"), facts)


def calibration_file(about: dict[str, Any]) -> str:
    """Return the name of the calibration cache of a model."""
    return f"{Path(about['file']).parent.name}.calib"


def _use_dla(trt: Any, builder: Any, network: Any, config: Any, core: int, who: str) -> dict[str, Any]:
    """Assign to a DLA core the layers that it can run; return their number and the layers that run on the GPU."""
    if core >= getattr(builder, "num_DLA_cores", 0):
        raise Failure(f"--dla {core}: {who} finds no such core here")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    left = [[layer.name, layer.type.name] for layer in layers if not config.can_run_on_DLA(layer)]
    return {"layers": len(layers), "gpu": left}


def _timing_cache(trt: Any, config: Any, arguments: argparse.Namespace) -> Path | None:
    """Attach the timing cache of earlier builds, with which a rebuild of the same network chooses the same kernels. Returns
    the path of the cache; None without one."""
    if arguments.engine != "tensorrt":  # TensorRT-RTX measures no kernels
        return None
    path: Path = arguments.out.with_name(f"timing-{trt.__version__}.cache")
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    return path if cache is not None and config.set_timing_cache(cache, False) else None


def build_apart(command: list[str], seconds: float) -> None:
    """Run a build in a process of its own. command: the command line that builds. seconds: its time limit.

    The process ends with this one, whose end closes its standard input. Raises Failure with the last line that it has
    written on stderr, or with the signal that ended it, or if it exceeds the limit.
    """
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise Failure(f"no engine after {seconds:g} s (--build-seconds)") from error
    finally:  # also after Ctrl-C
        process.kill()
        process.wait()
    code = process.returncode
    if code:
        lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
        why = lines[-1] if lines else f"exit code {code}"
        if code < 0:
            why = f"the build was ended by signal {-code}" + (f" ({why})" if lines else "")
        raise Failure(why[7:] if why.startswith("error: ") else why)


def trtexec(
    model: Path,
    arguments: argparse.Namespace,
    about: dict[str, Any],
    flags: list[str],
    dynamic: dict[str, Any],
    trt: Any,
) -> str:
    """Return the command line of NVIDIA's own tool that builds and measures the same engine, for systems without Python.

    dynamic: shapes of the inputs with dynamic axes, by name.
    """
    implicit = implied(trt, arguments, about)
    model = model if implicit is None else model.with_name(implicit["file"])
    tool = "tensorrt_rtx" if arguments.engine == "tensorrt_rtx" else "trtexec"
    words = [tool, f"--onnx={model}", f"--saveEngine={Path(about['file']).parent.name}{SUFFIXES[arguments.engine]}"]
    names = trt.NetworkDefinitionCreationFlag.__members__
    if implicit is not None:
        kinds = ",".join(["*:fp16", *(f"{name}:int8" for name in implicit["int8"])])
        words += [f"--calib={calibration_file(about)}", "--precisionConstraints=obey", f"--layerPrecisions={kinds}"]
    elif "EXPLICIT_BATCH" in names and "STRONGLY_TYPED" in names:  # 10.x; before it is unknown, and later the only way
        words.append("--stronglyTyped")
    words += [{"FP16": "--fp16", "INT8": "--int8"}[name] for name in flags if name in ("FP16", "INT8")]
    words += ["--sparsity=enable"] if "SPARSE_WEIGHTS" in flags else []
    words += [f"--useDLACore={arguments.dla}", "--allowGPUFallback"] if arguments.dla is not None else []
    text = ",".join("{}:{}".format(name, "x".join(map(str, shape))) for name, shape in dynamic.items())
    words += [f"--{bound}Shapes={text}" for bound in ("min", "opt", "max") if text]
    words += [f"--shapes={text}"] if text else []
    words += [f"--dynamicPlugins={path}" for path in arguments.plugins]
    words += ["--useSpinWait", "--noDataTransfers", *(["--useCudaGraph"] if arguments.graphs else [])]
    return " ".join(map(shlex.quote, words))


def end_with_input() -> None:
    """End this process at once when its standard input ends. A build cannot be interrupted in another way."""
    sys.stdin.read()
    os._exit(130)
