"""The comb: solves what every dimension of every tensor is made of, and which indices must go together.

Each operator contributes equations between the axes of its operands (graph/rules); unification solves them (graph/axes).
What is left are atoms: units that can lose indices everywhere at once. Source: ours; the idea of combing dependencies
without hints is CPD's (arXiv 2408.03046).
"""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import cost
from ..errors import BadInput
from ..nodes import arguments, fetch, hint, is_operator, op_name, shape, source
from ..program import Program
from . import axes as ax
from .axes import Axis, Factor, Misaligned, Reason, atoms, freeze, show, unify
from .rules import RULES, NoRule
from .rules.elementwise import pointwise
from .rules.table import WINDOW

KINDS = ("channel", "head", "head width", "hidden", "group", "token", "multiplier", "constant")
FOLDED = "_folded_"  # what capture calls a constant that the model computes
DEFAULT_KINDS = ("channel", "head", "head width", "hidden", "group")
REGISTER = "register a rule for it with graphcomb.rule (CONTRIBUTING.md shows how)"


@dataclass(frozen=True)
class Group:
    """Indices that can only be removed together.

    name: "parameter:dim" of the first member, with the kind appended where one dimension holds several groups.
    size: number of indices. members: every (parameter or buffer, dim) the group takes part in. frozen: None, or why
    nothing may be removed. least: the number of indices that must stay for every operator to be defined.
    """

    name: str
    size: int
    kind: str
    members: list[tuple[str, int]]
    frozen: str | None
    atom: Factor
    least: int = 1


class Sizer:
    """Sizes of axes when atoms have the given sizes; operators share their axes, so each is computed once."""

    def __init__(self, sizes: ax.Sizes):
        self.sizes = sizes
        self._known: dict[int, tuple[Axis, int]] = {}  # the axis too: an id is only good while its object lives

    def __call__(self, axis: Axis) -> int:
        found = self._known.get(id(axis))
        if found is None:
            found = self._known[id(axis)] = (axis, ax.kept_size(axis, self.sizes))
        return found[1]


