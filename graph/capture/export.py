"""`torch.export` of the user's model in eval and in train mode; the model is left as it was."""

from __future__ import annotations

import collections
import contextlib
import inspect
import io
import keyword
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from ..compat import SYMBOLS_LOG, BatchNorm, is_traceable_wrapper_subclass, pytree
from ..edit import like
from ..errors import BadInput, CaptureError

ADVICE = (
    "what to try: export the part of the model before data-dependent post-processing, pass other dynamic_shapes, or run "
    "torch.export.export(model, args, strict=False) by itself for the full report"
)


def export(
    model: torch.nn.Module, args: tuple, kwargs: dict, dynamic_shapes: Any, training: bool = False
) -> ExportedProgram:
    """`torch.export` of the model in one mode, with gradients on, so that `torch.no_grad()` regions are visible in the
    graph.

    A model on another device is exported on the processor if that is possible (see `on_processor`). The model is left as it
    was. Raises CaptureError if the export fails, BadInput if the model lacks the chosen outputs.
    """
    words = [name for name in kwargs if keyword.iskeyword(name)]
    if words:
        raise CaptureError(f'the input "{words[0]}" is a keyword of Python, which no graph can take; rename the input')

    if device_of(model) is not None:
        with contextlib.suppress(CaptureError), on_processor(model):  # fails if the forward itself names a device
            there = moved((args, kwargs), CPU)
            return _exported(model, there[0], there[1], dynamic_shapes, training)
    return _exported(model, args, kwargs, dynamic_shapes, training)


def _exported(
    model: torch.nn.Module, args: tuple, kwargs: dict, dynamic_shapes: Any, training: bool
) -> ExportedProgram:
    """As `export`, on the devices on which the tensors lie."""

    def run(gradients: bool) -> ExportedProgram:
        with (
            preserved(model), _quiet_average(model), without_fast_path(), torch.set_grad_enabled(gradients),
            silenced(SYMBOLS_LOG), _no_graph_of_a_failure(),
        ):  # fmt: skip
            enter(model, training)
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)

    try:
        try:
            return run(gradients=True)
        except RuntimeError as error:
            if "odified inplace" not in str(error) and "in-place operation" not in str(error):
                raise
            return run(gradients=False)  # the model writes where autograd forbids it, so it only runs without gradients
    except BadInput:  # raised by our own hook, which picks outputs
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        details = [line for line in lines[1:] if line.startswith("- ")][:1]  # the guard that dynamic shapes violate
        text = " ".join([lines[0], *details])
        raise CaptureError(f"torch.export refuses the model: {type(error).__name__}: {text[:400]}; {ADVICE}") from error


def enter(model: torch.nn.Module, training: bool) -> None:
    """Put a model into a mode, by way of train mode. There it drops what it cached in eval mode (LeViT caches its biases),
    which a trace would treat as constants."""
    model.train()
    model.train(training)


@contextmanager
def silenced(logger: str) -> Iterator[None]:
    """A context without the messages of one of PyTorch's loggers, which also logs failures that are expected here."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def _no_graph_of_a_failure() -> Iterator[None]:
    """A context in which a failing trace does not print its whole graph to stderr; what a successful one prints stays."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        yield
    sys.stderr.write(said.getvalue())


@contextmanager
def without_fast_path() -> Iterator[None]:
    """A context in which nn.MultiheadAttention does not use its fused inference kernels, so that the graph has the path
    that also trains."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _quiet_average(model: torch.nn.Module) -> Iterator[None]:
    """A context in which momentum None of BatchNorm is 0.

    None makes it read its counter as a number in training, which cannot be traced. In eval mode 0 means the same; in
    training, the module of the program counts (`trainable`).
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.momentum is None]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm in norms:
            norm.momentum = None


@contextmanager
def custom_functions() -> Iterator[list[str]]:
    """A context that yields a list of the `autograd.Function`s which a trace has passed through: their forward is in the
    graph, their backward is not. Functions of torch itself are left out (checkpointing, whose backward is that of its
    forward)."""
    names: list[str] = []
    plain = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch.") and cls.__qualname__ not in names:
            names.append(cls.__qualname__)
        return plain.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield names
    finally:
        torch.autograd.Function.apply = plain


