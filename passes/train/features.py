"""Features of a network: the nodes whose values are compared with a teacher's, and which indices of them a student kept."""

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ...graph import compat
from ...graph.compat import pytree
from ...graph.errors import BadInput, nearest
from ...graph.nodes import module_paths, op_name, shape
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..base import Refusal
from .callbacks import Kept


def block_outputs(program: Program) -> list[fx.Node]:
    """The nodes where a network's blocks end: its residual additions; without any, its concatenations; else the inputs of
    poolings."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    added = [n for n in nodes if op_name(n) == "add" and _residual(n)]
    joined = [n for n in nodes if op_name(n) == "cat" and len(shape(n)) > 2]
    pooled = [n.all_input_nodes[0] for n in nodes if "pool" in op_name(n)]
    return added or joined or list(dict.fromkeys(pooled))


def module_outputs(program: Program) -> dict[str, fx.Node]:
    """The maps and sequences (values of more than two dimensions) that the modules of the user's model output, by module
    path."""
    outputs: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.dim() > 2:
            outputs |= {path: node for path in module_paths(node) if path}
    return outputs


def feature_nodes(program: Program) -> list[fx.Node]:
    """All nodes whose values may be compared with a teacher's."""
    return list(dict.fromkeys([*block_outputs(program), *module_outputs(program).values()]))


def _wanted(program: Program, at: Sequence[str]) -> list[fx.Node]:
    """The outputs of the modules whose paths match a pattern; without patterns, those of blocks. Raises BadInput for a
    pattern without a match."""
    if not at:
        return block_outputs(program)
    outputs = module_outputs(program)
    for pattern in at:
        if not fnmatch.filter(outputs, pattern):
            raise BadInput(
                f"Distill.at: no module {pattern} gives a map or a sequence; {nearest(pattern, list(outputs))}"
            )
    return list(dict.fromkeys(n for path, n in outputs.items() if any(fnmatch.fnmatch(path, p) for p in at)))


def _residual(node: fx.Node) -> bool:
    def fits(term: Any) -> bool:
        computed = (
            isinstance(term, fx.Node) and term.op == "call_function" and isinstance(term.meta["val"], torch.Tensor)
        )
        return computed and len(shape(term)) > 2 and shape(term) == shape(node)

    return fits(node.args[0]) and fits(node.args[1])


def matching_features(teacher: Program, student: Program, at: Sequence[str] = ()) -> tuple[Kept, list[Refusal]]:
    """The features that both programs have, by node name, each with the indices of the teacher's that the student kept (by
    dimension; a dimension that is missing is whole); and refusals for the others.

    at: patterns of module paths whose outputs are the features; by default they are the block outputs. Which indices were
    kept follows from those records of the student's history that the teacher's lacks (`features` in the record of
    `RemoveChannels`). Without such a record, shapes have to be equal except for the batch. Raises BadInput for a pattern
    without a match.
    """
    since = list(student.history)
    for record in teacher.history:
        if since and since[0] == record:
            since.pop(0)
    theirs = {n.name: shape(n) for n in _wanted(teacher, at)}
    ours = {n.name: shape(n) for n in feature_nodes(student)}
    kept: Kept = {}
    refused = []
    for name, size in theirs.items():
        if name not in ours:
            refused.append(Refusal(name, "the student has no node of that name"))
            continue
        dims = _kept_since(name, size, since)
        left = tuple(len(dims[d]) if d in dims else n for d, n in enumerate(size))
        if left[1:] == ours[name][1:]:
            kept[name] = dims
        else:
            why = f"its shape is {ours[name][1:]} in the student, {size[1:]} in the teacher"
            refused.append(Refusal(name, why))
    if not theirs:
        refused.append(Refusal("features", "the teacher has no residual addition, concatenation or pooling"))
    return kept, refused


def _kept_since(name: str, size: tuple[int, ...], records: list[dict[str, Any]]) -> dict[int, torch.Tensor]:
    """By dimension, the indices of a value that are left after the recorded passes. size: the value's shape before them."""
    kept: dict[int, torch.Tensor] = {}
    for record in records:
        for entry in record.get("features", ()):
            for _, d in (place for place in entry["nodes"] if place[0] == name):
                left = kept.get(d, torch.arange(size[d]))
                stay = torch.ones(len(left), dtype=torch.bool)
                if max(entry["removed"]) < len(left):  # otherwise the record is of a network of another size
                    stay[entry["removed"]] = False
                kept[d] = left[stay]
    return kept


@contextmanager
def tapped(module: TrainableModule, names: Sequence[str]) -> Iterator[None]:
    """A context in which the module returns `(its outputs, [values of the named nodes])`."""
    graph = module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    before, codegen = output.args, compat.codegen_of(graph)
    by_name = {n.name: n for n in graph.nodes}
    plain = compat.output_spec(graph)
    spec = pytree.tree_structure((pytree.tree_unflatten([0] * plain.num_leaves, plain), [0] * len(names)))
    output.args = ((*before[0], *(by_name[name] for name in names)),)
    graph.set_codegen(compat.with_output_spec(codegen, spec))
    module.recompile()
    try:
        yield
    finally:
        output.args = before
        graph.set_codegen(codegen)
        module.recompile()
