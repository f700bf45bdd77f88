"""The comb: finds the atoms that every dimension of every tensor consists of, and which indices must be removed together.

Each operator contributes equations between the axes of its operands (`rules`); unification solves them (`axes`). The
remaining unknowns are atoms: units that can lose indices in all tensors at once. Source: ours; the idea of combing
dependencies without hints is CPD's (arXiv 2408.03046).
"""

from __future__ import annotations

import difflib
from functools import cached_property
from typing import Any

import torch
from torch import fx

from .. import cost
from ..errors import BadInput, strict
from ..facts import is_pointwise
from ..nodes import arguments, fetch, hint, is_operator, op_name
from ..program import Program
from . import axes as ax
from .axes import Axis, Factor, Misaligned, Reason, atoms, freeze, show
from .equations import Equations
from .groups import Group, find_groups, kinds_of
from .rules import RULES, NoRule
from .rules.elementwise import pointwise


class Sizer:
    """Computes sizes of axes for given sizes of atoms; operators share their axes, so each is computed once."""

    def __init__(self, sizes: ax.Sizes):
        self.sizes = sizes
        self._known: dict[int, tuple[Axis, int]] = {}  # keeps the axes alive, so that no id is used twice

    def __call__(self, axis: Axis) -> int:
        known = self._known.get(id(axis))
        if known is None:
            known = self._known[id(axis)] = (axis, ax.kept_size(axis, self.sizes))
        return known[1]


REGISTER = "register a rule for it with graphcomb.rule (CONTRIBUTING.md shows how)"


