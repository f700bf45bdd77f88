"""The engine class and the engine files that inductor and Torch-TensorRT share."""

import json
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....graph.compat import pytree
from ....graph.errors import BadInput, MissingBackend, reason
from ....graph.files import replacing
from ....graph.program import Program, flatten_outputs
from ...onnx_file import TensorSpec
from ..base import HostEngine

PACKAGE, ABOUT = "model.pt2", "engine.json"  # members of the engine file, which is a zip
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


class TorchEngine(HostEngine):
    """An engine that calls a compiled function of tensors on a device. `run` takes and returns numpy arrays.

    on_device: whether the device is an accelerator, so that CPU time says nothing about its load.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        device: torch.device,
    ):
        self._call, self._device = call, device
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.on_device = device.type != "cpu"

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            outputs = flatten_outputs(self._call(*self._tensors(inputs)))
        return [tensor.cpu().numpy() for tensor in outputs]

    def prepared(self, inputs: Sequence[np.ndarray]) -> Callable[[], None]:
        """Copy the inputs to the device and return a function that runs the engine on them without copying outputs."""
        tensors = self._tensors(inputs)

        def call() -> None:
            with torch.no_grad():
                self._call(*tensors)
            if self.on_device:
                torch.cuda.synchronize()

        call()  # the first call may compile
        return call

    def close(self) -> None:
        del self._call

    def _tensors(self, inputs: Sequence[np.ndarray]) -> list[torch.Tensor]:
        self._check_count(inputs)
        for spec, array in zip(self.inputs, inputs, strict=True):
            fits = array.ndim == len(spec.shape) and all(
                wanted in (None, extent) for extent, wanted in zip(array.shape, spec.shape, strict=True)
            )
            if not fits:
                raise BadInput(f"input {spec.name}: the engine takes shape {spec.shape}, got {array.shape}")
            self._check_dtype(spec, array)
        return [torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for array in inputs]


def specs(program: Program) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the specs of a program's input tensors and of its outputs, in order."""
    nodes = list(program.graph.nodes)
    inputs = [(str(n.target), n.meta.get("val")) for n in nodes if n.op == "placeholder"]
    results = [n.meta["val"] for n in pytree.tree_leaves(nodes[-1].args) if isinstance(n, torch.fx.Node)]
    names = ["output"] if len(results) == 1 else [f"output_{i}" for i in range(len(results))]
    return (
        [_spec(name, value) for name, value in inputs if isinstance(value, torch.Tensor)],
        [_spec(name, value) for name, value in zip(names, results, strict=True)],
    )


def pack(out: Path, package: Path, program: Program, device: torch.device) -> None:
    """Write an engine file: a zip of the compiler's file `package` and of the device, inputs and outputs as JSON."""
    inputs, outputs = specs(program)
    about = {"device": device.type, "inputs": inputs, "outputs": outputs}
    with replacing(out) as part, zipfile.ZipFile(part, "w") as file:
        file.write(package, PACKAGE)
        file.writestr(ABOUT, json.dumps(about, default=asdict))


def unpack(path: Path, backend: str, load: Callable[[str], Callable[..., Any]]) -> TorchEngine:
    """Load an engine file that `pack` wrote.

    load: returns a function of tensors from the path of the compiler's file. Raises BadInput for a file that is no such
    engine, MissingBackend if it was compiled for a GPU and this machine has none.
    """
    try:
        with zipfile.ZipFile(path) as file, tempfile.TemporaryDirectory() as folder:
            about = json.loads(file.read(ABOUT))
            device = torch.device(about["device"])
            if device.type == "cuda" and not torch.cuda.is_available():
                raise MissingBackend(f"{path}: compiled for a GPU, and there is none here")
            call = load(file.extract(PACKAGE, folder))
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
        raise BadInput(f"{path}: not an engine that {backend} can load here: {reason(error)}") from error
    inputs, outputs = (
        [TensorSpec(r["name"], r["dtype"], tuple(r["shape"])) for r in about[key]] for key in ("inputs", "outputs")
    )
    return TorchEngine(call, inputs, outputs, device)


def on_leaves(program: Program, module: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the program's input tensors that calls the module. Inputs other than tensors keep their example
    values."""
    leaves, spec = pytree.tree_flatten((program.args, program.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def call(*tensors: torch.Tensor) -> Any:
        values = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        args, kwargs = pytree.tree_unflatten(values, spec)
        return module(*args, **kwargs)

    return call


def precision(program: Program) -> str:
    """Return the precision of most of the program's parameters, "fp32" without parameters."""
    counts: dict[torch.dtype, int] = {}
    for tensor in program.module().parameters():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    most = max(counts, key=lambda kind: counts[kind], default=torch.float32)
    return PRECISIONS.get(most, str(most))


def _spec(name: str, value: torch.Tensor) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), shape)
