"""Parity: does an engine compute what the program computes?

Measured on the program's example inputs, on fresh random ones, on other batch sizes where the batch is dynamic, and on
real samples where there are some; for each output, and for each of its channels by the channel's own scale: class
scores beside box coordinates are a thousand times smaller, and all the same as important. Source: ours.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...graph.compat import pytree
from ...graph.errors import BadInput, Refused
from ...graph.nodes import op_name
from ...graph.program import Program, flatten_outputs
from ..engines.base import Engine

SAMPLES = 16  # at most, of real data: enough to see a wrong file, few enough for a large network
# A channel with this many values has a scale of its own; one with fewer may be small by chance (a logit near zero).
MANY = 64
NEIGHBOURS = {True: 0.1, False: 0.5}  # how far up in the order of scales its neighbour is: with many values, with few
BESIDE = 2e-3  # of a larger channel's scale: the least that a channel's error is compared with, since both round alike
SEEN = 1e3  # times the least difference that counts: what an output reaches at least, for that to hold
# A channel's error is compared with its own small scale, and carries the rounding of what it was computed from.
CHANNEL, MOST = 10.0, 0.5  # times the tolerance, and at most so much of its scale
# A channel of many values follows the program's: rounding leaves a correlation near 1, another class's scores one near 0.
FOLLOWS, STEADY = 0.8, 0.01  # the least correlation, of what varies by more than this share of its scale
COSINE = 0.2  # the largest error, relative to the length of the output as a vector, that its cosine may say


@dataclass(frozen=True)
class OutputError:
    """How far one output is off.

    error: max |a - b| / max |b|; of integers and booleans the share that differ. channel: the worst channel's
    rms(a - b) / rms(b) over all its values, along any axis but the first, and `where` it is. correlation: the lowest of
    a channel with many values that vary, and the channel, `follows`. cosine: between the two outputs as vectors.
    samples: the error of each entry of the first axis. agreement: share of the positions where the largest of several
    scores is the same one, or as good as it (None where no axis holds scores). distances: of a quantised program, the
    squared distance to what it computes without quantisation, of the engine's outputs and of the program's own.
    """

    name: str
    error: float
    channel: float
    where: str
    correlation: float
    follows: str
    cosine: float
    samples: tuple[float, ...]
    agreement: float | None
    distances: tuple[float, float] | None = None

    @property
    def worst(self) -> float:
        """Of the output and its channels, in terms of the tolerance that would let it pass."""
        strays = (1 - self.correlation) / 2 if self.correlation < FOLLOWS else 0.0
        return max(self.error, self.channel / CHANNEL, strays)

    def wrong(self, tolerance: float, real: bool = False) -> str:
        """What exceeds the limits that follow from a tolerance, in words; empty when nothing does. real: the inputs
        are samples of the task, whose answers must agree too."""
        if not self.error <= tolerance:
            return f"by {_figure(self.error)} of the largest value of {self.name}"
        if not self.channel <= (limit := min(CHANNEL * tolerance, max(MOST, tolerance))):
            return f"by {_figure(self.channel)} (limit {limit:.2g}) of the scale of {self.where} of {self.name}"
        if not self.correlation >= FOLLOWS and tolerance < 1:
            return f"in {self.follows} of {self.name}, which has a correlation of {self.correlation:.2f} with the program's"
        if not self.cosine >= 1 - min(limit, max(COSINE, tolerance)) ** 2 / 2:
            return f"with a cosine of {self.cosine:.4f} in {self.name}"
        if real and self.agreement is not None and self.agreement < 1 - tolerance:
            return f"in what {self.name} decides: only {self.agreement:.0%} of the cases are the same"
        return ""


@dataclass(frozen=True)
class Check:
    """One comparison: what was fed, its batch size (None without a dynamic batch), and how far each output is off.

    error: the worst output's; more where a channel exceeds the limits that it has in a tolerance of this.
    """

    inputs: str
    batch: int | None
    error: float
    outputs: tuple[OutputError, ...] = ()

    @property
    def real(self) -> bool:
        """Whether the inputs are samples of the task."""
        return self.inputs.startswith("data")

    @property
    def agreement(self) -> float | None:
        """The worst output's; None where no output holds scores."""
        return min((o.agreement for o in self.outputs if o.agreement is not None), default=None)

    def wrong(self, tolerance: float) -> str:
        """The first output that exceeds the limits, in words; empty when none does."""
        return next((w for o in self.outputs if (w := o.wrong(tolerance, self.real))), "")