class Comb(Equations):
    """The solved axes of a program. Besides the attributes of `Equations`, refusals: (node, reason) for operators that
    could not be followed."""

    def __init__(self, program: Program):
        super().__init__(program)
        self.refusals: list[tuple[fx.Node, str]] = []
        inputs: list[Any] = [n.meta.get("val") for n in self.module.graph.nodes if n.op == "placeholder"]
        self._dynamic = any(not isinstance(n, int) for v in inputs if isinstance(v, torch.Tensor) for n in v.shape)
        self._solve()

    # ----------------------------------------------------------------------------------------------------- solving
    def _solve(self) -> None:
        by_tensor: dict[int, list[Axis]] = {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.axes[node] = self.all_frozen(node.meta.get("val"), Reason(node, "an input of the program"))
            elif node.op == "get_attr":
                stored = fetch(self.module, str(node.target))
                if not isinstance(stored, torch.Tensor):
                    self.axes[node] = None
                    continue
                if id(stored) not in by_tensor:
                    by_tensor[id(stored)] = [ax.fresh(n) for n in stored.shape]
                self.axes[node] = self.parameters[str(node.target)] = by_tensor[id(stored)]
                if isinstance(stored, torch.nn.Parameter):
                    self._made_of_parameters.add(node)
            elif node.op == "output":
                for result in node.all_input_nodes:
                    self._freeze_all(result, Reason(result, "an output of the program"))
            else:
                self.axes[node] = self._apply_rule(node)
        self._freeze_summed_copies()

    def _freeze_summed_copies(self) -> None:
        """Freeze padding and repetitions that an operator sums or normalises over before they meet entries that belong to a
        parameter: the sum would change, and no parameter could make up for it."""
        if not any(a.frozen is None for axes in self._copies.values() for a in atoms(axes)):
            return
        loose: dict[fx.Node, set[Factor]] = {}
        for node in self.axes:
            made = {a for a in atoms(self._copies.get(node, ())) if a.frozen is None}
            inherited: set[Factor] = set().union(*(loose.get(i, ()) for i in node.all_input_nodes))
            if not made and not inherited:
                continue
            for i in () if node in self._joins else node.all_input_nodes:
                inherited -= atoms(self.flat(i)).keys() - loose.get(i, set())
            for axis in self._sums.get(node, ()):
                for atom in atoms([axis]):
                    if atom in inherited:
                        freeze([atom], Reason(node, "sums over padding or repeated entries"))
            loose[node] = made | (inherited & atoms(self.flat(node)).keys())

    def _apply_rule(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, list, tuple)):
            return None
        name, inputs = op_name(node), node.all_input_nodes
        if name == "getitem":
            whole = self.axes[node.args[0]]  # type: ignore[index]
            return whole[node.args[1]] if whole is not None else None
        if inputs and all(i in self._made_of_parameters or self.axes[i] is None for i in inputs):
            self._made_of_parameters.add(node)
        function = RULES.get(name)
        if function is None and is_pointwise(node):
            function = pointwise
        if function is None or not is_operator(node):
            return self._refuse(node, f"operator {name} has no rule", "" if function else REGISTER)
        solving = ax.solving.set(node)
        try:
            result = function(self, node, arguments(node))
            if node not in self._sums and not function.__module__.startswith(f"{__package__}."):
                self.sums(node, [axis for i in inputs for axis in self.flat(i)])  # a user's rule without `sums`
            self._check(value, result)
            return result
        except (NoRule, Misaligned) as error:
            return self._refuse(node, f"{name} cannot be followed ({error})")
        except Exception as error:  # a mistake in a rule freezes what the node touches, instead of ending the comb
            if strict():
                raise
            return self._refuse(node, f"{name} cannot be followed ({type(error).__name__}: {error})")
        finally:
            ax.solving.reset(solving)  # a node that stayed in a context variable would keep its whole graph alive

    def _refuse(self, node: fx.Node, what: str, advice: str = "") -> Any:
        """Freeze everything that the node reads and computes; returns the frozen axes of its results."""
        self.refusals.append((node, what))
        reason = Reason(node, what, advice)
        for i in node.all_input_nodes:
            self._freeze_all(i, reason)
        return self.all_frozen(node.meta["val"], reason)

    def _freeze_all(self, node: fx.Node, reason: Reason) -> None:
        for axis in self.flat(node):
            freeze(axis, reason)

    def _check(self, value: Any, result: Any) -> None:
        """Raise ValueError unless the axes have the sizes of the tensors that they describe."""
        pairs = [(value, result)] if isinstance(value, torch.Tensor) else zip(value, result, strict=True)
        for tensor, axes in pairs:
            if not isinstance(tensor, torch.Tensor):
                continue
            if len(axes) != tensor.dim() or any(ax.size(a) != hint(n) for a, n in zip(axes, tensor.shape, strict=True)):
                sizes = " x ".join(show(a) for a in axes)
                raise ValueError(f"the rule gives {sizes} for a tensor of shape {tuple(tensor.shape)}")
            for axis, n in zip(axes, tensor.shape, strict=True):
                if self._dynamic and isinstance(n, int):  # the atoms of a fixed size are not dynamic
                    for atom in atoms([axis]):
                        atom.symbolic = False

    # ------------------------------------------------------------------------------------------------------- results
    @cached_property
    def groups(self) -> list[Group]:
        """All groups that have a parameter or buffer as a member, frozen ones included, in graph order."""
        return find_groups(self)

    def why(self, parameter: str) -> str:
        """A text about each dimension of a parameter: its atoms, and why frozen ones are frozen. Raises BadInput for an
        unknown name."""
        if parameter not in self.parameters:
            near = difflib.get_close_matches(parameter, self.parameters, n=3)
            raise BadInput(f"no parameter {parameter}" + (f"; did you mean {', '.join(near)}?" if near else ""))
        names = {g.atom: g.name for g in self.groups}
        kinds = kinds_of(self)
        lines = []
        for d, axis in enumerate(self.parameters[parameter]):
            lines.append(f"{parameter}:{d} = {show(axis)}")
            for atom in atoms([axis]):
                if atom.frozen is not None:
                    lines.append(f"  {atom.size} frozen: {atom.frozen}")
                else:
                    lines.append(f"  {atom.size} prunable: {kinds[atom]}, group {names[atom]}")
        return "\n".join(lines)

    # ---------------------------------------------------------------------------------------------------------- cost
    @cached_property
    def _cost_parts(self) -> list[tuple[fx.Node, list[list[Axis]], dict[str, int]]]:
        """The terms of the program's cost (see `graph.cost`), with axes in place of dimensions."""

        def axis(node: fx.Node, ref: cost.Ref) -> Axis:  # a plain number becomes a frozen axis
            return ax.fresh(ref, Reason(node, "a number")) if isinstance(ref, int) else self.axes[ref[0]][ref[1]]

        parts = cost.terms(self.module)
        return [
            (node, [[axis(node, ref) for ref in m] for m in polynomial], units) for node, polynomial, units in parts
        ]

    def cost_terms(self) -> list[tuple[fx.Node, list[list[Axis]]]]:
        """For every node that multiplies, its MACs as a sum of products of axes (see `graph.cost`)."""
        return [(node, axes) for node, axes, units in self._cost_parts if "macs" in units]

    def macs(self, sizes: ax.Sizes | None = None) -> int:
        """MACs of the program when atoms have the given sizes."""
        size = Sizer(sizes or {})
        return sum(cost.evaluate(axes, size) for _, axes in self.cost_terms())

    def cost(self, sizes: ax.Sizes) -> dict[str, Any]:
        """The result of `Program.cost()` for the program whose atoms have the given sizes."""
        return cost.total(self._cost_parts, Sizer(sizes)) | self._uncounted

    @cached_property
    def _uncounted(self) -> dict[str, list[str]]:
        return cost.unknowns(self.module)

    def coverage(self) -> float:
        """Share of the parameters' elements that lie on at least one prunable axis."""
        sizes = {name: p.numel() for name, p in self.module.named_parameters() if name in self.parameters}
        reached = [n for name, n in sizes.items() if any(a.frozen is None for a in atoms(self.parameters[name]))]
        return sum(reached) / max(sum(sizes.values()), 1)


def comb(program: Program | torch.nn.Module) -> Comb:
    """Solve the axes of a program. Raises BadInput for anything else."""
    if not isinstance(program, Program):
        raise BadInput(f"comb takes a Program (graphcomb.capture makes one), not {type(program).__name__}")
    return Comb(program)