# --------------------------------------------------------------------------------------- leaving the model as it was
@contextmanager
def preserved(model: torch.nn.Module, written: Collection[str] = ()) -> Iterator[Callable[[], list[str]]]:
    """A context after which the model has its attributes, flags and buffers back, and the random generators their states,
    so that nothing stays that a forward pass or a trace left behind (cached anchors, masks, fake tensors).

    written: names of parameters that are restored, too. Yields a function that lists the names of attributes that are no
    longer the same object.
    """
    containers, tensors = _held(model)
    tensors = [t for t in tensors if _may_change(t)] + [model.get_parameter(name) for name in written]
    held = [(t, t.detach().clone(), t.requires_grad) for t in tensors]
    state = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield lambda: sorted({name for container in containers for name in container.changed()})
    finally:
        for container in containers:
            container.bring_back()
        with torch.no_grad():
            for tensor, before, required in held:
                if not torch.equal(tensor, before):
                    tensor.copy_(before)
                if tensor.requires_grad and not required:
                    tensor.detach_()  # the forward wrote something differentiable to it
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.random.set_rng_state(state[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _may_change(tensor: torch.Tensor) -> bool:
    """Whether a forward pass may write to the tensor. Parameters do not count, since copying all of them would cost too
    much."""
    return type(tensor) is torch.Tensor and tensor.device.type != "meta" and tensor.layout == torch.strided


# ------------------------------------------------------------------------------------------------------------- devices
CPU = torch.device("cpu")


def device_of(model: torch.nn.Module) -> torch.device | None:
    """The device of a model, if it lies on a single one besides the processor, where some of its tensors may be; else
    None."""
    tensors = [*model.parameters(), *model.buffers()]
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    return devices.pop() if len(devices) == 1 else None


def moved(inputs: Any, device: torch.device) -> Any:
    """The inputs with their tensors on a device; those that are there already are the same tensors."""

    def on_device(x: torch.Tensor) -> torch.Tensor:
        return x if x.device == device else x.detach().to(device).requires_grad_(x.requires_grad)

    return pytree.tree_map_only(torch.Tensor, on_device, inputs)


def beside(model: torch.nn.Module, inputs: Any) -> Any:
    """The inputs on the model's device if all of them lie elsewhere; mixed ones are where the forward wants them."""
    places = {t.device for t in [*model.parameters(), *model.buffers()]}
    home = device_of(model) or (CPU if places == {CPU} else None)
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    return inputs if home is None or any(x.device == home or x.is_meta for x in tensors) else moved(inputs, home)


@contextmanager
def on_processor(model: torch.nn.Module) -> Iterator[None]:
    """A context in which a model refers to copies of its tensors on the processor; its own tensors stay as they are, since
    wrappers such as DDP hold on to them.

    A graph must not depend on what a device decides by itself: cuDNN normalises up to 65,535 images at once, and attention
    kernels take some sizes only, which `torch.export` reports as limits that a dynamic batch violates.
    """
    copies: dict[int, torch.Tensor] = {}

    def there(value: Any) -> Any:
        if type(value) is tuple:
            new = tuple(map(there, value))
            return new if any(a is not b for a, b in zip(value, new, strict=True)) else value
        if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
            return value
        if value.device.type in ("cpu", "meta"):
            return value
        if id(value) not in copies:
            copies[id(value)] = like(value, value.detach().to(CPU)).requires_grad_(value.requires_grad)
        return copies[id(value)]

    containers, _ = _held(model)
    try:
        for held in (c.value for c in containers if isinstance(c.value, (dict, list))):
            for key in list(held) if isinstance(held, dict) else range(len(held)):
                if (new := there(held[key])) is not held[key]:
                    held[key] = new
        yield
    finally:
        for container in containers:
            container.bring_back()


CONTAINERS = (dict, list, set, collections.deque)


def _held(root: torch.nn.Module) -> tuple[list[_Contents], list[torch.Tensor]]:
    """The contents of everything that a module, and the containers and plain objects in it, refer to; and the tensors among
    these."""
    seen: set[int] = set()
    containers, tensors = [], []
    stack: list[Any] = [root]
    while stack:
        value = stack.pop()
        if not isinstance(value, (torch.Tensor, tuple, *CONTAINERS)):
            if not isinstance(value, torch.nn.Module) and not _plain(value):
                continue
            value = vars(value)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, tuple):
            stack += value
        elif isinstance(value, CONTAINERS):
            containers.append(_Contents(value))
            stack += value.values() if isinstance(value, dict) else value
    return containers, tensors


class _Contents:
    """The present contents of a container, for comparing and restoring later."""

    def __init__(self, value: Any):
        self.value = value
        self.before: Any = dict(value) if isinstance(value, dict) else list(value)

    def bring_back(self) -> None:
        if self._identities(self.value) != self._identities(self.before):
            self.value.clear()
            (self.value.extend if isinstance(self.value, (list, collections.deque)) else self.value.update)(self.before)

    def changed(self) -> list[str]:
        """The keys whose values are other objects; for a container without keys, its type."""
        if not isinstance(self.value, dict):
            same = self._identities(self.value) == self._identities(self.before)
            return [] if same else [f"a {type(self.value).__name__}"]
        nothing = object()
        keys = {*self.value, *self.before}
        return [str(k) for k in keys if self.value.get(k, nothing) is not self.before.get(k, nothing)]

    @staticmethod
    def _identities(container: Any) -> list[int]:
        return [*map(id, container), *(map(id, container.values()) if isinstance(container, dict) else ())]


def _plain(value: Any) -> bool:
    """Whether the value is an object of the user's that may cache tensors, neither code nor of a library's type."""
    if isinstance(value, type) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in ("torch", "numpy", "builtins", "collections", "threading")


# ------------------------------------------------------------------------------------------------------ dynamic shapes
def batch_dynamic(model: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict, Any]:
    """Example inputs and dynamic shapes that make the first dimension of every tensor input the batch.

    `torch.export` treats a size of 1 as a constant, so a single example is doubled. Raises CaptureError for inputs that do
    not fit the forward.
    """
    flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
    if flat and all(x.shape[0] == 1 for x in flat):
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: torch.cat([x, x]) if x.dim() else x, (args, kwargs))
    try:
        named = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CaptureError(f"the example inputs do not fit {type(model).__name__}.forward: {error}") from None
    spec = pytree.tree_map(lambda x: {0: Dim("batch")} if isinstance(x, torch.Tensor) and x.dim() else None, named)
    return args, kwargs, spec