@dataclass(frozen=True)
class Case:
    """Inputs of a program, and its outputs for them in float64 (integers stay what they are). plain: of a quantised
    program, those without quantisation."""

    inputs: str
    batch: int | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: list[np.ndarray]
    plain: list[np.ndarray] | None = None


def parity(program: Program, engine: Engine, seed: int = 0, data: Iterable[Any] = ()) -> list[Check]:
    """Compare an engine with the program in eval mode, on the example inputs, random ones at several batch sizes, and
    real ones.

    Returns a `Check` for each set of inputs: relative errors of the outputs, against the program's in float64, and
    whether what they decide is the same. Inputs are cast to the engine's types, so that an engine in half precision is
    measured against the fp32 program. Batch sizes that the program itself does not take are left out. The program is
    not changed.

    - seed: of the random inputs.
    - data: real inputs, (args, kwargs) of the program or batches of a loader, of which the first `SAMPLES` samples
      count.

    Raises Refused when the engine's outputs differ in number or shape, BadInput when it does not take the inputs.
    """
    return compare(cases(program, seed, data), engine)


def cases(program: Program, seed: int = 0, data: Iterable[Any] = ()) -> list[Case]:
    """What engines are compared on. data: (args, kwargs) of the program, or batches as loaders yield them; the first
    `SAMPLES` samples count."""
    frozen = program.copy()
    module = frozen.module().eval()
    plain = _without_quantisation(program)
    known = []
    for what, batch, args, kwargs in [*input_sets(frozen, seed), *_samples(frozen, data)]:
        try:
            with torch.no_grad():
                outputs = flatten_outputs(module(*args, **kwargs))
        except (RuntimeError, TypeError) as error:
            if what == "data":
                raise BadInput(f"data: the program does not take it ({str(error).strip().splitlines()[0]})") from error
            if what == "example":
                raise
            continue
        exact = None
        if plain is not None:
            with torch.no_grad():
                exact = _arrays(flatten_outputs(plain.module()(*args, **kwargs)))
        known.append(Case(what, batch, args, kwargs, _arrays(outputs), exact))
    return known


def _arrays(tensors: Iterable[torch.Tensor]) -> list[np.ndarray]:
    return [t.double().numpy() if t.is_floating_point() else t.numpy() for t in tensors]


def _without_quantisation(program: Program) -> Program | None:
    """The program as it was before values were quantised; None for one that has none."""
    plain = program.copy()
    module = plain.module().eval()
    nodes = [n for n in plain.graph.nodes if op_name(n).startswith("fake_quantize")]
    for node in nodes:
        node.replace_all_uses_with(node.args[0])
        plain.graph.erase_node(node)
    module.recompile()
    return plain if nodes else None


def compare(known: Iterable[Case], engine: Engine, steps: Mapping[str, float] | None = None) -> list[Check]:
    """An engine's outputs against those of the program; raises what `parity` raises. steps: by output, the least
    difference that counts."""
    checks, least = [], steps or {}
    for case in known:
        results = engine.run(feeds(engine, case.args, case.kwargs))
        if len(results) != len(case.wanted):
            raise Refused(f"the engine has {len(results)} outputs, the program {len(case.wanted)}")
        names = [o.name for o in engine.outputs]
        plain: Sequence[np.ndarray | None] = case.plain or (None,) * len(results)
        rows = zip(results, case.wanted, names, plain, strict=True)
        outputs = tuple(
            replace(output_error(a, b, n, least.get(n, 0.0)), distances=_distances(a, b, c)) for a, b, n, c in rows
        )
        error = max((o.worst for o in outputs), default=0.0)
        checks.append(Check(case.inputs, case.batch, error, outputs))
    return checks


def _distances(found: np.ndarray, wanted: np.ndarray, plain: np.ndarray | None) -> tuple[float, float] | None:
    if plain is None or plain.dtype.kind in "biu":
        return None
    finite = np.isfinite(plain)
    return tuple(float(np.sum(np.square(x[finite].astype(np.float64) - plain[finite]))) for x in (found, wanted))  # type: ignore[return-value]


