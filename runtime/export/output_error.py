"""The errors of one output of an engine: as a whole, of each channel at its own scale, and of what its scores decide.

Class scores may be a thousand times smaller than box coordinates in the same output and still be as important. Source: ours.
"""

import math
from dataclasses import dataclass

import numpy as np

from ...graph.errors import Refused

# A channel with at least MANY values is compared with its own scale (rms). One with fewer values may be small by chance (a
# logit near zero), so it is compared with the larger scale of another channel: see `_worst_channel`.
MANY = 64
NEIGHBOURS = {True: 0.1, False: 0.5}  # distance to that channel in the order of scales: with many values, with few
BESIDE = (
    2e-3  # share of the larger scale that is used for a channel of many values, since rounding affects both equally
)
SEEN = 1e3  # `least` of `output_error` applies only to an output whose largest value exceeds this many times `least`
# The error of a small channel includes the rounding of the larger values that it was computed from.
CHANNEL, MOST = 10.0, 0.5  # limit of a channel's error: this many times the tolerance, but at most MOST
# Rounding leaves a correlation near 1 between a channel and the program's; the scores of another class have one near 0.
FOLLOWS, STEADY = 0.8, 0.01  # smallest correlation, for channels whose deviation exceeds this share of their scale
COSINE = 0.2  # largest error of an output as a vector, relative to its length; the limit of the cosine follows from it


