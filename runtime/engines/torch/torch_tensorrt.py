"""Torch-TensorRT: TensorRT runs the parts of a program that it supports, PyTorch runs the others.

The library needs a GPU even to be imported, and has no releases for Jetson Orin after 2.8. If TensorRT supports the whole
network, building an ONNX file with TensorRT itself is simpler. Source: Torch-TensorRT documentation, "Compiling Exported
Programs with Torch-TensorRT".
"""

import importlib
import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from ....graph.compat import pytree
from ....graph.errors import BadInput, MissingBackend, Refused, reason
from ....graph.program import Program
from ....graph.program import load as load_program
from ...devices.table import Target, canonical
from ...engine_summary import Kernel
from ..backends import not_installed
from ..base import EngineReport
from ..options import EngineOptions
from .base import TorchEngine, on_leaves, pack, precision, specs, unpack

TAKES = "batch", "sparse", "optimization_level"
ENGINE, REST = "_run_on_acc", "_run_on_gpu"  # names of the parts that TensorRT and PyTorch run


def compile_program(
    program: Program,
    *,
    backend: str = "torch_tensorrt",
    sparse: bool = False,
    optimization_level: int | None = None,
    batch: int | None = None,
) -> TorchEngine:
    """Compile a program for this machine's GPU. The program is not changed.

    - sparse: whether kernels for 2:4 sparse weights may be used.
    - optimization_level: how thoroughly TensorRT searches for kernels, from 0 to 5.
    - batch: the only batch size that an engine with a dynamic batch accepts; by default it accepts 1 to 8 and is optimised
      for 1.

    Raises MissingBackend without the library or a GPU, BadInput for an option out of range and for dynamic axes other than
    the batch, Refused for a program that Torch-TensorRT cannot compile.
    """
    options = EngineOptions(batch=batch, sparse=sparse, optimization_level=optimization_level)
    module = _compile(_library(), program, options)
    return TorchEngine(on_leaves(program, module), *specs(program), _device())


def build(
    model: Path,
    target: Target,
    out: Path | None,
    options: EngineOptions,
    *,
    backend: str = "torch_tensorrt",
) -> EngineReport:
    """Compile a saved program for this machine's GPU into a file. The report's kernels are the parts of the program, of
    kind "TensorRT" or "PyTorch".

    Raises BadInput for a target that is not this machine, and what `compile_program` raises.
    """
    library = _library()
    here = torch.cuda.get_device_capability()
    if target.compute_capability != canonical(here):
        raise BadInput(f"target {target.name}: {backend} compiles for the GPU at hand, which is SM{here[0]}{here[1]}")
    out = out or model.with_suffix(".ep")
    program = load_program(model)
    module = _compile(library, program, options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.ep"
        library.save(module, str(file), output_format="exported_program", retrace=False)
        pack(out, file, program, _device())
    parts = [name for name, _ in module.named_children()]
    kernels = [Kernel(name=name, kind="TensorRT" if name.startswith(ENGINE) else "PyTorch") for name in parts]
    left = [name for name in parts if name.startswith(REST)]
    warnings = [f"{len(left)} of {len(parts)} parts run in PyTorch"] * bool(left)
    return EngineReport(library.__version__, out, precision(program), kernels, warnings=warnings)


def load(path: Path, *, backend: str = "torch_tensorrt") -> TorchEngine:
    """Load an engine file that `build` wrote.

    Raises MissingBackend without the library or a GPU, BadInput for a file that is no such engine.
    """
    library = _library()
    return unpack(path, backend, lambda file: library.load(file).module())


def _compile(library: ModuleType, program: Program, options: EngineOptions) -> Any:
    program = program.copy()
    program.module().eval()
    exported = move_to_device_pass(program.exported(), _device())
    args, kwargs = _inputs(library, program, options.batches)
    function = library.dynamo.compile
    wishes: dict[str, Any] = {
        "sparse_weights": bool(options.sparse),
        "optimization_level": options.optimization_level,
        "truncate_double": True,
        "min_block_size": 1,
        # TensorRT must compute in the program's own types. Newer versions always do; older ones need the list of types.
        "use_explicit_typing": True,
        "enabled_precisions": {t.dtype for t in program.module().parameters()} or {torch.float32},
    }
    known = inspect.signature(function).parameters
    if "use_explicit_typing" in known:
        del wishes["enabled_precisions"]
    settings = {name: value for name, value in wishes.items() if name in known and value is not None}
    try:
        return function(exported, arg_inputs=list(args), kwarg_inputs=kwargs, **settings)
    except Exception as error:  # the library's errors have no common base
        raise Refused(f"Torch-TensorRT {library.__version__} cannot compile the program: {reason(error)}") from error


def _inputs(library: ModuleType, program: Program, batches: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example inputs on the device; an input with a dynamic batch becomes the range of shapes to compile for."""
    inputs = iter(specs(program)[0])

    def give(tensor: torch.Tensor) -> Any:
        shape = next(inputs).shape
        if None not in shape:
            return tensor.to(_device())
        if None in shape[1:]:
            raise BadInput("Torch-TensorRT: only the batch may be dynamic here; capture the program with fixed shapes")
        keys = ("min_shape", "opt_shape", "max_shape")
        ranges = {key: (batch, *shape[1:]) for key, batch in zip(keys, batches, strict=True)}
        return library.Input(**ranges, dtype=tensor.dtype)

    return pytree.tree_map_only(torch.Tensor, give, (program.args, program.kwargs))


def _device() -> torch.device:
    return torch.device("cuda")


def _library() -> ModuleType:
    """Import the library. Raises MissingBackend if it is not installed, or fails to load, as it does without a GPU."""
    try:
        return importlib.import_module("torch_tensorrt")
    except ModuleNotFoundError as error:
        raise not_installed("torch_tensorrt") from error
    except Exception as error:  # the library asks for the device when it is imported
        raise MissingBackend(f"torch_tensorrt does not load here: {reason(error)}; it needs an NVIDIA GPU") from error
