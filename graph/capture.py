"""From an eager model to a functional graph in torch.export's training IR."""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .ops import arguments, fetch, op_name, shape, source

LITTER = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
)
FACTORIES = frozenset(
    "new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like arange zeros ones full empty linspace "
    "eye scalar_tensor tril_indices triu_indices".split()
)
RANDOM = frozenset("rand randn randint bernoulli rand_like randn_like normal multinomial randperm".split())
DROPOUTS = frozenset("dropout feature_dropout alpha_dropout feature_alpha_dropout".split())
REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
ADVICE = (
    "what to try: export the part of the model before data-dependent post-processing, pass other dynamic_shapes, or run "
    "torch.export.export(model, args, strict=False) by itself for the full report"
)


def export(model: torch.nn.Module, args: tuple, kwargs: dict, dynamic_shapes: Any) -> ExportedProgram:
    """`torch.export` in eval mode; the model's train/eval flags are restored. Raises CaptureError with the reason."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        details = [line for line in lines[1:] if line.startswith("- ")][:1]  # of dynamic shapes: which guard they break
        text = " ".join([lines[0], *details])
        raise CaptureError(f"torch.export refuses the model: {type(error).__name__}: {text[:400]}; {ADVICE}") from error
    finally:
        for m, training in modes.items():
            m.training = training


def batch_dynamic(model: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict, Any]:
    """Example inputs and dynamic shapes for "the first dimension of every tensor input is the batch".

    `torch.export` takes a size of 1 for a constant, so a single example is doubled.
    """
    flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
    if flat and all(x.shape[0] == 1 for x in flat):
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: torch.cat([x, x]) if x.dim() else x, (args, kwargs))
    try:
        named = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CaptureError(f"the example inputs do not fit {type(model).__name__}.forward: {error}") from None
    spec = pytree.tree_map(lambda x: {0: Dim("batch")} if isinstance(x, torch.Tensor) and x.dim() else None, named)
    return args, kwargs, spec


def dynamic_shapes_of(exported: ExportedProgram) -> Any:
    """The dynamic shapes an exported program was made with, read back from its placeholders; None when static.

    Returned in `torch.export`'s own form: a pytree like (args, kwargs) flattened to the top-level inputs.
    """
    # user_inputs would give a plain number by its value instead of its name
    names = {i.arg.name for i in exported.graph_signature.input_specs if i.kind is InputKind.USER_INPUT}
    inputs = [n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder" and n.name in names]
    shapes: list[Any] = [value.shape if isinstance(value, torch.Tensor) else () for value in inputs]
    sizes = [{d: n.node.expr for d, n in enumerate(dims) if isinstance(n, torch.SymInt)} for dims in shapes]
    times = Counter(expr for found in sizes for expr in found.values() if expr.is_symbol)
    # only what ties sizes together needs a name: a named one may not have the bounds that strides give it
    known = {expr: Dim(f"d{i}") if count > 1 else Dim.DYNAMIC for i, (expr, count) in enumerate(times.items())}
    leaves = [{d: known.get(expr, Dim.AUTO) for d, expr in found.items()} or None for found in sizes]
    if not any(leaves):
        return None
    in_spec = exported.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(leaves, in_spec)
    return (*args, *kwargs.values())


def functional_graph(exported: ExportedProgram) -> fx.GraphModule:
    """The exported program as an unlifted, functional graph: litter dropped, regions inlined, in-place ops rewritten,
    input-independent subgraphs folded. Raises CaptureError where a mutation cannot be expressed functionally."""
    module = (
        exported.module(check_guards=False) if "check_guards" in _parameters(exported.module) else exported.module()
    )
    _drop_litter(module.graph)
    _tie(module)
    while _inline_regions(module):
        pass
    _functionalise(module)
    _loosen_views(module.graph)
    _fold_constants(module)
    return module


def _tie(module: fx.GraphModule) -> None:
    """Make names of the same memory one tensor again: a saved program comes back with a tensor for every name."""
    known: dict[Any, torch.Tensor] = {}
    for node in module.graph.nodes:
        found = fetch(module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(found, torch.Tensor) and found.layout == torch.strided and found.numel():
            memory = (found.untyped_storage()._cdata, found.storage_offset(), found.dtype, found.shape, found.stride())
            kind = isinstance(found, torch.nn.Parameter)
            first = known.setdefault((kind, *memory), found)
            if first is not found:
                path, _, name = str(node.target).rpartition(".")
                setattr(module.get_submodule(path), name, first)


def _parameters(function: Any) -> Any:
    return function.__code__.co_varnames


def _drop_litter(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if (node.op == "call_module" and "_guards" in str(node.target)) or op_name(node) in LITTER:
            graph.erase_node(node)


def _inline_regions(module: fx.GraphModule) -> bool:
    """Inline the bodies of autocast and no-grad regions, which only exist to be transparent to tracing."""
    found = False
    for node in list(module.graph.nodes):
        if node.op != "call_function" or str(node.target) not in REGIONS:
            continue
        found = True
        at = next(
            i
            for i, a in enumerate(node.args)
            if isinstance(a, fx.Node)
            and a.op == "get_attr"
            and isinstance(fetch(module, str(a.target)), fx.GraphModule)
        )
        if node.target is not None and "autocast" in str(node.target) and _autocast_enabled(node.args[:at]):
            raise CaptureError(
                f"{source(node)}: an enabled autocast region cannot be inlined; capture without autocast"
            )
        body_attr = node.args[at]
        body, inputs = fetch(module, str(body_attr.target)), node.args[at + 1 :]
        env: dict[fx.Node, Any] = dict(zip([n for n in body.graph.nodes if n.op == "placeholder"], inputs, strict=True))
        results: Any = None
        with module.graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "placeholder" or op_name(inner) in LITTER:
                    continue
                if inner.op == "output":
                    results = fx.node.map_arg(inner.args[0], env.__getitem__)
                elif inner.op == "get_attr":
                    name = f"{body_attr.target}.{inner.target}"
                    env[inner] = module.graph.get_attr(name)
                    env[inner].meta = dict(inner.meta)
                else:
                    env[inner] = module.graph.node_copy(inner, env.__getitem__)
        results = results if isinstance(results, (tuple, list)) else [results]
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(results[user.args[1]])
                module.graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(results[0])
        module.graph.erase_node(node)
        if not body_attr.users:
            module.graph.erase_node(body_attr)
    return found


def _autocast_enabled(args: tuple) -> bool:
    flags = [a for a in args if isinstance(a, bool)]
    return bool(flags and flags[0])


# ------------------------------------------------------------------------------------------------- functionalisation
COPIES_IF_IT_MUST = frozenset("reshape flatten reshape_as ravel".split())


def infer(node: fx.Node) -> None:
    """Give a new node its fake value by running its operator on the fake values of its inputs."""
    values = pytree.tree_leaves([i.meta.get("val") for i in node.all_input_nodes])
    fake = next((v for v in values if isinstance(v, torch.Tensor)), None)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with fake.fake_mode, torch.no_grad():  # type: ignore[union-attr]
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _call(graph: fx.Graph, like: fx.Node, target: Any, args: tuple, kwargs: dict | None = None) -> fx.Node:
    new = graph.call_function(target, args, kwargs or {})
    new.meta = {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack")}
    infer(new)
    return new


def _is_view(node: fx.Node) -> bool:
    """Whether the result looks at the memory of the first argument; operators that always do say so in their schema."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    name, value = op_name(node), node.args[0].meta.get("val")
    if name == "getitem":
        return _is_view(node.args[0])
    if name in COPIES_IF_IT_MUST:
        return isinstance(value, torch.Tensor) and _viewable(value, node.meta["val"].shape)
    if name == "contiguous":
        return isinstance(value, torch.Tensor) and value.is_contiguous()
    if name in ("to", "type_as"):
        same = isinstance(value, torch.Tensor) and value.dtype == node.meta["val"].dtype
        return same and not arguments(node).get("copy")
    if name in DROPOUTS:
        return not arguments(node)["train"]
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)