@dataclass(frozen=True)
class OutputError:
    """The errors of one output a of an engine against the program's output b.

    A channel is a slice of the output at one index of any axis but the first.

    - name: name of the output.
    - error: max |a - b| / max |b|; for integers and booleans the share of entries that differ.
    - channel: largest rms(a - b) / rms(b) of a channel, and `where` it is.
    - correlation: lowest correlation of a channel with many, varying values, and where it is (`follows`).
    - cosine: cosine similarity of the two outputs as vectors.
    - samples: `error` of each index of the first axis.
    - agreement: share of positions at which the engine's largest score is the program's largest one, or nearly as large;
      None if no axis has scores.
    - distances: for a quantised program, the squared distances of a and of b to the output without quantisation.
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
        """The largest of the errors of the output and its channels, each scaled to the tolerance that would allow it."""
        strays = (1 - self.correlation) / 2 if self.correlation < FOLLOWS else 0.0
        return max(self.error, self.channel / CHANNEL, strays)

    def wrong(self, tolerance: float, real: bool = False) -> str:
        """Return in words which error exceeds the limits that follow from a tolerance; empty if none does.

        real: whether the inputs are samples of the task, for which `agreement` counts, too.
        """
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


def output_error(actual: np.ndarray, wanted: np.ndarray, name: str = "output", least: float = 0.0) -> OutputError:
    """Return the errors of one output. Absolute differences up to `least` count as none, unless the whole output is that
    small. Raises Refused if the shapes differ."""
    if actual.shape != wanted.shape:
        raise Refused(f"{name}: the engine gives shape {actual.shape}, the program {wanted.shape}")
    samples = (actual, wanted) if wanted.ndim else (actual[None], wanted[None])
    if wanted.dtype.kind in "biu":
        differ = tuple(float((a != b).mean()) if a.size else 0.0 for a, b in zip(*samples, strict=True))
        share = float(np.mean(differ)) if differ else 0.0
        return OutputError(name, share, 0.0, "", 1.0, "", 1.0, differ, None)
    actual = actual.astype(np.float64)
    if least * SEEN < np.abs(wanted).max(initial=0.0) < np.inf:
        actual = np.where(np.abs(actual - wanted) <= least, wanted, actual)
    samples = (actual, wanted) if wanted.ndim else (actual[None], wanted[None])
    errors = tuple(relative_error(a, b, name) for a, b in zip(*samples, strict=True))
    error = relative_error(actual, wanted, name)
    if not math.isfinite(error) or not wanted.size:
        return OutputError(name, error, error, "", 1.0, "", 0.0 if wanted.size else 1.0, errors, None)
    finite = np.isfinite(wanted)
    a, b = np.where(finite, actual, 0.0), np.where(finite, wanted, 0.0)
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    cosine = float(np.vdot(a, b)) / (norms[0] * norms[1]) if all(norms) else float(norms[0] == norms[1])
    return OutputError(
        name, error, *_worst_channel(a, b), *_least_correlation(a, b), cosine, errors, _agreement(actual, wanted)
    )


def relative_error(actual: np.ndarray, wanted: np.ndarray, name: str = "output") -> float:
    """Return max |actual - wanted| / max |wanted| over the finite entries; infinite if an entry is finite in only one of the
    two arrays. Raises Refused if the shapes differ."""
    if actual.shape != wanted.shape:
        raise Refused(f"{name}: the engine gives shape {actual.shape}, the program {wanted.shape}")
    actual, finite = actual.astype(np.float64), np.isfinite(wanted)
    if not np.array_equal(np.isfinite(actual), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.abs(wanted[finite]).max())
    return float(np.abs(actual[finite] - wanted[finite]).max()) / (scale or 1.0)


def _worst_channel(actual: np.ndarray, wanted: np.ndarray) -> tuple[float, str]:
    """Return the largest rms error of a channel relative to its scale, and where it is.

    Sort the channels of an axis by their rms. The scale of a channel of few values is the rms of the one that stands half
    of the axis further up, since some of many logits are near zero by chance. The scale of a channel of many values is its
    own rms, or BESIDE times that of the one a tenth of the axis further up if that is larger.
    """
    worst, where = 0.0, ""
    for axis in range(1, wanted.ndim):
        count, others = wanted.shape[axis], tuple(i for i in range(wanted.ndim) if i != axis)
        size, off = (np.sqrt(np.mean(np.square(x), axis=others)) for x in (wanted, actual - wanted))
        order, many = np.argsort(size), wanted.size // max(count, 1) >= MANY
        rank = np.minimum(np.arange(count) + max(1, round(NEIGHBOURS[many] * count)), count - 1)
        larger = np.empty_like(size)
        larger[order] = size[order][rank]
        scale = np.maximum(size, larger * (BESIDE if many else 1.0))
        errors = np.divide(off, scale, out=off.copy(), where=scale > 0)
        if errors.size and errors.max() > worst:
            worst, where = float(errors.max()), f"channel {int(errors.argmax())} of axis {axis}"
    return worst, where


def _least_correlation(actual: np.ndarray, wanted: np.ndarray) -> tuple[float, str]:
    """Return the lowest correlation of a channel with at least MANY values that vary (STEADY), and where it is."""
    least, where = 1.0, ""
    for axis in range(1, wanted.ndim):
        count, others = wanted.shape[axis], tuple(i for i in range(wanted.ndim) if i != axis)
        if wanted.size // max(count, 1) < MANY:
            continue
        a, b = (x - x.mean(axis=others, keepdims=True) for x in (actual, wanted))
        spread, scale = (np.sqrt(np.mean(np.square(x), axis=others)) for x in (b, wanted))
        varies = spread > STEADY * scale
        both = np.mean(a * b, axis=others)
        lengths = spread * np.sqrt(np.mean(np.square(a), axis=others))
        values = np.where(varies, np.divide(both, lengths, out=np.zeros_like(both), where=lengths > 0), 1.0)
        if values.size and values.min() < least:
            least, where = float(values.min()), f"channel {int(values.argmin())} of axis {axis}"
    return least, where


def _agreement(actual: np.ndarray, wanted: np.ndarray) -> float | None:
    """Return the share of positions at which the largest actual score is a largest one of `wanted` too, up to a hundredth of
    the range of the scores; None if no axis has scores.

    The axis of scores is the second one, or the last one of three if that is shorter.
    """
    axis = 2 if wanted.ndim == 3 and wanted.shape[2] < wanted.shape[1] else 1
    if wanted.ndim < 2 or wanted.shape[axis] < 2:
        return None
    finite = np.where(np.isfinite(wanted), wanted, np.nan)
    if np.isnan(finite).all(axis=axis).any():
        return None
    choice = np.expand_dims(np.nan_to_num(actual, nan=-np.inf).argmax(axis), axis)
    best, least = np.nanmax(finite, axis, keepdims=True), np.nanmin(finite, axis, keepdims=True)
    return float((np.take_along_axis(wanted, choice, axis) >= best - 0.01 * (best - least)).mean())


def _figure(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else "infinitely much"
