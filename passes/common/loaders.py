"""Data loaders: their lengths, the generators that decide their order, and the batches that each process takes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ..batch import Adapted, adapted

# Options of a loader that do not decide which batches it makes.
WORK = (
    "num_workers collate_fn pin_memory timeout worker_init_fn multiprocessing_context generator prefetch_factor "
    "persistent_workers"
).split()


@dataclass(frozen=True)
class Every:
    """Every `count`-th element of an iterable, from element `index` on.

    even: leave out an incomplete last group of `count`, so that all processes take the same number of steps.
    """

    items: Iterable[Any]
    index: int
    count: int
    even: bool

    def __iter__(self) -> Iterator[Any]:
        group: list[Any] = []
        for item in self.items:
            group.append(item)
            if len(group) == self.count:
                yield group[self.index]
                group = []
        if not self.even and self.index < len(group):
            yield group[self.index]

    def __len__(self) -> int:
        whole, rest = divmod(len(self.items), self.count)  # type: ignore[arg-type]
        return whole + (not self.even and self.index < rest)


def shard(data: Iterable[Any], index: int, count: int, even: bool = True) -> Iterable[Any]:
    """The batches that process `index` of `count` takes: batches `index`, `index + count`, … of the loader's order.

    A `DataLoader` over an indexable data set loads only these; of any other iterable, the other batches are loaded and
    dropped. A loader that already has a `DistributedSampler` is left as it is. even: see `Every`.
    """
    if count == 1:
        return data
    if isinstance(data, Adapted):
        return adapted(shard(data.data, index, count, even), data.inputs, data.labels)
    if not isinstance(data, DataLoader) or data.batch_sampler is None or isinstance(data.dataset, IterableDataset):
        return Every(data, index, count, even)
    if isinstance(data.sampler, DistributedSampler):
        return data
    return like_loader(data, batch_sampler=Every(data.batch_sampler, index, count, even))


def like_loader(data: DataLoader[Any], **parts: Any) -> DataLoader[Any]:
    """A loader of the same data set with the same working options and another sampler or batch sampler."""
    return DataLoader(data.dataset, **{option: getattr(data, option) for option in WORK}, **parts)


def length(data: Iterable[Any]) -> int | None:
    """Number of batches, or None for an iterable without a length."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None


def generators(data: Iterable[Any] | None) -> list[torch.Generator]:
    """The random generators that decide a loader's order, apart from the global one."""
    sampler = getattr(data, "sampler", None)
    candidates = [getattr(owner, "generator", None) for owner in (data, sampler, getattr(data, "batch_sampler", None))]
    return list({id(g): g for g in candidates if isinstance(g, torch.Generator)}.values())
