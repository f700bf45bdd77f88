"""The pass that repairs: layer after layer, the weights that bring the smaller network nearest to the dense one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from ...graph.compat import exact_kernels
from ...graph.errors import BadInput
from ...graph.nodes import arguments, fetch
from ...graph.program import Program
from ...graph.sparse import sparse_weights
from ...graph.verify.removal import composed
from ..base import Change, Context, Pass, PassResult, check_field
from ..common.feed import check_inputs
from ..common.processes import accelerator, placed, summed
from ..common.repeat import seeded
from ..common.scoring import bar, evaluating
from ..common.weights import check_included, layers, selected
from .attention import Logits, Mixing, find_logits
from .consumers import Consumer, Pair, Removed, choices, find, norm_of, unchanged
from .images import Images, by_sample, spread, take_images
from .least_squares import START, Fit, Stack, Sums, fit
from .rows import CHECKED, ENOUGH, MANY, PIECE, Rows, parts, rows_of_inputs, rows_of_outputs, some_positions
from .stepwise import Memory, Stepwise


@dataclass(frozen=True)
class Repair(Pass):
    """Give every layer behind a removal the weights that reproduce the dense network best.

    A layer `y = W x + b` read channels that are gone, or its inputs have changed. From unlabelled images, with `x` of the
    smaller network as repaired so far and `y` of the dense one, its best weights have a closed form (`least_squares`).
    Layers are repaired in the order they run, so that each makes up for what those before it could not. These are linear
    layers and convolutions, grouped and depthwise ones too; for k x k kernels with more than `unknowns` entries an output,
    and for transposed convolutions, all kernel positions share one map between channels, if the layer is better with it. If
    a layer has no bias, the BatchNorm behind it takes the constant. A layer that goes into a sum, directly or through that
    BatchNorm, is fitted to the dense sum less the other operand, and so makes up for what that lacks, as behind a removed
    block; a layer that stands for a merged block is fitted to the block's output. Where an operator such as `topk` chooses
    indices, the smaller network takes the dense one's while it is repaired, so that the same rows are compared. Where
    queries and keys lost channels, the projection of the queries takes the mix of the remaining channels that brings the
    logits nearest (`attention`). Nothing changes in front of the first removal, and no layer changes that would become
    worse on held-out images.

    samples: images to take from the data; labels are never needed. ridge: how strongly weights are held where they are, as
    a share of the inputs' mean squares; None chooses it for each layer by holding out half of the images. unknowns: see
    above. memory: gigabytes of activations in memory; the rest goes to temporary files. include, exclude: patterns over
    weight names; each pattern of `include` must match one.

    The dense program is the context's teacher. Left alone, with the reason in the record: weights that are used more than
    once, computed or quantised, layers that the dense network does not have, activations that are not finite, queries with
    a norm or a rotation behind their projection. Zeros of `Sparsify` stay zero. Raises BadInput without data or teacher.

    The record has, as `repaired`, for each layer its squared error against the dense one: `before`, `predicted` by the
    closed form and `after` (measured), and `held_out` before and after, as shares of the variance of what it is fitted to
    (where nothing takes up a constant, of the mean square; None where that is zero). Of a shared map, `predicted` and
    `held_out` are those of its `inputs`. `sum` names the addition that a layer was fitted to, less its other operand,
    `logits` the attention, `unproven` how many inputs varied too little for the weights that would be best, and keep theirs,
    `few` says what too few images mean, `kept` why a layer stayed as it was. Source: least-squares reconstruction as in
    OSSCAR (arXiv 2403.12983) and CORP (arXiv 2602.05243); the sequential form with held-out ridge is ours.
    """

    samples: int = 256
    ridge: float | None = None
    unknowns: int = 4608
    memory: float = 4.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_field(self, "samples", self.samples >= 1, "a whole number, at least 1")
        check_field(self, "ridge", self.ridge is None or self.ridge >= 0, "a share of at least 0, or null")
        check_field(self, "unknowns", self.unknowns >= 1, "at least 1")
        check_field(self, "memory", self.memory >= 0, "gigabytes, at least 0")

    def run(self, program: Program, context: Context) -> PassResult:
        dense = context.teacher
        if dense is None:
            raise BadInput("Repair: needs the dense program to compare with; pass teacher=")
        check_inputs(dense, program)
        check_included(self, self.include, *layers(program))
        result = program.copy()
        record = self.apply(dense, result, since(dense, program), context)
        better = (row for row in record["repaired"] if "kept" not in row)
        changed = [Change(row["what"], {key: row[key] for key in ("before", "after")}) for row in better]
        return PassResult(result, record | {"changed": changed})

    def images(self, program: Program, context: Context) -> Images:
        """The images that a repair uses, on the process's device. Raises BadInput without data, and where all are the same,
        so that one half would judge what the other has seen."""
        if context.data is None:
            raise BadInput("Repair: needs images (labels are not needed); pass data=")
        with seeded(context.seed, context.data):
            images = take_images(program, context, self.samples)
        if images.count > 1 and not images.vary:
            raise BadInput("data: all images are the same; give images with variety")
        return images

    def apply(
        self, dense: Program, smaller: Program, removed: Removed, context: Context, images: Images | None = None
    ) -> dict[str, Any]:
        """Change the weights of `smaller` in place; returns the record.

        removed: what `smaller` lost, in the numbering of `dense`. images: from an earlier call of `images`, by default new
        ones.
        """
        images = images or self.images(smaller, context)
        with ExitStack() as stack:
            for program in (dense, smaller):
                module = program.graph_module  # its values have the shapes after the removal
                stack.enter_context(evaluating(module))
                stack.enter_context(placed(module, accelerator().device))
            stack.enter_context(torch.no_grad())
            stack.enter_context(exact_kernels())
            return _Run(self, dense, smaller, removed, context, images).record()


def since(dense: Program, program: Program) -> Removed:
    """What the passes removed since both programs were one, in the dense program's numbering. Raises BadInput if the dense
    program lost something of its own."""
    pairs = zip(dense.history, program.history, strict=False)
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if any(record.get("removed") for record in dense.history[common:]):
        raise BadInput("teacher: it lost channels that the program still has; pass the network that was pruned")
    lost: dict[str, dict[int, list[int]]] = {}
    for record in program.history[common:]:
        for name in _replaced(record):
            lost.pop(name, None)  # the new layer's channels are others
        lost = composed([lost, record.get("removed") or {}])
    return lost


def _replaced(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the weights that a pass replaced by those of several layers in one, from its record."""
    for row in (*record.get("changed", ()), *record.get("merge", {}).get("changed", ())):
        layers_of = [part for part in row.get("rule", "").split(" + ") if part != "batch_norm"]
        if "into" in row and (len(layers_of) != 1 or layers_of[0].startswith("sum")):
            yield row["into"]


