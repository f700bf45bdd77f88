"""`graphcomb plan` shows what a recipe would remove from a model, `graphcomb comb` what can be removed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .shared.arguments import Arguments, Inputs, Overrides, RecipeFile, read_sizes, read_values
from .shared.output import console

if TYPE_CHECKING:
    from ..passes.depth.blocks import Block


def plan(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", help="The plan file to write.")] = Path("plan.yaml"),
    set_: Overrides = None,
) -> None:
    """Print what a recipe would remove, group by group, and write it as an editable plan for `run --plan`.

    For a recipe with PruneDepth it also lists the blocks of the network: their cost, and what pruning a block saves or why
    it cannot be pruned.
    """
    from ..job import prepare
    from ..recipe import read_recipe
    from ..tuning import plan as plans

    job = prepare(read_recipe(recipe, set_ or ()))
    rows, blocks = plans.make_plan(job)
    plans.write_plan(rows, out, blocks)
    if rows:
        show_groups([r | {"frozen": r.get("frozen")} for r in rows])
    if blocks:
        show_blocks(blocks)
    console.print(f"plan written to {out}; edit it, then: graphcomb run {recipe} --plan {out}", soft_wrap=True)


def comb(
    model: Annotated[str, typer.Argument(help="package.module:callable, a .pt2 or an .onnx file.")],
    arg: Arguments = None,
    input_: Inputs = None,
    why: Annotated[str | None, typer.Option("--why", metavar="PARAMETER", help="Explain one parameter.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which indices of a model can only be removed together, what is frozen, and why."""
    from ..graph.comb.solve import Comb
    from .shared.shapes import captured

    solved = Comb(captured(model, read_values(arg or ()), [read_sizes(s) for s in input_ or ()]))
    if why:
        print(solved.why(why))
        return
    rows = [
        {"name": g.name, "kind": g.kind, "size": g.size, "frozen": g.frozen, "members": [list(m) for m in g.members]}
        for g in solved.groups
    ]
    if as_json:
        print(json.dumps({"model": model, "prunable_share": solved.coverage(), "groups": rows}))
        return
    show_groups(rows)
    free = sum(r["frozen"] is None for r in rows)
    console.print(f"{free} of {len(rows)} groups can shrink; they reach {solved.coverage():.1%} of the parameters")


def show_groups(rows: list[dict[str, Any]]) -> None:
    """Print a table of groups: first those that can shrink, then the frozen ones with the reason."""
    planned = any("keep" in r for r in rows)
    table = Table("group", "kind", "size", *(["keep", "saves MACs"] if planned else []), "frozen because")
    table.columns[0].overflow = "fold"
    for r in sorted(rows, key=lambda r: r["frozen"] is not None):
        extra = [str(r.get("keep", "")), f"{r['saves_macs']:.1%}" if "saves_macs" in r else ""] if planned else []
        table.add_row(r["name"], r["kind"], str(r["size"]), *extra, r["frozen"] or "")
    console.print(table)


def show_blocks(blocks: Sequence[Block]) -> None:
    """Print a table of blocks in the order of the network, and below it the reasons why some cannot be pruned."""
    table = Table("block", "kind")
    table.columns[0].overflow = "fold"
    for head in ("MACs", "params", "saves\nMACs", "saves\nkernels"):
        table.add_column(head, justify="right", no_wrap=True)
    for b in blocks:
        saves = ["", ""] if b.saves is None else [_short(b.saves), str(b.kernels)]
        table.add_row(b.name, b.kind, _short(b.macs), _short(b.params), *saves)
    console.print(table)
    for b in blocks:
        if b.why is not None:
            console.print(f"{b.name} cannot be pruned: {b.why}", soft_wrap=True, markup=False)


def _short(count: int) -> str:
    """Format a number in at most eight characters; numbers below a million are exact."""
    units = ((1e9, "G"), (1e6, "M"))
    return next((f"{count / unit:.1f} {name}" for unit, name in units if count >= unit), f"{count:,}")
