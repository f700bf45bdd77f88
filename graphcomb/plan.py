"""The plan: how many indices every group keeps, as a YAML file to look at, edit and apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveInt, ValidationError

from .graph.errors import BadInput
from .passes.remove_channels import RemoveChannels
from .recipe import Section, explain, read_yaml
from .runner import Job
from .runtime.engine import replacing

HEAD = """\
# How many indices every group keeps. Edit `keep` (from 1 to `size`), or switch a group off with `prune: false`, then
#     graphcomb run RECIPE.yaml --plan {name}
# saves_macs: share of the dense program's MACs that the removal saves by itself. step: widths that suit the target are
# multiples of it. Groups under `frozen` cannot shrink, for the reason given.
"""


class Row(Section):
    """One group of a plan file; `keep` is applied, the other fields are there to be read."""

    name: str
    keep: PositiveInt
    size: PositiveInt
    prune: bool = True
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


def make_plan(job: Job) -> list[dict[str, Any]]:
    """What the recipe's first RemoveChannels would do, group by group (see `RemoveChannels.plan`)."""
    found = next((p for p in job.recipe.passes if isinstance(p, RemoveChannels)), None)
    if found is None:
        raise BadInput("passes: no RemoveChannels in the recipe, so there is nothing to plan")
    return found.plan(job.program, job.context())


def write_plan(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows as an editable YAML file, one group a line."""
    groups = [{"name": r["name"], "prune": True, **r} for r in rows if "frozen" not in r]
    frozen = [
        {"name": r["name"], "kind": r["kind"], "size": r["size"], "why": r["frozen"]} for r in rows if "frozen" in r
    ]
    with replacing(path) as part:
        text = HEAD.format(name=path.name)
        for title, entries in (("groups", groups), ("frozen", frozen)):
            lines = [yaml.safe_dump(e, default_flow_style=True, sort_keys=False, width=10**6).strip() for e in entries]
            text += f"{title}:\n" + "".join(f"- {line}\n" for line in lines) if lines else f"{title}: []\n"
        part.write_text(text)


def read_plan(path: str | Path) -> list[dict[str, Any]]:
    """Names and kept sizes from a plan file; BadInput with file and path of the field."""
    tree = read_yaml(path)
    try:
        plan = Plan.model_validate(tree)
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error, Plan)}") from error
    return [{"name": row.name, "keep": row.keep if row.prune else row.size} for row in plan.groups]
