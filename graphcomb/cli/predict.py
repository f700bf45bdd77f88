"""`graphcomb predict`: predict the latency of a model and its layers on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..graph.errors import BadInput
from .shared.arguments import Arguments, Inputs, Shapes, read_sizes, read_values
from .shared.output import console, save

if TYPE_CHECKING:
    from ..runtime.summary import Predicted, Prediction


def predict(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL [SMALLER]", help="package.module:callable, a .pt2 or an .onnx file.")
    ],
    target: Annotated[str, typer.Option("--target", help="A device, as in rtx-sm86.")] = "cpu",
    precision: Annotated[
        str | None, typer.Option("--precision", help="Such as fp16; by default that of --calibrate, else fp32.")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option("--calibrate", metavar="RESULTS.json", help="Results of bench bundles on the device."),
    ] = None,
    arg: Arguments = None,
    input_: Inputs = None,
    shape: Shapes = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Batch size; by default that of a fixed batch, else 1.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="OUT.json", help="Write the prediction.")] = None,
) -> None:
    """Predict how long a model and its layers take on a device, and which layers gain nothing from fewer channels.

    The prediction uses the device's data sheet, or is calibrated with measurements of bench bundles on the device.
    """
    from .. import runtime
    from ..runtime.summary import Prediction
    from .shared.shapes import at_shapes, captured, check_names, example_batch, read_shapes, with_batch

    if len(models) > 2:
        raise BadInput(f"predict: one model, or one and what became of it, not {len(models)}")
    device = runtime.get_target(target)
    roofline = runtime.Roofline.calibrated(calibrate, device, precision) if calibrate else None
    precision = precision or (roofline.dtype if roofline else "fp32")
    if batch is not None and batch < 1:
        raise BadInput(f"batch: 1 or more, not {batch}")
    shapes, sizes = read_shapes(shape or ()), [read_sizes(s) for s in input_ or ()]
    if shapes and sizes:
        raise BadInput("--shape, --input: give one of the two")
    programs, fixed = {}, None
    for which, model in zip(("before", "after"), models, strict=False):
        saved = model.endswith(".pt2")
        given = not saved and (shapes or sizes or batch is not None)
        inputs = with_batch(sizes or list(shapes.values()), batch) if given else []
        program = captured(model, read_values(arg or ()), inputs)
        check_names(program, shapes)
        programs[which] = program = at_shapes(program, shapes, batch) if saved and shapes else program
        fixed = fixed or example_batch(program)
        if fixed and batch not in (None, fixed):
            raise BadInput(f"--batch {batch}: {model} has a fixed batch of {fixed}; capture it with a dynamic one")
    prediction = runtime.predict(programs, device, precision, roofline, batch or fixed or 1)
    save(json_, prediction)
    show_prediction(Prediction.model_validate(prediction))


def show_prediction(prediction: Prediction) -> None:
    """Print the predicted time of each layer, what bounds it, and why fewer channels would not help."""
    from ..runtime.prediction.roofline import calibration_text

    table = Table("layer", "op", "MACs", "padded", "bytes", "ms", "bound", "note", box=SIMPLE_HEAD, padding=0)
    table.columns[0].overflow = "fold"
    notes: dict[str, int] = {}  # numbers, since the sentences would fill the table
    for row in prediction.layers:
        sides = [side for side in (row.before, row.after) if side]

        def cell(key: str, form: Callable[[Any], str], sides: Sequence[Predicted] = sides) -> str:
            return "\n-> ".join(dict.fromkeys(form(getattr(side, key)) for side in sides))

        numbers = [cell(key, _short) for key in ("macs", "padded_macs", "bytes")]
        why = sides[-1].verdict
        note = str(notes.setdefault(why, len(notes) + 1)) if why else ""
        table.add_row(row.name, row.op, *numbers, cell("ms", "{:.4f}".format), cell("bound", str), note)
    console.print(table)
    for why, number in notes.items():
        console.print(f"note {number}: fewer channels save little or no time here: {why}", soft_wrap=True)
    console.print(f"{prediction.by}: {' -> '.join(f'{ms:.3f} ms' for ms in prediction.ms.values())}", soft_wrap=True)
    if prediction.calibration:
        console.print(calibration_text(prediction.calibration.to_dict()), soft_wrap=True)
    if doubt := prediction.uncertainty:
        console.print(str(doubt), soft_wrap=True)


def _short(number: float) -> str:
    """Return a number of up to four digits with a unit, such as "9.437M" for 9,437,184."""
    unit, size = next(((u, s) for u, s in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if number >= s), ("", 1.0))
    return f"{number / size:.4g}{unit}"
