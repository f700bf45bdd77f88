"""What data says about weights: gradients of the loss, sample by sample, and the inputs of layers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...graph.errors import BadInput
from ...graph.nodes import arguments, fetch, hint, op_name, shape
from ...graph.program import Program, TrainableModule
from ..base import Context, Pass, check_field
from ..common.losses import logits_of, task_loss
from ..common.processes import accelerator, placed
from ..common.repeat import seeded
from .batches import Batch, Feed, map_some
from .class_axis import class_axis
from .losses import class_dim
from .processes import summed
from .samples import apart, everywhere, sample_batches


@dataclass(frozen=True)
class Layer:
    """A linear or convolution weight `(out, in / groups, *kernel)`, the nodes that use it and all names that it goes by
    (several where tied)."""

    name: str
    nodes: tuple[fx.Node, ...]
    shape: tuple[int, ...]
    groups: int
    names: tuple[str, ...]

    @property
    def kind(self) -> str:
        return "linear" if len(self.shape) == 2 else "depthwise" if self.shape[1] == 1 < self.groups else "conv"

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def matches(self, patterns: Iterable[str]) -> bool:
        """Whether one of its names does."""
        return any(fnmatchcase(name, pattern) for name in self.names for pattern in patterns)


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
            what, why = node.name, "its weight is computed, not a stored parameter"
            if op_name(weight).startswith("fake_quantize"):
                what, why = str(weight.all_input_nodes[0].target), "it is quantised; Quantize comes last"
            refused.append({"what": what, "why": why})
            continue
        if name != "linear" and len(shape(arguments(node)["input"])) < len(shape(weight)):
            refused.append({"what": str(weight.target), "why": "its inputs have no batch dimension"})
            continue
        tensor = fetch(module, str(weight.target))
        found.setdefault(id(tensor), (str(weight.target), []))[1].append(node)
    names: dict[int, list[str]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return [
        Layer(
            name,
            tuple(nodes),
            shape(arguments(nodes[0])["weight"]),
            arguments(nodes[0]).get("groups", 1),
            tuple(names[key]),
        )
        for key, (name, nodes) in found.items()
    ], refused


def read_patterns(of: Pass) -> None:
    """Make tuples of a pass's `include` and `exclude`, where a single name may be given by itself."""
    for key in ("include", "exclude"):
        value = getattr(of, key)
        value = (value,) if isinstance(value, str) else value
        good = isinstance(value, (list, tuple)) and all(isinstance(pattern, str) for pattern in value)
        check_field(of, key, good, "patterns over weight names")
        object.__setattr__(of, key, tuple(value))


def check_included(of: Pass, include: Sequence[str], found: Sequence[Layer], refused: Sequence[dict[str, str]]) -> None:
    """Raise BadInput unless each pattern of a pass's `include` matches a weight, taken or refused."""
    names = [name for layer in found for name in layer.names] + [row["what"] for row in refused]
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise BadInput(f'{type(of).__name__}.include: "{pattern}" matches no weight; there are {some or "none"}')


# ----------------------------------------------------------------------------------------------------------------- data
def check_again(before: int, now: int) -> None:
    """Raise BadInput unless a further run over the data saw as many samples as the one before (0: there was none)."""
    if before not in (0, now):
        raise BadInput(f"data: yields {now} samples, and {before} the time before; it must be iterable again")


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
        self, program: Program, names: Sequence[str], context: Context, largest: int, share: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Gradients of the named weights in eval mode, `{name: (k, *shape)}`, `k` at most so that a chunk holds `largest`
        numbers (but at least one gradient). The same seed gives the same samples again; `common.samples` says which.
        share: each process makes its part of them, else each makes all.

        Raises BadInput without data or batches, without labels where they are needed, or for gradients that are not finite.
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
            for each in (module, teacher) if teacher is not None else (module,):
                stack.enter_context(placed(each, device))
            stack.enter_context(_differentiable(maker.weights.values()))
            for batch, taken in sample_batches(feed, context, count, share=share):
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
                for found in maker(batch, taken, step):
                    yield _checked(found)

    def mean_squares(
        self, program: Program, names: Sequence[str], context: Context, largest: int
    ) -> tuple[dict[str, float], int]:
        """The mean square of each weight's gradient, over all of its entries, and of how many gradients. Processes share
        the samples."""
        share = self.per == "sample"
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=accelerator().device)

        def add_up() -> None:
            for gradients in self.stream(program, names, context, largest, share):
                values = [gradients[name].double().square().flatten(1).mean(1).sum() for name in names]
                sums.add_(torch.stack([*values, sums.new_tensor(len(gradients[names[0]]))]).to(sums.device))

        everywhere(add_up)
        *found, count = (summed(sums) if share else sums).tolist()
        return {name: total / count for name, total in zip(names, found, strict=True)}, int(count)


