"""`graphcomb tune` chooses widths and blocks for a budget, `graphcomb sensitivity` lists what each saves and loses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..graph.errors import BadInput
from .shared.arguments import Arguments, Inputs, Quiet, read_sizes, read_values
from .shared.output import WORSE, complain, console

if TYPE_CHECKING:
    from ..job import Job
    from ..tuning.plan import Plan
    from ..tuning.sensitivity import Option

ModelSource = Annotated[str, typer.Argument(metavar="MODEL", help="package.module:callable, a .pt2 or an .onnx file.")]
DataSource = Annotated[
    str | None, typer.Option("--data", help="Calibration images: package.module:callable, or a built-in name.")
]
DataArguments = Annotated[
    list[str] | None, typer.Option("--data-arg", metavar="NAME=VALUE", help="Argument of the data's callable.")
]
Target = Annotated[str, typer.Option("--target", help="The device, such as rtx-sm86.")]
Precision = Annotated[str, typer.Option("--precision", help="fp32 or fp16.")]
TableFile = Annotated[
    str | None,
    typer.Option("--table", help="Times of layers: roofline, results of a bundle, or a file of measured layers."),
]
Extra = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="OPTION", help="What may change, too: int8 or fp8; 2:4 (repeatable)."),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", help="Images for repair; as many others measure the loss. By default 64, or as in --plan."
    ),
]
Points = Annotated[int, typer.Option("--points", help="Sizes at which the loss of a group is measured, 1 or 2.")]
Sizes = Annotated[int, typer.Option("--sizes", help="Evenly spaced sizes of a group, and above 1 the least one.")]


def tune(
    model: ModelSource,
    latency: Annotated[
        list[str] | None, typer.Option("--latency", help='A time as in "3.5 ms", or a share; several make a front.')
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option("--loss", help='Instead: the largest loss, in nats, or of the metric as in "0.5 points".'),
    ] = None,
    data: DataSource = None,
    data_arg: DataArguments = None,
    target: Target = "cpu",
    precision: Precision = "fp32",
    table: TableFile = None,
    measure: Annotated[
        bool | None,
        typer.Option("--measure/--predict", help="Measure whole networks; by default if layers are measured."),
    ] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="An edited plan; changed and fixed rows stay.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The plan file; several plans are numbered.")] = Path("plan.yaml"),
    samples: Samples = None,
    points: Points = 1,
    sizes: Sizes = 6,
    rounds: Annotated[int, typer.Option("--rounds", help="How often the chosen network is built and measured.")] = 3,
    with_: Extra = None,
    arg: Arguments = None,
    input_: Inputs = None,
    quiet: Quiet = False,
) -> None:
    """Choose blocks to remove and widths of groups for a budget, and write them as an editable plan for `run --plan`.

    Exit code 1 if a plan misses its budget by more than a tenth, or if one of several budgets cannot be reached.
    """
    from ..tuning.plan import Plan
    from ..tuning.tune import choose, read_budgets

    if bool(latency) == bool(loss):
        raise BadInput("tune: give one of --latency and --loss")
    times, losses = ([_budget(text) for text in given or ()] or None for given in (latency, loss))
    budgets = read_budgets(times, losses)
    job, recipe = _job(model, data, data_arg, target, precision, arg, input_)
    found = choose(
        job.program, budgets, rounds, data=job.train, target=job.target, precision=precision, table=table,
        measure=measure, plan=plan, samples=samples, points=points, sizes=sizes, extra=with_ or (), progress=not quiet,
        val=job.val, metric=job.metric,
    )  # fmt: skip
    files = [out.with_stem(f"{out.stem}-{i}") if len(found) > 1 else out for i in range(1, len(found) + 1)]
    plans = {file: made for file, made in zip(files, found, strict=True) if isinstance(made, Plan)}
    unreachable = [error for error in found if not isinstance(error, Plan)]
    if not plans:
        raise unreachable[0]
    for file, made in plans.items():
        made.model_copy(update={"recipe": recipe}).save(file)
    _show(plans)
    console.print(f"edit a plan, then: graphcomb run --plan {next(iter(plans))}", soft_wrap=True)
    for error in unreachable:
        complain("unreachable", error)
    missed = [file for file, made in plans.items() if made.tuned and not made.tuned.met]
    for file in missed:
        complain("missed", f"{file}: the budget was missed by more than a tenth")
    if missed or unreachable:
        raise typer.Exit(WORSE)


def sensitivity(
    model: ModelSource,
    data: DataSource = None,
    data_arg: DataArguments = None,
    target: Target = "cpu",
    precision: Precision = "fp32",
    table: TableFile = None,
    out: Annotated[Path, typer.Option("--out", help="The CSV file; the HTML page lies beside it.")] = Path(
        "sensitivity.csv"
    ),
    samples: Samples = None,
    points: Points = 1,
    sizes: Sizes = 6,
    with_: Extra = None,
    arg: Arguments = None,
    input_: Inputs = None,
    quiet: Quiet = False,
) -> None:
    """List what every option of every group and block saves and loses by itself, as CSV and as a sortable page."""
    from ..passes.quantize.choose_layers import QUANTISED
    from ..tuning.sensitivity import measure, write_csv, write_page

    if (page := out.with_suffix(".html")) == out:
        raise BadInput(f"--out: {out} is the name of the page; name the CSV file")
    job, _ = _job(model, data, data_arg, target, precision, arg, input_)
    options = measure(
        job.program, job.train, target=job.target, precision=precision, table=table, samples=samples, points=points,
        sizes=sizes, extra=with_ or (), progress=not quiet,
    )  # fmt: skip
    write_csv(options, out)
    write_page(options, page, model, job.target.name)
    shown = [o for o in options if o.saves_ms > 0]
    for title, rows in (("ten best", shown[:10]), ("ten worst", shown[:-11:-1])):
        _show_options(title, rows)
    for o in options:
        if o.what == "every layer":
            console.print(f"no layer can be {o.option}: {o.note}", soft_wrap=True, markup=False)
        if o.option == "fp16" or (o.option in QUANTISED and o.measured and o.saves_ms <= 0):
            what = "may leave the range of fp16" if o.option == "fp16" else f"is slower in {o.option.upper()}"
            console.print(f"{o.what} {what}: {o.note}", soft_wrap=True, markup=False)
    console.print(f"written: {out}, {page}", soft_wrap=True)


def _budget(text: str) -> float | str:
    """Return a share as a number, and a time with its unit as the text."""
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
    """Return the job of a model with its data, and the fields of a recipe from which it was made."""
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


def _show(plans: dict[Path, Plan]) -> None:
    """Print for each plan its changes, and the time and loss that were asked for, predicted and found."""
    from ..passes.joint.tuning_rounds import told

    for file, plan in plans.items():
        assert plan.tuned is not None
        ms, loss, decided = plan.tuned.ms, plan.tuned.loss, plan.decided
        asked = "" if ms["asked"] is None else f"asked {_number(ms['asked'])}, "
        predicted = f"predicted {_range(ms, 'predicted', 'predicted_low', 'predicted_high')}" if ms["measured"] else ""
        aside = ", ".join(text for text in (asked.removesuffix(", "), predicted) if text)
        points = f", {_number(loss['points'])} points" if loss.get("points") is not None else ""
        console.print(
            f"{file}: {_number(ms['dense'])} -> {_range(ms, 'achieved', 'low', 'high')} ms {plan.tuned.met_by}"
            f"{f' ({aside})' if aside else ''}, loss {_number(loss['measured'])} "
            f"(predicted {_number(loss['predicted'])}){points}; "
            f"{told(decided)} ({plan.tuned.method})",
            soft_wrap=True,
        )
        by = plan.tuned.by
    console.print(f"times by {by}", soft_wrap=True)


def _show_options(title: str, rows: list[Option]) -> None:
    table = Table(title, "option", "saves ms", "loss", "loss per ms")
    table.columns[0].overflow = "fold"
    for o in rows:
        table.add_row(o.what, o.option, f"{o.saves_ms:.3g}", f"{o.loss:.3g}", f"{o.price:.3g}")
    console.print(table)


def _range(ms: dict[str, Any], name: str, low: str, high: str) -> str:
    """Format a time with its error bar."""
    text = _number(ms[name])
    return text if ms.get(low) is None else f"{text} [{_number(ms[low])} to {_number(ms[high])}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