def output_error(found: np.ndarray, wanted: np.ndarray, name: str = "output", least: float = 0.0) -> OutputError:
    """How far an output is off; differences up to `least` count as none. Raises Refused for another shape."""
    if found.shape != wanted.shape:
        raise Refused(f"{name}: the engine gives shape {found.shape}, the program {wanted.shape}")
    samples = (found, wanted) if wanted.ndim else (found[None], wanted[None])
    if wanted.dtype.kind in "biu":
        differ = tuple(float((a != b).mean()) if a.size else 0.0 for a, b in zip(*samples, strict=True))
        share = float(np.mean(differ)) if differ else 0.0
        return OutputError(name, share, 0.0, "", 1.0, "", 1.0, differ, None)
    found = found.astype(np.float64)
    if least * SEEN < np.abs(wanted).max(initial=0.0) < np.inf:  # else all of it is too small to say anything
        found = np.where(np.abs(found - wanted) <= least, wanted, found)
    samples = (found, wanted) if wanted.ndim else (found[None], wanted[None])
    errors = tuple(relative_error(a, b, name) for a, b in zip(*samples, strict=True))
    error = relative_error(found, wanted, name)
    if not math.isfinite(error) or not wanted.size:
        return OutputError(name, error, error, "", 1.0, "", 0.0 if wanted.size else 1.0, errors, None)
    finite = np.isfinite(wanted)
    a, b = np.where(finite, found, 0.0), np.where(finite, wanted, 0.0)
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    cosine = float(np.vdot(a, b)) / (norms[0] * norms[1]) if all(norms) else float(norms[0] == norms[1])
    return OutputError(
        name, error, *_worst_channel(a, b), *_least_correlation(a, b), cosine, errors, _agreement(found, wanted)
    )


def relative_error(found: np.ndarray, wanted: np.ndarray, name: str = "output") -> float:
    """max |found - wanted| / max |wanted| over the finite values; infinite where one is finite and the other is not."""
    if found.shape != wanted.shape:
        raise Refused(f"{name}: the engine gives shape {found.shape}, the program {wanted.shape}")
    found, finite = found.astype(np.float64), np.isfinite(wanted)
    if not np.array_equal(np.isfinite(found), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.abs(wanted[finite]).max())
    return float(np.abs(found[finite] - wanted[finite]).max()) / (scale or 1.0)


def _worst_channel(found: np.ndarray, wanted: np.ndarray) -> tuple[float, str]:
    """The largest rms error of a slice along any axis but the first, by the slice's own scale, and which it is.

    A slice of few values takes the scale of one half of the axis up in the order of scales, if that is larger: of many
    logits some are near zero. One of many values takes another's only where it is almost nothing beside it.
    """
    worst, where = 0.0, ""
    for axis in range(1, wanted.ndim):
        count, others = wanted.shape[axis], tuple(i for i in range(wanted.ndim) if i != axis)
        own, off = (np.sqrt(np.mean(np.square(x), axis=others)) for x in (wanted, found - wanted))
        order, many = np.argsort(own), wanted.size // max(count, 1) >= MANY
        rank = np.minimum(np.arange(count) + max(1, round(NEIGHBOURS[many] * count)), count - 1)
        larger = np.empty_like(own)
        larger[order] = own[order][rank]
        scale = np.maximum(own, larger * (BESIDE if many else 1.0))
        errors = np.divide(off, scale, out=off.copy(), where=scale > 0)
        if errors.size and errors.max() > worst:
            worst, where = float(errors.max()), f"channel {int(errors.argmax())} of axis {axis}"
    return worst, where


def _least_correlation(found: np.ndarray, wanted: np.ndarray) -> tuple[float, str]:
    """The lowest correlation of a slice along any axis but the first, and which it is: of slices with many values that
    vary."""
    least, where = 1.0, ""
    for axis in range(1, wanted.ndim):
        count, others = wanted.shape[axis], tuple(i for i in range(wanted.ndim) if i != axis)
        if wanted.size // max(count, 1) < MANY:
            continue
        a, b = (x - x.mean(axis=others, keepdims=True) for x in (found, wanted))
        spread, scale = (np.sqrt(np.mean(np.square(x), axis=others)) for x in (b, wanted))
        varies = spread > STEADY * scale
        both = np.mean(a * b, axis=others)
        lengths = spread * np.sqrt(np.mean(np.square(a), axis=others))
        values = np.where(varies, np.divide(both, lengths, out=np.zeros_like(both), where=lengths > 0), 1.0)
        if values.size and values.min() < least:
            least, where = float(values.min()), f"channel {int(values.argmin())} of axis {axis}"
    return least, where


def _agreement(found: np.ndarray, wanted: np.ndarray) -> float | None:
    """Share of the positions where the largest entry along the axis of scores is the same one, or is within a hundredth
    of the scores' range of it: the second axis, or the last one of three where that is shorter."""
    axis = 2 if wanted.ndim == 3 and wanted.shape[2] < wanted.shape[1] else 1
    if wanted.ndim < 2 or wanted.shape[axis] < 2:
        return None
    finite = np.where(np.isfinite(wanted), wanted, np.nan)
    if np.isnan(finite).all(axis=axis).any():
        return None
    choice = np.expand_dims(np.nan_to_num(found, nan=-np.inf).argmax(axis), axis)
    best, least = np.nanmax(finite, axis, keepdims=True), np.nanmin(finite, axis, keepdims=True)
    return float((np.take_along_axis(wanted, choice, axis) >= best - 0.01 * (best - least)).mean())