@contextmanager
def _differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Frozen parameters need gradients, too, for as long as this lasts."""
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


def check_finite(value: Tensor, what: str) -> None:
    """Raise BadInput, which starts with `what`, when a tensor has an entry that is not finite."""
    if not bool(value.isfinite().all()):
        raise BadInput(f"Sparsify: {what} not finite; check the data and the loss")


def _sample(tree: Any, index: list[int], size: int, batched: Sequence[bool] | None = None) -> Any:
    """Some samples, as a batch of their own, of the leaves that are `batched`, or else of all that are `size` long."""
    if batched is None:
        batched = [isinstance(t, Tensor) and t.dim() > 0 and len(t) == size for t in pytree.tree_leaves(tree)]
    return map_some(lambda value: value[index], tree, batched)


class _Samples:
    """Gradients of single samples from one run over their batch: a layer's weight gradient for a sample is the product of
    its inputs and of the loss's gradients at its outputs, where that sample's are (Goodfellow, arXiv 1510.01799).

    That asks of a network that it treats samples independently and keeps them in place; the first batch is compared with
    a run over single samples, and where they differ, all are made one by one.
    """

    def __init__(
        self, program: Program, names: Sequence[str], loss: Callable[..., Any] | None, feed: Feed, largest: int
    ):
        self.program, self.loss, self.divisible = program, loss, feed.static is None
        self.layers = [layer for layer in layers(program)[0] if layer.name in names]
        self.weights = {layer.name: fetch(program.module(), layer.name) for layer in self.layers}
        self.trusted: bool | None = None
        self.symbols: set[Any] = feed.size.node.expr.free_symbols if self.divisible else set()
        self.feed, self.largest = feed, largest
        self.at_once = max(2, largest // _numbers(program, feed))

    def __call__(self, batch: Batch, count: int, step: int) -> Iterator[dict[str, Tensor]]:
        """Gradients of the first `count` samples of a batch, `step` of them at a time. A network that takes any number of
        samples is run on so many that its activations hold about `largest` numbers."""
        at_once = self.at_once if self.divisible else batch.size
        for first in range(0, count if self.trusted is not False else 0, at_once):
            part, number = batch, min(first + at_once, count) - first
            if self.divisible:
                index = list(range(first, first + number))
                part = self._some(batch, index if number > 1 else index * 2)  # see `alone`
            values, pulls = self._run(part)
            for start in range(0, number, step):
                found = self._products(values, pulls, part.size, slice(start, min(start + step, number)))
                if self.trusted is None:
                    self.trusted = self._agrees(found, part)
                if not self.trusted:
                    break
                yield found
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
        """The gradient of the loss of a whole batch."""
        return self._gradient(self.program.module()(*batch.args, **batch.kwargs), batch.labels)

    def alone(self, batch: Batch, index: int) -> dict[str, Tensor]:
        """The gradient of the loss of one sample. It runs as a batch of two: the gradients of torch's batch normalisation
        on the CPU are wrong for one sample whose gradients arrive channels-last."""
        labels = _sample(batch.labels, [index], batch.size)
        if self.divisible:
            batch, index = self._some(batch, [index, index]), 0
        outputs = self.program.module()(*batch.args, **batch.kwargs)
        return self._gradient(_sample(outputs, [index], batch.size, self.feed.outputs), labels)

    def _some(self, batch: Batch, index: list[int]) -> Batch:
        """Some samples of a batch as one of their own."""
        args, kwargs = _sample((batch.args, batch.kwargs), index, batch.size, self.feed.batched)
        return Batch(args, kwargs, _sample(batch.labels, index, batch.size), len(index))

    def _gradient(self, outputs: Any, labels: Any) -> dict[str, Tensor]:
        value = _dependent(task_loss(self.loss, outputs, labels))
        found = torch.autograd.grad(value, list(self.weights.values()), allow_unused=True)
        return {
            n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(self.weights.items(), found, strict=True)
        }

    def _run(self, batch: Batch) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor]]:
        """The inputs of the layers, and the gradients of the sum of the samples' losses at their outputs."""
        tap = _Tap(self.program.module(), [node for layer in self.layers for node in layer.nodes])
        out = tap.run(*pytree.tree_leaves((batch.args, batch.kwargs)), enable_io_processing=False)
        out = self.program.module().graph.process_outputs(out)
        losses = []
        for i in range(batch.size):
            alone = _sample(out, [i], batch.size, self.feed.outputs), _sample(batch.labels, [i], batch.size)
            losses.append(task_loss(self.loss, *alone))
        total = _dependent(torch.stack(losses).sum())
        pulls = torch.autograd.grad(total, list(tap.outputs.values()), allow_unused=True)
        given = {
            n: torch.zeros_like(y) if g is None else g for (n, y), g in zip(tap.outputs.items(), pulls, strict=True)
        }
        return tap.inputs, given

    def _products(
        self, values: dict[fx.Node, Tensor], pulls: dict[fx.Node, Tensor], size: int, part: slice
    ) -> dict[str, Tensor]:
        found = {}
        for layer in self.layers:
            total: Any = 0
            for node in layer.nodes:
                at = _sample_dimension(node, self.symbols)
                x, pull = (t.movedim(at, 0) for t in (values[node], pulls[node]))
                per = len(x) // size
                cut = slice(part.start * per, part.stop * per)
                total = total + self._outer(node, layer, x[cut], pull[cut], part.stop - part.start)
            found[layer.name] = total.reshape(-1, *layer.shape)
        return found

    def _outer(self, node: fx.Node, layer: Layer, x: Tensor, pull: Tensor, count: int) -> Tensor:
        """For each of `count` samples the sum over positions of outputs' gradients times inputs, `(count, groups, out /
        groups, c)`; as many samples at a time, or else positions, as the limit of numbers allows."""
        per, found = len(x) // count, []
        some = max(1, self.largest // max(1, _windows(node, x[:per], layer).numel()))
        for start in range(0, count, some):
            own = slice(start * per, (start + some) * per)
            number, total = min(some, count - start), torch.zeros(())
            for rows, where in _pieces(_windows(node, x[own], layer), self.largest, 2):
                given = _outputs(pull[own] if where is None else pull[own][:, :, where], layer)
                rows, given = (t.unflatten(1, (number, -1)) for t in (rows, given))
                total = total.to(rows) + torch.einsum("gnpo,gnpc->ngoc", given, rows)
            found.append(total)
        return torch.cat(found)

    def _agrees(self, found: dict[str, Tensor], batch: Batch) -> bool:
        for i in {0, len(next(iter(found.values()))) - 1}:
            for name, expected in self.alone(batch, i).items():
                if not torch.dist(found[name][i], expected) <= 1e-3 * expected.norm() + 1e-8:
                    return False
        return True


def _sample_dimension(node: fx.Node, symbols: set[Any]) -> int:
    """Where a layer's input has its samples: the first dimension whose size goes with the batch's, else the outermost."""
    sizes = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    return next((d for d, s in enumerate(sizes) if not isinstance(s, int) and s.node.expr.free_symbols & symbols), 0)


def _numbers(program: Program, feed: Feed) -> int:
    """How many numbers a sample's activations and their gradients hold, about."""
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "call_function"]
    total = sum(math.prod(hint(s) for s in v.shape) for v in values if isinstance(v, Tensor))
    return max(1, 2 * total // max(1, hint(feed.size)))


def _dependent(loss: Tensor) -> Tensor:
    if not loss.requires_grad:
        raise BadInput("loss: has no gradient; it must be computed from the outputs by differentiable operations")
    return loss


class _Tap(fx.Interpreter):
    """Runs a graph and keeps the inputs and outputs of some layers."""

    def __init__(self, module: TrainableModule, nodes: Sequence[fx.Node]):
        super().__init__(module)
        self.inputs: dict[fx.Node, Tensor] = {}
        self.outputs: dict[fx.Node, Tensor] = {}
        self.nodes = set(nodes)

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n in self.nodes:
            self.inputs[n] = self.env[n.args[0]].detach()  # type: ignore[index]
            self.outputs[n] = found
        return found


# --------------------------------------------------------------------------------------------------------- activations
def input_moments(
    program: Program, names: Sequence[str], context: Context, count: int, full: bool = True, largest: int = 1 << 26
) -> tuple[dict[str, Tensor], int]:
    """`X Xᵀ / n` of the inputs of each named layer, one matrix per group: `(groups, c, c)`, `c` the inputs of one output
    in the order of the flattened weight; with `full` False its diagonal, `(groups, c)`. From `count` samples, eval mode,
    shared out over processes; returns how many of these the data has, too. largest: how many numbers a layer's unfolded
    inputs may hold at a time.

    Raises BadInput without data or batches, or for inputs whose squares are not finite.
    """
    if context.data is None:
        raise BadInput("Sparsify: needs data for its statistics; pass data=, or choose method magnitude")
    module, device = program.module().eval(), accelerator().device
    moments = _Moments(module, [layer for layer in layers(program)[0] if layer.name in names], full, largest, device)

    def add_up() -> int:
        seen = 0
        for batch, taken in sample_batches(Feed(program), context, count, share=True):
            moments.run(*pytree.tree_leaves((batch.args, batch.kwargs)), enable_io_processing=False)
            seen += taken
        return seen

    with seeded(context.seed, context.data), placed(module, device), torch.no_grad():
        seen = everywhere(add_up)
    numbers = summed(torch.tensor([seen, *moments.seen.values()], dtype=torch.float64, device=device)).tolist()
    found = {}
    for (name, total), rows in zip(moments.totals.items(), numbers[1:], strict=True):
        found[name] = summed(total) / rows
        check_finite(found[name], f"the statistics of {name} are")
    return found, int(numbers[0])


class _Moments(fx.Interpreter):
    """Runs a graph and sums up the second moments of the inputs of some layers."""

    def __init__(
        self, module: TrainableModule, wanted: Sequence[Layer], full: bool, largest: int, device: torch.device
    ):
        super().__init__(module)
        self.full, self.largest = full, largest
        self.layers = {node: layer for layer in wanted for node in layer.nodes}
        self.totals: dict[str, Tensor] = {}
        self.seen = {layer.name: 0 for layer in wanted}
        for layer in wanted:
            size = math.prod(layer.shape[1:])
            dtype = torch.promote_types(fetch(module, layer.name).dtype, torch.float32)  # squares of halves overflow
            form = (1 if layer.kind == "linear" else layer.groups, size, *[size] * full)
            self.totals[layer.name] = torch.zeros(form, dtype=dtype, device=device)

    def run_node(self, n: fx.Node) -> Any:
        if n in self.layers:
            layer = self.layers[n]
            total = self.totals[layer.name]
            every = _windows(n, self.env[n.args[0]], layer)  # type: ignore[index]
            for samples, _ in _pieces(every, self.largest, 1, flat=False):
                for rows, _ in _pieces(samples, self.largest, 2):
                    rows = rows.to(total.dtype)
                    total += rows.transpose(1, 2) @ rows if self.full else rows.square().sum(1)
                    self.seen[layer.name] += rows.shape[1]
        return super().run_node(n)


def _windows(node: fx.Node, x: Tensor, layer: Layer) -> Tensor:
    """The inputs of a layer as a view `(groups, samples, *positions, c...)`: what each output value is computed from."""
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
    return x.permute(1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))


