"""Where a DLA runs the layers of a program that is not exported yet."""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from ...graph.errors import BadInput
from ...graph.nodes import shape
from ...graph.program import Program
from ..devices.dla import dla_report
from ..devices.table import Target, get_target
from .opset import DEFAULT
from .translate import exportable, quiet, translate


def dla_placement(target: str | Target, precision: str = "fp16") -> Callable[[Program], list[tuple[str, str]]]:
    """Return a function that predicts from the documented rules where each layer of a program runs.

    target: a device with a DLA. precision: of the engine, "fp16" or "int8". The function takes a program and returns for
    every layer of its ONNX form, in order, its operator and the reason why it runs on the GPU ("" on the DLA). A dynamic
    batch is that of the example. Raises BadInput for a target without a DLA.
    """
    device = get_target(target) if isinstance(target, str) else target
    if device.dla is None:
        raise BadInput(f"dla_placement: {device.name} has no DLA")

    def place(program: Program) -> list[tuple[str, str]]:
        first = next(n for n in program.graph.nodes if n.op == "placeholder" and hasattr(n.meta.get("val"), "shape"))
        with quiet():
            graph = gs.import_onnx(translate(exportable(program).exported(), DEFAULT))
            model = gs.export_onnx(graph.fold_constants().cleanup().toposort())
        return [(row.op, row.why) for row in dla_report(model, device, batch=shape(first)[0], kind=precision)]

    return place
