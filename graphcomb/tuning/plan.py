"""A plan is a YAML file to read, edit and apply: how many indices every group keeps, and which blocks are removed.

`graphcomb plan` writes what the `RemoveChannels` of a recipe would do. `graphcomb tune` writes widths and blocks for a
budget, with the cost and the saving of each; such a plan can be run without a recipe.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError

from ..graph.comb.solve import Comb
from ..graph.errors import BadInput
from ..graph.files import replacing
from ..graph.program import Program
from ..job import Job
from ..passes.base import Context, Pass, PassResult
from ..passes.channels.remove_channels import RemoveChannels
from ..passes.depth.blocks import Block
from ..passes.depth.price import find_blocks
from ..passes.depth.prune_depth import PruneDepth
from ..passes.joint.carry_out import Decision, passes
from ..passes.joint.space import Space
from ..passes.joint.tables import Fixed, check_fixed
from ..passes.quantize.choose_layers import Precision
from ..passes.train.distill import Distill
from ..pipeline import Pipeline
from ..recipe import Recipe, Section, explain, parse_pass, read_yaml
from ..runtime.devices.table import get_target

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
TUNED = """\
# Which blocks go and how many indices every group keeps, so that a run takes at most `asked` ms on {target}.
# Edit it: `goes: false` keeps a block (true removes it), `keep` sets the width of a group (from 1 to `size`), `prune:
# false` keeps it whole. What you change stands, and the block that it is inside stays;
#     graphcomb run --plan {name}                      carries out what is written here, as it is
#     graphcomb tune ... --plan {name} --out {name}    chooses the rest anew around what you changed
# `fixed: true` marks what was changed before the last tuning and stands as well; set it to keep a row as it is, delete it
# to let the row be chosen again.
# saves_ms, loss: of the row's choice alone, by the tables; together they differ, see `ms` and `loss` at the top.
# loss: divergence from the dense network on calibration images. step: widths that suit the target are multiples of it.
# layers: `precision` is int8 (or fp8), fp16 or fp32 for a layer, the same for all layers of a `region`; `sparse: true` makes
# a weight 2:4 sparse. saves_ms and loss are those of INT8 (FP8), or of 2:4, for the whole region.
# inside: the block that takes the group with it. recovery: options of Distill, for training after the repair; {{}} for its
# defaults. Tuning anew keeps it, and the options under `repair` unless it gets others.
"""


class Row(Section):
    """One group of a plan file. Only `keep`, `prune` and `fixed` have an effect; the other fields are information.

    - keep: number of indices that stay. prune: false keeps all of them.
    - fixed (tuned plans): whether tuning anew keeps the width although it is the proposed one.
    - size: number of indices of the group. proposed: `keep` when the plan was written.
    - kind, step: kind of the group; widths that suit the target are multiples of step.
    - saves_macs: share of the dense program's MACs that this removal saves by itself.
    - saves_ms, loss (tuned plans): time saved and loss caused by this width alone.
    - inside (tuned plans): the block whose removal removes the group.
    - why (tuned plans): why there is no loss.
    """

    name: str
    keep: PositiveInt
    size: PositiveInt
    prune: bool = True
    fixed: bool = False
    proposed: PositiveInt | None = None
    kind: str = ""
    step: PositiveInt = 1
    saves_macs: float = 0.0
    saves_ms: float | None = None
    loss: float | None = None
    inside: str | None = None
    why: str | None = None

    @property
    def width(self) -> int:
        """The number of indices that the group keeps."""
        return self.keep if self.prune else self.size

    @property
    def edited(self) -> bool:
        """Whether the row was changed after the plan was written."""
        return self.width != self.proposed


class BlockRow(Section):
    """One block of a tuned plan. Only `goes` and `fixed` have an effect.

    - goes: whether the block is removed. proposed: `goes` when the plan was written.
    - fixed: whether tuning anew keeps `goes` although it is the proposed one.
    - saves_ms, loss: time saved and loss caused by removing this block alone.
    - why: why the block cannot be removed, or why there is no loss.
    """

    name: str
    goes: bool
    fixed: bool = False
    proposed: bool = False
    kind: str = ""
    saves_ms: float | None = None
    loss: float | None = None
    why: str | None = None


class LayerRow(Section):
    """One layer of a tuned plan. Only `precision`, `sparse` and `fixed` have an effect.

    - name: the layer's weight. region: the first weight of the layers that must have the same precision, since INT8 or FP8
      values pass between them.
    - precision: "int8", "fp8", "fp16" or "fp32". proposed: `precision` when the plan was written.
    - sparse: whether the weight becomes 2:4 sparse. proposed_sparse: `sparse` when the plan was written.
    - fixed: whether tuning anew keeps `precision` and `sparse` although they are the proposed ones.
    - saves_ms, loss: time saved and loss caused by INT8 or FP8 (of the whole region), or by 2:4, alone.
    - inside: the block whose removal removes the layer.
    - why: why the layer stays as it is, or why there is no loss.
    """

    name: str
    precision: Precision | None = None
    proposed: Precision | None = None
    sparse: bool | None = None
    proposed_sparse: bool | None = None
    fixed: bool = False
    region: str | None = None
    saves_ms: float | None = None
    loss: float | None = None
    inside: str | None = None
    why: str | None = None


class Repairing(Section):
    """How indices are ranked (see `RemoveChannels`), and the number of images for ranking and repair."""

    importance: str = "repair"
    samples: PositiveInt = 64


class Tuned(Section):
    """What a tuned plan was made for, and what its network reaches.

    - model: a code of the names and shapes of the program's tensors.
    - target, precision: device and precision. by: source of the times of layers. method: how the choice was found.
    - met: whether the budget is met, within a tenth. met_by: whether a "measured" or a "predicted" time tells.
    - ms: milliseconds of the dense network, asked for, predicted by the tables, and achieved; `measured` tells whether
      achieved was measured. The true times lie mostly from dense_low to dense_high, from predicted_low to predicted_high,
      and from low to high.
    - loss: divergence from the dense network in nats, predicted and measured; `images` is the number of images, and
      `held_out` tells whether the repair did not use them. `points` (if asked for) is what the metric loses, in hundredths.
    """

    model: str
    target: str
    precision: str
    by: str
    method: str
    met: bool
    met_by: Literal["measured", "predicted"] = "predicted"
    ms: dict[str, float | bool | None]
    loss: dict[str, float | int | bool | None]


class Frozen(Section):
    """A group that cannot shrink. why: the reason."""

    name: str
    kind: str
    size: PositiveInt
    why: str


class Plan(Section):
    """The content of a plan file.

    - groups, frozen: groups that can shrink, and groups that cannot.
    - tuned, repair, blocks (written by `graphcomb tune`): figures, settings of the repair, and blocks.
    - recipe (written by `graphcomb tune`): model, data and other fields that `graphcomb run` needs.
    - recovery: options of `Distill` for training after the repair, {} for its defaults; None for no training.
    """

    tuned: Tuned | None = None
    recipe: dict[str, Any] | None = None
    repair: Repairing = Repairing()
    recovery: dict[str, Any] | None = None
    blocks: list[BlockRow] = Field(default_factory=list)
    groups: list[Row]
    layers: list[LayerRow] = Field(default_factory=list)
    frozen: list[Frozen] = Field(default_factory=list)

    def save(self, path: str | Path) -> Path:
        """Write the plan as an editable YAML file and return the path."""
        path = Path(path)
        values = self.model_dump(exclude_none=True)
        for row in (row for table in ("blocks", "groups", "layers") for row in values[table]):
            if not row["fixed"]:
                del row["fixed"]
        head = {key: values[key] for key in ("tuned", "recipe", "repair", "recovery") if key in values}
        text = TUNED.format(name=path.name, target=self.tuned.target if self.tuned else "the target")
        text += yaml.safe_dump(head, sort_keys=False, default_flow_style=None, width=120)
        with replacing(path) as part:
            part.write_text(
                text + _tables({key: values[key] for key in ("blocks", "groups", "layers", "frozen") if key in values})
            )
        return path

    @property
    def decided(self) -> Decision:
        """The blocks that the plan removes and the widths that it sets. Raises BadInput for two rows of the same thing, and
        for a plan that sets the width of a group whose block it removes."""
        self._check_once()
        gone, fixed = {b.name for b in self.blocks if b.goes}, self.fixed
        for row in self.groups:
            if row.inside in gone and row.width != row.size and row.name in fixed.widths:
                raise BadInput(
                    f"plan: {row.name} keeps {row.width}, and its block {row.inside} goes; keep the block, or leave the row"
                )
        widths = {r.name: r.width for r in self.groups if r.width != r.size and r.inside not in gone}
        layers = [row for row in self.layers if row.inside not in gone]
        for layer in self.layers:
            changes = [str(layer.precision)] if layer.precision and layer.name in fixed.precisions else []
            changes += ["2:4 sparse"] if layer.sparse and layer.name in fixed.sparse else []
            if layer.inside in gone and changes:
                raise BadInput(
                    f"plan: {layer.name} becomes {changes[0]}, and its block {layer.inside} goes; keep the block, or leave "
                    "the row"
                )
        base = self.tuned.precision if self.tuned else "fp32"
        precisions = {r.name: r.precision for r in layers if r.precision not in (None, base)}
        sparse = tuple(r.name for r in layers if r.sparse)
        return Decision(tuple(b.name for b in self.blocks if b.goes), widths, precisions, sparse)

    @property
    def fixed(self) -> Fixed:
        """The decisions by hand: rows that were changed after the plan was written, and rows that are marked as fixed."""
        return self._changed(marked=True)

    def _changed(self, marked: bool) -> Fixed:
        """The rows that were changed after the plan was written, and those that are marked as fixed, if these count."""
        widths = {r.name: r.width for r in self.groups if r.edited or (marked and r.fixed)}
        blocks = {b.name: b.goes for b in self.blocks if b.goes != b.proposed or (marked and b.fixed)}
        precisions = {
            r.name: r.precision
            for r in self.layers
            if r.precision and (r.precision != r.proposed or (marked and r.fixed))
        }
        sparse = {
            r.name: bool(r.sparse)
            for r in self.layers
            if r.sparse != r.proposed_sparse or (marked and r.fixed and r.sparse is not None)
        }
        return Fixed(widths, blocks, precisions, sparse)

    def _check_once(self) -> None:
        """Raise BadInput for two rows of one block or group, or with two precisions or sparsities of one layer."""
        decisions = [
            *(("block", b.name) for b in self.blocks), *(("group", g.name) for g in self.groups),
            *(("precision of", name) for name, value in {(r.name, r.precision) for r in self.layers} if value is not None),
            *(("sparsity of", name) for name, value in {(r.name, r.sparse) for r in self.layers} if value is not None),
        ]  # fmt: skip
        if twice := [f"{what} {name}" for (what, name), count in Counter(decisions).items() if count > 1]:
            raise BadInput(f"plan: two rows for the {twice[0]}; delete one")

    def check_sizes(self, comb: Comb) -> None:
        """Raise BadInput for a row of a group that the program does not have, or has in another size."""
        sizes = {g.name: g.size for g in comb.groups}
        for row in self.groups:
            if row.name not in sizes:
                raise BadInput(f"plan: no group {row.name!r} in this program; graphcomb comb lists them")
            if row.size != sizes[row.name]:
                raise BadInput(f"plan: {row.name}: size is {sizes[row.name]} in this program, not {row.size}")

    def passes(self, program: Program) -> list[Pass]:
        """Return the passes that apply the plan to its program.

        Raises BadInput for a plan of `graphcomb plan`, a plan for another program, a width or block that is not possible,
        and a contradiction in the plan.
        """
        if self.tuned is None:
            raise BadInput(
                "plan: written by `graphcomb plan` for the recipe's own passes; `graphcomb tune` writes whole ones"
            )
        if self.tuned.model != code_of_model(program):
            raise BadInput("plan: of another model than this one; tune this one, or run the plan's own")
        decided = self.decided
        space = Space(program, alignment=1, more={name: [n] for name, n in decided.widths.items()}, lazy=True)
        self.check_sizes(space.comb)
        precisions, sparse = decided.precisions, dict.fromkeys(decided.sparse, True)
        check_fixed(space, Fixed(decided.widths, dict.fromkeys(decided.blocks, True), precisions, sparse))
        steps = passes(space, decided, self.repair.importance, self.repair.samples)
        recovery = [] if self.recovery is None else [parse_pass(Distill, self.recovery, "plan.recovery")]
        return [*steps, *recovery]

    def figures(self) -> dict[str, Any] | None:
        """Return the plan's figures for summary.json (`Planned`); None for a plan of `graphcomb plan`."""
        if self.tuned is None:
            return None
        changes = [
            {"what": b.name, "option": "goes", "saves_ms": b.saves_ms, "loss": b.loss} for b in self.blocks if b.goes
        ]
        changes += [
            {"what": r.name, "option": f"{r.width} of {r.size}", "saves_ms": r.saves_ms, "loss": r.loss}
            for r in self.groups
            if r.name in self.decided.widths
        ]
        changes += [
            {"what": r.name, "option": "2:4" if r.sparse else r.precision, "saves_ms": r.saves_ms, "loss": r.loss}
            for r in self.layers
            if r.sparse or r.name in self.decided.precisions
        ]
        values = self.tuned.model_dump(exclude={"model"})
        return values | {"edited": self._changed(marked=False) != Fixed(), "changes": changes}

    def applied(self, job: Job) -> Recipe:
        """Return the recipe of a job with the passes of the plan. Raises what `passes` raises, and BadInput for another
        target than the plan's."""
        self._check_target(job.target.name)
        return job.recipe.model_copy(update={"passes": self.passes(job.program)})

    def _check_target(self, name: str | None) -> None:
        if self.tuned is not None and name not in (None, self.tuned.target):
            raise BadInput(f"plan: for target {self.tuned.target}, not {name}; tune for this one")

    def run(self, program: Program, context: Context | None = None, **fields: Any) -> PassResult:
        """Apply the plan to its program; every pass is verified. context, fields: as for `Pipeline.run`; the target may be a
        name, and without one, as without a dtype, it is the plan's.

        The record of the result has the records of the passes (`passes`), all their changes (`changed`), and the figures of
        the plan (`tuned`). Raises what `passes` and `Pipeline.run` raise, and BadInput for another target than the plan's.
        """
        context = (context or Context()).replaced("Plan.run", **fields)
        steps = self.passes(program)
        assert self.tuned is not None  # else there are no passes
        target = self.tuned.target if context.target is None else context.target
        target = get_target(target) if isinstance(target, str) else target
        self._check_target(getattr(target, "name", None))
        # The default of a context's dtype says nothing, since it cannot be told from the same dtype on purpose.
        dtype = self.tuned.precision if context.dtype == Context.dtype and "dtype" not in fields else context.dtype
        context = context.replaced("Plan.run", target=target, dtype=dtype)
        result = Pipeline(steps).run(program, context)
        changed = [row for record in result.records for row in record.get("changed", [])]
        record = {
            "pass": "Plan", "changed": changed, "passes": result.records, "tuned": self.tuned.model_dump(),
            "cost": {"before": program.cost(), "after": result.program.cost()},
        }  # fmt: skip
        return PassResult(result.program, record, _removed(program, result.records))


