"""Batches fitted to the inputs of one program: order, names, dtypes and sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import fx

from ...graph import compat
from ...graph.compat import pytree
from ...graph.errors import BadInput
from ...graph.program import Program
from ..batch import ADAPT, FORMS, Adapted, Split, describe, split_batch
from .loaders import length


def map_some(change: Callable[[torch.Tensor], torch.Tensor], tree: Any, which: Sequence[bool]) -> Any:
    """The tree with `change` applied to those of its leaves for which `which` is True."""
    leaves, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten([change(v) if chosen else v for v, chosen in zip(leaves, which, strict=True)], spec)


@dataclass
class Batch:
    """One batch, ready for `module(*args, **kwargs)`; size: the number of samples without padding."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    size: int

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device."""
        args, kwargs, labels = send_to_device((self.args, self.kwargs, self.labels), device)
        return Batch(args, kwargs, labels, self.size)


class Feed:
    """Fits the batches of a loader to one program: order and names of the inputs, dtype, rank and sizes.

    Attributes: `size`, the program's batch size, a number or a symbol (None without inputs); `static`, the batch size
    where it is fixed (None where it is dynamic); `batched` and `outputs`, whether each input and each output has the
    batch as its first dimension; `skipped`, how many batches were too short for a static program so far. Every error is
    a BadInput that names the input and what to do; `field` is the name of the data in its message.
    """

    def __init__(self, program: Program, field: str = "data"):
        self.field, self.skipped = field, 0
        self._args, self._kwargs = program.args, program.kwargs
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        self._names = [str(n.target) for n in placeholders]
        self._values = [n.meta.get("val") for n in placeholders]
        top = len(self._args) + len(self._kwargs)
        names = compat.input_names(program.graph) or self._names
        positional = names[: len(self._args)] if len(names) == top else self._names[: len(self._args)]
        self._order = [*positional, *self._kwargs]
        leaves = pytree.tree_leaves(program.graph.output_node().args)
        results = [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        self.size: Any = _batch_size(self._values, results)
        self.static = self.size if isinstance(self.size, int) else None
        self.batched = self._with_samples(self._values)
        self.outputs = self._with_samples(results)

    def _with_samples(self, values: Iterable[Any]) -> list[bool]:
        return [isinstance(v, torch.Tensor) and v.dim() > 0 and str(v.shape[0]) == str(self.size) for v in values]

    def batches(self, data: Iterable[Any], pad: bool = False) -> Iterator[Batch]:
        """Yield all batches of `data`, checked. A static program cannot take a short last batch: it is skipped and
        counted, or, with `pad`, filled up with copies of its last sample, whose outputs the caller cuts off (`cut`).

        Raises BadInput for data that cannot be iterated or does not fit the program.
        """
        if not isinstance(data, Iterable):
            raise BadInput(f"{self.field}: a {type(data).__name__} cannot be iterated; give a DataLoader")
        for index, raw in enumerate(data):
            batch = self.fit(raw)
            if self.static is not None and batch.size < self.static:
                if index == 0 and not pad:
                    raise self._wrong_size(batch.size)
                if not pad:
                    self.skipped += 1
                    continue
                batch = self._pad(batch, self.static)
            yield batch

    def leaves(self, data: Iterable[Any]) -> bool:
        """Whether an epoch ends with a batch that is too short for a static program, as far as the loader's attributes
        tell.
        """
        if self.static is None:
            return False
        if isinstance(plain := data.data if isinstance(data, Adapted) else data, (list, tuple)):
            last = data.split(plain[-1]) if isinstance(data, Adapted) and plain else plain[-1:]
            return bool(plain) and self.fit(last if isinstance(last, Split) else last[0]).size < self.static
        size, count = getattr(data, "batch_size", None), length(getattr(data, "dataset", None))  # type: ignore[arg-type]
        return bool(size and count and not getattr(data, "drop_last", False) and count % size)

    def fit(self, raw: Any) -> Batch:
        """One batch in the program's argument order, checked; it may have fewer samples than a static program takes,
        but not more.
        """
        args, kwargs, labels = split_batch(raw)
        if isinstance(raw, Mapping) and "labels" in raw and "labels" in self._order:
            kwargs["labels"] = raw["labels"]  # labels that are also an input of the model
        args, kwargs = self._packed(args, kwargs)
        takes = ", ".join(self._order)
        if len(args) > len(self._order):
            raise BadInput(f"{self.field}: a batch has {len(args)} inputs, the program takes {takes}; {ADAPT}")
        inputs = dict(zip(self._order, args, strict=False)) | kwargs
        if unknown := [name for name in inputs if name not in self._order]:
            raise BadInput(f'{self.field}: no input "{unknown[0]}" in the program; it takes {takes}; {ADAPT}')
        example = dict(zip(self._order, [*self._args, *self._kwargs.values()], strict=True))
        for name, value in example.items():
            if name not in inputs and any(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(value)):
                pair = isinstance(raw, (list, tuple)) and len(raw) == 2 and len(example) > 1
                forms = f" (what is second in it are the labels): {FORMS}" if pair else ""
                raise BadInput(f'{self.field}: the batch lacks the input "{name}"{forms}')
        values = [self._like(name, inputs.get(name, value), value) for name, value in example.items()]
        args, kwargs = tuple(values[: len(self._args)]), dict(zip(self._kwargs, values[len(self._args) :], strict=True))
        size = self._check(pytree.tree_leaves((args, kwargs)))
        if self.static is not None and size > self.static:
            raise self._wrong_size(size)
        return Batch(args, kwargs, labels, size)

    def _packed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of a batch, packed into one list or mapping where that is the program's only input."""
        only = self._args[0] if len(self._args) == 1 else None
        if isinstance(only, (list, tuple)) and not (len(args) == 1 and isinstance(args[0], (list, tuple))):
            return ((list(args),), kwargs) if args else (args, kwargs)
        if isinstance(only, Mapping) and not args and only.keys() <= kwargs.keys():
            return ({k: kwargs[k] for k in only},), {k: v for k, v in kwargs.items() if k not in only}
        return args, kwargs

    def _like(self, name: str, value: Any, example: Any) -> Any:
        """An input in the structure of the example: a tuple becomes a list where the example is one, and the reverse."""
        if pytree.tree_structure(value) == (spec := pytree.tree_structure(example)):
            return value
        leaves = pytree.tree_leaves(value)
        if isinstance(value, (list, tuple)) != isinstance(example, (list, tuple)) or len(leaves) != spec.num_leaves:
            raise BadInput(f'{self.field}: input "{name}" is {describe(value)}, the program takes {describe(example)}')
        if isinstance(value, (list, tuple)):
            return pytree.tree_unflatten(leaves, spec)
        return value

    def _pad(self, batch: Batch, size: int) -> Batch:
        def fill(value: torch.Tensor) -> torch.Tensor:
            return torch.cat([value, value[-1:].expand(size - len(value), *value.shape[1:])])

        args, kwargs = map_some(fill, (batch.args, batch.kwargs), self.batched)
        return Batch(args, kwargs, batch.labels, batch.size)

    def cut(self, outputs: Any, batch: Batch) -> Any:
        """The outputs of a padded batch without those of the padding."""
        if self.static in (None, batch.size):
            return outputs
        return map_some(lambda value: value[: batch.size], outputs, self.outputs)

    def first(self, batch: Batch, count: int) -> Batch:
        """The first so many samples of a batch. A static program takes whole batches alone."""
        if self.static is not None or count >= batch.size:
            return batch
        args, kwargs = map_some(lambda value: value[:count], (batch.args, batch.kwargs), self.batched)
        return Batch(args, kwargs, batch.labels, count)

    def _wrong_size(self, size: int) -> BadInput:
        return BadInput(
            f"{self.field}: a batch has {size} samples, the program is fixed to {self.static}; "
            f'capture it with dynamic_shapes="batch" or set batch_size={self.static}'
        )

    def _check(self, leaves: list[Any]) -> int:
        if len(leaves) != len(self._values):
            raise BadInput(f"{self.field}: a batch has {len(leaves)} inputs, the program takes {len(self._values)}")
        size = None
        for name, value, expected, batched in zip(self._names, leaves, self._values, self.batched, strict=True):
            if not isinstance(value, torch.Tensor) or not isinstance(expected, torch.Tensor):
                continue
            if value.dtype != expected.dtype:
                raise BadInput(f'{self.field}: input "{name}" is {value.dtype}, the program takes {expected.dtype}')
            sizes = list(zip(value.shape, expected.shape, strict=False))[int(batched) :]
            if value.dim() != expected.dim() or any(isinstance(want, int) and have != want for have, want in sizes):
                known = [str(s) if isinstance(s, int) else "any" for s in expected.shape]
                wanted = ", ".join(["batch", *known[1:]] if batched else known)
                raise BadInput(
                    f'{self.field}: input "{name}" has shape {tuple(value.shape)}, the program takes ({wanted})'
                )
            size = value.shape[0] if size is None and batched else size
        return size or 0


