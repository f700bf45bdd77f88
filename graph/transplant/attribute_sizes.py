"""Finds attributes of the user's modules that hold sizes, by running the modules beside a smaller program. Source: ours.

Every value that the program computes is known. A module that gets such values as inputs, but raises or returns other
values, is tried again with other whole numbers in its attributes: first those that a number has become in its tensors, then
those in the program's operators of this module.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..compat import pytree
from ..errors import Refused, reason
from ..nodes import hint, module_path
from ..program import Program

Sizes = dict[int, set[int]]
Slot = tuple[str, int | None]  # an attribute, and the index if it is a tuple or list
TRIES = 512  # most combinations of numbers that are tried for one module
CLOSE = 1e-3  # relative difference up to which values count as the same, to guide the search


def mend(program: Program, new: nn.Module, tables: Iterable[dict[str, Sizes]]) -> str:
    """Bring attributes up to date. new: the module with the program's tensors, in eval mode. tables: by names of tensors,
    what their sizes became. Returns a message about the first place where the module seems to compute something else, or
    "".

    Raises Refused, naming the line, if the module does not run.
    """
    run = _Run(Values(program), list(tables))
    args, kwargs = copy.deepcopy((program.args, program.kwargs))
    forwards = {m: m.__dict__.get("forward") for m in new.modules()}
    try:
        for path, module in new.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.__dict__["forward"] = run.guarded(path, module, module.forward)
        with torch.no_grad():
            new(*args, **kwargs)
    except Exception as error:
        raise Refused(f"transplant: {_where(error)} fixes a size ({reason(error)})") from None
    finally:
        for module, forward in forwards.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
    return run.wrong


class Values(fx.Interpreter):
    """The values that a program computes for its example inputs in eval mode, and the whole numbers in each module's
    operators."""

    def __init__(self, program: Program):
        super().__init__(program.copy().module().eval(), garbage_collect_values=False)
        self._tensors: dict[tuple[int, ...], list[tuple[float, float, torch.Tensor]]] = defaultdict(list)
        self.numbers: dict[str, set[int]] = defaultdict(set)
        with torch.no_grad():
            self.run(*pytree.tree_leaves(copy.deepcopy((program.args, program.kwargs))))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function":
            numbers = self.numbers[module_path(n)]
            numbers.update(hint(v) for v in pytree.tree_leaves((n.args, n.kwargs)) if type(v) is int)
        for tensor in pytree.tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                self._tensors[tuple(tensor.shape)].append((*_sums(tensor), tensor))
                if n.op == "call_function":
                    numbers.update(tensor.shape)
        return value

    def knows(self, values: Any) -> bool:
        """Whether all tensors of a nest are values of the program."""
        return all(self._known(t) for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor))

    def _known(self, tensor: torch.Tensor) -> bool:
        size, along = _sums(tensor)
        for other_size, other_along, other in self._tensors.get(tuple(tensor.shape), ()):
            near = abs(size - other_size) <= CLOSE * other_size and abs(along - other_along) <= 10 * CLOSE * other_size
            if near and (tensor.double() - other.double()).abs().max() <= CLOSE * max(
                float(other.double().abs().max()), 1e-30
            ):
                return True
        return not tensor.numel()


def _sums(tensor: torch.Tensor) -> tuple[float, float]:
    """The norm of a tensor, and its product with a fixed vector, for quick comparison."""
    wide = tensor.detach().double().flatten()
    return float(wide.norm()), float(wide @ torch.cos(torch.arange(len(wide), dtype=torch.float64)))


class _Run:
    def __init__(self, values: Values, tables: list[dict[str, Sizes]]):
        self.values, self.tables = values, tables
        self.wrong = ""
        self._trials = 0
        self._hopeless: set[tuple[str, Any]] = set()
        self._final: Exception | None = None

    def guarded(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A module's forward that corrects the module's attributes if it fails."""

        def run(*args: Any, **kwargs: Any) -> Any:
            inputs = _copied((args, kwargs))  # a forward may write to its inputs
            failure, result = None, None
            try:
                result = forward(*args, **kwargs)
                if self.values.knows(result):
                    return result
            except Exception as error:
                failure = error
            if failure is not None and failure is self._final:
                raise failure
            known = [self.values.knows(t) for t in _floating(inputs)]
            # With no known input, another module is at fault. A constant, such as a mask, may not be in the program.
            if not all(known) and (failure is None or not any(known)):
                if failure is not None:
                    raise failure
                return result
            mended = self._mended(path, module, forward, inputs)
            if mended is not None:
                return mended[0]
            if failure is not None:
                if all(known) and not any(isinstance(v, int) for v in pytree.tree_leaves(inputs)):
                    self._final = failure  # no number of a module around it reaches this one
                raise failure
            if not self._trials:
                self.wrong = self.wrong or f"; first in {path or 'the model'} ({_place_of(module)})"
            return result

        return run

    def _mended(self, path: str, module: nn.Module, forward: Callable[..., Any], inputs: Any) -> list[Any] | None:
        """The forward's result with other numbers in the module's attributes, as a list; None, with the attributes
        unchanged, if no combination gives a known value."""
        held, state = dict(_slots(module)), (path, _signature(inputs))
        if not held or state in self._hopeless:
            return None
        for choice in itertools.islice(_choices(held, self._left(path), self._numbers(path)), TRIES):
            _set(module, choice)
            self._trials += 1  # modules inside are corrected during the trial
            try:
                args, kwargs = _copied(inputs)
                result = forward(*args, **kwargs)
                if self.values.knows(result):
                    return [result]
            except Exception:
                pass
            finally:
                self._trials -= 1
            _set(module, {slot: held[slot] for slot in choice})
        self._hopeless.add(state)  # the modules around it would try all of this again with each of their choices
        return None

    def _left(self, path: str) -> Sizes:
        """What sizes became in the tensors of a module, or of its nearest parent with tensors that changed."""
        while True:
            under = f"{path}." if path else ""
            left: Sizes = {}
            for table in self.tables:
                for name, sizes in table.items():
                    if name.startswith(under):
                        for before, after in sizes.items():
                            left.setdefault(before, set()).update(after)
            if left or not path:
                return left
            path = path.rpartition(".")[0]

    def _numbers(self, path: str) -> set[int]:
        return self.values.numbers.get(path, set())