class _Run:
    """One repair: the dense and the smaller network side by side over the same images."""

    def __init__(
        self, options: Repair, dense: Program, smaller: Program, removed: Removed, context: Context, images: Images
    ):
        self.options, self.context, self.images = options, context, images
        self.module = smaller.module()
        memory = Memory(options.memory * 1e9)
        self.dense = Stepwise(dense.module(), self.images.inputs, memory)
        self.smaller = Stepwise(self.module, self.images.inputs, memory)
        self.same = unchanged(dense.module(), self.module)
        self.choices = choices(dense.module(), self.module, self.same)
        self.sparse, self.start = set(sparse_weights(smaller)), START
        pair = Pair(dense, self.module, removed, self.same, self.sparse, options.unknowns)
        consumers, self.refused = find(pair)
        logits, unmixed = find_logits(pair)
        self.refused += unmixed
        candidates: list[Consumer | Logits] = [*consumers, *logits]
        chosen = [c for c in candidates if selected([c.weight], options.include, options.exclude)]
        self.layers = sorted(chosen, key=lambda c: self.smaller.place[c.node])
        for node in (*self.choices.values(), *(node for layer in self.layers for node in _goals(layer))):
            self.dense.hold(node)  # the dense network may run its layers in another order
        shared = [c for c in consumers if not c.whole]
        self.full = {c.weight: fetch(dense.module(), str(arguments(c.twin)["weight"].target)) for c in shared}

    def record(self) -> dict[str, Any]:
        rows = []
        with bar(self.context.progress and accelerator().is_main_process, "repair", len(self.layers)) as update:
            for i, layer in enumerate(self.layers):
                self._advance(layer.node)
                for node in _goals(layer):
                    self.dense.run_through(node)
                row = self._repair(layer) if isinstance(layer, Consumer) else self._mix(layer)
                if row is None:
                    self.refused.append({"what": layer.weight, "why": "its inputs or outputs are not finite numbers"})
                else:
                    rows.append(row)
                for node in _goals(layer):
                    self.dense.release(node)
                update(i + 1, layer.weight)
        return {"samples": self.images.count, "repaired": rows, "refused": self.refused}

    def _advance(self, node: fx.Node) -> None:
        """Run the smaller network up to a node; what is the same in both networks is computed once."""
        while self.smaller.position < self.smaller.place[node]:
            following = self.smaller.nodes[self.smaller.position]
            twin = self.same.get(following) if following.op != "get_attr" else None  # a repair may change a parameter
            twin = twin or self.choices.get(following)
            if twin is not None:
                self.dense.run_through(twin)
            self.smaller.step(self.dense.values.get(twin) if twin is not None else None)
            if following in self.choices:
                self.dense.release(self.choices[following])

    def _repair(self, consumer: Consumer) -> dict[str, Any] | None:
        sums = self._sums(consumer)
        if sums is None:
            return None
        weight, bias = self._as_rows(consumer)
        fitted = fit(sums, weight, bias, self.options.ridge, self._fixed(consumer), self.start)
        self.start = fitted.ridge if self.options.ridge is None and fitted.helps else START
        row = _row(consumer, fitted, self.images.count)
        if not consumer.whole:
            return self._share(consumer, fitted, row)
        if fitted.helps:
            self._write(consumer, fitted)
            self.smaller.step()
            row["after"] = self._measured(consumer, fitted) * fitted.rows / fitted.total if fitted.total else None
        else:
            row |= {"predicted": row["before"], "after": row["before"], "kept": fitted.why_not}
        return row

    def _share(self, consumer: Consumer, fitted: Fit, row: dict[str, Any]) -> dict[str, Any]:
        """Multiply a shared map into a layer unless that makes the layer worse, which the closed form does not tell: it is
        that of the inputs. row: of the record, with the errors of the inputs."""
        for node in consumer.node.all_input_nodes:
            self.smaller.hold(node)
        self.smaller.step()
        before = after = self._outputs_apart(consumer)
        why = fitted.why_not
        if fitted.helps:
            parameter = fetch(self.module, consumer.weight)
            old = parameter.clone()
            self._write(consumer, fitted)
            self.smaller.again(consumer.node)
            after = self._outputs_apart(consumer)
            why = "the layer is no better with the map that is best for its inputs"
            if not after < before:
                parameter.copy_(old)
                self.smaller.again(consumer.node)
                after = before
        for node in consumer.node.all_input_nodes:
            self.smaller.release(node)
        inputs = {key: row[key] for key in ("before", "predicted", "held_out")}
        row |= {"before": before, "predicted": None, "after": after, "held_out": [None, None], "inputs": inputs}
        return row if after < before else row | {"kept": why}

    def _outputs_apart(self, consumer: Consumer) -> float:
        """The squared error of a layer's outputs, as a share of the dense ones' variance (0 if that is 0)."""
        sums = torch.zeros(4, len(consumer.outputs), dtype=torch.float64)
        for i, value in enumerate(self.smaller.values[consumer.node]):
            chosen = self._half(i, len(value)) >= 0
            y = consumer.left(self.dense.values[consumer.twin][i], 1)[chosen.to(value.device)].double()
            error = value[chosen.to(value.device)].double() - y
            parts = (error.square(), torch.ones_like(y), y, y.square())
            sums += torch.stack([t.movedim(1, 0).flatten(1).sum(1).cpu() for t in parts])
        error, count, total, squares = summed(sums)
        variance = float((squares - total.square() / count.clamp(min=1)).sum())
        return float(error.sum()) / variance if variance > 0 else 0.0

    def _mix(self, logits: Logits) -> dict[str, Any] | None:
        """Repair the queries of an attention, head by head; None if numbers are not finite."""
        mixing = Mixing(logits, self.smaller.values, self.dense.values, self.images.halves)
        losses, ridges, total, count = torch.zeros(5, dtype=torch.float64), [], 0.0, 0
        for head in range(len(logits.rows)):
            sums = _everywhere(mixing.sums(head))
            if sums is None:
                return None
            fitted = mixing.fit(sums, self.options.ridge)
            total, count = total + fitted.total, count + fitted.rows
            held_before, held = fitted.held_before or 0.0, fitted.held or 0.0
            head_losses = [fitted.before, fitted.predicted, fitted.predicted, held_before, held]
            if fitted.helps:
                mix = fitted.weight.unflatten(-1, (logits.rows.shape[1], -1))[0, 0]
                head_losses[2] = float(summed(mixing.measured(head, mix)))
                mixing.fold(self.module, head, mix)
                ridges.append(fitted.ridge)
            else:
                head_losses[1:] = [fitted.before, fitted.before, held_before, held_before]
            losses += torch.tensor(head_losses, dtype=torch.float64)
        before, predicted, after, *held_out = [loss / total if total else None for loss in losses.tolist()]
        row = {
            "what": logits.weight, "logits": logits.node.name, "rows": count, "unknowns": logits.unknowns,
            "ridge": max(ridges, default=None), "before": before, "predicted": predicted, "after": after,
            "held_out": held_out,
        } | few(count, logits.unknowns, self.images.count)  # fmt: skip
        left = len(logits.rows) - len(ridges)
        return row | ({"kept": f"{left} heads are no better on held-out images"} if left else {})

    def _sums(self, consumer: Consumer) -> tuple[Sums, Sums] | tuple[Stack, Stack] | None:
        """The sums over all images, or the rows if these are fewer than the inputs, for both halves; None if numbers are not
        finite."""
        x = self.smaller.values[consumer.x]
        first = self._by_sample(consumer.x, x[0], 0)
        groups, count, unknowns = rows_of_inputs(consumer, first[:1]).shape
        outputs = self._target_rows(consumer, 0, slice(1)).shape[-1]
        many = self._rows(0, len(first), count)
        few = many < unknowns and accelerator().num_processes == 1
        make = Stack if few and consumer.weight not in self.sparse else Sums.zeros
        halves = tuple(make(groups, unknowns, outputs, first.device) for _ in range(2))
        waiting, wanted = [Rows(sums) for sums in halves], max(MANY, ENOUGH * unknowns)
        generator = torch.Generator().manual_seed(self.context.seed)
        for i in range(len(x)):
            batch = self._by_sample(consumer.x, x[i], i)
            half = self._half(i, len(batch))
            positions = some_positions((len(half), count), many, wanted, generator)
            size = groups * unknowns * (count if positions is None else positions.shape[1])
            for k, sums in enumerate(waiting):
                for part in parts(half, k, PIECE // size):
                    chosen = None if positions is None else positions[part].to(batch.device)
                    sums.add(
                        rows_of_inputs(consumer, batch[part], chosen), self._target_rows(consumer, i, part, chosen)
                    )
        for rows in waiting:
            rows.flush()
        return _everywhere(halves)  # type: ignore[arg-type]

    def _wanted(
        self, consumer: Consumer, batch: int, part: slice | Tensor = slice(None)
    ) -> tuple[Tensor, Tensor | None]:
        """The dense values that samples of a batch are fitted to, and what the smaller network adds to the layer's output,
        or None."""
        y = self._by_sample(consumer.goal, self.dense.values[consumer.goal][batch], batch)[part]
        if consumer.beside is None:
            return y, None
        return y, self._by_sample(consumer.beside, self.smaller.values[consumer.beside][batch], batch)[part]

    def _by_sample(self, node: fx.Node, value: Tensor, batch: int) -> Tensor:
        return by_sample(value, len(self.images.halves[batch]), node)

    def _half(self, batch: int, entries: int) -> Tensor:
        return spread(self.images.halves[batch], entries)

    def _rows(self, batch: int, entries: int, count: int) -> int:
        """How many rows the samples of all batches have, if a batch has so many entries, samples alone or with positions,
        and each of these `count` rows."""
        return self.images.count * entries * count // len(self.images.halves[batch])

    def _target_rows(
        self, consumer: Consumer, batch: int, part: slice | Tensor, positions: Tensor | None = None, whole: bool = False
    ) -> Tensor:
        """The rows that the layer is fitted to; with `whole`, a bias that cannot change is part of them, else it is
        subtracted."""
        y, beside = self._wanted(consumer, batch, part)
        if not consumer.whole:
            return rows_of_inputs(consumer, y, positions)
        rows, bias = rows_of_outputs(consumer, y, positions), arguments(consumer.node)["bias"]
        if beside is not None:
            rows = rows - rows_of_outputs(consumer, beside, positions)
        if consumer.norm is not None:
            scale, mean, shift = norm_of(self.module, consumer.norm)
            return rows - (shift - scale * mean).reshape(consumer.groups, 1, -1).to(rows.dtype)
        if consumer.bias is None and bias is not None and not whole:
            rows = rows - fetch(self.module, str(bias.target)).reshape(consumer.groups, 1, -1)
        return rows

    def _as_rows(self, consumer: Consumer) -> tuple[Tensor, Tensor | None]:
        """The present weights `(groups, o, u)` and bias (or None); for a shared map, the choice of channels that they stand
        for."""
        if not consumer.whole:
            full = self.full[consumer.weight]
            channels = full.shape[0 if consumer.transposed else 1]
            choice = full.new_zeros(channels, len(consumer.inputs), dtype=torch.float64)
            choice[torch.from_numpy(consumer.inputs), torch.arange(len(consumer.inputs))] = 1
            return choice[None], None
        weight = fetch(self.module, consumer.weight).double().flatten(1).unflatten(0, (consumer.groups, -1))
        if consumer.norm is not None:
            weight = weight * norm_of(self.module, consumer.norm)[0].reshape(consumer.groups, -1, 1)
        if consumer.mean is not None:
            return weight, weight.new_zeros(weight.shape[:2])
        if consumer.bias is None:
            return weight, None
        return weight, fetch(self.module, consumer.bias).double().reshape(consumer.groups, -1)

    def _fixed(self, consumer: Consumer) -> Tensor | None:
        if consumer.weight not in self.sparse:
            return None
        weight = fetch(self.module, consumer.weight)
        return (weight == 0).flatten(1).unflatten(0, (consumer.groups, -1))

    def _write(self, consumer: Consumer, fitted: Fit) -> None:
        parameter = fetch(self.module, consumer.weight)
        if consumer.whole:
            if consumer.norm is not None and fitted.bias is not None:
                scale = norm_of(self.module, consumer.norm)[0].reshape(consumer.groups, -1)
                fitted = replace(fitted, weight=fitted.weight / scale[..., None], bias=fitted.bias / scale)
            parameter.copy_(fitted.weight.reshape(parameter.shape))
            if fitted.bias is not None and consumer.bias is not None:
                fetch(self.module, consumer.bias).copy_(fitted.bias.flatten())
            elif fitted.bias is not None and consumer.mean is not None:
                fetch(self.module, consumer.mean).sub_(fitted.bias.flatten())
            return
        # The map from the remaining channels to the original ones, less the choice of channels in the present weights.
        into = 0 if consumer.transposed else 1
        rest = fitted.weight[0] - self._as_rows(consumer)[0][0]
        full = (
            self.full[consumer.weight]
            .double()
            .index_select(1 - into, torch.from_numpy(consumer.outputs).to(rest.device))
        )
        parameter.add_(torch.tensordot(full, rest, ([into], [0])).movedim(-1, into).to(parameter.dtype))

    def _measured(self, consumer: Consumer, fitted: Fit) -> float:
        """The mean squared error of a row of the repaired layer, as the network computes it, on these images; if there are
        many rows, on other rows than those of the fit."""
        total = torch.zeros(2, dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.context.seed + 1)
        for i, value in enumerate(self.smaller.values[consumer.node]):
            value = self._by_sample(consumer.node, value, i)
            half = self._half(i, len(value))
            count = value[0].numel() // value.shape[-1 if consumer.linear else 1]
            positions = some_positions((len(half), count), self._rows(i, len(half), count), CHECKED, generator)
            for k in range(2):
                for part in parts(half, k, len(half)):
                    chosen = None if positions is None else positions[part].to(value.device)
                    error = rows_of_outputs(consumer, value[part], chosen)
                    if consumer.norm is not None:
                        scale = norm_of(self.module, consumer.norm)[0]
                        error = error * scale.reshape(consumer.groups, 1, -1).to(error.dtype)
                    error = error - self._target_rows(consumer, i, part, chosen, whole=True)
                    if consumer.mean is not None and consumer.norm is None and fitted.bias is not None:
                        error = error + fitted.bias[:, None].to(error.dtype)
                    total[0] += float(error.square().sum(dtype=torch.float64))
                    total[1] += error.shape[1]
        squares, rows = summed(total).tolist()
        return squares / rows


def _goals(layer: Consumer | Logits) -> tuple[fx.Node, ...]:
    """The dense nodes that a layer is compared with."""
    if isinstance(layer, Logits):
        return layer.goals
    return (layer.goal,) if layer.whole else (layer.goal, layer.twin)


Kind = TypeVar("Kind", Sums, Stack)


def _everywhere(halves: tuple[Kind, Kind]) -> tuple[Kind, Kind] | None:
    """The sums over all processes; None if numbers are not finite."""
    for sums in halves:
        if isinstance(sums, Sums) and accelerator().num_processes > 1:
            sums.join(summed)
    return halves if all(sums.finite for sums in halves) else None


def _row(consumer: Consumer, fitted: Fit, images: int) -> dict[str, Any]:
    def share(loss: float | None) -> float | None:
        return loss / fitted.total if fitted.total and loss is not None else None

    rows, unknowns = fitted.rows, fitted.weight.shape[-1]
    row: dict[str, Any] = {
        "what": consumer.weight, "rows": rows, "unknowns": unknowns, "ridge": fitted.ridge,
        "before": share(fitted.before), "predicted": share(fitted.predicted),
        "held_out": [share(fitted.held_before), share(fitted.held)],
    }  # fmt: skip
    if consumer.total is not None:
        row["sum"] = consumer.total.name
    if fitted.unproven:
        row["unproven"] = fitted.unproven
    return row | few(rows, unknowns, images)


def few(rows: int, unknowns: int, images: int) -> dict[str, str]:
    """A note for the record if there are too few images: fewer rows than unknowns, or nothing to hold out."""
    if images == 1:
        return {"few": "one image: nothing is held out, and the ridge decides"}
    if rows < unknowns:
        wanted = -(-unknowns * images // rows)
        return {"few": f"{rows} rows for {unknowns} unknowns: the ridge decides; {wanted} images would have as many"}
    return {}
