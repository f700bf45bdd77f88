"""Export, engines, measurement and report."""

from typing import TYPE_CHECKING, Any

from .bundle.run import run_bundle
from .bundle.write import write_bundle
from .device_results import read_results
from .devices.table import TARGETS, Target, get_target
from .engines.base import Engine, EngineReport
from .engines.build import build_engine, load_engine, open_engine
from .export.parity import parity
from .export.placement import dla_placement
from .export.to_onnx import OnnxReport, export_onnx
from .measure.bench import BenchResult, bench
from .prediction.latency_table import LatencyTable
from .prediction.layer_report import predict
from .prediction.roofline import Roofline

if TYPE_CHECKING:
    from .report.report import write_report

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
    "dla_placement",
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
        from .report.report import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