def _removed(program: Program, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, list[int]]]:
    """Return the removed indices of the program's tensors; empty after `PruneDepth`, whose merged layers are new tensors."""
    shapes = {name: tuple(t.shape) for name, t in program.module().state_dict().items()}
    merged = any(record["pass"] == "PruneDepth" for record in records)
    removed: dict[str, dict[int, list[int]]] = next((r["removed"] for r in records if r.get("removed")), {})
    return {} if merged else {name: lost for name, lost in removed.items() if name in shapes}


def code_of_model(program: Program) -> str:
    """Return a code of the names and shapes of a program's tensors. It does not depend on the weights, so a plan fits every
    set of weights of the same network."""
    shapes = sorted((name, tuple(t.shape)) for name, t in program.module().state_dict().items())
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]


def make_plan(job: Job) -> tuple[list[dict[str, Any]], list[Block]]:
    """Return what the recipe's first RemoveChannels would do, group by group (see `RemoveChannels.plan`), and the blocks of
    the network if the recipe has a PruneDepth. Raises BadInput for a recipe with neither."""
    removal = next((p for p in job.recipe.passes if isinstance(p, RemoveChannels)), None)
    depth = any(isinstance(p, PruneDepth) for p in job.recipe.passes)
    if removal is None and not depth:
        raise BadInput("passes: no RemoveChannels in the recipe and no PruneDepth, so there is nothing to plan")
    return removal.plan(job.program, job.context()) if removal else [], find_blocks(job.program) if depth else []


