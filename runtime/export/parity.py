"""Parity: compare the outputs of an engine with those of the program.

They are compared on the program's example inputs, on random inputs, on several batch sizes if the batch is dynamic, and on
real samples if they are given. Source: ours.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...graph.compat import pytree
from ...graph.errors import BadInput, Refused
from ...graph.facts import FAKE_QUANTISATION
from ...graph.nodes import op_name
from ...graph.program import Program, flatten_outputs
from ..engines.base import Engine
from .output_error import OutputError, output_error

SAMPLES = 16  # largest number of real samples: enough to detect a wrong file, few enough for a large network


@dataclass(frozen=True)
class Check:
    """The comparison of all outputs on one set of inputs.

    - inputs: kind of inputs: "example", "random" or "data" (real samples), with a suffix for an emulation.
    - batch: batch size; None without a dynamic batch.
    - error: largest `OutputError.worst` of the outputs.
    """

    inputs: str
    batch: int | None
    error: float
    outputs: tuple[OutputError, ...] = ()

    @property
    def real(self) -> bool:
        """Whether the inputs are real samples."""
        return self.inputs.startswith("data")

    @property
    def agreement(self) -> float | None:
        """The lowest agreement of an output; None if no output has scores."""
        return min((o.agreement for o in self.outputs if o.agreement is not None), default=None)

    def wrong(self, tolerance: float) -> str:
        """Return in words the first output that exceeds the limits of a tolerance; empty if none does."""
        return next((w for o in self.outputs if (w := o.wrong(tolerance, self.real))), "")


@dataclass(frozen=True)
class Case:
    """Inputs of a program and the outputs it computes from them.

    - inputs: kind of inputs: "example", "random" or "data". batch: batch size; None without a dynamic batch.
    - wanted: outputs of the program, floating-point ones as float64.
    - plain: for a quantised program, its outputs without quantisation.
    """

    inputs: str
    batch: int | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: list[np.ndarray]
    plain: list[np.ndarray] | None = None


def parity(program: Program, engine: Engine, seed: int = 0, data: Iterable[Any] = ()) -> list[Check]:
    """Compare an engine with the program in eval mode, which is not changed.

    The inputs are the example inputs, random ones at several batch sizes if the batch is dynamic, and real ones. They are
    cast to the engine's types, so that an engine in half precision is compared with the fp32 program. Batch sizes that the
    program itself does not support are left out.

    - seed: seed of the random inputs.
    - data: real inputs: (args, kwargs) of the program, or batches of a data loader. The first `SAMPLES` samples are used.

    Returns a `Check` for each set of inputs. Raises Refused if inputs or outputs differ in number or outputs in shape,
    BadInput if the engine or the program does not support the inputs.
    """
    return compare(cases(program, seed, data), engine)


def cases(program: Program, seed: int = 0, data: Iterable[Any] = ()) -> list[Case]:
    """Return the inputs that engines are compared on, with the program's outputs. seed, data: as for `parity`.

    Raises BadInput for data that the program does not support.
    """
    frozen = program.copy()
    module = frozen.module().eval()
    plain = _without_quantisation(program)
    known = []
    for what, batch, args, kwargs in [*input_sets(frozen, seed), *_samples(frozen, data)]:
        try:
            with torch.no_grad():
                outputs = flatten_outputs(module(*args, **kwargs))
        except (RuntimeError, TypeError) as error:
            if what == "data":
                raise BadInput(f"data: the program does not take it ({str(error).strip().splitlines()[0]})") from error
            if what == "example":
                raise
            continue
        exact = None
        if plain is not None:
            with torch.no_grad():
                exact = _arrays(flatten_outputs(plain.module()(*args, **kwargs)))
        known.append(Case(what, batch, args, kwargs, _arrays(outputs), exact))
    return known


def _arrays(tensors: Iterable[torch.Tensor]) -> list[np.ndarray]:
    return [t.double().numpy() if t.is_floating_point() else t.numpy() for t in tensors]


def _without_quantisation(program: Program) -> Program | None:
    """Return a copy of a program without its fake quantisation; None if it has none."""
    plain = program.copy()
    module = plain.module().eval()
    nodes = [n for n in plain.graph.nodes if op_name(n) in FAKE_QUANTISATION]
    for node in nodes:
        node.replace_all_uses_with(node.args[0])
        plain.graph.erase_node(node)
    module.recompile()
    return plain if nodes else None


def compare(known: Iterable[Case], engine: Engine, steps: Mapping[str, float] | None = None) -> list[Check]:
    """Compare an engine's outputs with those of the program.

    steps: by output, the largest absolute difference that counts as none. Raises what `parity` raises.
    """
    checks, least = [], steps or {}
    for case in known:
        results = engine.run(feeds(engine, case.args, case.kwargs))
        if len(results) != len(case.wanted):
            raise Refused(f"the engine has {len(results)} outputs, the program {len(case.wanted)}")
        names = [o.name for o in engine.outputs]
        plain: Sequence[np.ndarray | None] = case.plain or (None,) * len(results)
        rows = zip(results, case.wanted, names, plain, strict=True)
        outputs = tuple(
            replace(output_error(a, b, n, least.get(n, 0.0)), distances=_distances(a, b, c)) for a, b, n, c in rows
        )
        error = max((o.worst for o in outputs), default=0.0)
        checks.append(Check(case.inputs, case.batch, error, outputs))
    return checks


def _distances(actual: np.ndarray, wanted: np.ndarray, plain: np.ndarray | None) -> tuple[float, float] | None:
    if plain is None or plain.dtype.kind in "biu":
        return None
    finite = np.isfinite(plain)
    return tuple(float(np.sum(np.square(x[finite].astype(np.float64) - plain[finite]))) for x in (actual, wanted))  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------------------------- inputs
def feeds(engine: Engine, args: tuple, kwargs: dict[str, Any]) -> list[np.ndarray]:
    """Return the tensors among a program's inputs as numpy arrays of the engine's types.

    Raises Refused if their number differs from that of the engine's inputs.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if len(tensors) != len(engine.inputs):
        raise Refused(f"the engine has {len(engine.inputs)} inputs, the program {len(tensors)}")
    return [
        np.ascontiguousarray(t.detach().cpu().numpy().astype(i.dtype))
        for t, i in zip(tensors, engine.inputs, strict=True)
    ]


