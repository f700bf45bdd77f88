"""`graphcomb run` and `graphcomb demo`: run a recipe and print the figures of the finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..graph.errors import BadInput
from .shared.arguments import Overrides, Quiet
from .shared.output import console

if TYPE_CHECKING:
    from ..runtime.summary import Summary

DEMO = Path(__file__).parents[1] / "demo.yaml"
SUMMARY_ROWS = {
    "macs_ratio": "{:.2f}x fewer",
    "params_ratio": "{:.2f}x fewer",
    "latency_ratio": "{:.2f}x faster",
    "surgery_error": "{:.1e}",
    "onnx_parity": "{:.1e}",
    "onnx_parity_fp16": "{:.1e}",
    "seconds": "{:.0f} s",
}


def run(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE.yaml", help="The recipe; a plan of `tune` does without.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results; default out/NAME.")] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A plan file, edited by hand; one of `tune` has its own passes.")
    ] = None,
    set_: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not continue from finished passes.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: compress, verify, export, build engines, measure, report. Continues where it was interrupted."""
    from .. import run as runs
    from ..recipe import override, parse_recipe, read_recipe
    from ..store import is_main
    from ..tuning import plan as plans

    edited = plans.load_plan(plan) if plan else None
    if recipe is not None:
        parsed = read_recipe(recipe, set_ or ())
    elif edited is not None and edited.recipe is not None:
        tree = edited.recipe | {"passes": []}
        for text in set_ or ():
            override(tree, text)
        parsed = parse_recipe(tree)
    else:
        raise BadInput("run: a recipe, or --plan with a file that `graphcomb tune` wrote")
    folder = out or Path("out") / (recipe or plan or Path("plan")).stem
    rows = None if edited is None else edited.applied if edited.tuned else plans.rows_of(edited)
    planned = None if edited is None else edited.figures()
    summary = runs.run(parsed, folder, rows, progress=not quiet, fresh=fresh, planned=planned)
    if is_main():
        show_summary(summary)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("out/demo"), quiet: Quiet = False
) -> None:
    """Train a small network on digits (or load the cached one) and run the whole pipeline on it."""
    run(DEMO, out, quiet=quiet)
    from ..store import is_main

    if is_main():
        print(
            "Next, a real network: `make gallery ONLY=pp_ocr`, in a clone of graphcomb, prunes a trained text detector."
        )


def show_summary(summary: Summary) -> None:
    """Print the figures of a finished run."""
    from ..pipeline import figure
    from ..runtime.report.reading import latency_place

    table = Table(show_header=False)
    name = summary.metric.replace(" ", "_")
    interval = " to ".join(figure(summary.metric, end) for end in summary.accuracy_interval or () if end is not None)
    between = f" (95 % interval {interval})" if interval else ""
    for when, value, more in (("before", summary.accuracy_before, ""), ("after", summary.accuracy_after, between)):
        if value is not None:
            table.add_row(f"{name}_{when}", figure(summary.metric, value) + more)
    # With an fp16 file the engines are not built from the fp32 file, so its error is not shown.
    hidden = {"onnx_parity"} if summary.onnx_parity_fp16 is not None else set()
    for key, form in SUMMARY_ROWS.items():
        if (number := getattr(summary, key)) is not None and key not in hidden:
            where = f" in {latency_place(summary)}" if key == "latency_ratio" else ""
            table.add_row(key, form.format(number) + where)
    if (prediction := summary.prediction) and len(prediction.ms) == 2:
        before, after = prediction.ms.values()
        where = f"{prediction.target}, {prediction.precision}, batch {prediction.batch}"
        doubt = prediction.uncertainty
        bar = f" (each off by up to {doubt.factor:.2g} times)" if doubt else ""
        ms = f"{before:.3g} -> {after:.3g} ms{bar}"
        table.add_row("predicted", f"{before / after:.2f}x faster on {where}: {ms}" if after else "")
    if (plan := summary.plan) is not None and not plan.edited:
        ms_, asked = plan.ms, plan.ms.get("asked")
        text = f"asked {asked:.3g} ms, " if asked is not None else ""
        text += f"predicted {ms_['predicted']:.3g} [{ms_['predicted_low']:.3g} to {ms_['predicted_high']:.3g}] ms"
        if plan.met_by == "measured":
            text += f", measured when tuned {ms_['achieved']:.3g} [{ms_['low']:.3g} to {ms_['high']:.3g}] ms"
        table.add_row("plan", f"{text}: {'met' if plan.met else 'missed'}, {plan.met_by}")
    for kind, path in summary.files.items():
        for one in path if isinstance(path, list) else [path]:
            table.add_row(kind, one)
    console.print(table)
    if summary.bench and summary.bench.note:
        console.print(f"latency: {summary.bench.note}")
