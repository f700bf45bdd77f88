"""The verdict of the absence oracle: whether a pruned program is what the original becomes when entries are absent."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..errors import GraphcombError, in_a_line
from ..program import Program, flatten_outputs
from .absence import Absence
from .evaluate import Evaluator, Observer, double_weights, example_inputs, random_inputs, relative_error, size_symbols
from .presence import Disagreement, Held, along
from .randomise import randomise
from .removal import Removed, checked, differences, pruned_weights, removed_since

TOLERANCE = 1e-10
ATTEMPTS = 3  # most draws of weights, if draws are ill-conditioned
JITTER = 1e-12
WORST_CONDITIONING = 1e5
SAME = 1e-9
SHOWN = 3


@dataclass(frozen=True)
class Verdict:
    """The result of the oracle, in float64; errors are relative to the largest entry of each output.

    error: worst difference between the pruned program and the absence oracle; inf if one of them cannot run, if shapes
    differ, or if the weights are not slices of the original's. dense_difference: difference between the pruned program and
    the original. conditioning: change of the outputs per relative change of the weights. vacuous: something was removed and
    nothing changed, so the check proves nothing. disagreements: why it failed, one line each. inputs: the shapes that were
    tried.
    """

    error: float
    dense_difference: float
    conditioning: float
    vacuous: bool
    disagreements: tuple[str, ...] = ()
    inputs: tuple[tuple[tuple[int, ...], ...], ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether the program is proven: within the tolerance, not vacuous, and without disagreements."""
        return self.error <= TOLERANCE and not self.vacuous and not self.disagreements

    def record(self) -> dict[str, Any]:
        """The verdict, JSON-able; numbers that are not finite become None."""
        numbers = {"error": self.error, "dense_difference": self.dense_difference, "conditioning": self.conditioning}
        return {k: v if math.isfinite(v) else None for k, v in numbers.items()} | {
            "vacuous": self.vacuous,
            "disagreements": list(self.disagreements),
            "inputs": [[list(shape) for shape in shapes] for shapes in self.inputs],
        }


def surgery(before: Program, result: Any, *, seed: int = 0, batches: int = 2, retrained: bool = False) -> float:
    """Worst relative error, in float64, of a pruned program against what the original becomes when entries are absent.

    result: what `RemoveChannels` returns, or anything with `program` and `removed`; with `masked` too if a pass both
    removes and changes weights: the original with the new weights, which then replaces the original here. After several
    such passes, `before` may be the program before any of them. Weights are drawn at random, so that no error hides behind
    zeros; a program with a dynamic batch runs at `batches` batch sizes. retrained: the weights were trained after the
    removal, so only their shapes are compared.

    Returns inf, with a warning that says why, if shapes or weights do not fit. Raises GraphcombError if something was
    removed and no output changed (vacuous), BadInput if `result.removed` does not fit the program.
    """
    verdict = check(before, result, seed=seed, batches=batches, retrained=retrained)
    if verdict.vacuous:
        raise GraphcombError("vacuous: something was removed and no output changed, so the surgery is not proven")
    if verdict.disagreements:
        warnings.warn(f"surgery: {verdict.disagreements[0]}", stacklevel=2)
    return verdict.error


def check(before: Program, result: Any, *, seed: int = 0, batches: int = 2, retrained: bool = False) -> Verdict:
    """The full verdict; see `surgery` for the arguments. Raises BadInput if `result.removed` does not fit the program."""
    before = (getattr(result, "masked", None) or before).on_cpu()
    removed, after = checked(before, removed_since(before, result)), result.program.on_cpu()
    wrong = differences(before, after, removed, retrained)
    if wrong:
        return Verdict(float("inf"), float("nan"), float("nan"), False, tuple(wrong))
    return Trial(before, after, removed, seed).judge(batches)


