"""The conditions of a measurement: the machine, its clocks and load, and the versions of libraries."""

import contextlib
import datetime
import os
import platform
from importlib import metadata
from typing import Any

import torch

from ..engines.backends import BACKENDS
from ..kit.telemetry import read_line

PACKAGES = dict.fromkeys(("graphcomb", "torch", "onnx", "numpy", *(backend.package for backend in BACKENDS.values())))


def environment(threads: int = 1) -> dict[str, Any]:
    """Return the conditions of a measurement as JSON-able values: processor, GPU, clock governor, versions of libraries,
    load, date (ISO 8601, UTC), and `threads` as given."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu(),
        "cores": cores,
        "governor": read_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    lines = (read_line("/proc/cpuinfo") or "").splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return name or read_line("/proc/device-tree/model") or platform.processor() or platform.machine()
