"""A compiled PyTorch callable behind the interface of engines: what inductor and Torch-TensorRT share."""

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

PACKAGE, ABOUT = "model.pt2", "engine.json"  # in the engine file, a zip
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


class TorchEngine(HostEngine):
    """A callable of tensors on a device. Inputs and outputs are host arrays."""

    def __init__(
        self,
        call: Callable[..., Any],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        device: torch.device,
    ):
        self._call, self._device = call, device
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.on_device = device.type != "cpu"  # the processor waits while it runs

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            outputs = flatten_outputs(self._call(*self._tensors(inputs)))
        return [tensor.cpu().numpy() for tensor in outputs]

    def prepared(self, inputs: Sequence[np.ndarray]) -> Callable[[], None]:
        """A call that runs on inputs that stay on the device, and leaves the outputs there."""
        tensors = self._tensors(inputs)

        def call() -> None:
            with torch.no_grad():
                self._call(*tensors)
            if self.on_device:
                torch.cuda.synchronize()

        call()  # the first one may compile
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
    """Inputs and outputs of a program, in the order of its tensors."""
    nodes = list(program.graph.nodes)
    inputs = [(str(n.target), n.meta.get("val")) for n in nodes if n.op == "placeholder"]
    results = [n.meta["val"] for n in pytree.tree_leaves(nodes[-1].args) if isinstance(n, torch.fx.Node)]
    names = ["output"] if len(results) == 1 else [f"output_{i}" for i in range(len(results))]
    return (
        [_spec(name, value) for name, value in inputs if isinstance(value, torch.Tensor)],
        [_spec(name, value) for name, value in zip(names, results, strict=True)],
    )


def pack(out: Path, package: Path, program: Program, device: torch.device) -> None:
    """Write an engine file: a zip of what the compiler wrote and of what this interface needs to know."""
    inputs, outputs = specs(program)
    about = {"device": device.type, "inputs": inputs, "outputs": outputs}
    with replacing(out) as part, zipfile.ZipFile(part, "w") as file:
        file.write(package, PACKAGE)
        file.writestr(ABOUT, json.dumps(about, default=asdict))


def unpack(path: Path, backend: str, load: Callable[[str], Callable[..., Any]]) -> TorchEngine:
    """Read an engine file; `load` makes a callable of the compiler's part. Raises BadInput for another file,
    MissingBackend where the device it was compiled for is not at hand."""
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
    """The module as a function of the program's input tensors alone; other inputs keep their example values."""
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
    """The type that most of the parameters have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in program.module().parameters():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    most = max(counts, key=lambda kind: counts[kind], default=torch.float32)
    return PRECISIONS.get(most, str(most))


def _spec(name: str, value: torch.Tensor) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), shape)
