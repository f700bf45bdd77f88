"""What data says about weights: gradients of the loss, sample by sample, and the inputs of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, fx
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from ..graph.errors import BadInput
from ..graph.ops import arguments, fetch, op_name, shape
from ..graph.program import Program, TrainableModule
from .base import Context
from .batches import Batch, Feed
from .training import accelerator, logits_of, placed, seeded, task_loss


@dataclass(frozen=True)
class Layer:
    """A linear or convolution weight `(out, in / groups, *kernel)` and the nodes that use it (several where tied)."""

    name: str
    nodes: tuple[fx.Node, ...]
    shape: tuple[int, ...]
    groups: int

    @property
    def kind(self) -> str:
        return "linear" if len(self.shape) == 2 else "depthwise" if self.shape[1] == 1 < self.groups else "conv"

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()


def layers(program: Program) -> tuple[list[Layer], list[dict[str, str]]]:
    """The linear and convolution weights that are stored tensors, in the order they are used, and the others with the
    reason."""
    found: dict[int, tuple[str, list[fx.Node]]] = {}
    refused = []
    module = program.module()
    for node in program.graph.nodes:
        name = op_name(node)
        if name not in ("linear", "conv1d", "conv2d", "conv3d"):
            if name.startswith("conv_transpose"):
                what = str(arguments(node)["weight"].target)
                refused.append({"what": what, "why": "the weights of a transposed convolution lie the other way round"})
            continue
        weight = arguments(node)["weight"]
        if weight.op != "get_attr" or not isinstance(fetch(module, str(weight.target)), torch.nn.Parameter):
            refused.append({"what": node.name, "why": "its weight is computed, not a stored parameter"})
            continue
        tensor = fetch(module, str(weight.target))
        found.setdefault(id(tensor), (str(weight.target), []))[1].append(node)
    return [
        Layer(name, tuple(nodes), shape(arguments(nodes[0])["weight"]), arguments(nodes[0]).get("groups", 1))
        for name, nodes in found.values()
    ], refused


# ------------------------------------------------------------------------------------------------------------ gradients
@dataclass(frozen=True)
class Gradients:
    """How to make gradients: `count` of them, of single samples (`per` "sample") or of batches, against the data's labels
    or (`against` "teacher") against labels drawn from the teacher's class probabilities, which makes the empirical
    Fisher matrix the true one where the teacher is the network itself."""

    count: int
    per: str
    against: str

    def stream(
        self, program: Program, names: Sequence[str], context: Context, largest: int
    ) -> Iterator[dict[str, Tensor]]:
        """Gradients of the named parameters in eval mode, `{name: (k, *shape)}`, `k` at most so that a chunk holds
        `largest` numbers (but at least one gradient). The same seed gives the same samples again.

        Raises BadInput without data, without labels where they are needed, or for a loss that is not finite.
        """
        if context.data is None:
            raise BadInput("Sparsify: needs data for its gradients; pass data=, or choose method magnitude")
        feed = Feed(program)
        if self.per == "sample" and feed.static not in (None, 1):
            raise BadInput(
                f"Sparsify.per: single samples do not fit a program fixed to batches of {feed.static}; capture it with "
                'dynamic_shapes="batch", or set per to "batch"'
            )
        module, device = program.module().eval(), accelerator().device
        teacher = (context.teacher or program).copy().module().eval() if self.against == "teacher" else None
        chosen = {name: fetch(module, name) for name in names}
        step = max(1, largest // max(1, sum(p.numel() for p in chosen.values())))
        rest = self.count
        with seeded(context.seed), placed(module, device):
            if teacher is not None:
                teacher.to(device)
            for batch in feed.batches(context.data):
                args, kwargs, labels = send_to_device((batch.args, batch.kwargs, batch.labels), device)
                if teacher is not None:
                    labels = _drawn(teacher, args, kwargs)
                elif labels is None:
                    raise BadInput('Sparsify.against: the data has no labels; set it to "teacher"')
                taken = 1 if self.per == "batch" else min(batch.size, rest)
                parts = [slice(None)] if self.per == "batch" else [
                    slice(i, min(i + step, taken)) for i in range(0, taken, step)
                ]  # fmt: skip
                for part in parts:
                    cut = _cut(Batch(args, kwargs, labels, batch.size), part)
                    found = _of_batch if self.per == "batch" else _of_samples
                    yield _finite(found(module, chosen, cut, context.loss))
                rest -= taken
                if rest <= 0:
                    return


def _cut(batch: Batch, part: slice) -> Batch:
    def take(tensor: Tensor) -> Tensor:
        return tensor[part] if tensor.dim() and len(tensor) == batch.size else tensor

    args, kwargs, labels = pytree.tree_map_only(Tensor, take, (batch.args, batch.kwargs, batch.labels))
    return Batch(args, kwargs, labels, len(range(*part.indices(batch.size))))


def _drawn(teacher: TrainableModule, args: Any, kwargs: Any) -> Tensor:
    with torch.no_grad():
        scores = logits_of(teacher(*args, **kwargs)).float().movedim(1, -1)
    return torch.multinomial(scores.softmax(-1).flatten(0, -2), 1).view(scores.shape[:-1])


def _of_samples(
    module: TrainableModule, chosen: dict[str, Tensor], batch: Batch, loss: Callable[..., Any] | None
) -> dict[str, Tensor]:
    """Gradients of each sample's own loss: vectorised where every operator can be, else one after another."""
    leaves, spec = pytree.tree_flatten((batch.args, batch.kwargs, batch.labels))
    dims = [0 if isinstance(t, Tensor) and t.dim() and len(t) == batch.size else None for t in leaves]

    def of_one(parameters: dict[str, Tensor], *sample: Any) -> Tensor:
        whole = [t if d is None else t.unsqueeze(0) for t, d in zip(sample, dims, strict=True)]
        args, kwargs, labels = pytree.tree_unflatten(whole, spec)
        return task_loss(loss, functional_call(module, parameters, args, kwargs), labels)

    values = {name: p.detach() for name, p in chosen.items()}
    if batch.size > 1:
        try:
            with torch.no_grad():
                return vmap(grad(of_one), (None, *dims), randomness="different")(values, *leaves)
        except (RuntimeError, NotImplementedError, BadInput):
            pass  # an operator without a batching rule, or a loss that asks for values
    parts = [_of_batch(module, chosen, _cut(batch, slice(i, i + 1)), loss) for i in range(batch.size)]
    return {name: torch.cat([p[name] for p in parts]) for name in chosen}