def check_inputs(teacher: Program, program: Program) -> None:
    """Raise BadInput for a teacher that takes other inputs than the program."""
    theirs, ours = ([n.meta["val"] for n in p.graph.nodes if n.op == "placeholder"] for p in (teacher, program))
    if len(theirs) != len(ours):
        raise BadInput(f"teacher: takes {len(theirs)} inputs, the program {len(ours)}")
    for t, s in zip(theirs, ours, strict=True):
        if not isinstance(t, torch.Tensor) or not isinstance(s, torch.Tensor):
            continue
        fixed = list(zip(t.shape, s.shape, strict=False))
        same = all(a == b for a, b in fixed if isinstance(a, int) and isinstance(b, int))
        if t.dtype != s.dtype or t.dim() != s.dim() or not same:
            raise BadInput(f"teacher: an input is {t.dtype} {tuple(t.shape)}, the program's {s.dtype} {tuple(s.shape)}")


def sample_dimension(sizes: Iterable[Any], symbols: set[Any]) -> int | None:
    """The dimension that holds the samples: the first whose size depends on symbols of the batch size; None if none does."""
    return next((d for d, s in enumerate(sizes) if not isinstance(s, int) and s.node.expr.free_symbols & symbols), None)


def _batch_size(inputs: Iterable[Any], outputs: Iterable[Any]) -> Any:
    """The batch size, a number or a symbol, from the first dimensions of the inputs.

    Inputs are preferred whose first dimension is dynamic, then those that share it with an output; of equals the first.
    None without tensor inputs.
    """
    results = {str(v.shape[0]) for v in outputs if isinstance(v, torch.Tensor) and v.dim()}
    first = [v.shape[0] for v in inputs if isinstance(v, torch.Tensor) and v.dim()]

    def rank(size: Any) -> tuple[bool, bool]:
        return isinstance(size, int), str(size) not in results

    return min(first, key=rank, default=None)
