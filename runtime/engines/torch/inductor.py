"""PyTorch's own compiler, for a GPU without TensorRT and for CPUs with a C++ compiler.

`compile_program` compiles in this process (`torch.compile`, constants folded into the weights, CUDA graphs on a GPU);
`build` compiles ahead of time (AOTInductor) into a file that loads without the model's code. Both compile for this machine
only.
Source: PyTorch documentation, "torch.compile", "AOTInductor: Ahead-Of-Time Compilation".
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ....graph.compat import compile_ahead, load_compiled, pytree
from ....graph.errors import BadInput, MissingBackend, Refused, reason
from ....graph.program import Program
from ....graph.program import load as load_program
from ...devices.table import Target, canonical
from ..base import EngineReport
from ..options import EngineOptions
from .base import TorchEngine, on_leaves, pack, precision, specs, unpack

TAKES = ("threads",)


def compile_program(
    program: Program, *, backend: str = "inductor", threads: int = 1, graphs: bool = True
) -> TorchEngine:
    """Compile a program for this machine's GPU, or for its CPU without one. The program is not changed.

    threads: number of threads on the CPU. graphs: whether to run CUDA graphs on a GPU. Raises MissingBackend on a CPU
    without a C++ compiler, Refused for a program that inductor cannot compile.
    """
    device = _device()
    program = program.copy()
    module = program.module().eval().to(device)
    options: dict[str, Any] = {"freezing": True}
    if device.type == "cuda" and graphs:
        options["triton.cudagraphs"] = True
    _threads(device, threads)
    # Without the reset the modules of all programs share one cache, and torch.compile gives up after eight entries.
    torch.compiler.reset()
    compiled = torch.compile(module, options=options, dynamic=bool(program.dynamic_shapes))
    engine = TorchEngine(on_leaves(program, compiled), *specs(program), device)
    leaves = pytree.tree_leaves((program.args, program.kwargs))
    try:
        engine.prepared([leaf.cpu().numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)])
    except RuntimeError as error:
        raise Refused(f"inductor cannot compile the program: {reason(error)}") from error
    return engine


def build(
    model: Path, target: Target, out: Path | None, options: EngineOptions, *, backend: str = "inductor"
) -> EngineReport:
    """Compile a saved program ahead of time for this machine. The report lists no kernels.

    Raises BadInput for a target that is not this machine, MissingBackend on a CPU without a C++ compiler, Refused for a
    program that inductor cannot compile.
    """
    device = _device()
    here = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if target.compute_capability != (canonical(here) if here else None):
        at_hand = f"SM{here[0]}{here[1]}" if here else "a CPU"
        raise BadInput(f"target {target.name}: inductor compiles for the machine at hand, which is {at_hand}")
    out = out or model.with_suffix(".aoti")
    program = load_program(model)
    program.module().eval().to(device)
    _threads(device, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        try:
            package = compile_ahead(program.exported(), str(Path(folder) / "model.pt2"))
        except RuntimeError as error:
            raise Refused(f"{model}: inductor cannot compile it: {reason(error)}") from error
        pack(out, Path(package), program, device)
    memory = {"weights": sum(t.nbytes for t in program.module().parameters())}
    return EngineReport(torch.__version__, out, precision(program), memory=memory)


def load(path: Path, *, backend: str = "inductor", threads: int = 1) -> TorchEngine:
    """Load an engine file that `build` wrote. threads: number of threads on the CPU.

    Raises BadInput for a file that is no such engine, MissingBackend if it was compiled for a GPU and this machine has
    none.
    """
    engine = unpack(path, backend, load_compiled)
    if not engine.on_device:
        torch.set_num_threads(threads)
    return engine


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name):
        raise MissingBackend("inductor needs a C++ compiler on a CPU; install g++ or clang, or set CXX")
    return torch.device("cpu")


def _threads(device: torch.device, threads: int) -> None:
    if device.type == "cpu":
        torch.set_num_threads(threads)