def _pieces(windows: Tensor, largest: int, dim: int, flat: bool = True) -> Iterator[tuple[Tensor, slice | None]]:
    """What `_windows` gives, cut along a dimension (1: samples, 2: the first of the positions, which a linear layer lacks)
    into pieces of about `largest` numbers; with `flat` each as rows `(groups, n, c)`. And where it lies, None for all."""
    rank = (windows.dim() - 3) // 2
    if dim == 2 and not rank:
        yield windows, None
        return
    step = max(1, largest // max(1, windows.numel() // max(1, windows.shape[dim])))
    for start in range(0, windows.shape[dim], step):
        piece = windows.narrow(dim, start, min(step, windows.shape[dim] - start))
        if flat:
            piece = piece.reshape(len(piece), -1, math.prod(piece.shape[2 + rank :]))
        yield piece, slice(start, start + step)


def _outputs(y: Tensor, layer: Layer) -> Tensor:
    """The outputs of a layer as `(groups, n, out / groups)` rows, in the order of `_rows`."""
    if len(layer.shape) == 2:
        return y.reshape(1, -1, y.shape[-1])
    y = y.unflatten(1, (layer.groups, -1)).movedim(1, 0).movedim(2, -1)
    return y.reshape(layer.groups, -1, y.shape[-1])


def _each(value: Any, count: int) -> list[int]:
    return [*value] * count if len(value) == 1 else [*value]
