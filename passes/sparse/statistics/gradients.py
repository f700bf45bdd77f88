"""Gradients of the loss with respect to chosen weights, for each sample or each batch."""

import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ....graph.compat import pytree
from ....graph.errors import BadInput
from ....graph.nodes import fetch, hint
from ....graph.program import Program
from ....graph.trainable import TrainableModule
from ...base import Context
from ...common.class_axis import class_axis
from ...common.feed import Batch, Feed, map_some, sample_dimension
from ...common.losses import class_dim, logits_of, task_loss
from ...common.observe import Observer
from ...common.processes import accelerator, placed, summed
from ...common.samples import apart, everywhere, sample_batches
from ...common.weights import WeightedLayer, named_layers, windows
from .unfold import check_finite, outputs_of, pieces


@dataclass(frozen=True)
class Gradients:
    """Which gradients to compute. count: how many. per: "sample" or "batch", what each is of. against: "labels" of the
    data, or "teacher" for labels that are drawn from the teacher's class probabilities; where the teacher is the network
    itself, this makes the empirical Fisher matrix the true one."""

    count: int
    per: str
    against: str

    def stream(
        self, program: Program, names: Sequence[str], context: Context, largest: int, share: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Yield gradients of the named weights in eval mode, as `{name: (k, *shape)}`.

        largest: the most numbers in a chunk, which has at least one gradient. The same seed gives the same samples again;
        `common.samples` says which. share: each process computes its part of the gradients; otherwise each computes all.

        Raises BadInput without data or batches, without labels where they are needed, for gradients that are not finite,
        and for a program of a fixed batch size that mixes its samples, with `per` "sample".
        """
        if context.data is None:
            raise BadInput("Sparsify: needs data for its gradients; pass data=, or choose method magnitude")
        return apart(self._made(program, names, context, largest, share), context.seed, context.data)

    def _made(
        self, program: Program, names: Sequence[str], context: Context, largest: int, share: bool
    ) -> Generator[dict[str, Tensor]]:
        feed, module, device = Feed(program), program.module().eval(), accelerator().device
        teacher = (context.teacher or program).copy().module().eval() if self.against == "teacher" else None
        of_graph = class_axis(context.teacher or program) if teacher is not None else None
        maker = _Samples(program, names, context.loss, feed, largest)
        step = max(1, largest // max(1, sum(layer.size for layer in maker.layers)))
        size = getattr(context.data, "batch_size", None)
        count = self.count if self.per == "sample" else self.count * size if size else sys.maxsize
        made = 0
        with ExitStack() as stack:
            for net in (module, teacher) if teacher is not None else (module,):
                stack.enter_context(placed(net, device))
            stack.enter_context(_differentiable(maker.weights.values()))
            for batch, many in sample_batches(feed, context, count, share=share):
                labels = batch.labels
                if teacher is not None:
                    labels = _drawn(teacher, batch.args, batch.kwargs, of_graph)
                elif labels is None:
                    raise BadInput('Sparsify.against: the data has no labels; set it to "teacher"')
                batch = Batch(batch.args, batch.kwargs, labels, batch.size)
                if self.per == "batch":
                    made += 1
                    yield _checked({n: g[None] for n, g in maker.direct(batch).items()})
                    if made >= self.count:
                        return
                    continue
                for gradients in maker(batch, many, step):
                    yield _checked(gradients)

    def mean_squares(
        self, program: Program, names: Sequence[str], context: Context, largest: int
    ) -> tuple[dict[str, float], int]:
        """The mean square of each weight's gradient over all of its entries, and the number of gradients.

        With `per` "sample", processes share the work.
        """
        share = self.per == "sample"
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=accelerator().device)

        def add_up() -> None:
            for gradients in self.stream(program, names, context, largest, share):
                values = [gradients[name].double().square().flatten(1).mean(1).sum() for name in names]
                sums.add_(torch.stack([*values, sums.new_tensor(len(gradients[names[0]]))]).to(sums.device))

        everywhere(add_up)
        *totals, count = (summed(sums) if share else sums).tolist()
        return {name: total / count for name, total in zip(names, totals, strict=True)}, int(count)


@contextmanager
def _differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A context in which frozen parameters get gradients, too."""
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _drawn(teacher: TrainableModule, args: Any, kwargs: Any, of_graph: int | None) -> Tensor:
    instead = 'set against to "labels", and give loss='
    with torch.no_grad():
        scores = logits_of(teacher(*args, **kwargs), instead)
        scores = scores.float().movedim(class_dim(scores, of_graph=of_graph, instead=instead), -1)
    if not bool(scores.isfinite().all()):
        raise BadInput("Sparsify.against: the teacher's scores are not finite")
    return torch.multinomial(scores.softmax(-1).flatten(0, -2), 1).view(scores.shape[:-1])


def _checked(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, value in gradients.items():
        check_finite(value, f"a gradient of {name} is")
    return gradients


def _sample(tree: Any, index: list[int], size: int, batched: Sequence[bool] | None = None) -> Any:
    """Some samples of a tree, as a batch of their own. batched: which leaves to index, by default those that are `size`
    long."""
    if batched is None:
        batched = [isinstance(t, Tensor) and t.dim() > 0 and len(t) == size for t in pytree.tree_leaves(tree)]
    return map_some(lambda value: value[index], tree, batched)


class _Samples:
    """Gradients of single samples from one backward pass over their batch: for each sample, a layer's weight gradient is
    the product of the layer's inputs and the loss's gradients at its outputs (Goodfellow, arXiv 1510.01799).

    This holds only for a network that treats samples independently and keeps their order. So the first batch is compared
    with passes over single samples; where they differ, all gradients are computed sample by sample.
    """

    def __init__(
        self, program: Program, names: Sequence[str], loss: Callable[..., Any] | None, feed: Feed, largest: int
    ):
        self.program, self.loss, self.divisible = program, loss, feed.static is None
        self.layers = named_layers(program, names)
        self.weights = {layer.name: fetch(program.module(), layer.name) for layer in self.layers}
        self.trusted: bool | None = None
        self.symbols: set[Any] = feed.size.node.expr.free_symbols if self.divisible else set()
        self.feed, self.largest = feed, largest
        self.at_once = max(2, largest // _numbers(program, feed))

    def __call__(self, batch: Batch, count: int, step: int) -> Iterator[dict[str, Tensor]]:
        """Yield gradients of the first `count` samples of a batch, `step` of them at a time. A network with a dynamic batch
        size is run on as many samples as have about `largest` numbers in their activations."""
        at_once = self.at_once if self.divisible else batch.size
        for first in range(0, count if self.trusted is not False else 0, at_once):
            part, number = batch, min(first + at_once, count) - first
            if self.divisible:
                index = list(range(first, first + number))
                part = self._some(batch, index if number > 1 else index * 2)  # see `alone`
            values, pulls = self._run(part)
            for start in range(0, number, step):
                gradients = self._products(values, pulls, part.size, slice(start, min(start + step, number)))
                if self.trusted is None:
                    self.trusted = self._agrees(gradients, part)
                if not self.trusted:
                    break
                yield gradients
            if not self.trusted:
                break
        if self.trusted:
            return
        if not self.divisible:
            raise BadInput(
                "Sparsify.per: the program mixes the samples of its fixed batch, or moves them elsewhere; capture it with "
                'dynamic_shapes="batch", or set per to "batch"'
            )
        for i in range(count):
            yield {n: g[None] for n, g in self.alone(batch, i).items()}

    def direct(self, batch: Batch) -> dict[str, Tensor]:
        """The gradient of the loss of a whole batch, by name."""
        return self._gradient(self.program.module()(*batch.args, **batch.kwargs), batch.labels)

    def alone(self, batch: Batch, index: int) -> dict[str, Tensor]:
        """The gradient of the loss of one sample, by name. The sample runs as a batch of two, since on the CPU torch's
        gradient of batch normalisation is wrong for one sample whose gradient arrives channels-last."""
        labels = _sample(batch.labels, [index], batch.size)
        if self.divisible:
            batch, index = self._some(batch, [index, index]), 0
        outputs = self.program.module()(*batch.args, **batch.kwargs)
        return self._gradient(_sample(outputs, [index], batch.size, self.feed.outputs), labels)

    def _some(self, batch: Batch, index: list[int]) -> Batch:
        """Some samples of a batch, as a batch."""
        args, kwargs = _sample((batch.args, batch.kwargs), index, batch.size, self.feed.batched)
        return Batch(args, kwargs, _sample(batch.labels, index, batch.size), len(index))

    def _gradient(self, outputs: Any, labels: Any) -> dict[str, Tensor]:
        value = _dependent(task_loss(self.loss, outputs, labels))
        gradients = torch.autograd.grad(value, list(self.weights.values()), materialize_grads=True)
        return dict(zip(self.weights, gradients, strict=True))

    def _run(self, batch: Batch) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor]]:
        """For each layer node, its input, and the gradient at its output of the sum of the samples' losses."""
        inputs: dict[fx.Node, Tensor] = {}
        outputs: dict[fx.Node, Tensor] = {}

        def see(node: fx.Node, value: Tensor, values: dict[fx.Node, Any]) -> None:
            inputs[node] = values[node.args[0]].detach()  # type: ignore[index]
            outputs[node] = value

        show = Observer(self.program.module(), (node for layer in self.layers for node in layer.nodes), see)
        out = self.program.module().graph.process_outputs(show(batch))
        losses = []
        for i in range(batch.size):
            alone = _sample(out, [i], batch.size, self.feed.outputs), _sample(batch.labels, [i], batch.size)
            losses.append(task_loss(self.loss, *alone))
        total = _dependent(torch.stack(losses).sum())
        pulls = torch.autograd.grad(total, list(outputs.values()), materialize_grads=True)
        return inputs, dict(zip(outputs, pulls, strict=True))

    def _products(
        self, values: dict[fx.Node, Tensor], pulls: dict[fx.Node, Tensor], size: int, part: slice
    ) -> dict[str, Tensor]:
        products = {}
        for layer in self.layers:
            total: Any = 0
            for node in layer.nodes:
                at = sample_dimension(node.args[0].meta["val"].shape, self.symbols) or 0  # type: ignore[union-attr]
                x, pull = (t.movedim(at, 0) for t in (values[node], pulls[node]))
                per = len(x) // size
                cut = slice(part.start * per, part.stop * per)
                total = total + self._outer(node, layer, x[cut], pull[cut], part.stop - part.start)
            products[layer.name] = total.reshape(-1, *layer.shape)
        return products

    def _outer(self, node: fx.Node, layer: WeightedLayer, x: Tensor, pull: Tensor, count: int) -> Tensor:
        """For each of `count` samples, the sum over positions of output gradients times inputs, `(count, groups, out /
        groups, c)`.

        Computed for as many samples at a time, or else positions, as the limit of numbers allows.
        """
        per, products = len(x) // count, []
        some = max(1, self.largest // max(1, windows(node, x[:per]).numel()))
        for start in range(0, count, some):
            part = slice(start * per, (start + some) * per)
            number, total = min(some, count - start), torch.zeros(())
            for rows, where in pieces(windows(node, x[part]), self.largest, 2):
                pulls = outputs_of(pull[part] if where is None else pull[part][:, :, where], layer)
                rows, pulls = (t.unflatten(1, (number, -1)) for t in (rows, pulls))
                total = total.to(rows) + torch.einsum("gnpo,gnpc->ngoc", pulls, rows)
            products.append(total)
        return torch.cat(products)

    def _agrees(self, products: dict[str, Tensor], batch: Batch) -> bool:
        for i in {0, len(next(iter(products.values()))) - 1}:
            for name, expected in self.alone(batch, i).items():
                if not torch.dist(products[name][i], expected) <= 1e-3 * expected.norm() + 1e-8:
                    return False
        return True


def _numbers(program: Program, feed: Feed) -> int:
    """About how many numbers the activations of one sample and their gradients hold."""
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "call_function"]
    total = sum(math.prod(hint(s) for s in v.shape) for v in values if isinstance(v, Tensor))
    return max(1, 2 * total // max(1, hint(feed.size)))


def _dependent(loss: Tensor) -> Tensor:
    if not loss.requires_grad:
        raise BadInput("loss: has no gradient; it must be computed from the outputs by differentiable operations")
    return loss
