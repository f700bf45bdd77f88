"""The plan: how many indices every group keeps, as a YAML file to look at, edit and apply."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveInt, ValidationError

from .graph.errors import BadInput
from .graph.files import replacing
from .job import Job
from .passes.channels.remove_channels import RemoveChannels
from .passes.depth.blocks import Block
from .passes.depth.price import find_blocks
from .passes.depth.prune_depth import PruneDepth
from .recipe import Section, explain, read_yaml

HEAD = """\
# How many indices every group keeps. Edit `keep` (from 1 to `size`), switch a group off with `prune: false`, or delete
# rows, then
#     graphcomb run RECIPE.yaml --plan {name}
# Rows that you change stand. The others keep what is `proposed`, or give more where the target needs it; groups without
# a row are chosen anew.
# saves_macs: share of the dense program's MACs that the removal saves by itself. step: widths that suit the target are
# multiples of it. Groups under `frozen` cannot shrink, for the reason given.
"""
BLOCKS = """
# The blocks of the network for PruneDepth, which takes as many as its options say, or those in its `names`.
# saves_kernels: one for each layer, normalisation over features and attention that would be gone after merging.
"""


class Row(Section):
    """One group of a plan file; `keep` and `prune` are applied, the other fields are there to be read. proposed: what
    `keep` was when the plan was written."""

    name: str
    keep: PositiveInt
    size: PositiveInt
    prune: bool = True
    proposed: PositiveInt | None = None
    kind: str = ""
    step: PositiveInt = 1
    saves_macs: float = 0.0


class Frozen(Section):
    """A group that cannot shrink, and why."""

    name: str
    kind: str
    size: PositiveInt
    why: str


class Plan(Section):
    """A plan file."""

    groups: list[Row]
    frozen: list[Frozen] = Field(default_factory=list)


def make_plan(job: Job) -> tuple[list[dict[str, Any]], list[Block]]:
    """Return what the recipe's first RemoveChannels would do, group by group (see `RemoveChannels.plan`), and the blocks of
    the network where it has a PruneDepth. Raises BadInput when it has neither."""
    removal = next((p for p in job.recipe.passes if isinstance(p, RemoveChannels)), None)
    depth = any(isinstance(p, PruneDepth) for p in job.recipe.passes)
    if removal is None and not depth:
        raise BadInput("passes: no RemoveChannels in the recipe and no PruneDepth, so there is nothing to plan")
    return removal.plan(job.program, job.context()) if removal else [], find_blocks(job.program) if depth else []


def write_plan(rows: list[dict[str, Any]], path: Path, blocks: Sequence[Block] = ()) -> None:
    """Write the rows as an editable YAML file, one group a line; blocks as comments, to be read."""
    groups = [{"name": r["name"], "prune": True, **r} for r in rows if "frozen" not in r]
    frozen = [
        {"name": r["name"], "kind": r["kind"], "size": r["size"], "why": r["frozen"]} for r in rows if "frozen" in r
    ]
    listed = [
        {"name": b.name, "kind": b.kind, "macs": b.macs}
        | ({"saves_macs": b.saves, "saves_kernels": b.kernels} if b.why is None else {"why": b.why})
        for b in blocks
    ]
    with replacing(path) as part:
        text = HEAD.format(name=path.name)
        for title, entries in (("groups", groups), ("frozen", frozen)):
            lines = _lines(entries)
            text += f"{title}:\n" + "".join(f"- {line}\n" for line in lines) if lines else f"{title}: []\n"
        text += (BLOCKS + "".join(f"# - {line}\n" for line in _lines(listed))) if listed else ""
        part.write_text(text)


def _lines(entries: list[dict[str, Any]]) -> list[str]:
    return [yaml.safe_dump(e, default_flow_style=True, sort_keys=False, width=10**6).strip() for e in entries]


def read_plan(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a plan file as `RemoveChannels` takes them. Raises BadInput with file and path of the field."""
    tree = read_yaml(path)
    try:
        plan = Plan.model_validate(tree)
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error, Plan)}") from error
    return [row.model_dump(include={"name", "keep", "prune", "proposed"}) for row in plan.groups]
