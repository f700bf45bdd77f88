"""The nodes of merged layers: in the graph, the merged map (`merge_weights`) replaces the layer with the most weights, and
the other nodes are erased."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...graph.edit import Editor, like
from ...graph.nodes import arguments, fetch, op_name, shape
from ...graph.program import Program
from ...graph.sparse import sparse_weights
from ...graph.trainable import TrainableModule
from ...graph.verify.evaluate import to_double
from .choose_merges import Merge, Planner
from .merge_weights import Kernel, operator
from .parts import Sum, Values, kernel_of, map_of_branches
from .proof import TOLERANCE, Proof, merge_error, prove, random_values
from .regions import Regions


def merged_kernel(merge: Merge, values: Values) -> Kernel:
    """The one map that a merge puts in the place of several, with the weights that `values` gives, in float64."""
    return map_of_branches(merge.branches, merge.axis, merge.source, kernel_of(values))


@dataclass(frozen=True)
class Failure:
    """A merge that turned out wrong: its nodes, and the reason."""

    members: set[fx.Node]
    why: str


class Merger:
    """Merges what it can in a copy of a program, each merge after it was checked.

    Merged weights are kept in float64 beside their rounded values, so that chains of merges round once and checks see the
    algebra alone. wrong: merges that must not be done: the name of the node of `program` whose value each gives, with the
    reason. checked: False leaves the checks out, for a program of which only the structure is used.
    """

    def __init__(self, program: Program, seed: int, wrong: Mapping[str, str], checked: bool = True):
        copied = program.copy()
        self.checked = checked
        self.program, self.seed = program, seed
        self.module: TrainableModule = copied.graph_module.eval()
        self.graph, self.edit = self.module.graph, Editor(self.module)
        # For every node, the node of the original program with the same value.
        self.twins: dict[fx.Node, fx.Node] = dict(zip(self.graph.nodes, program.graph.nodes, strict=True))
        self.generator = torch.Generator().manual_seed(seed)
        self.sparse = sparse_weights(program)
        self.exact: dict[str, torch.Tensor] = {}
        self.changed: list[dict[str, Any]] = []
        # Wrong merges, by the node whose value they give.
        self.failed = {n: Failure({n}, wrong[twin.name]) for n, twin in self.twins.items() if twin.name in wrong}
        self.moved: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Plan all regions and do the merges that are cheaper, until a sweep finds none."""
        while self._sweep():
            pass

    def _sweep(self) -> bool:
        before = len(self.changed)
        self.regions, self.planner = Regions(self.module), Planner(self.failed, self.sparse)
        for parts in list(self.regions.find()):
            for merge in self.planner.chain(parts).merges:
                self._do(merge)
        self.module.recompile()
        return len(self.changed) > before

    def proof(self) -> Proof:
        """Compare the merged network with the original on random inputs (`prove`)."""
        fused = self.program.derive(self.module, stale=False)
        return prove(self.program, fused, self.twins, self.exact, self.seed)

    def _do(self, merge: Merge) -> None:
        """Check a merge and do it; a wrong one is remembered and not done."""
        kernel, nodes = merged_kernel(merge, self._value), list(self.graph.nodes)
        error = self._error(merge, kernel, nodes) if self.checked else 0.0
        if not error <= TOLERANCE:
            self.failed[merge.last] = Failure(merge.members, f"the merged layer is {error:.1e} off")
            return
        members = [n.name for n in nodes if n in merge.members]
        into = self._commit(merge, kernel)
        self.changed.append({"rule": _rule(merge), "into": into, "nodes": members, "error": error})
        if merge.after[0] != merge.before[0]:
            self.changed[-1]["macs"] = [merge.before[0], merge.after[0]]

    def _error(self, merge: Merge, kernel: Kernel, nodes: list[fx.Node]) -> float:
        """How far off the merged layer is, with the program's weights and with random ones."""
        error = merge_error(merge, kernel, self._value, nodes, self._current, self.generator)
        drawn = random_values(self._value, self.generator)
        return max(error, merge_error(merge, merged_kernel(merge, drawn), drawn, nodes, self._current, self.generator))

    def _value(self, stored: fx.Node) -> torch.Tensor:
        """The value of a stored tensor in float64, before rounding if it is a merged one."""
        name = str(stored.target)
        exact = self.exact.get(name)
        return to_double(fetch(self.module, name)) if exact is None else exact

    def _current(self, node: fx.Node) -> fx.Node:
        """The node that computes the value of `node` now, which may have been merged since the plan was made."""
        while node in self.moved:
            node = self.moved[node]
        return node

    def _commit(self, merge: Merge, kernel: Kernel) -> str:
        """Put the merged map at the place of the layer with the most weights; returns the name of its weight."""
        carriers = [step.carrier for step in merge.steps() if step.carrier]
        keep = max(carriers, key=lambda n: math.prod(shape(arguments(n)["weight"])))
        weight = self._store(keep, "weight", kernel.stored_weight())
        bias = None if kernel.bias is None else self._store(keep, "bias", kernel.bias)
        keep.target, args = operator(op_name(keep), kernel.geometry)
        keep.args, keep.kwargs = (self._current(merge.source), weight, bias, *args), {}
        total = keep
        value = merge.last.meta["val"]
        with self.edit.before(merge.last):
            for branch in merge.rest:
                alpha: dict[str, Any] = {} if branch.factor == 1 else {"alpha": branch.factor}
                terms = (total, self._current(branch.end))
                total = self.edit.call(torch.ops.aten.add.Tensor, terms, alpha, like=merge.last, value=value)
        keep.meta["val"] = value
        twin = self.twins.get(merge.last)
        self.twins.pop(keep, None)  # where a sum keeps some branches, no node of the original has this partial sum
        if twin is not None:
            self.twins[total] = twin
        if merge.last is not total:
            merge.last.replace_all_uses_with(total, delete_user_cb=lambda user: user is not keep)
            self.moved[merge.last] = total
        for node in [n for n in reversed(list(self.graph.nodes)) if n in merge.members - {keep} and not n.users]:
            self.edit.erase(node)
        return str(weight.target)

    def _store(self, keep: fx.Node, key: str, exact: torch.Tensor) -> fx.Node:
        """Give the layer `keep` a new weight or bias (`key`), creating a bias that it lacks; returns the node of the
        tensor.
        """
        stored, name = arguments(keep)[key], str(arguments(keep)["weight"].target)
        weight = fetch(self.module, name)
        value = like(weight, exact.to(weight.dtype))
        if stored is None:
            with self.edit.before(keep):
                stored = self.edit.store(self.edit.free_name(_beside(name, key)), value)
        else:
            self.edit.overwrite(stored, value)
        self.exact[str(stored.target)] = exact
        return stored


def _beside(weight: str, key: str) -> str:
    """The name for another tensor of the layer that owns `weight`: `conv.weight` and the key "bias" give `conv.bias`."""
    owner, _, name = weight.rpartition(".")
    return f"{owner}{'.' * bool(owner)}{name.replace('weight', key) if 'weight' in name else f'{name}_{key}'}"


def _rule(merge: Merge) -> str:
    """The name of a merge in the record, such as "conv2d + batch_norm"."""
    if len(merge.parts) == 1:
        return f"sum of {len(merge.indices or merge.parts[0].branches)} branches"
    return " + ".join("sum" if isinstance(p, Sum) else op_name(p.nodes[len(p.nodes) // 2]) for p in merge.parts)
