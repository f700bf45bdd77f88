"""An exported program as a functional graph in the training IR, by PyTorch's own functionaliser.

`run_decompositions({})` rewrites all in-place writes, also those through views and into buffers, but it removes the
training flags of batch_norm, dropout and rrelu. So these become opaque operators before it, and themselves again after it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from .. import compat
from ..edit import Editor
from ..errors import CaptureError, in_a_line
from ..facts import DROPOUTS
from ..nodes import arguments, continuous, fetch, op_name, source, writes
from ..trainable import graphs, set_tag, tag, walk
from .constants import fold_constants
from .regions import drop_litter


class CaptureWarning(UserWarning):
    """Warns of a part of the model that is not in the program, or that could not be compared with it."""


aten = torch.ops.aten
_LIBRARY = torch.library.Library("graphcomb", "FRAGMENT")
_NORM = (
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, bool training, float momentum, float eps, "
    "bool cudnn_enabled) -> Tensor"
)
_DROPOUT = "(Tensor input, float p, bool train) -> Tensor"
_SCHEMAS = {
    "batch_norm": _NORM,
    **dict.fromkeys(sorted(DROPOUTS), _DROPOUT),
    "rrelu": "(Tensor input, Scalar lower, Scalar upper, bool training, Generator? generator) -> Tensor",
}


def _same_shape(input: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(input)


for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(f"opaque_{_name}{_schema}")
    torch.library.register_fake(f"graphcomb::opaque_{_name}", _same_shape, lib=_LIBRARY)

_THERE = {getattr(aten, name).default: getattr(torch.ops.graphcomb, f"opaque_{name}").default for name in _SCHEMAS}
_BACK = {there: here for here, there in _THERE.items()}


def functional_graph(exported: ExportedProgram) -> fx.GraphModule:
    """The exported program (with its regions already inlined) as an unlifted functional graph.

    In-place writes are rewritten, with one `copy_` at the end for every buffer or input that the program changes; constants
    are folded. Raises CaptureError where the functionaliser refuses.
    """
    if any(writes(n) for _, n in walk(exported.graph_module)):
        exported = _functionalised(exported)
    module = compat.unlifted(exported)
    for part in graphs(module):
        _restore(part.graph)
    drop_litter(module.graph)
    _tie(module)
    _tidy(module)
    fold_constants(module)
    return module


def _functionalised(exported: ExportedProgram) -> ExportedProgram:
    """Run PyTorch's functionaliser over the whole program; a graph without in-place writes does not need it."""
    for module in graphs(exported.graph_module):
        _make_opaque(module)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            return exported.run_decompositions({})
    except Exception as error:
        raise CaptureError(f"the exported graph cannot be made functional: {in_a_line(error, 300)}") from error


def written_parameters(
    exported: ExportedProgram, model: torch.nn.Module, in_eval: Collection[str] | None = None
) -> set[str]:
    """The parameters that the forward itself writes to; they must be frozen, and act as buffers.

    in_eval: for a training graph, the parameters that are written in eval mode. Raises CaptureError, naming the node, for a
    write to a parameter that trains, or that is not in `in_eval`: a program could not train it.
    """
    assigned: set[str] = set()
    specs = exported.graph_signature.input_specs
    names = {i.arg.name: str(i.target) for i in specs if i.kind is InputKind.PARAMETER}
    owners = {_memory(n): names[n.name] for n in exported.graph.nodes if n.op == "placeholder" and n.name in names}
    for node in exported.graph.nodes:
        if not writes(node):
            continue
        for i, argument in enumerate(compat.schema(node.target).arguments):
            base = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            name = owners.get(_memory(base)) if written and isinstance(base, fx.Node) else None
            if name is None:
                continue
            assigned.add(name)
            if model.get_parameter(name).requires_grad or name not in (assigned if in_eval is None else in_eval):
                raise CaptureError(
                    f"{source(node)} writes to the parameter {name} of the model itself, which a program cannot train; "
                    "write to it outside of forward, such as after the optimizer's step"
                )
    return assigned


def own(exported: ExportedProgram) -> ExportedProgram:
    """The same program around a copy of its graph, which may be changed."""
    module = copy.deepcopy(exported.graph_module)
    for (_, old), (_, new) in zip(walk(exported.graph_module), walk(module), strict=True):
        new.meta, new.name = dict(old.meta), old.name  # the same fake values, and the names that the signature has
    for part in graphs(module):
        part.recompile()
    return compat.with_module(exported, module)


# ---------------------------------------------------------------------------------------------------- opaque operators
def _make_opaque(module: fx.GraphModule) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        if node.target not in _THERE:
            continue
        if op_name(node) in DROPOUTS and not arguments(node)["train"] and (reader := _alias_conflict(graph, node)):
            known = tag(node)
            if any(pair[1] for pair in known.get("modes", {}).values()):
                warnings.warn(
                    f"{source(node)}: this dropout is not in the program, in training neither: what is written in place "
                    f"reaches {reader.name} through it in eval mode and does not in training",
                    CaptureWarning,
                    stacklevel=2,
                )
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        known, values = tag(node), tuple(arguments(node).values())
        node.target, node.args, node.kwargs = _THERE[node.target], values, {}
        if known:
            set_tag(node, **known)
    module.recompile()


