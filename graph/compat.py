"""Every private API of PyTorch that graphcomb uses, under a name that says what it does; no other file uses one.

It works with the versions in `tests/torch_versions.md`, unless a line says otherwise. Not counted as private: the
dictionaries of `nn.Module` (`_modules`, `_parameters`, `_buffers`), on which `state_dict` hooks rely, and ATen operators
whose names begin with an underscore.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # noqa: F401
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass
from torch.utils._sympy import functions as size_functions  # noqa: F401

from .errors import BadInput

FAKE_TENSOR_LOG = "torch._subclasses.fake_tensor"  # logs failures on fake tensors
SYMBOLS_LOG = "torch.fx.experimental.symbolic_shapes"  # logs sizes that depend on data, with the whole graph so far


# ------------------------------------------------------------------------------------------------------------ operators
def schema(target: Any) -> Any:
    """The schema of an operator's overload (`name`, `arguments`, `is_mutable`); None for any other object."""
    return getattr(target, "_schema", None)


def writes(target: Any) -> bool:
    """Whether an operator writes to one of its arguments."""
    known = schema(target)
    return known is not None and known.is_mutable


# ----------------------------------------------------------------------------------------------------- sizes and memory
def example_of(size: torch.SymInt, unknown: int) -> int:
    """The example value of a symbolic size; `unknown` is used for every symbol whose value depends on data."""
    node: Any = size.node
    if node.has_hint():
        return int(node.hint)
    environment = node.shape_env
    newer = hasattr(environment, "backed_var_to_val")  # its name in releases after 2.11
    known = environment.backed_var_to_val if newer else environment.var_to_val
    return int(node.expr.subs({s: known.get(s, unknown) for s in node.expr.free_symbols}))


def storage_id(tensor: torch.Tensor) -> int:
    """A number that identifies the memory of a tensor, also of a fake one: equal for views of one storage."""
    return tensor.untyped_storage()._cdata


# --------------------------------------------------------------------------------------------------------- fake tensors
def fake_mode(values: Any) -> FakeTensorMode | None:
    """The mode of the first fake tensor in a nest of values, or None."""
    return next((v.fake_mode for v in pytree.tree_leaves(values) if isinstance(v, FakeTensor)), None)


def fake(mode: FakeTensorMode | None, tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor of static shape for a stored one. Raises BadInput if `mode` is None."""
    if mode is None:
        raise BadInput("the graph has no tensor input to propagate shapes from")
    return mode.from_tensor(tensor, static_shapes=True)


@contextmanager
def exact_kernels() -> Iterator[None]:
    """A context in which a GPU computes in full fp32, not in TF32 (which PyTorch's convolutions use by default and which
    keeps ten bits), and chooses the same kernels for the same sizes every time."""
    cudnn: Any = torch.backends.cudnn
    flags: list[tuple[Any, str, Any]] = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    products = None
    try:
        _ = cudnn.allow_tf32
        products = torch.get_float32_matmul_precision()
        flags.append((cudnn, "allow_tf32", False))
    except RuntimeError:  # the caller uses the newer flags, which cannot be mixed with these
        flags += [(part, "fp32_precision", "ieee") for part in (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)]
    before = [getattr(part, name) for part, name, _ in flags]
    try:
        for part, name, value in flags:
            setattr(part, name, value)
        if products is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for (part, name, _), value in zip(flags, before, strict=True):
            setattr(part, name, value)
        if products is not None:
            torch.set_float32_matmul_precision(products)


@contextmanager
def faking(mode: FakeTensorMode) -> Iterator[None]:
    """A context in which operators run on fake tensors, without gradients, and composite ones keep dynamic sizes."""
    with mode, torch.no_grad(), enable_python_dispatcher():
        yield


# --------------------------------------------------------------------------------------------------------------- graphs
def codegen_of(graph: fx.Graph) -> Any:
    """The part of a graph that knows how its inputs and outputs are nested, and generates its code."""
    return graph._codegen


def share_codegen(graph: fx.Graph, other: fx.Graph) -> None:
    """Nest the inputs and outputs of a graph as those of another."""
    graph.set_codegen(copy.copy(other._codegen))


def input_names(graph: fx.Graph) -> list[str] | None:
    """The names of a graph's arguments before they are flattened, or None if they are unknown."""
    info = getattr(graph._codegen, "pytree_info", None)
    return [n for n in info.orig_args if n != "self"] if info else None


def output_spec(graph: fx.Graph) -> pytree.TreeSpec:
    """How a graph's outputs are nested."""
    return graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]


def with_output_spec(codegen: Any, spec: pytree.TreeSpec) -> Any:
    """A copy of a codegen (`codegen_of`) for outputs that are nested in another way."""
    new = copy.copy(codegen)
    new.pytree_info = codegen.pytree_info._replace(out_spec=spec)
    return new


def copy_specs(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copy torch.export's notes on how inputs and outputs are nested from one module to another, if there are any."""
    for name in ("_in_spec", "_out_spec"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


def rename(node: fx.Node, name: str) -> None:
    """Give a node a name, made unique in its graph."""
    node._rename(name)


# ----------------------------------------------------------------------------------------------------- exported programs
def with_module(exported: ExportedProgram, module: fx.GraphModule) -> ExportedProgram:
    """The exported program around another module of the same signature."""
    return exported._update(module, exported.graph_signature)


def unlifted(exported: ExportedProgram) -> fx.GraphModule:
    """The module of an exported program, without the check of its inputs' sizes (which 2.10 and older do not have)."""
    checks = "check_guards" in exported.module.__code__.co_varnames
    return exported.module(check_guards=False) if checks else exported.module()


def is_guard(node: fx.Node) -> bool:
    """Whether a node calls the module that checks the sizes of the inputs."""
    return node.op == "call_module" and "_guards" in str(node.target)


def archive_reader(file: BinaryIO) -> Any:
    """A reader of the members of a `.pt2` file, as `torch.export.load` uses it: `get_all_records()`, `get_record(name)`."""
    return torch._C.PyTorchFileReader(file)


# --------------------------------------------------------------------------------------------------------------- inductor
def compile_ahead(exported: ExportedProgram, package: str) -> str:
    """Compile with AOTInductor into a package at a path; returns the path."""
    return torch._inductor.aoti_compile_and_package(exported, package_path=package)


def load_compiled(package: str) -> Any:
    """Load a package of `compile_ahead`, as a callable of the original's arguments."""
    return torch._inductor.aoti_load_package(package)


# ------------------------------------------------------------------------------------------------------------- training
def is_unscaled(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a scaler has unscaled an optimizer's gradients since its last step; unscaling twice is an error."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"].name != "READY"
