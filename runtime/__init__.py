"""Export, engines, measurement and report."""

from typing import TYPE_CHECKING, Any

from .bench import BenchResult, bench
from .bundle import run_bundle, write_bundle
from .engine import Engine, EngineReport, build_engine, load_engine, open_engine
from .latency import LatencyTable
from .measured import read_results
from .onnx import OnnxReport, export_onnx
from .parity import parity
from .prediction import predict
from .roofline import Roofline
from .targets import TARGETS, Target, get_target

if TYPE_CHECKING:
    from .report import write_report

__all__ = [
    "TARGETS",
    "BenchResult",
    "Engine",
    "EngineReport",
    "LatencyTable",
    "OnnxReport",
    "Roofline",
    "Target",
    "bench",
    "build_engine",
    "export_onnx",
    "get_target",
    "load_engine",
    "open_engine",
    "parity",
    "predict",
    "read_results",
    "run_bundle",
    "write_bundle",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "write_report":  # brings matplotlib, which nothing else needs
        from .report import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