def _alias_conflict(graph: fx.Graph, dropout: fx.Node) -> fx.Node | None:
    """A node that would see another value than it should, because dropout in eval mode returns its input itself and not a
    copy: one of the two is written in place and the other read afterwards. None if there is no such node."""
    memory = _memory(dropout)
    if memory is None or memory != _memory(dropout.args[0]):
        return None
    inside, written, after = {dropout}, {True: False, False: False}, False
    for node in graph.nodes:
        after = after or node is dropout
        if not after or node is dropout:
            continue
        touched = [i for i in node.all_input_nodes if _memory(i) == memory]
        for i in touched:
            if written[i not in inside]:
                return node
        base = node.args[0] if node.args and writes(node) else None
        if isinstance(base, fx.Node) and base in touched:
            written[base in inside] = True
        if _memory(node) == memory and any(i in inside for i in touched):
            inside.add(node)
    return None


def _memory(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return compat.storage_id(value) if isinstance(value, torch.Tensor) and value.layout == torch.strided else None


def _restore(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target in _BACK:
            known = tag(node)
            node.target = _BACK[node.target]
            compat.rename(node, op_name(node))
            if known:
                set_tag(node, **known)


# ---------------------------------------------------------------------------------------------------------- tidying up
def _tie(module: fx.GraphModule) -> None:
    """Make several names of the same memory one tensor again, since a saved program is loaded with a tensor for every
    name."""
    known: dict[Any, torch.Tensor] = {}
    for node in module.graph.nodes:
        stored = fetch(module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(stored, torch.Tensor) and stored.layout == torch.strided and stored.numel():
            memory = (compat.storage_id(stored), stored.storage_offset(), stored.dtype, stored.shape, stored.stride())
            kind = isinstance(stored, torch.nn.Parameter)
            first = known.setdefault((kind, *memory), stored)
            if first is not stored:
                path, _, name = str(node.target).rpartition(".")
                setattr(module.get_submodule(path), name, first)


def _tidy(module: fx.GraphModule) -> None:
    """Replace the functionaliser's operators by those of the training IR.

    view and _unsafe_view become reshape, which means the same once nothing writes in place, and needs no particular memory
    layout (that of scaled_dot_product_attention depends on the kernel, and so on the widths); a copy before one becomes
    part of it. A copy that only changes the layout becomes `contiguous`, a cast becomes `to`.
    """
    edit = Editor(module)
    for node in list(module.graph.nodes):
        if node.target in (aten.view.default, aten._unsafe_view.default):
            a = arguments(node)
            x = a["self"]
            if x.target is aten.clone.default and x.kwargs:
                x = x.args[0]
            node.target, node.args, node.kwargs = aten.reshape.default, (x, a["size"]), {}
        elif node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
            node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.kwargs["dtype"]), {}
        elif node.target is aten.as_strided_scatter.default:
            _plain_scatter(edit, node)
        elif node.target is aten.copy.default:
            _plain_copy(edit, node)
        elif node.target is aten.copy_.default and continuous(node.args[1].meta["val"]):  # a buffer's, at the end
            with edit.before(node):
                cut = edit.call(aten.detach.default, (node.args[1],), like=node, value=node.args[1].meta["val"])
            node.replace_input_with(node.args[1], cut)
    for node in module.graph.nodes:
        if node.target is aten.clone.default and node.kwargs.get("memory_format") is torch.contiguous_format:
            node.target, node.kwargs = aten.contiguous.default, {}


def _plain_copy(edit: Editor, node: fx.Node) -> None:
    """Replace `copy(old, new)`, which autograd does not know, by `new` in the type and shape of `old`."""
    old, new = (i.meta["val"] for i in node.args[:2])  # type: ignore[union-attr]
    value: Any = node.args[1]
    with edit.before(node):
        if old.dtype != new.dtype:
            value = edit.call(aten.to.dtype, (value, old.dtype), like=node)
        if tuple(old.shape) != tuple(new.shape):
            value = edit.call(aten.expand_as.default, (value, node.args[0]), like=node)
    node.replace_all_uses_with(value)
    edit.graph.erase_node(node)


def _plain_scatter(edit: Editor, node: fx.Node) -> None:
    """Replace `as_strided_scatter(x, piece)`, whose own backward is wrong (torch 2.14), by `index_put` at the same
    positions.

    Raises CaptureError for tensors of dynamic shape or another layout.
    """
    a = arguments(node)
    x, piece = a["self"], a["src"]
    value = x.meta["val"]
    sizes = [*value.shape, *a["size"], *a["stride"]]
    if not all(isinstance(s, int) for s in sizes) or not value.is_contiguous():
        raise CaptureError(f"{source(node)}: a write through as_strided into a tensor of dynamic shape or other layout")
    positions = torch.arange(value.numel()).as_strided(a["size"], a["stride"], a["storage_offset"] or 0)
    with edit.before(next(iter(edit.graph.nodes))):
        index = edit.store(edit.free_name("_positions_0"), positions.flatten().to(value.device))
    with edit.before(node):
        flat = edit.call(aten.reshape.default, (x, [-1]), like=node)
        new = edit.call(aten.reshape.default, (piece, [-1]), like=node)
        put = edit.call(aten.index_put.default, (flat, [index], new), like=node)
        result = edit.call(aten.reshape.default, (put, list(value.shape)), like=node)
    node.replace_all_uses_with(result)
    edit.graph.erase_node(node)


# ------------------------------------------------------------------------------------------------------ missing in torch
def _shape_of_fake_quantisation(self: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(self), torch.empty_like(self, dtype=torch.bool)


for _name in ("per_tensor_affine_cachemask", "per_channel_affine_cachemask"):  # torch's fail with a symbolic batch
    torch.library.register_fake(f"aten::fake_quantize_{_name}", _shape_of_fake_quantisation)