def _of_batch(
    module: TrainableModule, chosen: dict[str, Tensor], batch: Batch, loss: Callable[..., Any] | None
) -> dict[str, Tensor]:
    wanted = {name: p.detach().requires_grad_() for name, p in chosen.items()}
    with torch.enable_grad():
        value = task_loss(loss, functional_call(module, wanted, batch.args, batch.kwargs), batch.labels)
        found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    return {n: (torch.zeros_like(p) if g is None else g)[None] for (n, p), g in zip(wanted.items(), found, strict=True)}


def _finite(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, value in gradients.items():
        if not bool(value.isfinite().all()):
            raise BadInput(f"Sparsify: a gradient of {name} is not finite; check the data and the loss")
    return gradients


# --------------------------------------------------------------------------------------------------------- activations
def input_moments(
    program: Program, wanted: Sequence[Layer], context: Context, count: int, full: bool = True
) -> dict[str, Tensor]:
    """`X Xᵀ / n` of each layer's inputs, one matrix per group: `(groups, c, c)`, `c` the inputs of one output in the order
    of the flattened weight; with `full` False only its diagonal, `(groups, c)`. From `count` samples, eval mode."""
    if context.data is None:
        raise BadInput("Sparsify: needs data for its statistics; pass data=, or choose method magnitude")
    module, device = program.module().eval(), accelerator().device
    moments = _Moments(module, wanted, full)
    with seeded(context.seed), placed(module, device), torch.no_grad():
        for batch in Feed(program).batches(context.data):
            args, kwargs = send_to_device((batch.args, batch.kwargs), device)
            moments.run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
            count -= batch.size
            if count <= 0:
                break
    return {name: total / moments.seen[name] for name, total in moments.totals.items()}


class _Moments(fx.Interpreter):
    """Runs a graph and sums up the second moments of the inputs of some layers."""

    def __init__(self, module: TrainableModule, wanted: Sequence[Layer], full: bool):
        super().__init__(module)
        self.full = full
        self.layers = {node: layer for layer in wanted for node in layer.nodes}
        self.totals: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.layers:
            layer = self.layers[n]
            rows = _rows(n, self.env[n.args[0]], layer)  # type: ignore[index]
            new = rows.transpose(1, 2) @ rows if self.full else rows.square().sum(1)
            self.totals[layer.name] = self.totals.get(layer.name, 0) + new
            self.seen[layer.name] = self.seen.get(layer.name, 0) + rows.shape[1]
        return super().run_node(n)


def _rows(node: fx.Node, x: Tensor, layer: Layer) -> Tensor:
    """The inputs of a layer as `(groups, n, c)` rows: what one output value is computed from."""
    if len(layer.shape) == 2:
        return x.reshape(1, -1, x.shape[-1])
    a, kernel = arguments(node), layer.shape[2:]
    every = [_each(a[key], len(kernel)) for key in ("stride", "dilation")]
    if isinstance(a["padding"], str):
        total = [d * (k - 1) * (a["padding"] == "same") for k, d in zip(kernel, every[1], strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in _each(a["padding"], len(kernel))]
    x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    for d, (k, stride, dilation) in enumerate(zip(kernel, *every, strict=True)):
        x = x.unfold(2 + d, dilation * (k - 1) + 1, stride)[..., ::dilation]
    x = x.unflatten(1, (layer.groups, -1))  # (N, groups, channels, *out, *kernel)
    rank = len(kernel)
    x = x.permute(1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    return x.reshape(layer.groups, -1, layer.shape[1] * torch.Size(kernel).numel())


def _each(value: Any, count: int) -> list[int]:
    return [*value] * count if len(value) == 1 else [*value]