def _copied(values: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, values)


def _signature(values: Any) -> tuple[Any, ...]:
    """Equal for nests with the same tensors and the same other values."""
    leaves = pytree.tree_leaves(values)
    return tuple((tuple(v.shape), *_sums(v)) if isinstance(v, torch.Tensor) else repr(v) for v in leaves)


def _floating(values: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a nest. A program may lack the others, such as sizes of feature maps, of which
    `torch.export` makes constants."""
    return [t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _slots(module: nn.Module) -> Iterator[tuple[Slot, int]]:
    """The whole numbers in a module's attributes."""
    for name, value in vars(module).items():
        if type(value) is int:
            yield (name, None), value
        elif isinstance(value, (tuple, list)) and not name.startswith("_"):
            yield from (((name, i), v) for i, v in enumerate(value) if type(v) is int)


def _set(module: nn.Module, choice: dict[Slot, int]) -> None:
    for (name, index), number in choice.items():
        if index is None:
            vars(module)[name] = number
            continue
        old = vars(module)[name]
        parts = [*old[:index], number, *old[index + 1 :]]
        vars(module)[name] = torch.Size(parts) if isinstance(old, torch.Size) else type(old)(parts)


def _choices(held: dict[Slot, int], left: Sizes, numbers: set[int]) -> Iterator[dict[Slot, int]]:
    """Yield other values for some of the numbers: for all whose size changed, for some of these, and then, the fewest
    first, any numbers in the program's operators of this module."""
    known = {slot: sorted(left[n]) for slot, n in held.items() if n in left}
    other = {slot: [m for m in sorted(numbers, reverse=True) if 0 < m < n] for slot, n in held.items() if n > 1}
    for count in range(len(known), 0, -1):
        yield from _some(known, count)
    for base in ([next(_some(known, len(known)))] if known else []) + [{}]:
        for count in (1, 2):
            for choice in _some({s: o for s, o in other.items() if s not in base}, count):
                yield base | choice


def _some(options: dict[Slot, list[int]], count: int) -> Iterator[dict[Slot, int]]:
    """All ways to choose `count` of the slots, and a value for each."""
    for slots in itertools.combinations(options, count):
        for values in itertools.product(*(options[s] for s in slots)):
            yield dict(zip(slots, values, strict=True))


def _where(error: Exception) -> str:
    """The innermost line of the error outside of PyTorch."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frames = [f for f in frames if f.filename != __file__]
    if not frames:
        return "PyTorch"
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}"


def _place_of(module: nn.Module) -> str:
    """File and line of the forward of a module's class."""
    try:
        start = inspect.getsourcelines(type(module).forward)[1]
        return f"{Path(inspect.getsourcefile(type(module)) or '').name}:{start}: {type(module).__name__}.forward"
    except (OSError, TypeError):
        return type(module).__name__
