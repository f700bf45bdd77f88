"""Metrics of a model over a data set."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ...graph.errors import BadInput
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..batch import split_batch
from .feed import Batch, Feed
from .loaders import length, shard
from .losses import accuracy, applied, number
from .processes import accelerator, placed, reduced
from .repeat import seeded


@contextmanager
def bar(show: bool, title: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """A progress bar; yields `update(done, text)`, which does nothing if the bar is not shown."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[text]}"), disable=not show) as progress:
        task = progress.add_task(title, total=total, text="")

        def update(done: int, text: str) -> None:
            progress.update(task, completed=done, text=text)

        yield update


def evaluate(
    model: Program | nn.Module,
    data: Iterable[Any],
    metric: Callable[..., Any] | None = None,
    progress: bool = False,
    field: str = "val",
    alone: bool = False,
) -> float:
    """Mean of `metric(outputs, labels)` (scores per sample or pixel, default `accuracy`) over a data set, in eval mode.

    A metric that is no mean over samples, such as mAP, is an object (or a class) with torchmetrics' `reset()`,
    `update(outputs, labels)` and `compute()`, which returns one number; under several processes it must gather by
    itself what they saw.

    A `Program` is checked against the batches; one with a fixed batch size still sees every sample. Under several
    processes, each scores its share and all return the mean of the whole; with `alone`, each scores everything. Train
    and eval flags and random states are restored. field: name of the data in messages. Raises BadInput for data that is
    empty, has no labels or does not fit, and for a metric that fails.
    """
    acc = accelerator()
    feed = Feed(model, field) if isinstance(model, Program) else None
    module = model.module() if isinstance(model, Program) else model
    place = placed(module, acc.device) if isinstance(module, TrainableModule) else nullcontext()
    with evaluating(module), place:
        return score(module, feed, data, metric or accuracy, acc, progress, field, alone)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A context in which the module is in eval mode; afterwards every flag is as before, also where single
    normalisations were frozen.
    """
    modes = {m: m.training for m in module.modules()}
    graph = module.graph if isinstance(module, TrainableModule) else None
    flags = {node: (node.args, node.kwargs) for node in graph.nodes} if graph else {}
    module.eval()
    try:
        yield
    finally:
        module.train(modes[module])
        for m, mode in modes.items():
            m.training = mode
        changed = {node: arguments for node, arguments in flags.items() if (node.args, node.kwargs) != arguments}
        for node, (args, kwargs) in changed.items():
            node.args, node.kwargs = args, kwargs
        if changed and isinstance(module, TrainableModule):
            module.recompile()


def score(
    forward: Callable[..., Any],
    feed: Feed | None,
    data: Iterable[Any],
    metric: Callable[..., Any],
    acc: Accelerator,
    progress: bool = False,
    field: str = "val",
    alone: bool = False,
) -> float:
    """The mean that `evaluate` describes, for a module that the caller has put on its device and into eval mode.

    forward: gives the outputs of a batch. feed: fits batches to a program; None for a module that takes batches as they
    are.
    """
    whole: Any = metric() if isinstance(metric, type) else metric
    if not all(hasattr(whole, name) for name in ("reset", "update", "compute")):
        whole = None
    if whole is not None:
        applied("metric", whole.reset)
    total, count = 0.0, 0
    share = data if alone else shard(data, acc.process_index, acc.num_processes, even=False)
    batches = feed.batches(share, pad=True) if feed else (Batch(*split_batch(raw), size=0) for raw in share)
    with bar(progress and acc.is_main_process, field, length(share)) as update, torch.no_grad(), seeded(0, data):
        for done, batch in enumerate(batches, 1):
            if batch.labels is None:
                raise BadInput(f"{field}: the batches have no labels, and the metric needs them")
            batch = batch.to(acc.device)
            outputs = forward(*batch.args, **batch.kwargs)
            if feed:
                outputs = feed.cut(outputs, batch)
            if whole is not None:
                applied("metric", whole.update, outputs, batch.labels)
                count += 1
                continue
            scores = torch.as_tensor(applied("metric", metric, outputs, batch.labels))
            total, count = total + scores.cpu().double().sum().item(), count + scores.numel()
            update(done, "")
    if whole is not None and count:
        return number("metric", applied("metric", whole.compute))
    total, counted = (total, count) if alone else reduced([total, count], "sum", acc)
    if not counted:
        raise BadInput(f"{field}: yields nothing to score")
    return total / counted
