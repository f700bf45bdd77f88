"""Batches of a sample of the data, for statistics and for scores from gradients.

The samples are a random subset, drawn under the seed, where a loader goes through its data set in order. They are the
first ones that a loader yields under the seed where it shuffles or samples by itself, has a data set without random
access, or is no `DataLoader`.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from ...graph.errors import BadInput
from ..base import Context
from ..batch import Adapted, adapted
from .feed import Batch, Feed
from .loaders import generators, length, like_loader, shard
from .processes import accelerator, forwarded, gathered
from .repeat import rng_state, set_rng_state
from .scoring import bar

T = TypeVar("T")


def drawn(data: Iterable[Any], count: int, seed: int, batches: int = 1) -> Iterable[Any]:
    """A loader over a random subset of `count` samples, rounded up to whole batches and to so many of them, for a loader
    that goes through its data set in order; else the data itself.
    """
    if isinstance(data, Adapted):
        return adapted(drawn(data.data, count, seed, batches), data.inputs, data.labels)
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return data
    size, total = data.batch_size, length(data.dataset)  # type: ignore[arg-type]
    if not isinstance(data.sampler, SequentialSampler) or size is None or total is None or total <= count:
        return data
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = order[: max(math.ceil(count / size), batches) * size]
    return like_loader(data, batch_size=size, sampler=chosen, drop_last=data.drop_last)


def sample_batches(
    feed: Feed, context: Context, count: int, title: str | None = None, share: bool = False
) -> Iterator[tuple[Batch, int]]:
    """Yield batches of the context's data, on the process's device, until there are `count` samples, each batch with
    how many of its samples count. It must run under a seed (`seeded`, `apart`).

    title: of a progress bar, None for none. share: each process gets its part of these batches; otherwise each gets
    all. Raises BadInput where there is no batch at all; with `share`, a process may get none.
    """
    acc, data = accelerator(), drawn(context.batches, count, context.seed)
    parts, position = (acc.num_processes, acc.process_index) if share else (1, 0)
    loader = shard(data, position, parts, even=False)
    if parts > 1 and loader is data:  # the loader's own `DistributedSampler` divides the data
        count, parts, position = math.ceil(count / parts), 1, 0
    start = size = done = 0
    with bar(title is not None and context.progress and acc.is_main_process, title or "", count) as update:
        for batch in feed.batches(loader):
            if parts > 1:  # all batches but the last are of one size
                size = max(size, batch.size)
                start, position = position * size, position + parts
            counted = min(batch.size, count - start)
            if counted <= 0:
                return
            yield batch.to(acc.device), counted
            done += counted
            update(min(done * parts, count), "")
            start = position * size if parts > 1 else done
            if start >= count:
                return
    if not done and parts == 1:
        raise BadInput("data: yields no batch; it must be iterable again")


def apart(made: Generator[T], seed: int, data: Iterable[Any] | None) -> Iterator[T]:
    """Yield the elements of a generator. It runs under the seed and with gradients enabled; between two elements, and
    after the caller stops, random states and the gradient mode are the caller's.
    """
    states, inner = [(g, g.get_state()) for g in generators(data)], None
    try:
        while True:
            outer = rng_state()
            try:
                if inner is None:
                    set_seed(seed)
                    for generator, _ in states:
                        generator.manual_seed(seed)
                else:
                    set_rng_state(inner)
                with torch.enable_grad():
                    element = next(made, made)
                inner = rng_state()
            finally:
                set_rng_state(outer)
            if element is made:
                return
            yield element  # type: ignore[misc]
    finally:
        made.close()
        for generator, before in states:
            generator.set_state(before)


def everywhere(act: Callable[[], T]) -> T:
    """What `act` returns in this process; if it fails in any process, its first error is raised in all."""
    if accelerator().num_processes == 1:
        return act()
    result, error = None, None
    try:
        result = act()
    except Exception as raised:
        error = forwarded(raised)
    for other in gathered(error):
        if other is not None:
            raise other
    return result  # type: ignore[return-value]