def write_plan(rows: list[dict[str, Any]], path: Path, blocks: Sequence[Block] = ()) -> None:
    """Write the rows as an editable YAML file with one group per line; blocks are comments."""
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
        text += _tables({"groups": groups, "frozen": frozen})
        text += (BLOCKS + "".join(f"# - {line}\n" for line in _lines(listed))) if listed else ""
        part.write_text(text)


def _tables(tables: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return lists of rows as YAML, with one row per line."""
    text = ""
    for title, entries in tables.items():
        lines = _lines(entries)
        text += f"{title}:\n" + "".join(f"- {line}\n" for line in lines) if lines else f"{title}: []\n"
    return text


def _lines(entries: list[dict[str, Any]]) -> list[str]:
    return [yaml.safe_dump(e, default_flow_style=True, sort_keys=False, width=10**6).strip() for e in entries]


def load_plan(path: str | Path) -> Plan:
    """Read a plan file. Raises BadInput, which names the file and the path of the first wrong field."""
    tree = read_yaml(path)
    try:
        return Plan.model_validate(tree)
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error, Plan)}") from error


def read_plan(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a plan file for `RemoveChannels` (`Context.plan`). Raises what `load_plan` and `rows_of` raise."""
    return rows_of(load_plan(path))


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    """Return the rows of a plan for `RemoveChannels` (`Context.plan`). Raises BadInput for two rows of one group."""
    _ = plan.decided  # contradictions are errors
    return [row.model_dump(include={"name", "keep", "prune", "proposed"}) for row in plan.groups]
