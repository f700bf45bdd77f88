"""Applies a sparsification method to the weights of a program, within a memory limit."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...graph.compat import exact_kernels
from ...graph.errors import Refused
from ...graph.nodes import fetch
from ...graph.program import Program
from ..base import Context
from ..common.processes import accelerator
from ..common.scoring import bar
from ..common.weights import WeightedLayer
from . import cap, ranking
from .finishing import finish_rows, sole_producers
from .layout import column_order, columns_of, from_blocks, rows_of, to_blocks
from .statistics import fisher
from .statistics.gradients import Gradients
from .statistics.moments import input_moments
from .statistics.unfold import check_again, check_finite
from .sweep import sweep

DAMPING = 1e-2  # relative to the mean of a diagonal
PROBE = 64  # number of gradients from which that mean is estimated
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Method:
    """A method by name, its goal (a share of zeros or a pattern) and its options (those of `Sparsify`).

    everywhere: whether all layers are ranked together. by_increments: cap ranks the entries of all blocks by what each adds
    to its block's loss (ours), else by the block's loss so far, as the paper's code does, which loses more. finish_rows:
    the share that this ranking takes off the mean loss of a nearly empty row's last weights (0: nothing).
    """

    name: str
    goal: float | ranking.Pattern
    everywhere: bool
    block: int
    gradients: Gradients
    damping: float | None
    dtype: str
    memory: float
    by_increments: bool = True
    finish_rows: float = 0.0

    @property
    def pattern(self) -> ranking.Pattern | None:
        """The goal if it is a pattern, else None."""
        return self.goal if isinstance(self.goal, tuple) else None


@dataclass(frozen=True)
class Piece:
    """A range of a layer's blocks of `size` weights, from block `start` to before block `stop`."""

    layer: WeightedLayer
    size: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def part(self) -> slice:
        return slice(self.start, self.stop)


