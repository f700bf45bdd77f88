"""The last step of a capture: the program is compared with the user's model, on the example inputs, in both modes.

Compared are outputs, buffers after the call, and the gradients of a random linear function of the outputs with respect to
parameters and floating-point inputs. Both sides draw the same random numbers. Differences are relative to the norm of a
tensor. Where they exceed the tolerance, the program runs again with its tensors changed by rounding errors, to see how much
rounding alone changes each of them (badly conditioned networks, gradients that would be zero without rounding).

A network with `torch.cond` runs without its operators being intercepted. The same is compared, in the branches that the
example inputs take; but no node can be named where the two sides differ, and random numbers are compared only where both
sides lay tensors out alike.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..compat import HigherOrderOperator, exact_kernels, pytree
from ..errors import CaptureError, in_a_line
from ..nodes import continuous, op_name, writes
from ..trainable import STATISTICS, TrainableModule, draws, switch, walk
from .export import enter, preserved
from .modes import Lost
from .observe import Run, Values, first_unknown, nudged, observe

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
NOISE = 50.0  # a difference counts if it is more than this many times the effect of rounding
CHAOS = 0.05  # a tensor that rounding changes by more than this share proves nothing


@dataclass
class Proof:
    """The result of the comparison. error: worst relative difference in each mode ("eval", "train"), those within the
    effect of rounding included. skipped: what could not be compared, and why. seconds: duration."""

    error: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


def prove(
    model: torch.nn.Module,
    module: TrainableModule,
    args: tuple,
    kwargs: dict[str, Any],
    lost: Lost,
    functions: list[str],
) -> Proof:
    """Compare the captured module with the model. Raises CaptureError, naming the first node that differs.

    lost: what only training has; the modules around it run in eval mode on both sides. functions: custom
    `autograd.Function`s of the model; if there are any, gradients may differ.
    """
    start = time.perf_counter()
    proof = Proof()
    same = functools.partial(_Comparison, model, module, args, kwargs, functions=functions)
    with exact_kernels():
        same(lost=Lost(), mode="eval", proof=proof).run()
        _settle_rewired(lost, functools.partial(same, mode="train"))
        same(lost=lost, mode="train", proof=proof).run()
    proof.seconds = time.perf_counter() - start
    return proof


def _settle_rewired(lost: Lost, comparison: Callable[..., _Comparison]) -> None:
    """Forget rewired nodes that were only reordered.

    Nodes that seem to have other inputs in training may be the same nodes in another order: if the program in train mode
    equals the model with them, nothing is lost. Nodes in modules that run in eval mode anyway are kept, since they show
    nothing.
    """
    if not lost.rewired:
        return
    trial = Proof()
    with contextlib.suppress(CaptureError):
        comparison(lost=replace(lost, rewired={}), proof=trial).run()
        if "train" in trial.error and not trial.skipped:
            lost.rewired = {node: path for node, path in lost.rewired.items() if path in lost.without}


@dataclass
class _Comparison:
    """The comparison in one mode; the arguments are those of `prove`."""

    model: torch.nn.Module
    module: TrainableModule
    args: tuple
    kwargs: dict[str, Any]
    lost: Lost
    functions: list[str]
    mode: str
    proof: Proof

    def run(self) -> None:
        self.changed: list[str] = []
        writes_to = [n.args[0] for n in self.module.graph.nodes if writes(n)]
        names = {str(n.target) for n in writes_to if isinstance(n, fx.Node) and n.op == "get_attr"}
        self.written = {n for n, _ in self.module.named_parameters(remove_duplicate=False) if n in names}
        self.ordered = not any(isinstance(n.target, HigherOrderOperator) for _, n in walk(self.module))
        self.random = False
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        tensors = [*self.model.parameters(), *(x for x in leaves if isinstance(x, Tensor) and x.is_floating_point())]
        dtypes = {t.dtype for t in tensors if t.is_floating_point()} or {torch.float32}
        self.tolerance = max(TOLERANCE.get(d, 1e-2) for d in dtypes)
        if any(t.device.type == "meta" or t.is_inference() for t in tensors):
            return self._skipped("tensors without values or made in inference mode")
        try:
            expected = self._model()
        except Exception as error:
            return self._skipped(f"the model itself fails: {in_a_line(error, 160)}")
        try:
            observed = self._program()
        except Exception as error:
            if self.lost:
                return self._skipped("parts that only training has")
            raise CaptureError(
                f"the captured program does not run in {self.mode} mode where the model does: {in_a_line(error)}"
            ) from error
        self._compare(expected, observed)
        if self.changed and not self.lost:
            self._compare_again()

    def _compare_again(self) -> None:
        """Compare a second call, for a model whose first call changes its attributes: a graph only knows the first call."""
        with self._switched(self.model):
            observe(self.model, self.args, self.kwargs, ordered=self.ordered)
            expected = observe(self.model, self.args, self.kwargs, ordered=self.ordered)
        with self._switched(self.module):
            observe(self.module, self.args, self.kwargs, ordered=self.ordered)
            observed = observe(self.module, self.args, self.kwargs, ordered=self.ordered)
        pairs = [(n, expected.values[n], observed.values[n]) for n in expected.values if n in observed.values]
        wrong = self._wrong(pairs)
        if wrong:
            wrong = self._beyond(wrong, observed.values, self._program(nudge=True).values)
        if wrong or self._structure(expected, observed):
            raise CaptureError(
                f"a second call of the model in {self.mode} mode gives something else than one of the program: the forward "
                f"changes Python attributes, which a graph holds fixed ({', '.join(self.changed[:4])}); make what must "
                "change a buffer that is written in place"
            )

    def _skipped(self, why: str) -> None:
        self.proof.skipped.append(f"{self.mode} mode: {why}")

    @contextlib.contextmanager
    def _switched(self, module: torch.nn.Module) -> Iterator[None]:
        """A context in which the model or the program is in the mode."""
        try:
            with preserved(module, self.written) as changes:
                enter(module, self.mode == "train")
                for path in self.lost.quiet:
                    with contextlib.suppress(AttributeError):
                        module.get_submodule(path).training = False
                _follow_flags(module)
                before = {*changes()}
                yield
                if module is self.model:
                    self.changed = [name for name in changes() if name not in before]
        finally:
            _follow_flags(module)

    def _model(self) -> Run:
        """The model's run; if it fails with intercepted operators, a run without interception."""
        if self.ordered:
            try:
                with self._switched(self.model):
                    return observe(self.model, self.args, self.kwargs)
            except Exception:
                self.ordered = False
        with self._switched(self.model):
            return observe(self.model, self.args, self.kwargs, ordered=False)

    def _program(self, nudge: bool = False) -> Run:
        with self._switched(self.module), nudged(self.module) if nudge else contextlib.nullcontext():
            self.random = any(draws(node) for _, node in walk(self.module))
            return observe(self.module, self.args, self.kwargs, nudge, ordered=self.ordered)

    # ------------------------------------------------------------------------------------------------------ verdicts
    def _compare(self, expected: Run, actual: Run) -> None:
        if problem := self._structure(expected, actual):
            if self.lost:
                return self._skipped("the outputs in training are others")
            raise CaptureError(f"the captured program differs from the model in {self.mode} mode: {problem}")
        shared = expected.values.keys() & actual.values.keys() - {f"buffer {name}" for name in self.lost.buffers}
        wrong = self._wrong([(n, v, actual.values[n]) for n, v in expected.values.items() if n in shared])
        gradients = self._gradients(expected, actual)
        wrong_gradients = self._wrong(gradients)
        if wrong or wrong_gradients:
            noise = self._program(nudge=True)
            wrong = self._beyond(wrong, actual.values, noise.values)
            wrong_gradients = self._beyond(wrong_gradients, actual.gradients or {}, noise.gradients or {})
        if wrong and self.lost:
            return self._skipped("what only training has changes the outputs")
        if (wrong or wrong_gradients) and self.random and not self.ordered:
            return self._skipped("random numbers that the model may draw in another order")
        if wrong:
            name, error = max(wrong.items(), key=lambda item: item[1])
            at = self._first_difference()
            raise CaptureError(
                f"the captured program differs from the model in {self.mode} mode at {at}: {name} is off by {error:.1e} "
                "of its norm"
            )
        if wrong_gradients and (self.functions or self.lost):
            cause = "what only training has changes them"
            if self.functions:
                cause = f"the backward of {', '.join(self.functions)} is replaced by that of its forward's operators"
            self.proof.skipped.append(f"{self.mode} mode: {len(wrong_gradients)} gradients; {cause}")
        elif wrong_gradients:
            name, error = max(wrong_gradients.items(), key=lambda item: item[1])
            at = self._first_difference(backward=True)
            raise CaptureError(
                f"the captured program has other gradients than the model in {self.mode} mode at {at}: that of {name} is "
                f"off by {error:.1e} of its norm"
            )

    def _structure(self, expected: Run, actual: Run) -> str | None:
        """How the runs differ before numbers are compared, or None."""
        ours = {n for n in actual.values if n.startswith("output")}
        theirs = {n for n in expected.values if n.startswith("output")}
        if ours != theirs:
            return f"it has {len(ours)} outputs, the model {len(theirs)}"
        for name in sorted(theirs):
            a, b = actual.values[name], expected.values[name]
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name} is {a.dtype} {tuple(a.shape)}, of the model {b.dtype} {tuple(b.shape)}"
        if not _equal(expected.rest, actual.rest):
            return "outputs that are no tensors are others"
        return None

    def _gradients(self, expected: Run, actual: Run) -> list[tuple[str, Tensor, Tensor]]:
        """Pairs of gradients by name, model's and program's; a missing one counts as zeros."""
        if expected.gradients is not None and actual.gradients is None and self.ordered:
            raise CaptureError(
                f"the captured program cannot be differentiated in {self.mode} mode where the model can: "
                f"{actual.undifferentiable}"
            )
        if expected.gradients is None or actual.gradients is None:
            twice = self.mode == "train" and any(
                owner is not self.module and switch(node) is not None and op_name(node) in STATISTICS
                for owner, node in walk(self.module)
                if node.op == "call_function"
            )
            more = "; a backward pass through torch.cond computes its branch again, and moves running statistics twice"
            self.proof.skipped.append(
                f"{self.mode} mode: its gradients, since the model itself has none here{more if twice else ''}"
            )
            return []
        pairs = []
        for name, theirs in expected.gradients.items():
            ours = actual.gradients.get(name)
            if ours is None and theirs is None:
                continue
            other = ours if theirs is None else theirs
            assert other is not None
            zeros = torch.zeros_like(other)
            pairs.append((name, zeros if theirs is None else theirs, zeros if ours is None else ours))
        return pairs

    def _wrong(self, pairs: list[tuple[str, Tensor, Tensor]]) -> dict[str, float]:
        errors = {}
        for name, expected, ours in pairs:
            error = distance(expected, ours)
            if error > self.tolerance:
                errors[name] = error
            else:
                self._note(error)
        return errors

    def _note(self, error: float) -> None:
        self.proof.error[self.mode] = max(self.proof.error.get(self.mode, 0.0), error)

    def _beyond(self, wrong: dict[str, float], values: dict[str, Any], noise: dict[str, Any]) -> dict[str, float]:
        """Those of the differences that rounding does not explain."""
        left, chaotic = {}, 0
        for name, error in wrong.items():
            a, b = values.get(name), noise.get(name)
            rounding = distance(a, b) if a is not None and b is not None else 0.0
            if rounding > CHAOS:
                chaotic += 1
            elif error > NOISE * rounding:
                left[name] = error
            else:
                self._note(error)
        if chaotic:
            self.proof.skipped.append(f"{self.mode} mode: {chaotic} tensors that rounding alone changes by over 5 %")
        return left

    # ------------------------------------------------------------------------------------------- where they part ways
    def _first_difference(self, backward: bool = False) -> str:
        """The first node whose value (or the last node whose gradient) does not occur in the model's run, for a message."""
        if not self.ordered:
            return "a node that cannot be named (operators around torch.cond are not observed)"
        try:
            seen = Values()
            with self._switched(self.model):
                observe(self.model, self.args, self.kwargs, log=seen)
            with self._switched(self.module):
                return first_unknown(self.module, self.args, self.kwargs, seen, backward)
        except Exception:
            return "a node that could not be found"


def _follow_flags(module: torch.nn.Module) -> None:
    if isinstance(module, TrainableModule):
        module._switch()


def distance(expected: Tensor, actual: Tensor) -> float:
    """Difference relative to the norm of `expected`; infinite unless infinities and NaN are in the same places."""
    if expected.shape != actual.shape:
        return float("inf")
    if not continuous(expected):
        return 0.0 if torch.equal(expected, actual) else 1.0
    a, b = (t.detach().to(torch.complex128 if t.is_complex() else torch.float64) for t in (expected, actual))
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    a, b = torch.where(same & ~a.isfinite(), 0, a), torch.where(same & ~b.isfinite(), 0, b)
    norm = max(float(a.norm()), float(b.norm()) * 1e-3, 1e-300)
    error = float((a - b).norm()) / norm
    return error if error == error else float("inf")


def _equal(left: list[Any], right: list[Any]) -> bool:
    plain = (bool, int, float, str, type(None))
    return all(a == b for a, b in zip(left, right, strict=False) if isinstance(a, plain) and isinstance(b, plain))
