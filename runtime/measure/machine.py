"""Report what a machine has and what it can be used for, without building or measuring anything. Source: ours."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ...graph.errors import GraphcombError
from ..devices.here import local_target
from ..devices.table import TARGETS, canonical
from ..engines.backends import BACKENDS, install_command
from ..kit.cuda import Cuda, CudaError
from ..kit.telemetry import describe_device, read_line
from .environment import environment

BUSY = 0.5  # load per core above which measurements are often disturbed
INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")  # instructions for INT8, as /proc/cpuinfo names them
POWER = ("tegrastats", "nvidia-smi")


@dataclass(frozen=True)
class Finding:
    """One part of a machine.

    what: kind of part. here: what this machine has, empty for nothing. means: what that means for the user.
    """

    what: str
    here: str
    means: str

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON-able values."""
        return dataclasses.asdict(self)


def examine() -> list[Finding]:
    """Return findings on the processor, the GPU, clocks and power, and the inference libraries of this machine."""
    capability, why = _gpu()
    return [*_processor(), *_accelerator(capability, why), *_libraries(capability is not None)]


def _processor() -> list[Finding]:
    about = environment()
    flags = set((read_line("/proc/cpuinfo") or "").split())
    fast = [name for name in INT8 if name in flags]
    int8 = f"with INT8 instructions ({', '.join(fast)})" if fast else "no instructions for INT8: it may be slow"
    findings = [Finding("processor", f"{about['cpu']}, {about['cores']} cores", f"target cpu; {int8}")]
    if about["load"] is not None:
        busy = about["load"] > BUSY * about["cores"]
        means = "busy: measurements may end without a figure" if busy else "quiet enough to measure"
        findings.append(Finding("load", str(about["load"]), means))
    if governor := about["governor"]:
        fixed = governor == "performance"
        means = "clocks stay up" if fixed else f"clocks vary; to fix them: {TARGETS['cpu'].clocks[0]}"
        findings.append(Finding("processor clocks", governor, means))
    return findings


def _gpu() -> tuple[tuple[int, int] | None, str]:
    """Return the compute capability of the GPU and "", or None and why there is none."""
    try:
        return canonical(Cuda().compute_capability), ""
    except CudaError as error:
        return None, str(error)


def _accelerator(capability: tuple[int, int] | None, why: str) -> list[Finding]:
    if capability is None:
        means = f"{why}: engines for GPUs run elsewhere; `graphcomb bundle` writes a folder that measures them there"
        return [Finding("GPU", "", means)]
    device = describe_device()
    targets = []
    for backend in ("tensorrt", "tensorrt_rtx"):
        with warnings.catch_warnings(record=True), contextlib.suppress(GraphcombError):
            warnings.simplefilter("always")
            targets.append(local_target(backend).name)
    means = f"target {' or '.join(dict.fromkeys(targets))}" if targets else "no target of the table has it"
    name = device["model"] or "a GPU"
    findings = [Finding("GPU", f"{name}, SM{capability[0]}{capability[1]}", means)]
    if driver := (read_line("/proc/driver/nvidia/version") or "").partition("\n")[0]:
        findings.append(Finding("driver", driver, ""))
    if mode := device["power_mode"]:
        findings.append(Finding("power mode", mode, "figures hold for this mode alone; the fastest is `nvpmodel -m 0`"))
    tools = [name for name in POWER if shutil.which(name)]
    power = "power and clocks are recorded beside latency" if tools else "latency is measured without power and clocks"
    return [*findings, Finding("power meter", ", ".join(tools), power)]


def _libraries(gpu: bool) -> list[Finding]:
    versions = _versions()
    return [
        Finding(name, versions[name], _use(name, gpu) if versions[name] else install_command(backend))
        for name, backend in BACKENDS.items()
    ]


def _versions() -> dict[str, str]:
    """Return the installed version of each backend's library, empty for one that is not installed."""
    distributions, versions = metadata.packages_distributions(), dict.fromkeys(BACKENDS, "")
    for name, backend in BACKENDS.items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(distributions.get(backend.package, [backend.package])[0])
    return versions


def _use(name: str, gpu: bool) -> str:
    """Return what an installed library can be used for on this machine."""
    if name in ("onnxruntime", "openvino"):
        return "builds and runs engines on this processor"
    if name == "inductor":
        return "builds and runs engines on this " + ("GPU" if gpu else "processor")
    if gpu:
        return "builds and runs engines on this GPU"
    if name == "tensorrt_rtx":
        names = [target.name for target in TARGETS.values() if target.backend == name]
        return f"builds engines for {', '.join(names)}; they run elsewhere"
    return "builds engines on a GPU alone"