class Solver:
    """Prunes the chosen layers of a program in place.

    probed: gradients that an earlier, smaller run over the data gave (0: none); a later run that gives another number is
    refused. seen: gradients or samples in the latest run. damping: λ, 0 for a method without one; see `Sparsify`.
    """

    def __init__(
        self, method: Method, program: Program, chosen: Sequence[WeightedLayer], context: Context, probed: int = 0
    ):
        self.method, self.program, self.context = method, program, context
        self.layers = {layer.name: layer for layer in chosen}
        module = program.module()
        self.weights = {name: fetch(module, name).detach() for name in self.layers}
        self.device = accelerator().device
        self.seen, self.probed = 0, probed
        self.damping = method.damping or 0.0
        self.last = bool(method.pattern)  # whether rows and blocks run over input channels fastest

    def run(self) -> float | None:
        """Prune. Returns the predicted rise of the loss, `1/2 dᵀ F d` with undamped `F`, for cap and woodfisher, else None.
        Raises BadInput for changing or non-finite data, Refused where rounding spoils the elimination."""
        with exact_kernels():
            if self.method.name in ("cap", "woodfisher"):
                return self._by_blocks()
            if self.method.name in ("fastcap", "sparsegpt"):
                self._by_sweeps()
            else:
                self._by_scores()
        return None

    def _write(self, name: str, blocks: Tensor) -> None:
        """Store a weight that is given as its rows or blocks."""
        value = from_blocks(blocks, self.layers[name].shape, self.last)
        fetch(self.program.module(), name).data.copy_(value)

    def _goal(self, names: Sequence[str]) -> int:
        """Number of weights that still have to go from these layers together."""
        assert isinstance(self.method.goal, float)
        total = sum(self.weights[n].numel() for n in names)
        return max(0, round(self.method.goal * total) - sum(int((self.weights[n] == 0).sum()) for n in names))

    def _scopes(self) -> list[list[str]]:
        """For each ranking, the names of the layers that are ranked together."""
        return [list(self.layers)] if self.method.everywhere else [[name] for name in self.layers]

    # ------------------------------------------------------------------------------------------------- cap, woodfisher
    def _by_blocks(self) -> float:
        """Two sweeps over the blocks, for the order in which entries go and for the update. All Fisher sums are kept in
        between if they fit into the memory, else made again from the same gradients."""
        method, batches, exact = self.method, self._batches(), self.method.name == "cap"
        self.damping = method.damping or DAMPING * self._mean_square() or 1e-8
        kept = self._collect(batches[0], "1/1") if len(batches) == 1 else None
        ranked: dict[Piece, tuple[Tensor, Tensor]] = {}
        for piece, sums in self._fishers(batches, kept, ""):
            ranked[piece] = self._rank(piece, sums)
            del sums
        masks = self._masks(ranked)
        updated: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        predicted = 0.0
        for piece, sums in self._fishers(batches, kept, " again"):
            old = self._blocks(piece)
            for part in fisher.chunks(piece.count, piece.size):
                w, mask = old[part].to(self.device), masks[piece][part].to(self.device)
                matrix = sums.matrix(part)
                new = cap.repair(w, matrix, mask) if exact else cap.step_once(w, sums.inverse(part), mask)
                matrix.diagonal(dim1=1, dim2=2).sub_(self.damping)
                predicted += float(cap.loss(new - w, matrix).sum())
                updated[piece.layer.name].append(new.to(old.device))
            del sums
        for name, blocks in updated.items():
            self._write(name, torch.cat(blocks))
        return predicted

    def _mean_square(self) -> float:
        """The mean square of a weight's gradient over all layers: λ stands for the curvature where gradients are silent,
        and one λ for all keeps such weights comparable. From gradients of its own, so that the memory limit does not change
        it."""
        few = replace(self.method.gradients, count=min(PROBE, self.method.gradients.count))
        squares, seen = few.mean_squares(self.program, list(self.layers), self.context, int(self.method.memory / 32))
        check_again(self.probed, seen)
        self.probed = seen
        sizes = {name: layer.size for name, layer in self.layers.items()}
        return sum(squares[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def _fishers(
        self, batches: Sequence[Sequence[Piece]], kept: Sequence[fisher.Fisher] | None, title: str
    ) -> Iterator[tuple[Piece, fisher.Fisher]]:
        """Yield each piece with its Fisher sums, kept or made now; memory never holds those of two batches."""
        if kept is not None:
            yield from zip(batches[0], kept, strict=True)
            return
        for i, batch in enumerate(batches):
            made = self._collect(batch, f"{i + 1}/{len(batches)}{title}")
            for piece in batch:
                yield piece, made.pop(0)

    def _blocks(self, piece: Piece) -> Tensor:
        return to_blocks(self.weights[piece.layer.name], piece.size, self.last)[piece.part]

    def _batches(self) -> list[list[Piece]]:
        """All blocks of all layers, divided into batches whose Fisher sums fit into the memory."""
        width = torch.finfo(DTYPES[self.method.dtype]).bits // 8
        working = 4 * fisher.CHUNK * 8 + sum(w.numel() for w in self.weights.values()) * 16
        budget = max(self.method.memory - working, self.method.memory / 4) * 7 / 8  # an eighth is for gradients
        batches: list[list[Piece]] = [[]]
        left = budget
        for layer in self.layers.values():
            size = min(self.method.block, layer.size)
            blocks, start = -(-layer.size // size), 0
            cost = fisher.Fisher.numbers(size, size, self.method.gradients.count) * width
            while start < blocks:
                fits = int(left // cost)
                if fits < 1 and batches[-1]:
                    batches.append([])
                    left = budget
                    continue
                take = min(max(fits, 1), blocks - start)
                batches[-1].append(Piece(layer, size, start, start + take))
                left -= take * cost
                start += take
        return batches

    def _collect(self, batch: Sequence[Piece], title: str) -> list[fisher.Fisher]:
        method = self.method
        dtype, count = DTYPES[method.dtype], method.gradients.count
        with torch.device(self.device):
            fishers = [fisher.Fisher(p.count, p.size, count, self.damping, dtype) for p in batch]
        alive = [(self._blocks(p) != 0).to(self.device, dtype) for p in batch]
        before, self.seen = self.seen, 0
        names = list(dict.fromkeys(p.layer.name for p in batch))
        stream = method.gradients.stream(self.program, names, self.context, int(method.memory / 32))
        with bar(self.context.progress, f"Sparsify: gradients {title}", count) as update:
            for gradients in stream:
                for piece, sums, mask in zip(batch, fishers, alive, strict=True):
                    samples = gradients[piece.layer.name]
                    blocks = torch.stack([to_blocks(g, piece.size, self.last)[piece.part] for g in samples])
                    sums.add(blocks.to(dtype) * mask)
                self.seen += len(samples)
                update(self.seen, "")
        check_again(before, self.seen)
        check_again(self.probed, min(self.seen, PROBE))
        for piece, sums in zip(batch, fishers, strict=True):
            check_finite(sums.sums, f"the statistics of {piece.layer.name} are")
        return fishers

    def _rank(self, piece: Piece, sums: fisher.Fisher) -> tuple[Tensor, Tensor]:
        """`(order, losses)` of the piece's blocks, both `(b, s)`: cap's elimination, or woodfisher's weights each by
        itself."""
        method, old = self.method, self._blocks(piece)
        ranked = []
        with bar(self.context.progress, f"Sparsify: {piece.layer.name}", piece.count) as update:
            for part in fisher.chunks(piece.count, piece.size):
                w = old[part].to(self.device, DTYPES[method.dtype])
                if method.name == "cap":
                    order, losses = self._eliminated(piece, w, sums.inverse(part))
                    if method.pattern is None and method.by_increments:
                        losses = ranking.increments(losses)
                else:
                    inverse = sums.inverse(part)
                    scores = w.square() / (2 * inverse.diagonal(dim1=1, dim2=2)).to(w.dtype)
                    losses, order = scores.masked_fill_(w == 0, torch.inf).sort(1)
                ranked.append((order.to("cpu", torch.int32), losses.float().cpu()))
                update(part.stop, "")
        return ranking.joined([o for o, _ in ranked], 0), ranking.joined([x for _, x in ranked], torch.inf)

    def _eliminated(self, piece: Piece, w: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """The result of `cap.eliminate`, in float64 if the method's precision does not suffice."""
        for dtype in dict.fromkeys((w.dtype, torch.float64)):
            try:
                return cap.eliminate(w.to(dtype), inverse.to(dtype, copy=True), w != 0, self.method.pattern)
            except cap.Imprecise as error:
                why = str(error)
        raise Refused(
            f"Sparsify: {piece.layer.name}: {why}: its Fisher matrix is too ill-conditioned with damping "
            f"{self.damping:.1e}; give a larger Sparsify.damping, or more gradients"
        )

    def _masks(self, ranked: dict[Piece, tuple[Tensor, Tensor]]) -> dict[Piece, Tensor]:
        """For each piece, the mask of zeros: those so far, and the cheapest prefixes of the blocks (or of the groups)."""
        method, masks = self.method, {}
        lengths: dict[Piece, Tensor] = {}
        if method.pattern is None:
            for names in self._scopes():
                pieces = [p for p in ranked if p.layer.name in names]
                if method.finish_rows:
                    ranked = ranked | self._finishing(pieces, ranked, self._goal(names))
                counts = ranking.prefixes([ranked[p][1] for p in pieces], self._goal(names))
                lengths |= dict(zip(pieces, counts, strict=True))
        for piece, (order, losses) in ranked.items():
            zero = self._blocks(piece).cpu() == 0
            if method.pattern is None:
                new = ranking.first(order, lengths[piece], piece.size)
            elif method.name == "cap":
                new = ranking.first(order, losses.isfinite().sum(1), piece.size)
            else:
                scores = torch.empty(len(order), piece.size).scatter_(1, order.long(), losses)
                scores.masked_fill_(zero, -1)
                new = ranking.lowest_of_groups(scores, method.pattern)
            masks[piece] = zero | new
        return masks

    def _finishing(
        self, pieces: Sequence[Piece], ranked: dict[Piece, tuple[Tensor, Tensor]], goal: int
    ) -> dict[Piece, tuple[Tensor, Tensor]]:
        """The pieces with new orders and losses by `finish_rows`; a row may extend from one piece into the next."""
        costs = torch.cat([ranked[piece][1].reshape(-1) for piece in pieces])
        price = float(costs.kthvalue(min(goal, int(costs.isfinite().sum()))).values) if goal else 0.0
        finished: dict[Piece, tuple[Tensor, Tensor]] = {}
        alone = sole_producers(self.program)
        for layer in dict.fromkeys(piece.layer for piece in pieces if piece.layer.name in alone):
            its = [piece for piece in pieces if piece.layer is layer]
            gone = torch.cat([self._blocks(piece).cpu() == 0 for piece in its])
            old = [ranked[piece] for piece in its]
            finished |= zip(its, finish_rows(old, gone, columns_of(layer), price, self.method.finish_rows), strict=True)
        return finished

    # -------------------------------------------------------------------------------------------- fastcap, sparsegpt
    def _by_sweeps(self) -> None:
        self.damping = self.method.damping or DAMPING
        batches = [list(self.layers.values())]
        if self.method.name == "sparsegpt":
            batches = _fitting(self.layers.values(), self.method.memory / 2)
        matrices = self._shared_fisher if self.method.name == "fastcap" else self._moments
        new = {}
        for batch in batches:
            for name, parts in matrices(batch).items():
                rows = rows_of(self.weights[name], self.last).to(self.device).clone()
                sizes = [int((rows[row, column] != 0).sum()) for row, column, _ in parts]
                shares = ranking.portions(0 if self.method.pattern else self._goal([name]), sizes)
                for (row, column, matrix), share in zip(parts, shares, strict=True):
                    damp = self.damping * float(matrix.diagonal().mean()) or 1.0
                    w = rows[row, column]
                    damped = matrix.double() + damp * torch.eye(len(matrix), device=matrix.device, dtype=torch.float64)
                    rows[row, column] = sweep(w, damped, share, self.method.pattern, w != 0)[0]
                new[name] = rows
        for name, rows in new.items():
            self._write(name, rows)

    def _shared_fisher(self, batch: Sequence[WeightedLayer]) -> dict[str, list[tuple[slice, slice, Tensor]]]:
        """For each layer and block of columns, the mean of `g gᵀ` over gradients and rows, in float64."""
        method = self.method
        matrices: dict[str, list[tuple[slice, slice, Tensor]]] = {}
        for layer in batch:
            width = columns_of(layer)
            parts = [slice(i, min(i + method.block, width)) for i in range(0, width, method.block)]
            sizes = [p.stop - p.start for p in parts]
            empty = [torch.zeros(s, s, device=self.device, dtype=torch.float64) for s in sizes]
            matrices[layer.name] = [(slice(None), p, e) for p, e in zip(parts, empty, strict=True)]
        stream = method.gradients.stream(self.program, list(matrices), self.context, int(method.memory / 32))
        with bar(self.context.progress, "Sparsify: gradients", method.gradients.count) as update:
            for gradients in stream:
                for name, columns in matrices.items():
                    rows = torch.cat([rows_of(g, self.last) for g in gradients[name]])
                    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # squares of halves underflow
                    for _, part, total in columns:
                        total += (rows[:, part].T @ rows[:, part]).double()
                self.seen += len(gradients[name])
                update(self.seen, "")
        for name, columns in matrices.items():
            for _, _, total in columns:
                check_finite(total, f"the statistics of {name} are")
                total /= self.seen * self.layers[name].shape[0]
        return matrices

    def _moments(self, batch: Sequence[WeightedLayer]) -> dict[str, list[tuple[slice, slice, Tensor]]]:
        parts = {}
        for name, matrices in self._inputs([x.name for x in batch], True).items():
            layer = self.layers[name]
            order = column_order(layer, self.last).to(matrices.device)
            height = layer.shape[0] // layer.groups
            rows = [slice(g * height, (g + 1) * height) for g in range(layer.groups)]
            parts[name] = [(rows[g], slice(None), matrices[g][order][:, order]) for g in range(layer.groups)]
        return parts

    def _inputs(self, names: Sequence[str], full: bool) -> dict[str, Tensor]:
        before = self.seen
        count, largest = self.method.gradients.count, int(self.method.memory / 32)
        moments, self.seen = input_moments(self.program, names, self.context, count, full, largest)
        check_again(before, self.seen)
        return moments

    # ------------------------------------------------------------------------------------------------ wanda, magnitude
    def _by_scores(self) -> None:
        scores = {name: rows_of(w, self.last).abs() for name, w in self.weights.items()}
        if self.method.name == "wanda":
            for name, squares in self._inputs(list(self.layers), False).items():
                order = column_order(self.layers[name], self.last).to(squares.device)
                lengths = squares[:, order].sqrt().to(scores[name])
                scores[name] = scores[name] * lengths.repeat_interleave(len(scores[name]) // len(lengths), 0)
        for name, w in self.weights.items():  # weights that are zero already rank first
            scores[name] = scores[name].masked_fill(rows_of(w, self.last) == 0, -1)
        if self.method.pattern:
            masks = {name: ranking.lowest_of_groups(s, self.method.pattern) for name, s in scores.items()}
        elif self.method.name == "wanda":
            goal = self.method.goal
            assert isinstance(goal, float)
            masks = {name: ranking.lowest_of_rows(rows, round(goal * rows.numel())) for name, rows in scores.items()}
        else:
            masks = {}
            for names in self._scopes():
                gone = sum(int((self.weights[n] == 0).sum()) for n in names)
                chosen = ranking.lowest([scores[n] for n in names], self._goal(names) + gone)
                masks |= dict(zip(names, chosen, strict=True))
        for name, mask in masks.items():
            self._write(name, rows_of(self.weights[name], self.last).masked_fill(mask, 0))


def _fitting(layers: Iterable[WeightedLayer], memory: float) -> list[list[WeightedLayer]]:
    """The layers in consecutive batches, of at least one layer each, whose moments fit into this many bytes together."""
    batches: list[list[WeightedLayer]] = []
    left = 0.0
    for layer in layers:
        cost = 4 * layer.groups * columns_of(layer) ** 2
        if not batches or cost > left:
            batches.append([])
            left = memory
        batches[-1].append(layer)
        left -= cost
    return batches
