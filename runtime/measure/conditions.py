"""What else happens on the machine during a measurement: the clock of the processor, and other processes on the GPU.

Sources: Linux documentation, "CPU Performance Scaling" (scaling_cur_freq); NVML API reference
(nvmlDeviceGetProcessUtilization).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path("/")
LIBRARY = "libnvidia-ml.so.1"
NOT_FOUND = 6  # NVML's code for no samples: no process had the GPU


def processor_mhz() -> float | None:
    """Return the clock of the processor that this thread last ran on; None where the system does not report it, as in most
    virtual machines."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = (ROOT / "proc/thread-self/stat").read_text().rpartition(")")[2].split()
        core = int(fields[36])  # field 39 of the file; the first two come before the parenthesis
        return int((ROOT / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq").read_text()) / 1000
    return None


class _Sample(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("time", ctypes.c_ulonglong),
        *((name, ctypes.c_uint) for name in ("sm", "memory", "encoder", "decoder")),
    ]


class OtherProcesses:
    """Watches the current GPU from now on, as far as NVML reports who has it. On a Jetson and within MIG it does not."""

    def __init__(self) -> None:
        self._start = time.time_ns() // 1000
        self._library: Any = None
        self._device = ctypes.c_void_p()
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(LIBRARY)
            if library.nvmlInit_v2() == 0 and self._find(library) == 0:
                self._library = library

    def _find(self, library: Any) -> int:
        if torch.cuda.is_available():  # NVML counts GPUs in another order than CUDA
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            return int(library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(self._device)))
        return int(library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device)))

    def percent(self) -> float | None:
        """Return the percentage of the time since the start for which others had the GPU; None if it is not known.

        In a container NVML does not name this process by its own id. Then the busiest one is taken for it, so that the
        figure is a lower bound.
        """
        if self._library is None:
            return None
        count, since = ctypes.c_uint(0), ctypes.c_ulonglong(self._start)
        with contextlib.suppress(AttributeError):
            ask = self._library.nvmlDeviceGetProcessUtilization
            ask(self._device, None, ctypes.byref(count), since)  # only counts
            count.value += 8  # processes that begin meanwhile
            samples = (_Sample * count.value)()
            code = ask(self._device, samples, ctypes.byref(count), since)
            if code == NOT_FOUND:
                return 0.0
            if code == 0:
                return self._others([(s.pid, s.sm) for s in samples[: count.value]])
        return None

    def _others(self, shares: list[tuple[int, int]]) -> float:
        mine = [share for pid, share in shares if pid == os.getpid()] or [max((s for _, s in shares), default=0)]
        return float(min(sum(share for _, share in shares) - sum(mine), 100))