def _figure(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "infinitely much"


# -------------------------------------------------------------------------------------------------------------- inputs
def feeds(engine: Engine, args: tuple, kwargs: dict[str, Any]) -> list[np.ndarray]:
    """The tensors among a program's inputs as the engine takes them."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if len(tensors) != len(engine.inputs):
        raise Refused(f"the engine has {len(engine.inputs)} inputs, the program {len(tensors)}")
    return [
        np.ascontiguousarray(t.detach().cpu().numpy().astype(i.dtype))
        for t, i in zip(tensors, engine.inputs, strict=True)
    ]


def input_sets(program: Program, seed: int = 0) -> Iterator[tuple[str, int | None, tuple, dict[str, Any]]]:
    """What to compare on: (name, batch size, args, kwargs)."""
    sizes = _batch(program)
    example = next(iter(sizes.values()), None)
    yield "example", example, program.args, program.kwargs
    for batch in [example] if example is None else sorted({1, example, example + 1}):
        generator = torch.Generator().manual_seed(seed + (batch or 0))
        leaves, spec = pytree.tree_flatten((program.args, program.kwargs))
        fresh = [
            random_like(x, generator, batch if i in sizes else None) if isinstance(x, torch.Tensor) else x
            for i, x in enumerate(leaves)
        ]
        args, kwargs = pytree.tree_unflatten(fresh, spec)
        yield "random", batch, args, kwargs


def _samples(program: Program, data: Iterable[Any]) -> Iterator[tuple[str, int | None, tuple, dict[str, Any]]]:
    """Real inputs, of a dynamic batch the first `SAMPLES` samples."""
    sizes, count = _batch(program), 0
    for item in data:
        leaves, spec = pytree.tree_flatten(_inputs(item))
        batch = next((leaves[i].shape[0] for i in sizes), None)
        if batch is not None:
            batch = min(batch, SAMPLES - count)
            leaves = [x[:batch] if i in sizes else x for i, x in enumerate(leaves)]
        first = next((x for x in leaves if isinstance(x, torch.Tensor)), None)
        yield "data", batch, *pytree.tree_unflatten(leaves, spec)
        count += len(first) if first is not None and first.dim() else 1
        if count >= SAMPLES:
            return


def _inputs(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a program, from just that or from what a data loader yields, whose labels are left out."""
    if isinstance(item, torch.Tensor):
        return (item,), {}
    if isinstance(item, Mapping):
        return (), {k: v for k, v in item.items() if k != "labels"}
    if not isinstance(item, (tuple, list)) or not 1 <= len(item) <= 2:
        raise BadInput(f"data: a {type(item).__name__} is neither (args, kwargs) of the program nor (inputs, labels)")
    first, second = item[0], item[1] if len(item) == 2 else {}
    if isinstance(second, Mapping) and isinstance(first, (tuple, list)):
        return tuple(first), dict(second)
    return (tuple(first), {}) if isinstance(first, (tuple, list)) else _inputs(first)


def random_like(tensor: torch.Tensor, generator: torch.Generator, batch: int | None = None) -> torch.Tensor:
    """Random values with the mean and deviation of a float tensor, or in the range of an integer one."""
    shape = tensor.shape if batch is None else (batch, *tensor.shape[1:])
    if tensor.is_floating_point():
        deviation, mean = torch.std_mean(tensor.double(), correction=0)
        noise = torch.randn(shape, generator=generator)
        return (noise * (float(deviation) or 1.0) + float(mean)).to(tensor.dtype)
    low, high = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
    return torch.randint(low, high + 1, shape, generator=generator).to(tensor.dtype)


def _batch(program: Program) -> dict[int, int]:
    """Positions and batch size of the inputs whose first dimension is the dynamic batch."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    leaves = pytree.tree_leaves((program.args, program.kwargs))
    sizes: dict[int, int] = {}
    symbol = None
    for i, (node, leaf) in enumerate(zip(placeholders, leaves, strict=True)):
        value = node.meta.get("val")
        size = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else 0
        if isinstance(size, torch.SymInt) and (symbol is None or str(size) == symbol):
            symbol = str(size)
            sizes[i] = leaf.shape[0]
    return sizes