def input_sets(program: Program, seed: int = 0) -> Iterator[tuple[str, int | None, tuple, dict[str, Any]]]:
    """Yield the example inputs and random ones as (kind, batch size or None, args, kwargs)."""
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


def _samples(program: Program, data: Iterable[Any]) -> Iterator[tuple[str, int | None, tuple, dict[str, Any]]]:
    """Yield real inputs in the form of `input_sets`, until they have `SAMPLES` samples. A dynamic batch is cut to fit."""
    sizes, count = _batch(program), 0
    for item in data:
        leaves, spec = pytree.tree_flatten(_inputs(item))
        batch = next((leaves[i].shape[0] for i in sizes), None)
        if batch is not None:
            batch = min(batch, SAMPLES - count)
            leaves = [x[:batch] if i in sizes else x for i, x in enumerate(leaves)]
        first = next((x for x in leaves if isinstance(x, torch.Tensor)), None)
        yield "data", batch, *pytree.tree_unflatten(leaves, spec)
        count += len(first) if first is not None and first.dim() else 1
        if count >= SAMPLES:
            return


def _inputs(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of a program from an item of `data`: such a pair, or a loader's batch, without its labels.

    Raises BadInput for anything else.
    """
    if isinstance(item, torch.Tensor):
        return (item,), {}
    if isinstance(item, Mapping):
        return (), {k: v for k, v in item.items() if k != "labels"}
    if not isinstance(item, (tuple, list)) or not 1 <= len(item) <= 2:
        raise BadInput(f"data: a {type(item).__name__} is neither (args, kwargs) of the program nor (inputs, labels)")
    first, second = item[0], item[1] if len(item) == 2 else {}
    if isinstance(second, Mapping) and isinstance(first, (tuple, list)):
        return tuple(first), dict(second)
    return (tuple(first), {}) if isinstance(first, (tuple, list)) else _inputs(first)


def random_like(tensor: torch.Tensor, generator: torch.Generator, batch: int | None = None) -> torch.Tensor:
    """Return a tensor of random values: normal with the mean and deviation of a float tensor, or uniform in the range of an
    integer one. batch: size of the first axis, if it should differ."""
    shape = tensor.shape if batch is None else (batch, *tensor.shape[1:])
    if tensor.is_floating_point():
        deviation, mean = torch.std_mean(tensor.double(), correction=0)
        noise = torch.randn(shape, generator=generator)
        return (noise * (float(deviation) or 1.0) + float(mean)).to(tensor.dtype)
    low, high = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
    return torch.randint(low, high + 1, shape, generator=generator).to(tensor.dtype)


def _batch(program: Program) -> dict[int, int]:
    """Return the example batch size of every input whose first dimension is the dynamic batch, by the input's position."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    leaves = pytree.tree_leaves((program.args, program.kwargs))
    sizes: dict[int, int] = {}
    symbol = None
    for i, (node, leaf) in enumerate(zip(placeholders, leaves, strict=True)):
        value = node.meta.get("val")
        size = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else 0
        if isinstance(size, torch.SymInt) and (symbol is None or str(size) == symbol):
            symbol = str(size)
            sizes[i] = leaf.shape[0]
    return sizes