class Trial:
    """A pair of programs on random inputs and random weights; own: on the weights of `before` instead."""

    def __init__(self, before: Program, after: Program, removed: Removed, seed: int = 0, own: bool = False):
        self.before, self.after, self.removed, self.seed, self.own = before, after, removed, seed, own
        self.conditioning, self.difference = float("nan"), float("nan")

    def prepare(self) -> None:
        """Draw weights and inputs that are well conditioned, if a few draws find such. Raises whatever running the pruned
        program raises."""
        for attempt in range(ATTEMPTS):
            seed = self.seed + 1000 * attempt
            dense = self.draw(seed)
            self.sliced = pruned_weights(self.weights, self.removed, self.after)
            pruned = Evaluator(self.after, self.sliced).run(self.inputs)
            jittered = Jitter(self.after, self.sliced, self.generator).run(self.inputs)
            self.conditioning = relative_error(jittered, pruned) / JITTER
            self.difference = relative_error(dense, pruned)
            if 0 < self.conditioning <= WORST_CONDITIONING:
                break

    def draw(self, seed: int) -> Any:
        """Set inputs and weights, and return the original's outputs for them. The batch size is 2 if the program allows;
        where random inputs give NaN, the example inputs are used."""
        self.generator = torch.Generator().manual_seed(seed)
        small = {s: 2 for s, (_, d) in size_symbols(self.before).items() if d == 0}
        for self.sizes in (small, {}) if small else ({},):
            try:
                self.inputs = self.fresh_inputs()
                dense = self._weights(seed)
            except RuntimeError:  # the program does not take this batch size
                continue
            if not any(bool(t.isnan().any()) for t in flatten_outputs(dense)):
                return dense
        self.inputs = example_inputs(self.before)
        return self._weights(seed)

    def _weights(self, seed: int) -> Any:
        """Set the weights; returns the original's outputs with them."""
        if self.own:
            self.weights = double_weights(self.before)
        else:
            shapes: dict[str, Any] = {}
            self.weights, outputs = randomise(self.before, self.inputs, seed, self.removed, _shapes_into(shapes))
            self.known = (self.inputs, outputs, shapes)
        return Evaluator(self.before, self.weights).run(self.inputs)

    def fresh_inputs(self) -> list[Any]:
        """New random inputs of the sizes found by `draw`."""
        return random_inputs(self.before, self.generator, self.sizes)

    def judge(self, batches: int) -> Verdict:
        """The verdict for the prepared inputs and others; a dynamic batch is tried at this many sizes."""
        errors, tried, disagreements = [0.0], [], []
        try:
            self.prepare()
            for inputs in self.batches(batches):
                tried.append(tuple(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)))
                expected, shapes = self.expected(inputs)
                pruned, wrong = self.pruned(inputs, shapes)
                errors.append(relative_error(pruned, expected))
                if errors[-1] > TOLERANCE and not wrong:
                    wrong = [self.first_difference(inputs)]
                disagreements += [w for w in wrong if w not in disagreements]
        except Disagreement as error:
            errors.append(float("inf"))
            disagreements.append(str(error))
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            errors.append(float("inf"))
            disagreements.append(f"the program does not run: {in_a_line(error, 300)}")
        vacuous = bool(self.removed) and max(errors) <= TOLERANCE and self.difference <= SAME
        return Verdict(max(errors), self.difference, self.conditioning, vacuous, tuple(disagreements), tuple(tried))

    def batches(self, count: int) -> Iterator[list[Any]]:
        """Yield the prepared inputs, then others at larger batch sizes; other dynamic sizes, such as heights, change
        once."""
        yield self.inputs
        symbols = size_symbols(self.before)
        first = next((x.shape[0] for x in self.inputs if isinstance(x, torch.Tensor) and x.dim()), 1)
        batch = [s for s, (_, d) in symbols.items() if d == 0]
        rest = {s: n for s, (n, d) in symbols.items() if d != 0}
        for extra in range(1, count if batch else 1):
            yield random_inputs(self.before, self.generator, dict.fromkeys(batch, first + extra))
        if rest:
            for resize in (lambda n: n // 2, lambda n: 2 * n):
                inputs = random_inputs(self.before, self.generator, {s: resize(n) for s, n in rest.items()})
                try:
                    Evaluator(self.before, self.weights).run(inputs)
                except RuntimeError:  # the original does not take this size either
                    continue
                yield inputs
                return

    def expected(self, inputs: list[Any]) -> tuple[Any, dict[str, Any]]:
        """The oracle's outputs, and the shape that every node of the pruned program must have."""
        of_inputs, outputs, shapes = self.known
        if of_inputs is not inputs or outputs is None:
            shapes = {}
            outputs = Absence(self.before, self.weights, self.removed).run(inputs, _shapes_into(shapes))
        return outputs, shapes

    def pruned(self, inputs: list[Any], shapes: dict[str, Any]) -> tuple[Any, list[str]]:
        """The pruned program's outputs, and messages about the first nodes of another shape than the oracle's."""
        wrong: list[str] = []

        def look(node: fx.Node, value: Any) -> None:
            expected = shapes.get(node.name)
            if isinstance(value, torch.Tensor) and expected is not None and not _fits(value, expected):
                wrong.append(f"{node.name} has shape {tuple(value.shape)}, the oracle says {expected}")

        return Evaluator(self.after, self.sliced).run(inputs, look), wrong[:SHOWN]

    def first_difference(self, inputs: list[Any]) -> str:
        """A message that names the first node whose value differs from the oracle's."""
        values: dict[str, torch.Tensor] = {}
        Evaluator(self.after, self.sliced).run(
            inputs, lambda n, v: values.update({n.name: v}) if isinstance(v, torch.Tensor) else None
        )
        first: list[str] = []

        def look(node: fx.Node, value: Any) -> None:
            if isinstance(value, Held) and node.name in values and not first:
                if None in value.kept_shape():
                    return
                error = relative_error(values[node.name], value.kept())
                if error > TOLERANCE:
                    first.append(f"{node.name} is the first to differ from the oracle, by {error:.1e}")

        Absence(self.before, self.weights, self.removed).run(inputs, look)
        return first[0] if first else "outputs differ from the oracle"


class Jitter(Evaluator):
    """Runs a program with weights that are off by 1e-12, to measure how much rounding errors are magnified."""

    def __init__(self, program: Program, weights: dict[str, torch.Tensor], generator: torch.Generator):
        super().__init__(program, weights)
        self.generator = generator

    def fetch(self, name: str) -> Any:
        """A stored tensor; floating-point ones are multiplied by random factors near 1 along their first and last
        dimension."""
        value = super().fetch(name)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        for d in {0, value.dim() - 1} if value.dim() else ():
            noise = torch.randn(value.shape[d], generator=self.generator, dtype=torch.float64).to(value.device)
            value = value * along(1 + JITTER * noise, d, value.dim())
        return value


def _shapes_into(shapes: dict[str, Any]) -> Observer:
    """An observer that records the shape of every node in the pruned program."""

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, Held):
            shapes[node.name] = value.kept_shape()

    return note


def _fits(value: torch.Tensor, expected: tuple[int | None, ...]) -> bool:
    """Whether a value has the expected shape; None stands for an axis with free entries, whose size is undetermined."""
    return len(expected) == value.dim() and all(e in (n, None) for e, n in zip(expected, value.shape, strict=True))
