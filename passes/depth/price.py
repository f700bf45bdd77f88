"""What pruning each block of a network would save, and why some blocks cannot be pruned."""

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

from torch import fx

from ...graph.cost import evaluate, macs
from ...graph.facts import MAPS
from ...graph.nodes import arguments, op_name
from ...graph.program import Program
from ...graph.sparse import sparse_weights
from ..fuse.choose_merges import Cost, Planner, plus
from ..fuse.regions import Regions
from .blocks import ACTIVATIONS, ATTENTION, NORMS, Block, branches_of, candidates, is_data, norm_axis
from .padding import is_centred, spatial
from .relax import relax

ORDER = "run PruneDepth before Sparsify"


def find_blocks(program: Program) -> list[Block]:
    """The blocks in the order of their exits, each with what pruning it would save, or why it cannot be pruned."""
    blocks = [_judged(b, _obstacle(program, b)) for b in candidates(program)]
    merging = [b for b in blocks if b.prunable and not b.dropped]
    settled = relax(program, merging, settled=True, fitted=True)  # the form with the most padding, which costs most
    owner = {n: b.name for b in blocks for n in b.nodes}
    before = {n.name: evaluate(macs(n)) for n in program.graph.nodes if is_data(n)}
    dense, pruned = _costs(program, lambda n: owner.get(n.name)), _costs(settled, lambda n: n.meta.get("block"))
    result = []
    for block in blocks:
        if not block.prunable:
            result.append(block)
            continue
        now = (0, 0) if block.dropped else pruned.get(block.name, (0, 0))
        saved = sum(before.get(n, 0) for n in block.nodes) - now[0]
        launches = dense.get(block.name, (0, 0))[1] - now[1]
        if saved <= 0:
            after = block.macs - saved
            why = f"its pruned form would take {after:,} MACs instead of {block.macs:,}"
            if not saved:
                why = f"its pruned form would save none of its {block.macs:,} MACs"
            result.append(replace(block, why=why))
        else:
            result.append(replace(block, saves=saved, kernels=launches))
    return result


def _judged(block: Block, why: str | None) -> Block:
    """The block with its obstacle, if any. An attention block that cannot be merged can still be left out."""
    if why is not None and block.kind == "attention":
        return replace(block, dropped=True)
    return replace(block, why=why)


def _costs(program: Program, owner: Callable[[fx.Node], str | None]) -> dict[str | None, Cost]:
    """For each block, MACs and kernels of the program after merging inside the block only, since the neighbours that it
    could be merged with may not be pruned."""
    regions, planner = Regions(program.graph_module), Planner((), sparse_weights(program))
    merged: set[fx.Node] = set()
    costs: dict[str | None, Cost] = {}  # with None for what is outside of blocks
    for parts in regions.find():
        for name, group in groupby(parts, key=lambda p: owner(p.last)):
            run = list(group)
            merges = planner.chain(run).merges if any(p.carriers for p in run) else ()
            for merge in merges:
                merged |= merge.members
                costs[name] = plus(costs.get(name, (0, 0)), merge.after)
    for node in program.graph.nodes:
        if node not in merged and is_data(node):
            name, kernels = owner(node), int(op_name(node) in (*MAPS, *NORMS, *ATTENTION))
            costs[name] = plus(costs.get(name, (0, 0)), (evaluate(macs(node)), kernels))
    return costs


def _obstacle(program: Program, block: Block) -> str | None:
    """Why a block has no form that can be merged, or None."""
    nodes = {n.name: n for n in program.graph.nodes}
    regions, sparse = Regions(program.graph_module), sparse_weights(program)
    for name in block.nodes:
        node, op = nodes[name], op_name(nodes[name])
        if op in ATTENTION:
            return f"{name} ({op}) is not linear; attention can only be left out as a whole"
        if op in ACTIVATIONS or op in ("permute", "transpose") or (op == "add" and regions.addends(node)):
            continue
        if op in NORMS:
            if norm_axis(node) is None:
                return f"{name} ({op}) does not normalise over channels alone"
            continue
        if op in MAPS or op == "batch_norm":
            if why := regions.problem(node):
                return f"{name}: {why}"
            weight = str(arguments(node)["weight"].target) if op in MAPS else None
            if weight in sparse:
                return f"merging would fill up {weight}, which Sparsify made {sparse[weight] or 'sparse'}; {ORDER}"
            continue
        if regions.step(node) is None:
            return f"{name} ({op}) is no affine map, and no activation or normalisation that becomes one"
    for path in branches_of(nodes, block):
        for node in spatial(path or ())[1:]:
            if not is_centred(node):
                return f"{node.name}: its kernel has no centre that a layer of one tap could keep"
    return None
