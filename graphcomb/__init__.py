"""graphcomb compresses vision models the way a compiler optimises programs.

Capture a model, comb its dependencies, run passes over the graph, lower it to ONNX and TensorRT, and measure:

    program = graphcomb.capture(model, args)
    result = graphcomb.passes.RemoveChannels(ratio=0.5)(program)
    graphcomb.verify.surgery(program, result)       # worst relative error, float64
    graphcomb.runtime.export_onnx(result.program, "model.onnx")

Names are imported when they are first used, so that `import graphcomb` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import passes, runtime
    from .graph import verify
    from .graph.comb.groups import Group
    from .graph.comb.rules import rule
    from .graph.comb.solve import Comb, comb
    from .graph.cost import counts
    from .graph.errors import BadInput, CaptureError, GraphcombError, MissingBackend, Refused, Unreachable
    from .graph.onnx.from_onnx import from_onnx
    from .graph.program import Program, capture, load
    from .passes.base import Context, Pass, PassResult
    from .pipeline import Pipeline, PipelineResult
    from .session import Session, attach
    from .tuning.plan import Plan
    from .tuning.tune import tune

_MODULES = {"passes": "passes", "runtime": "runtime", "verify": "graph.verify"}
_NAMES = {
    "graph.comb": ("Comb", "Group", "comb"),
    "graph.cost": ("counts",),
    "graph.errors": ("BadInput", "CaptureError", "GraphcombError", "MissingBackend", "Refused", "Unreachable"),
    "graph.onnx.from_onnx": ("from_onnx",),
    "graph.program": ("Program", "capture", "load"),
    "graph.comb.rules": ("rule",),
    "passes.base": ("Context", "Pass", "PassResult"),
    "pipeline": ("Pipeline", "PipelineResult"),
    "tuning.plan": ("Plan",),
    "session": ("Session", "attach"),
    "tuning.tune": ("tune",),
}

__all__ = [
    "BadInput", "CaptureError", "Comb", "Context", "GraphcombError", "Group", "MissingBackend", "Pass", "PassResult",
    "Pipeline", "PipelineResult", "Plan", "Program", "Refused", "Session", "Unreachable", "attach", "capture", "comb",
    "counts", "from_onnx", "load", "passes", "rule", "runtime", "tune", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
