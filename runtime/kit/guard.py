"""Whether something else had the processor while a model ran.

A bench bundle takes this file along, so it needs nothing but Python 3.8.
"""

from __future__ import annotations

import contextlib
import os

BUSY = 0.1  # share of a model's runs that may have met something else on the processor
GUARD, TRIES = 0.93, 20  # share of a run in which the processor must work for it, and how often it is repeated


def waited() -> float:
    """Seconds that this thread was ready to run and had no processor; 0 where the system does not tell."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            return int(file.read().split()[1]) * 1e-9
    except (OSError, ValueError, IndexError):
        return 0.0


def stolen() -> float:
    """Seconds that a hypervisor has taken from this virtual machine's processors; 0 where that is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError), open("/proc/stat") as file:
        return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0
