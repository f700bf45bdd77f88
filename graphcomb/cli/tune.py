"""`graphcomb tune` and `graphcomb sensitivity`: one budget for width and depth, and what every option costs and saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..graph.errors import BadInput
from .arguments import Arguments, Inputs, Quiet, read_sizes, read_values
from .output import WORSE, complain, console

if TYPE_CHECKING:
    from ..job import Job
    from ..plan import Plan
    from ..sensitivity import Option

ModelSource = Annotated[str, typer.Argument(metavar="MODEL", help="package.module:callable, a .pt2 or an .onnx file.")]
DataSource = Annotated[
    str | None, typer.Option("--data", help="Calibration images: package.module:callable, or a built-in name.")
]
Target = Annotated[str, typer.Option("--target", help="A device, as in rtx-sm86.")]
Precision = Annotated[str, typer.Option("--precision", help="fp32 or fp16.")]
TableFile = Annotated[
    str | None,
    typer.Option("--table", help="Layers' times: roofline, results of a bundle, or a file of measured layers."),
]
Samples = Annotated[int, typer.Option("--samples", help="Images for repair; as many others judge.")]
Points = Annotated[int, typer.Option("--points", help="Sizes at which each width's loss is measured, 1 or 2.")]
Sizes = Annotated[int, typer.Option("--sizes", help="Sizes that each group may have, at most.")]


def tune(
    model: ModelSource,
    latency: Annotated[
        list[str] | None, typer.Option("--latency", help='A time as in "3.5 ms", or a share; several make a front.')
    ] = None,
    loss: Annotated[
        list[float] | None, typer.Option("--loss", help="Instead: the divergence that may be lost, in nats.")
    ] = None,
    data: DataSource = None,
    data_arg: Annotated[
        list[str] | None, typer.Option("--data-arg", metavar="NAME=VALUE", help="Argument of the data's callable.")
    ] = None,
    target: Target = "cpu",
    precision: Precision = "fp32",
    table: TableFile = None,
    measure: Annotated[
        bool | None,
        typer.Option("--measure/--predict", help="Measure whole networks; default where layers are measured."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A plan, edited by hand, to choose the rest around.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The plan file; of a front, the names get numbers.")] = Path(
        "plan.yaml"
    ),
    samples: Samples = 64,
    points: Points = 1,
    sizes: Sizes = 6,
    rounds: Annotated[int, typer.Option("--rounds", help="How often what was chosen is built and measured.")] = 2,
    arg: Arguments = None,
    input_: Inputs = None,
    quiet: Quiet = False,
) -> None:
    """Choose blocks to remove and widths together for a budget, and write it as an editable plan for `run --plan`.

    Exit code 1 where a plan misses its budget by more than a tenth.
    """
    from ..tuning import tune as tuned

    if bool(latency) == bool(loss):
        raise BadInput("tune: give one of --latency and --loss")
    budgets = [_budget(text) for text in latency or ()]
    job, recipe = _job(model, data, data_arg, target, precision, arg, input_)
    plans: list[Plan] = tuned(
        job.program, job.train, budgets or None, list(loss) if loss else None, job.target, precision, table, measure, plan,
        samples, points, sizes, rounds=rounds, progress=not quiet,
    )  # fmt: skip
    several = len(plans) > 1
    files = [out.with_stem(f"{out.stem}-{i}") if several else out for i in range(1, len(plans) + 1)]
    for found, file in zip(plans, files, strict=True):
        found.model_copy(update={"recipe": recipe}).save(file)
    _show(plans, [str(f) for f in files])
    console.print(f"edit a plan, then: graphcomb run --plan {files[0]}", soft_wrap=True)
    missed = [file for found, file in zip(plans, files, strict=True) if found.tuned and not found.tuned.met]
    for file in missed:
        complain("missed", f"{file}: the budget was missed by more than a tenth")
    if missed:
        raise typer.Exit(WORSE)


def sensitivity(
    model: ModelSource,
    data: DataSource = None,
    data_arg: Annotated[
        list[str] | None, typer.Option("--data-arg", metavar="NAME=VALUE", help="Argument of the data's callable.")
    ] = None,
    target: Target = "cpu",
    precision: Precision = "fp32",
    table: TableFile = None,
    out: Annotated[Path, typer.Option("--out", help="The CSV file; the HTML page lies beside it.")] = Path(
        "sensitivity.csv"
    ),
    samples: Samples = 64,
    points: Points = 1,
    sizes: Sizes = 6,
    arg: Arguments = None,
    input_: Inputs = None,
    quiet: Quiet = False,
) -> None:
    """What every option of every group and block saves and loses by itself, as CSV and as a page that sorts."""
    from ..sensitivity import measure, write_csv, write_page

    job, _ = _job(model, data, data_arg, target, precision, arg, input_)
    options = measure(
        job.program, job.train, target=job.target, precision=precision, table=table, samples=samples, points=points,
        sizes=sizes, progress=not quiet,
    )  # fmt: skip
    page = out.with_suffix(".html")
    write_csv(options, out)
    write_page(options, page, model, job.target.name)
    shown = [o for o in options if o.saves_ms > 0]
    for title, rows in (("ten best", shown[:10]), ("ten worst", shown[:-11:-1])):
        _show_options(title, rows)
    console.print(f"written: {out}, {page}", soft_wrap=True)


def _budget(text: str) -> float | str:
    """A share, or a time with its unit."""
    try:
        return float(text)
    except ValueError:
        return text


def _job(
    model: str,
    data: str | None,
    data_arguments: list[str] | None,
    target: str,
    precision: str,
    arguments: list[str] | None,
    inputs: list[str] | None,
) -> tuple[Job, dict[str, Any]]:
    """The model and its data, and the part of a recipe that says where they come from."""
    from ..job import prepare
    from ..recipe import parse_recipe

    if data is None:
        raise BadInput("--data: calibration images are needed; labels are not")
    recipe: dict[str, Any] = {
        "model": {"source": model, "arguments": read_values(arguments or ())},
        "data": {"source": data, "arguments": read_values(data_arguments or (), "--data-arg")},
        "target": target, "precision": precision,
    }  # fmt: skip
    if inputs:
        recipe["inputs"] = [{"shape": read_sizes(text)} for text in inputs]
    return prepare(parse_recipe(recipe | {"passes": []})), recipe


def _show(plans: list[Plan], files: list[str]) -> None:
    """Print what each plan does, and what it was asked for, predicted and found to take and lose."""
    for found, file in zip(plans, files, strict=True):
        assert found.tuned is not None
        ms, loss, decided = found.tuned.ms, found.tuned.loss, found.decided
        asked = "" if ms["asked"] is None else f"asked {_number(ms['asked'])}, "
        how = "measured" if ms["measured"] else "layer by layer"
        console.print(
            f"{file}: {_number(ms['dense'])} -> {_number(ms['achieved'])} ms {how} ({asked}predicted "
            f"{_number(ms['predicted'])}), loss {_number(loss['measured'])} (predicted {_number(loss['predicted'])}); "
            f"{len(decided.blocks)} blocks gone, {len(decided.widths)} groups narrower ({found.tuned.method})",
            soft_wrap=True,
        )
    assert plans[0].tuned is not None
    console.print(f"times by {plans[0].tuned.by}", soft_wrap=True)


def _show_options(title: str, rows: list[Option]) -> None:
    table = Table(title, "option", "saves ms", "loss", "loss per ms")
    table.columns[0].overflow = "fold"
    for o in rows:
        table.add_row(o.what, o.option, f"{o.saves_ms:.3g}", f"{o.loss:.3g}", f"{o.price:.3g}")
    console.print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
