"""Metrics of a model over a data set."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy import stats
from torch import Tensor, nn

from ...graph.capture.export import CPU, device_of
from ...graph.errors import BadInput
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..batch import split_batch
from .feed import Batch, Feed
from .loaders import length, shard
from .losses import accuracy, applied, number
from .processes import accelerator, placed, reduced
from .repeat import seeded

FEWEST = 8  # samples from whose spread an interval is estimated


class Score(NamedTuple):
    """The mean of a metric over a data set.

    interval: the mean's 95 % interval over the choice of samples, as (low, high); None where it is not known: for a metric
    that is no mean, and for few samples.
    """

    mean: float
    interval: tuple[float, float] | None = None


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
    return estimate(model, data, metric, progress, field, alone).mean


def estimate(
    model: Program | nn.Module,
    data: Iterable[Any],
    metric: Callable[..., Any] | None = None,
    progress: bool = False,
    field: str = "val",
    alone: bool = False,
) -> Score:
    """As `evaluate`, with the interval of the mean."""
    acc = accelerator()
    feed = Feed(model, field) if isinstance(model, Program) else None
    module = model.module() if isinstance(model, Program) else model
    place: AbstractContextManager[Any] = nullcontext()
    if isinstance(module, TrainableModule):
        device, place = acc.device, placed(module, acc.device)
    else:
        device = device_of(module) or CPU  # a module of the user's stays where it is
    with evaluating(module), place:
        return score(module, feed, data, metric or accuracy, acc, progress, field, alone, device)


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
    device: torch.device | None = None,
) -> Score:
    """The mean that `evaluate` describes, for a module that the caller has put on its device and into eval mode.

    forward: gives the outputs of a batch. feed: fits batches to a program; None for a module that takes batches as they
    are. device: on which the module is, by default the process's.
    """
    whole: Any = metric() if isinstance(metric, type) else metric
    if not all(hasattr(whole, name) for name in ("reset", "update", "compute")):
        whole = None
    if whole is not None:
        applied("metric", whole.reset)
    total, count, units = 0.0, 0, [0.0, 0.0, 0.0]
    share = data if alone else shard(data, acc.process_index, acc.num_processes, even=False)
    batches = feed.batches(share, pad=True) if feed else (Batch(*split_batch(raw), size=0) for raw in share)
    with bar(progress and acc.is_main_process, field, length(share)) as update, torch.no_grad(), seeded(0, data):
        for done, batch in enumerate(batches, 1):
            if batch.labels is None:
                raise BadInput(f"{field}: the batches have no labels, and the metric needs them")
            batch = batch.to(device or acc.device)
            outputs = forward(*batch.args, **batch.kwargs)
            if feed:
                outputs = feed.cut(outputs, batch)
            if whole is not None:
                applied("metric", whole.update, outputs, batch.labels)
                count += 1
                continue
            scores = torch.as_tensor(applied("metric", metric, outputs, batch.labels)).cpu().double()
            total, count = total + scores.sum().item(), count + scores.numel()
            units = [a + b for a, b in zip(units, _independent(scores, batch.labels), strict=True)]
            update(done, "")
    if whole is not None and count:
        return Score(number("metric", applied("metric", whole.compute)))
    total, counted, *units = (total, count, *units) if alone else reduced([total, count, *units], "sum", acc)
    if not counted:
        raise BadInput(f"{field}: yields nothing to score")
    return Score(total / counted, _interval(total / counted, *units))


def _independent(scores: Tensor, labels: Any) -> list[float]:
    """The number of scores of a batch that are independent of each other, their sum and the sum of their squares.

    Scores of pixels of one image are not, so where there is not one score for each sample the batch counts as one.
    """
    if not (isinstance(labels, Tensor) and labels.dim() and scores.shape == labels.shape[:1]):
        scores = scores.mean().reshape(1) if scores.numel() else scores.reshape(0)
    return [float(len(scores)), float(scores.sum()), float(scores.square().sum())]


def _interval(mean: float, count: float, total: float, squares: float) -> tuple[float, float] | None:
    """The 95 % interval of a mean: Wilson's for shares, else Student's. count, total, squares: see `_independent`."""
    if not math.isfinite(squares) or not count:
        return None
    if squares == total:  # every score is 0 or 1
        interval = stats.binomtest(round(total), round(count)).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)
    if count < FEWEST:
        return None
    spread = math.sqrt(max(squares - total**2 / count, 0) / (count - 1) / count)
    half = float(stats.t.ppf(0.975, count - 1)) * spread
    return mean - half, mean + half