def dynamic_shapes_of(exported: ExportedProgram) -> Any:
    """The dynamic shapes that an exported program was made with, from its placeholders; None if all are static.

    They are in `torch.export`'s own form: a pytree like (args, kwargs), flattened to the top-level inputs.
    """
    # `graph_signature.user_inputs` would list an input that is a plain number by its value instead of its name
    names = {i.arg.name for i in exported.graph_signature.input_specs if i.kind is InputKind.USER_INPUT}
    inputs = [n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder" and n.name in names]
    shapes: list[Any] = [value.shape if isinstance(value, torch.Tensor) else () for value in inputs]
    sizes = [{d: n.node.expr for d, n in enumerate(dims) if isinstance(n, torch.SymInt)} for dims in shapes]
    times = Counter(expr for symbols in sizes for expr in symbols.values() if expr.is_symbol)
    # Only sizes that occur more than once get a named Dim, since a named one cannot have the bounds that strides imply.
    known = {expr: Dim(f"d{i}") if count > 1 else Dim.DYNAMIC for i, (expr, count) in enumerate(times.items())}
    leaves = [{d: known.get(expr, Dim.AUTO) for d, expr in symbols.items()} or None for symbols in sizes]
    if not any(leaves):
        return None
    in_spec = exported.call_spec.in_spec
    args, kwargs = pytree.tree_unflatten(leaves, in_spec)
    return (*args, *kwargs.values())