def _viewable(value: torch.Tensor, sizes: Any) -> bool:
    """Whether the strides of a fake tensor allow a view of these sizes, so that reshaping does not copy."""
    try:
        with value.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
            value.view(sizes)
    except (RuntimeError, ValueError):
        return False
    return True


def _mutated(node: fx.Node) -> fx.Node | None:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return None
    for i, a in enumerate(schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            found = node.args[i] if i < len(node.args) else node.kwargs.get(a.name)
            return found if isinstance(found, fx.Node) else None
    return None


def _functionalise(module: fx.GraphModule) -> None:
    """Rewrite in-place operators into their functional forms and redirect later uses of everything that aliases.

    `alias` maps a tensor that is a view to the tensor it looks at and the node that says how (its template).
    """
    graph = module.graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    alias: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    views: dict[fx.Node, list[fx.Node]] = defaultdict(list)

    def note(view: fx.Node, under: fx.Node, how: fx.Node) -> None:
        alias[view] = (under, how)
        views[under].append(view)

    for node in list(graph.nodes):
        if _is_view(node):
            under = node.all_input_nodes[0]
            # a piece of a split looks at the whole: the list between them is no tensor
            note(node, alias[under][0] if op_name(node) == "getitem" else under, node)
        base = _mutated(node)
        if base is None:
            continue
        chain = [base]
        while chain[-1] in alias:
            chain.append(alias[chain[-1]][0])
        root = chain[-1]
        if root.op == "get_attr":
            continue  # a buffer that the model updates: kept as it is, the comb freezes what it touches
        with graph.inserting_before(node):
            new = _functional_form(graph, node, base)
            # write the new value back through the chain of views, innermost first
            values = {base: new}
            for view, below in itertools.pairwise(chain):
                values[below] = _write_back(graph, alias[view][1], below, values[view])
            # other views of the same memory that are read later are taken again from the new value
            for other in _looking_at(root, views):
                if other in values or not any(order.get(u, -1) > order[node] for u in other.users):
                    continue
                path = [other]
                while path[-1] not in values:
                    path.append(alias[path[-1]][0])
                for hop in reversed(path[:-1]):
                    under, how = alias[hop]
                    values[hop] = _view_again(graph, how, values[under])
        for old, value in values.items():
            for user in [u for u in old.users if order.get(u, -1) > order[node]]:
                user.replace_input_with(old, value)
            order.setdefault(value, order[node])
            if old in alias and alias[old][0] in values:
                under = values[alias[old][0]]
                if under is not value:  # as after detach, where both are one tensor from now on
                    note(value, under, alias[old][1])
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _looking_at(root: fx.Node, views: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    """All views of a tensor, views of views included."""
    found = list(views[root])
    for view in found:
        found += views[view]
    return found


def _view_again(graph: fx.Graph, how: fx.Node, under: fx.Node) -> fx.Node:
    """The same view of another tensor."""
    if op_name(how) == "getitem":
        split: fx.Node = how.args[0]  # type: ignore[assignment]
        return _call(graph, how, operator.getitem, (_view_again(graph, split, under), how.args[1]))
    return _call(graph, how, how.target, (under, *how.args[1:]), dict(how.kwargs))


def _functional_form(graph: fx.Graph, node: fx.Node, base: fx.Node) -> fx.Node:
    aten, name = torch.ops.aten, op_name(node)
    refusal = CaptureError(f"{source(node)}: cannot make the in-place operator {name} functional")
    if name == "copy_":
        value = base.meta["val"]
        new = node.args[1]
        if not isinstance(new, fx.Node):
            raise refusal
        new = _call(graph, node, aten.clone.default, (new,))  # what is written to the copy later is not its source's
        if new.meta["val"].dtype != value.dtype:
            new = _call(graph, node, aten.to.dtype, (new, value.dtype))
        if tuple(new.meta["val"].shape) != tuple(value.shape):
            new = _call(graph, node, aten.expand_as.default, (new, base))
        return new
    if name == "zero_":
        return _call(graph, node, aten.zeros_like.default, node.args)
    packet = getattr(aten, name[:-1], None)
    spelt = (node.target._overloadname, "default")  # type: ignore[union-attr]
    overload = next((getattr(packet, o) for o in spelt if hasattr(packet, o)), None)
    if overload is None or not name.endswith("_") or overload._schema.is_mutable:
        raise refusal
    new = _call(graph, node, overload, node.args, dict(node.kwargs))
    if new.meta["val"].dtype != base.meta["val"].dtype:
        new = _call(graph, node, aten.to.dtype, (new, base.meta["val"].dtype))
    return new


def _write_back(graph: fx.Graph, view: fx.Node, below: fx.Node, value: fx.Node) -> fx.Node:
    """The tensor `below` after its view `view` has been overwritten with `value`."""
    aten, name = torch.ops.aten, op_name(view)
    if name in ("slice", "select", "narrow"):
        if name == "narrow":
            a = arguments(view)
            args = (below, value, a["dim"], a["start"], a["start"] + a["length"])
            return _call(graph, view, aten.slice_scatter.default, args)
        scatter = aten.slice_scatter.default if name == "slice" else aten.select_scatter.default
        return _call(graph, view, scatter, (below, value, *view.args[1:]), dict(view.kwargs))
    if name in ("alias", "detach", "contiguous", "to", "type_as") or name in DROPOUTS:
        return value
    if name in ("movedim", "moveaxis"):
        a = arguments(view)
        return _call(graph, view, view.target, (value, a["destination"], a["source"]))
    if name in ("permute", "transpose", "t", "swapaxes", "swapdims", "numpy_T", "mT", "mH"):
        if name == "permute":
            dims = list(view.args[1])  # type: ignore[arg-type]
            inverse = [0] * len(dims)
            for i, d in enumerate(dims):
                inverse[d % len(dims)] = i
            return _call(graph, view, view.target, (value, inverse))
        return _call(graph, view, view.target, (value, *view.args[1:]))
    if name in ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as", "ravel"):
        return _call(graph, view, aten.reshape_as.default, (value, below))
    if name == "getitem":  # one piece of a split: write it into its span
        split, index = view.all_input_nodes[0], int(view.args[1])  # type: ignore[arg-type]
        pieces = [p.shape for p in split.meta["val"]]
        dim = arguments(split)["dim"] % len(shape(below))
        if op_name(split) == "unbind":
            return _call(graph, view, aten.select_scatter.default, (below, value, dim, index))
        start = sum(int(p[dim]) for p in pieces[:index])
        end = start + int(pieces[index][dim])
        return _call(graph, view, aten.slice_scatter.default, (below, value, dim, start, end))
    raise CaptureError(f"{source(view)}: a write through {name} cannot be made functional")


def _loosen_views(graph: fx.Graph) -> None:
    """view -> reshape, which means the same once nothing writes in place, and needs no particular memory layout: that of
    scaled_dot_product_attention depends on the kernel, and so on the widths."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default:
            a = arguments(node)
            node.target, node.args, node.kwargs = torch.ops.aten.reshape.default, (a["self"], a["size"]), {}


# --------------------------------------------------------------------------------------------------- constant folding
def _fold_constants(module: fx.GraphModule) -> None:
    """Compute what depends on no input and no parameter once, and keep it as a buffer `_folded_k`."""
    graph = module.graph
    written = {_mutated(n) for n in graph.nodes}
    value: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            found = fetch(module, str(node.target))
            if isinstance(found, torch.Tensor) and not isinstance(found, torch.nn.Parameter) and node not in written:
                value[node] = found
        elif node.op == "call_function" and not _impure(node):
            inputs = node.all_input_nodes
            constant = all(i in value for i in inputs)
            like = node.args[:1] if op_name(node).startswith("new_") else ()  # gives its type only, whatever its shape
            shaped = op_name(node) in FACTORIES and all(i in value or i in like or _static_tensor(i) for i in inputs)
            if (inputs and constant) or shaped:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _concrete(n, value))
                with torch.no_grad():
                    try:
                        value[node] = copy.deepcopy(node.target(*args, **kwargs))
                    except (RuntimeError, TypeError, ValueError):
                        continue
    count = 0
    for node in list(graph.nodes):
        outside = [u for u in node.users if u not in value]
        if node in value and node.op == "call_function" and outside and isinstance(value[node], torch.Tensor):
            while hasattr(module, f"_folded_{count}"):
                count += 1
            module.register_buffer(f"_folded_{count}", value[node].detach().clone().contiguous())
            with graph.inserting_before(node):
                buffer = graph.get_attr(f"_folded_{count}")
            buffer.meta = dict(node.meta)
            for user in outside:
                user.replace_input_with(node, buffer)
    for node in reversed(list(graph.nodes)):
        if node in value and node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _impure(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    name = op_name(node)
    return (schema is not None and schema.is_mutable) or name in RANDOM or (name == "dropout" and bool(node.args[2]))


def _static_tensor(node: fx.Node) -> bool:
    found = node.meta.get("val")
    return isinstance(found, torch.Tensor) and all(isinstance(s, int) for s in found.shape)


def _concrete(node: fx.Node, value: dict[fx.Node, Any]) -> Any:
    if node in value:
        return value[node]
    fake = node.meta["val"]
    return torch.empty(tuple(s if isinstance(s, int) else 1 for s in fake.shape), dtype=fake.dtype)


# ------------------------------------------------------------------------------------------------------ missing in torch
def _shape_of_fake_quantisation(self: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(self), torch.empty_like(self, dtype=torch.bool)


for _name in ("per_tensor_affine_cachemask", "per_channel_affine_cachemask"):  # no shapes with a symbolic batch so far
    torch.library.register_fake(f"aten::fake_quantize_{_name}", _shape_of_fake_quantisation)
