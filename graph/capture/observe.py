"""One observed call of a module: its outputs, buffers and gradients, and every tensor on the way."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..compat import TorchDispatchMode, pytree, writes
from ..errors import in_a_line
from ..nodes import continuous, fetch, source
from ..trainable import TrainableModule
from .export import without_fast_path
from .modes import COUNTER


@dataclass
class Run:
    """The tensors after one call, by name, the gradients (None if the call cannot be differentiated), and the outputs that
    are no tensors."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor | None] | None
    rest: list[Any]
    undifferentiable: str = ""  # why there are no gradients


def observe(
    module: torch.nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    nudge: bool = False,
    log: Any = None,
    ordered: bool = True,
) -> Run:
    """Run a module on copies of the inputs and return its outputs, changed buffers and inputs, and gradients.

    nudge: change the inputs by rounding errors. log: a further context for the call. ordered: draw random numbers in the
    order of indices, whatever the memory layout; every operator is intercepted for this, which `torch.cond` does not allow.
    The seed is 0.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    copies = [x.detach().clone() if isinstance(x, Tensor) else copy.copy(x) for x in leaves]
    if nudge:
        copies = [_moved(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in copies]
    watched = {f"input {i}": x for i, x in enumerate(copies) if continuous(x)}
    for x in watched.values():
        x.requires_grad_()
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad and continuous(p)}

    def call(given: list[Any]) -> tuple[list[Any], list[Any]]:
        """The leaves of the outputs, and the inputs after the call, which may write to them."""
        fresh = [x.clone() if isinstance(x, Tensor) else x for x in given]
        inputs, options = pytree.tree_unflatten(fresh, spec)
        torch.manual_seed(0)
        return pytree.tree_leaves(module(*inputs, **options)), fresh

    with (
        torch.inference_mode(False), torch.random.fork_rng(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH),
        without_fast_path(), _SameDraws() if ordered else contextlib.nullcontext(), log or contextlib.nullcontext(),
    ):  # fmt: skip
        why = ""
        try:
            flat, after = call(copies)
        except RuntimeError as error:  # the module only runs without gradients
            why = in_a_line(error, 200)
            with torch.no_grad():
                flat, after = call(leaves)
        tensors = [t for t in flat if isinstance(t, Tensor)]
        named = {f"output {i}": t for i, t in enumerate(tensors)}
        named |= {f"input {i} after the call": x for i, x in enumerate(after) if isinstance(x, Tensor)}
        named |= {f"buffer {n}": b for n, b in module.named_buffers() if not n.endswith(COUNTER)}
        values = {name: t.detach().clone() for name, t in named.items()}
        gradients = None if why else _differentiate(tensors, {**parameters, **watched})
    return Run(values, gradients, [x for x in flat if not isinstance(x, Tensor)], why)


def _differentiate(outputs: list[Tensor], of: dict[str, Tensor]) -> dict[str, Tensor | None] | None:
    """Gradients of a fixed random linear function of all outputs; None if that cannot be differentiated."""
    roots = [t for t in outputs if t.requires_grad and continuous(t)]
    if not roots or not of:
        return dict.fromkeys(of)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in roots]
    try:
        gradients = torch.autograd.grad(roots, list(of.values()), weights, allow_unused=True)
    except RuntimeError:
        return None
    return {n: None if g is None else g.detach() for n, g in zip(of, gradients, strict=True)}


# ------------------------------------------------------------------------------------------------------------ rounding
def _moved(x: Tensor) -> Tensor:
    """The tensor with every entry changed by a rounding error of its dtype."""
    generator = torch.Generator().manual_seed(2)
    signs = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
    return (x * (1 + torch.finfo(x.dtype).eps * signs)).detach()


@contextlib.contextmanager
def nudged(module: TrainableModule) -> Iterator[None]:
    """A context in which every parameter is changed by a rounding error."""
    before = [(p, p.detach().clone()) for p in module.parameters() if p.is_floating_point()]
    try:
        with torch.no_grad():
            for p, old in before:
                p.copy_(_moved(old))
        yield
    finally:
        with torch.no_grad():
            for p, old in before:
                p.copy_(old)


# ---------------------------------------------------------------------------------------------------- same randomness
class _SameDraws(TorchDispatchMode):
    """Makes operators draw random numbers in the order of indices, since the two sides may lay tensors out differently."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        base = args[0] if args else None
        if writes(func) and isinstance(base, Tensor):
            drawn = base.clone(memory_format=torch.contiguous_format)
            func(drawn, *args[1:], **kwargs)
            return base.copy_(drawn)
        args = pytree.tree_map_only(Tensor, lambda t: t.contiguous(), args)
        return func(*args, **kwargs)


# ------------------------------------------------------------------------------------------------- the first difference
class Values(TorchDispatchMode):
    """Records every tensor that an operator reads or returns, by size, sum and norm, whatever its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[tuple[float, float]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(t, Tensor) and t.numel():
                size, total, norm = _signature(t)
                self.seen.setdefault(size, []).append((total, norm))
        return result

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor of the same size, sum and norm (within 1e-4) was recorded."""
        size, total, norm = _signature(tensor)
        close = 1e-4 * max(norm, 1e-12)
        return any(abs(n - norm) <= close and abs(t - total) <= close * size**0.5 for t, n in self.seen.get(size, ()))


def _signature(tensor: Tensor) -> tuple[int, float, float]:
    value = tensor.detach()
    value = torch.view_as_real(value) if value.is_complex() else value
    value = value.double()
    return value.numel(), float(value.sum()), float(value.norm())


def first_unknown(module: TrainableModule, args: tuple, kwargs: dict, seen: Values, backward: bool) -> str:
    """The source of the first node whose value does not occur in the model's run; with `backward`, of the last node whose
    gradient does not."""
    leaves = pytree.tree_leaves((args, kwargs))
    values: dict[fx.Node, Any] = {}
    placeholders = iter(leaves)
    with torch.random.fork_rng(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _SameDraws():
        torch.manual_seed(0)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                x = next(placeholders)
                values[node] = x.detach().clone().requires_grad_(continuous(x)) if isinstance(x, Tensor) else x
            elif node.op == "get_attr":
                values[node] = fetch(module, str(node.target))
            elif node.op == "call_function":
                a, k = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*a, **k)
                result = values[node]
                if not backward and isinstance(result, Tensor) and result.numel() and not seen.knows(result):
                    return source(node)
        if not backward:
            return "an output"
        outputs = [values[n] for n in module.graph.output_node().all_input_nodes]
        inner = {n: v for n, v in values.items() if isinstance(v, Tensor) and v.requires_grad}
        gradients = _differentiate([t for t in outputs if isinstance(t, Tensor)], {n.name: v for n, v in inner.items()})
    for node in reversed(list(inner)):
        gradient = (gradients or {}).get(node.name)
        if gradient is not None and not seen.knows(gradient):
            users = [u for u in node.users if u.op == "call_function"]
            return source(users[0] if users else node)
    return "a node that has no gradient in one of them"
