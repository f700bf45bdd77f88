"""Turn a recipe into a job: capture the model, load the data, and check what can be checked before work begins."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import torch

from .data import cache_folder
from .graph.compat import pytree
from .graph.errors import BadInput, CaptureError, named
from .graph.program import Program, capture
from .passes.base import Context
from .passes.batch import adapted, split_batch
from .passes.common.feed import Feed
from .passes.quantize import Quantize
from .recipe import Input, Recipe
from .runtime.device_results import are_results
from .runtime.devices.dla import dla_core
from .runtime.devices.table import Target, get_target
from .runtime.engines.backends import engine_options
from .runtime.export.opset import FLOAT8, LOWEST
from .runtime.export.placement import dla_placement
from .runtime.prediction.latency_table import LatencyTable
from .runtime.prediction.roofline import Roofline
from .sources import first_batch, load_data, load_model, load_onnx, resolve

DEFAULT_SHAPE = [1, 3, 224, 224]


@dataclass
class Job:
    """A recipe whose model and data are loaded and checked.

    - program, target: the captured program, and the target.
    - train, val: batches for training and validation; None without data, val also without labels.
    - loss, metric: the recipe's functions; None for the defaults.
    - latency: predicts latencies of layers: a `LatencyTable`, a `Roofline`, or None.
    """

    recipe: Recipe
    program: Program
    target: Target
    train: Any = None
    val: Any = None
    loss: Any = None
    metric: Any = None
    latency: Any = None

    def context(self, progress: bool = False) -> Context:
        """Return the context in which the passes of the recipe run."""
        return Context(
            data=self.train, val=self.val, loss=self.loss, metric=self.metric, target=self.target,
            dtype=self.recipe.precision, teacher=self.program, seed=self.recipe.seed, progress=progress,
            latency=self.latency, placement=dla_placement(self.target) if self.target.dla else None,
        )  # fmt: skip


def prepare(recipe: Recipe) -> Job:
    """Load and capture the model, load the data, and check that they fit together. Nothing is written.

    Raises a GraphcombError, which names the field, for an unknown target, a library that is not installed, a model that
    cannot be imported or captured, and data that does not fit the model.
    """
    target = get_target(recipe.target)
    _check_outputs(recipe)
    torch.manual_seed(recipe.seed)
    imported = recipe.model.source.endswith(".onnx")
    model = None if imported else load_model(recipe.model.source, recipe.model.arguments)
    train, val, batch = _data(recipe)
    if model is None:
        program = _import(recipe, batch)
    elif isinstance(model, Program):
        if recipe.inputs or recipe.dynamic_batch is not None or recipe.model.outputs is not None:
            raise BadInput("inputs, dynamic_batch, model.outputs: a captured program has its own, remove the fields")
        program = model
    else:
        program = _capture(model, recipe, batch)
    if batch is not None:
        Feed(program, "data").fit(batch)
        if Feed(program, "validation data").fit(first_batch(val)).labels is None:
            val = None
    loss = resolve(recipe.loss, "loss") if recipe.loss else None
    metric = resolve(recipe.metric, "metric") if recipe.metric else None
    return Job(recipe, program, target, train, val, loss, metric, _latency(recipe, target))


def _check_outputs(recipe: Recipe) -> None:
    """Raise the errors of export and engine builds that are known before anything is trained."""
    quantised = {pass_.precision for pass_ in recipe.passes if isinstance(pass_, Quantize)}
    for precision in sorted(quantised - {"int8"}):
        for target in targets_of(recipe):
            target.alignment(precision)
    for i, engine in enumerate(recipe.outputs.engines):
        with named(f"outputs.engines.{i}"):
            device = get_target(engine.target)
            options = engine_options(device.backend, engine.options.given())
            if options.dla is not None:
                dla_core(device, options.dla, min(quantised, default=recipe.precision))
    lowest = min(targets_of(recipe), key=lambda target: target.opset)
    least = FLOAT8 if "fp8" in quantised else LOWEST
    if recipe.outputs.opset is not None and not least <= recipe.outputs.opset <= lowest.opset:
        why = " for FP8" if least > LOWEST else ""
        limits = f"{least} is the lowest{why}, and target {lowest.name} parses up to {lowest.opset}"
        raise BadInput(f"outputs.opset: {recipe.outputs.opset}: {limits}")
    if recipe.outputs.keep_fp32 and recipe.precision == "fp32":
        raise BadInput("outputs.keep_fp32: is for precision fp16")


def targets_of(recipe: Recipe) -> list[Target]:
    """Return all targets that the run's ONNX files are for, the recipe's `target` first."""
    return [get_target(name) for name in (recipe.target, *(engine.target for engine in recipe.outputs.engines))]


def _latency(recipe: Recipe, target: Target) -> LatencyTable | Roofline | None:
    """Return what predicts latencies, or None. It is a latency table, which measures, only if a pass needs latencies."""
    asked = any(getattr(pass_, "latency", None) is not None for pass_ in recipe.passes)
    name = recipe.latency_table
    try:
        if name == "roofline":
            return Roofline(target, recipe.precision)
        if name is not None and are_results(name):
            return Roofline.calibrated(name, target, recipe.precision)
        if not asked:
            return None
        suffix = "" if recipe.precision == "fp32" else f"-{recipe.precision}"
        file = name or cache_folder() / f"latency-{target.name}{suffix}.json"
        return LatencyTable(file, target, precision=recipe.precision)
    except BadInput as error:
        raise BadInput(f"latency_table: {error}") from error


def example(inputs: list[Input], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return example inputs: Gaussian noise for floats, zeros for integers and booleans."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for wanted in inputs:
        dtype = getattr(torch, wanted.dtype)
        noise = torch.randn(wanted.shape, generator=generator)
        result.append(noise.to(dtype) if dtype.is_floating_point else torch.zeros(wanted.shape, dtype=dtype))
    return tuple(result)


def _data(recipe: Recipe) -> tuple[Any, Any, Any]:
    """Return the training loader, the validation loader and the first training batch; three times None without data."""
    if recipe.data is None:
        return None, None, None
    arguments = dict(recipe.data.arguments)
    if recipe.data.source == "random" and recipe.inputs:
        arguments.setdefault("shape", recipe.inputs[0].shape[1:])
    functions = {"inputs": recipe.data.inputs, "labels": recipe.data.labels}
    splits = [resolve(name, f"data.{key}") if name else None for key, name in functions.items()]
    train, val = (adapted(loader, *splits) for loader in load_data(recipe.data.source, arguments))
    return train, val, first_batch(train)


def _import(recipe: Recipe, batch: Any) -> Program:
    """Import an ONNX file. Dynamic shapes of the file are those of the recipe's inputs or of the data."""
    dynamic: bool | None = recipe.dynamic_batch
    if dynamic is None and batch is not None:
        dynamic = True
    args: tuple[Any, ...] | None = None
    if recipe.inputs:
        args = example(recipe.inputs, recipe.seed)
    elif batch is not None:
        args, kwargs, _ = split_batch(batch)
        args = (*args, *kwargs.values())
        args = pytree.tree_map_only(torch.Tensor, lambda t: t[:2], args) if dynamic else args
    asked = "auto" if dynamic is None else "batch" if dynamic else None
    return load_onnx(recipe.model.source, recipe.model.arguments, args, asked, recipe.model.outputs)


def _capture(model: torch.nn.Module, recipe: Recipe, batch: Any) -> Program:
    kwargs: dict[str, Any] = {}
    if recipe.inputs:
        args = example(recipe.inputs, recipe.seed)
    elif batch is not None:
        args, kwargs, _ = split_batch(batch)
    else:
        args = example([Input(shape=DEFAULT_SHAPE)], recipe.seed)
    dynamic = batch is not None if recipe.dynamic_batch is None else recipe.dynamic_batch
    if batch is not None and not recipe.inputs and dynamic:
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t[:2], (args, kwargs))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.export prints the graph when it fails
            return capture(model, args, kwargs, "batch" if dynamic else None, outputs=recipe.model.outputs)
    except CaptureError as error:
        shapes = ", ".join(str(tuple(a.shape)) for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor))
        raise CaptureError(f"model: {recipe.model.source} with inputs {shapes}: {error}") from error
