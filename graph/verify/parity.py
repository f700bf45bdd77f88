"""Comparisons of two forms of one model: for rewrites that keep the meaning of weights, and for other formats and
engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..compat import pytree
from ..program import Program
from .check import Trial
from .evaluate import Evaluator, double_weights, relative_error, tensors_of

Runs = Program | torch.nn.Module | Callable[..., Any]


def parity(program: Program, other: Runs, args: tuple | None = None, kwargs: dict[str, Any] | None = None) -> float:
    """Worst relative error of another form of the program (eager module, loaded `.pt2`, ONNX Runtime session wrapped in a
    callable, engine), on the example inputs or `args` and `kwargs`; each form runs in its own precision. Outputs may be
    NumPy arrays."""
    if args is None:
        args, kwargs = program.args, program.kwargs
    return relative_error(_outputs(other, args, kwargs or {}), _outputs(program, args, kwargs or {}))


def _outputs(form: Runs, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    function: Any = form.graph_module if isinstance(form, Program) else form
    training = isinstance(function, torch.nn.Module) and function.training
    if training:
        function.eval()
    try:
        with torch.no_grad():
            outputs = function(*args, **kwargs)
    finally:
        if training:
            function.train()
    leaves = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in pytree.tree_leaves(outputs)]
    return [x.detach().cpu() for x in leaves if isinstance(x, torch.Tensor)]


def equivalence(before: Program, after: Program, *, seed: int = 0, batches: int = 2) -> float:
    """Worst relative error, in float64, of two programs on their own weights and the same random inputs; a dynamic batch is
    tried at `batches` sizes. For rewrites that change weights but not the function (folding, merging)."""
    before, after = before.on_cpu(), after.on_cpu()
    trial = Trial(before, after, {}, seed, own=True)
    trial.draw(seed)
    ours, theirs = Evaluator(before, trial.weights), Evaluator(after, double_weights(after))
    return max(relative_error(theirs.run(inputs), ours.run(inputs)) for inputs in trial.batches(batches))


def randomised(program: Program, seed: int = 0) -> Program:
    """A copy of the program with random weights and calibrated BatchNorm (see `randomise`), in its own precision. Rewrites
    should be tested on it, since freshly initialised weights hide errors."""
    program = program.on_cpu()
    trial = Trial(program, program, {}, seed)
    trial.draw(seed)
    copy = program.copy()
    with torch.no_grad():
        for name, tensor in tensors_of(copy).items():
            tensor.copy_(trial.weights[name])
    return copy