class Comb:
    """The solved axes of a program.

    axes: axes of every tensor node (a list of lists for operators with several results). parameters: axes of every
    parameter and buffer by name. refusals: nodes whose operator could not be followed, as (node, reason).
    """

    def __init__(self, program: Program):
        self.program = program
        self.module = program.graph_module
        self.axes: dict[fx.Node, Any] = {}
        self.parameters: dict[str, list[Axis]] = {}
        self.rewrites: list[tuple[fx.Node, Callable[..., None]]] = []
        self.minima: list[tuple[fx.Node, list[Axis], int]] = []
        self.refusals: list[tuple[fx.Node, str]] = []
        self._roles: list[tuple[Axis, str, fx.Node | None]] = []
        self._kernels: list[Axis] = []
        self._dynamic = any(not isinstance(n, int) for v in self._inputs() for n in v.shape)
        self._copies: dict[fx.Node, list[Axis]] = {}
        self._sums: dict[fx.Node, list[Axis]] = {}
        self._joins: set[fx.Node] = set()
        self._made_of_parameters: set[fx.Node] = set()
        self._groups: list[Group] | None = None
        self._units: list[tuple[list[Axis], dict[str, int]]] | None = None
        self._unknown: dict[str, list[str]] | None = None
        self._terms: list[tuple[fx.Node, list[list[Axis]]]] | None = None
        self._solve()

    # ----------------------------------------------------------------------------------------------------- solving
    def _solve(self) -> None:
        by_tensor: dict[int, list[Axis]] = {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                value = node.meta.get("val")
                if isinstance(value, torch.Tensor):
                    self.axes[node] = [self.frozen(node, d, "an input of the program") for d in range(value.dim())]
                else:
                    self.axes[node] = None
            elif node.op == "get_attr":
                found = fetch(self.module, str(node.target))
                if not isinstance(found, torch.Tensor):
                    self.axes[node] = None
                    continue
                if id(found) not in by_tensor:
                    by_tensor[id(found)] = [ax.fresh(n) for n in found.shape]
                self.axes[node] = self.parameters[str(node.target)] = by_tensor[id(found)]
                if isinstance(found, torch.nn.Parameter):
                    self._made_of_parameters.add(node)
            elif node.op == "output":
                for result in node.all_input_nodes:
                    self._freeze_all(self.axes[result], Reason(result, "an output of the program"))
            else:
                self.axes[node] = self._apply_rule(node)
        self._freeze_summed_copies()

    def _inputs(self) -> list[torch.Tensor]:
        values = [n.meta.get("val") for n in self.module.graph.nodes if n.op == "placeholder"]
        return [v for v in values if isinstance(v, torch.Tensor)]

    def _freeze_summed_copies(self) -> None:
        """Freeze padding and repetitions over which somebody sums or normalises before they meet anything with entries of
        its own: the sum would change, and no parameter that takes part says by what."""
        if not any(a.frozen is None for axes in self._copies.values() for a in atoms(axes)):
            return
        loose: dict[fx.Node, set[Factor]] = {}
        for node in self.axes:
            made = {a for a in atoms(self._copies.get(node, ())) if a.frozen is None}
            given: set[Factor] = set().union(*(loose.get(i, ()) for i in node.all_input_nodes))
            if not made and not given:
                continue
            for i in () if node in self._joins else node.all_input_nodes:
                given -= atoms(self._flat(i)).keys() - loose.get(i, set())
            for axis in self._sums.get(node, ()):
                for atom in atoms([axis]):
                    if atom in given:
                        freeze([atom], Reason(node, "sums over padding or repeated entries"))
            loose[node] = made | (given & atoms(self._flat(node)).keys())

    def _flat(self, node: fx.Node) -> list[Axis]:
        """The axes of all results of a node."""
        axes = self.axes[node] or []
        several = isinstance(node.meta.get("val"), (list, tuple))
        return [axis for result in axes for axis in result or ()] if several else axes

    def _apply_rule(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, list, tuple)):
            return None
        name = op_name(node)
        if name == "getitem":
            whole = self.axes[node.args[0]]  # type: ignore[index]
            return whole[node.args[1]] if whole is not None else None
        inputs = node.all_input_nodes
        if inputs and all(i in self._made_of_parameters or self.axes[i] is None for i in inputs):
            self._made_of_parameters.add(node)
        function = RULES.get(name)
        if function is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            function = pointwise
        solving = ax.solving.set(node)
        try:
            if function is None or not is_operator(node):
                raise NoRule("no rule for it")
            result = function(self, node, arguments(node))
            if node not in self._sums and not function.__module__.startswith(f"{__package__}."):
                self.sums(node, [axis for i in inputs for axis in self._flat(i)])  # a user's rule that does not say
            self._check(value, result)
            return result
        except Exception as error:  # a rule that stumbles, a user's one too, must not take the comb down: it freezes
            text = str(error) if isinstance(error, (NoRule, Misaligned)) else f"{type(error).__name__}: {error}"
            what = f"{name} cannot be followed" + ("" if text == "no rule for it" else f" ({text})")
            if text == "no rule for it":
                what = f"operator {name} has no rule"
            self.refusals.append((node, what))
            reason = Reason(node, what, REGISTER if function is None else "")
            for i in inputs:
                self._freeze_all(self.axes[i], reason)
            if isinstance(value, torch.Tensor):
                return [ax.fresh(hint(n), reason, not isinstance(n, int)) for n in value.shape]
            return [
                [ax.fresh(hint(n), reason, not isinstance(n, int)) for n in v.shape]
                if isinstance(v, torch.Tensor)
                else None
                for v in value
            ]
        finally:
            ax.solving.reset(solving)  # what stays in a context variable keeps its whole graph alive

    def _check(self, value: Any, result: Any) -> None:
        """The axes have the sizes of the tensors they describe."""
        pairs = [(value, result)] if isinstance(value, torch.Tensor) else zip(value, result, strict=True)
        for tensor, axes in pairs:
            if not isinstance(tensor, torch.Tensor):
                continue
            if len(axes) != tensor.dim() or any(ax.size(a) != hint(n) for a, n in zip(axes, tensor.shape, strict=True)):
                found = " x ".join(show(a) for a in axes)
                raise ValueError(f"the rule gives {found} for a tensor of shape {tuple(tensor.shape)}")
            for axis, n in zip(axes, tensor.shape, strict=True):
                if self._dynamic and isinstance(n, int):  # what a fixed size is made of is fixed
                    for atom in atoms([axis]):
                        atom.symbolic = False

    # ------------------------------------------------------------------------------------------ vocabulary of the rules
    def first(self, node: fx.Node) -> fx.Node:
        """The node's first tensor operand."""
        return next(
            a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node) and self.axes[a] is not None
        )

    @staticmethod
    def unify(a: Axis, b: Axis) -> None:
        """The two axes are the same index space."""
        if a is not b:
            unify(a, b)

    def freeze(self, axis: Axis, node: fx.Node, text: str) -> None:
        freeze(axis, Reason(node, text))

    def _freeze_all(self, axes: Any, reason: Reason) -> None:
        for axis in axes or ():
            if axis is None or (axis and isinstance(axis[0], list)) or axis == [[]]:
                self._freeze_all(axis, reason)
            else:
                freeze(axis, reason)

    def _dim(self, node: fx.Node, d: int, index: int | None = None) -> Any:
        value = node.meta["val"]
        return (value if index is None else value[index]).shape[d]

    def fresh(self, node: fx.Node, d: int, n: int | None = None) -> Axis:
        """A new, free axis for dimension d of the node's result (or of size n)."""
        size = self._dim(node, d)
        if n is not None:
            return ax.fresh(n)
        return ax.fresh(hint(size), None, not isinstance(size, int))

    def frozen(self, node: fx.Node, d: int, text: str, index: int | None = None) -> Axis:
        """A new frozen axis for dimension d of the node's result."""
        size = self._dim(node, d, index)
        return ax.fresh(hint(size), Reason(node, text), not isinstance(size, int))

    def window(self, node: fx.Node, x: fx.Node, first: int, index: int | None = None) -> list[Axis]:
        """The node slides a window over the dimensions of x from `first` on: freeze them, and the result's."""
        for axis in self.axes[x][first:]:
            self.freeze(axis, node, WINDOW)
        return [self.frozen(node, d, WINDOW, index) for d in range(first, len(shape(x)))]

    def kernel(self, axis: Axis, node: fx.Node) -> None:
        """Kernel positions of a convolution: frozen, and not worth a group of their own."""
        self.freeze(axis, node, "kernel positions")
        self._kernels.append(axis)

    def copies(self, node: fx.Node, axes: list[Axis], role: str) -> None:
        """Along these axes of its result the node repeats a constant or its operand; role: "constant" or "multiplier"."""
        self._copies.setdefault(node, []).extend(axes)
        for axis in axes:
            self.role(axis, role)

    def sums(self, node: fx.Node, axes: list[Axis]) -> None:
        """The node adds up, compares or normalises the entries along these axes of its operands. A user's rule that does
        not call this is taken to do so along all of them; one of an operator that takes every entry by itself says `[]`."""
        self._sums.setdefault(node, []).extend(axes)

    def joins(self, node: fx.Node) -> None:
        """The node's operands come to lie side by side and do not meet entry by entry."""
        self._joins.add(node)

    def at_least(self, node: fx.Node, axes: list[Axis], count: int) -> None:
        """The node is defined only where the axes together keep this many indices."""
        self.minima.append((node, axes, count))

    def role(self, axis: Axis, role: str, weight: fx.Node | None = None) -> None:
        """Note what an axis is used as: "out", "in", "linear" (out of a linear), "group", "multiplier", "head", "width" or
        "constant"."""
        self._roles.append((axis, role, weight))

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether the tensor is a parameter, or computed from parameters alone."""
        return node in self._made_of_parameters

    def rewrite(self, node: fx.Node, function: Callable[..., None]) -> None:
        """After slicing, call `function(slicer, new_node)` to regenerate the node's constants from its axes."""
        self.rewrites.append((node, function))

    def resize(self, node: fx.Node, argument: str, axes: list[Axis]) -> None:
        """The list of sizes in `argument` describes `axes`: regenerate what changes."""
        self.rewrite(node, lambda slicer, new: slicer.resize(node, new, argument, axes))

    # ------------------------------------------------------------------------------------------------------- results
    @property
    def groups(self) -> list[Group]:
        """All groups that have a parameter or buffer as a member, frozen ones included, in graph order."""
        if self._groups is None:
            self._groups = self._make_groups()
        return self._groups

    def members(self) -> dict[Factor, list[tuple[str, int]]]:
        """(parameter or buffer, dim) pairs in which each atom occurs."""
        found: dict[Factor, list[tuple[str, int]]] = defaultdict(list)
        for name, axes in self.parameters.items():
            for d, axis in enumerate(axes):
                for atom in atoms([axis]):
                    found[atom].append((name, d))
        return found

    def _make_groups(self) -> list[Group]:
        members = self.members()
        hidden = atoms(self._kernels)
        kinds = self.kinds()
        named: dict[str, list[tuple[Factor, str]]] = defaultdict(list)
        for atom in members:
            if atom in hidden and atom.frozen is not None and atom.frozen.text == "kernel positions":
                continue
            name, dim = next((m for m in members[atom] if not m[0].startswith(FOLDED)), members[atom][0])
            named[f"{name}:{dim}"].append((atom, kinds[atom]))
        least = self._least()
        result = []
        for base, found in named.items():
            for atom, kind in found:
                name = base
                if len(found) > 1:
                    same = [a for a, k in found if k == kind]
                    name = f"{base}/{kind}" + (f".{same.index(atom)}" if len(same) > 1 else "")
                frozen = str(atom.frozen) if atom.frozen is not None else None
                if frozen is not None and name.startswith(FOLDED):
                    frozen = f"a constant that {self._maker(name.split(':')[0])} computes; {frozen}"
                result.append(Group(name, atom.size, kind, members[atom], frozen, atom, least.get(atom, 1)))
        return result

    def _maker(self, name: str) -> str:
        """The line of the user's model from which a constant was folded."""
        return source(next(n for n in self.module.graph.nodes if n.op == "get_attr" and n.target == name))

    def _least(self) -> dict[Factor, int]:
        """What each atom has to keep so that every minimum holds whatever else is removed."""
        found: dict[Factor, int] = {}
        for _, axes, count in self.minima:
            free = [a for a in atoms(axes) if a.frozen is None]
            if math.prod(ax.kept_size(axis, dict.fromkeys(free, 1)) for axis in axes) < count:
                found.update((a, max(found.get(a, 1), min(count, a.size))) for a in free)
        return found

    def kinds(self) -> dict[Factor, str]:
        """The kind of every atom that occurs in a parameter or buffer, derived from how its axes are used."""
        roles: dict[Factor, set[str]] = defaultdict(set)
        producers: dict[Factor, set[fx.Node]] = defaultdict(set)
        consumers: dict[Factor, set[fx.Node]] = defaultdict(set)
        for axis, role, weight in self._roles:
            for atom in atoms([axis]):
                roles[atom].add(role)
                if weight is not None:
                    (consumers if role == "in" else producers)[atom].add(weight)
        trainable = {n for n, p in self.module.named_parameters(remove_duplicate=False)}
        partners: dict[Factor, set[Factor]] = defaultdict(set)
        owned: set[Factor] = set()
        for name, axes in self.parameters.items():
            for axis in axes:
                for monomial in ax.monomials(axis):
                    if name in trainable:
                        owned.update(monomial)
                    if len(monomial) > 1:
                        for atom in monomial:
                            partners[atom].update(m for m in monomial if m is not atom)
        result = {}
        for atom in self.members():
            mine = roles[atom]
            near = {r for p in partners[atom] for r in roles[p]}
            linear = mine <= {"linear", "in"} and len(consumers[atom]) == 1 and bool(producers[atom])
            if atom not in owned or ("constant" in mine and not producers[atom]):
                kind = "constant"
            elif "multiplier" in mine and not mine & {"head", "group"}:
                kind = "multiplier"
            elif "head" in mine:
                kind = "head"
            elif "width" in mine or "head" in near:
                kind = "head width"
            elif "group" in mine:
                kind = "group"
            elif not mine & {"out", "in", "linear"}:
                kind = "token"
            else:
                kind = "hidden" if linear else "channel"
            result[atom] = kind
        return result

    def why(self, parameter: str) -> str:
        """What each dimension of a parameter is made of and why frozen parts are frozen. BadInput for an unknown name."""
        if parameter not in self.parameters:
            near = difflib.get_close_matches(parameter, self.parameters, n=3)
            raise BadInput(f"no parameter {parameter}" + (f"; did you mean {', '.join(near)}?" if near else ""))
        names = {g.atom: g.name for g in self.groups}
        kinds = self.kinds()
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
    def cost_terms(self) -> list[tuple[fx.Node, list[list[Axis]]]]:
        """MACs of every node as sums of products of axes (see `graph.cost`)."""
        if self._terms is None:
            self._terms = []
            for node in self.module.graph.nodes:
                polynomial = cost.macs(node)
                if polynomial:
                    self._terms.append((node, [[self._factor(node, ref) for ref in m] for m in polynomial]))
        return self._terms

    def _factor(self, node: fx.Node, ref: cost.Ref) -> Axis:
        """The axis a monomial refers to; a plain number is an axis that nothing shrinks."""
        return ax.fresh(ref, Reason(node, "a number")) if isinstance(ref, int) else self.axes[ref[0]][ref[1]]

    def macs(self, sizes: ax.Sizes | None = None) -> int:
        """MACs of the program when atoms have the given sizes."""
        size = Sizer(sizes or {})
        return sum(math.prod(map(size, m)) for _, terms in self.cost_terms() for m in terms)

    def cost(self, sizes: ax.Sizes) -> dict[str, Any]:
        """`Program.cost()` of the program in which atoms have the given sizes."""
        size = Sizer(sizes)
        found: dict[str, Any] = {"macs": self.macs(sizes), "weight_bytes": 0, "activation_bytes": 0, "params": 0}
        for axes, count in self._tensor_units():
            entries = math.prod(map(size, axes))
            for key, unit in count.items():
                found[key] += unit * entries
        if self._unknown is None:
            self._unknown = cost.unknowns(self.module)
        return found | self._unknown

    def _tensor_units(self) -> list[tuple[list[Axis], dict[str, int]]]:
        """What one entry of each tensor adds to the parts of the cost."""
        if self._units is None:
            self._units = []
            parameters = {id(p) for p in self.module.parameters()}
            for node, axes in self.axes.items():
                value = node.meta.get("val")
                if axes is None or not isinstance(value, torch.Tensor) or node.op == "placeholder":
                    continue
                if node.op == "call_function":
                    self._units.append((axes, {"activation_bytes": value.element_size()}))
                    continue
                tensor = id(fetch(self.module, str(node.target)))
                self._units.append((axes, {"weight_bytes": value.element_size(), "params": int(tensor in parameters)}))
                parameters.discard(tensor)
        return self._units

    def coverage(self) -> float:
        """Share of the parameters' elements that lie on at least one prunable axis."""
        reached = total = 0
        seen: set[int] = set()
        for name, p in self.module.named_parameters(remove_duplicate=True):
            if id(p) in seen or name not in self.parameters:
                continue
            seen.add(id(p))
            total += p.numel()
            if any(a.frozen is None for axis in self.parameters[name] for a in atoms([axis])):
                reached += p.numel()
        return reached / max(total, 1)


def comb(program: Program | torch.nn.Module) -> Comb:
    """Solve the axes of a program."""
    if not isinstance(program, Program):
        raise BadInput(f"comb takes a Program (graphcomb.capture makes one), not {type(program).__name__}")
    return Comb(program)


__all__ = ["DEFAULT_KINDS", "KINDS", "Comb", "Group", "comb"]
