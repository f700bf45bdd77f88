"""Parity: does an engine compute what the program computes?

Measured on the program's example inputs, on fresh random ones, and on other batch sizes where the batch is dynamic.
Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..graph.errors import Refused
from ..graph.ops import source
from ..graph.program import Program, flatten_outputs
from .engine import Engine


@dataclass(frozen=True)
class Check:
    """One comparison: what was fed, its batch size (None without a dynamic batch), and the worst output's error."""

    inputs: str
    batch: int | None
    error: float


def parity(program: Program, engine: Engine, seed: int = 0) -> list[Check]:
    """Compare an engine with the program in eval mode; the program is not changed.

    Inputs are cast to the engine's dtypes, so that a half-precision engine is measured against the fp32 program. Batch
    sizes that the program itself does not take are left out. Raises Refused when the engine's outputs differ in number
    or shape, BadInput when it does not take the inputs.
    """
    frozen = program.copy()
    module = frozen.module().eval()
    checks = []
    for what, batch, args, kwargs in input_sets(frozen, seed):
        try:
            with torch.no_grad():
                wanted = [t.double().numpy() for t in flatten_outputs(module(*args, **kwargs))]
        except RuntimeError:
            if what == "example":
                raise
            continue
        found = engine.run(feeds(engine, args, kwargs))
        if len(found) != len(wanted):
            raise Refused(f"the engine has {len(found)} outputs, the program {len(wanted)}")
        names = [o.name for o in engine.outputs]
        errors = [relative_error(a, b, name) for a, b, name in zip(found, wanted, names, strict=True)]
        checks.append(Check(what, batch, max(errors, default=0.0)))
    return checks


class HalfEmulator(fx.Interpreter):
    """Runs a graph in fp32 with weights, inputs and the result of every operator rounded to fp16.

    That is what a tensor core does: fp16 operands, fp32 accumulation. Kernels that fuse operators round less often.
    `overflow` names the first operator whose finite result exceeds fp16, with its largest value.
    """

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.overflow: tuple[str, float] | None = None

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op == "output":
            return found
        return pytree.tree_map_only(torch.Tensor, lambda t: self._round(n, t), found)

    def _round(self, node: fx.Node, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        if node.op == "get_attr":  # constants are clamped when they are converted
            largest = torch.finfo(torch.float16).max
            return torch.where(tensor.isfinite(), tensor.clamp(-largest, largest), tensor).half().float()
        rounded = tensor.half().float()
        if self.overflow is None and bool((rounded.isinf() & tensor.isfinite()).any()):
            self.overflow = (source(node), float(tensor[tensor.isfinite()].abs().max()))
        return rounded


def half_emulation(program: Program) -> tuple[Check, list[str]]:
    """The error to expect of fp16 arithmetic on the example inputs, and what fp16 cannot hold: the first operator that
    overflows, outputs that vanish."""
    module = program.copy().module().eval()
    emulator = HalfEmulator(module)
    with torch.no_grad():
        wanted = [t.double().numpy() for t in flatten_outputs(module(*program.args, **program.kwargs))]
        found = emulator.run(*pytree.tree_leaves((program.args, program.kwargs)), enable_io_processing=False)
    outputs = [t.numpy() for t in flatten_outputs(found)]
    error = max((relative_error(a, b) for a, b in zip(outputs, wanted, strict=True)), default=0.0)
    notes = []
    if emulator.overflow:
        notes.append(f"fp16 overflows at {emulator.overflow[0]}, which reaches {emulator.overflow[1]:.3g}")
    for i, output in enumerate(wanted):
        largest, normal = float(np.abs(output).max(initial=0.0)), float(np.finfo(np.float16).smallest_normal)
        if 0 < largest < normal:
            notes.append(f"output {i} reaches {largest:.2g} only, below the normal range of fp16 ({normal:.2g})")
    return Check("example, every operator rounded to fp16", next(iter(_batch(program).values()), None), error), notes


def relative_error(found: np.ndarray, wanted: np.ndarray, name: str = "output") -> float:
    """max |found - wanted| / max |wanted| over the finite values; infinite where one is finite and the other is not."""
    if found.shape != wanted.shape:
        raise Refused(f"{name}: the engine gives shape {found.shape}, the program {wanted.shape}")
    found, finite = found.astype(np.float64), np.isfinite(wanted)
    if not np.array_equal(np.isfinite(found), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.abs(wanted[finite]).max())
    return float(np.abs(found[finite] - wanted[finite]).max()) / (scale or 1.0)


def feeds(engine: Engine, args: tuple, kwargs: dict[str, Any]) -> list[np.ndarray]:
    """The tensors among a program's inputs as the engine takes them."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if len(tensors) != len(engine.inputs):
        raise Refused(f"the engine has {len(engine.inputs)} inputs, the program {len(tensors)}")
    return [
        np.ascontiguousarray(t.detach().cpu().numpy().astype(i.dtype))
        for t, i in zip(tensors, engine.inputs, strict=True)
    ]


def input_sets(program: Program, seed: int = 0) -> Iterator[tuple[str, int | None, tuple, dict[str, Any]]]:
    """What to compare on: (name, batch size, args, kwargs)."""
    sizes = _batch(program)
    example = next(iter(sizes.values()), None)
    yield "example", example, program.args, program.kwargs
    for batch in [example] if example is None else sorted({1, example, example + 1}):
        generator = torch.Generator().manual_seed(seed + (batch or 0))
        leaves, spec = pytree.tree_flatten((program.args, program.kwargs))
        fresh = [
            random_like(x, generator, batch if i in sizes else None) if isinstance(x, torch.Tensor) else x
            for i, x in enumerate(leaves)
        ]
        args, kwargs = pytree.tree_unflatten(fresh, spec)
        yield "random", batch, args, kwargs


def random_like(tensor: torch.Tensor, generator: torch.Generator, batch: int | None = None) -> torch.Tensor:
    """Random values with the mean and deviation of a float tensor, or in the range of an integer one."""
    shape = tensor.shape if batch is None else (batch, *tensor.shape[1:])
    if tensor.is_floating_point():
        deviation, mean = torch.std_mean(tensor.double(), correction=0)
        noise = torch.randn(shape, generator=generator)
        return (noise * (float(deviation) or 1.0) + float(mean)).to(tensor.dtype)
    low, high = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
    return torch.randint(low, high + 1, shape, generator=generator).to(tensor.dtype)


def _batch(program: Program) -> dict[int, int]:
    """Positions and batch size of the inputs whose first dimension is the dynamic batch."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    leaves = pytree.tree_leaves((program.args, program.kwargs))
    found: dict[int, int] = {}
    symbol = None
    for i, (node, leaf) in enumerate(zip(placeholders, leaves, strict=True)):
        value = node.meta.get("val")
        size = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else 0
        if isinstance(size, torch.SymInt) and (symbol is None or str(size) == symbol):
            symbol = str(size)
            found[i] = leaf.shape[0]
    return found
