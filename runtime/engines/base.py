"""The common interface of engines of all libraries, and the report of a build."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx
from pydantic_core import to_jsonable_python

from ...graph.errors import BadInput
from ..engine_summary import Kernel, Origin
from ..onnx_file import TensorSpec


class UnparsedOp(BadInput):
    """The library does not support an operator of the ONNX file. The message names the node and the operator."""


def unparsed(path: Path, library: str, ops: Collection[str]) -> UnparsedOp:
    """Return the error for ONNX operators that a library does not support; it names the first node with one of them."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    node = next((n for n in nodes if n.op_type in ops), None)
    where = f"node {node.name} ({node.op_type})" if node else ", ".join(ops)  # without node: it is in a subgraph
    return UnparsedOp(f"{path}: {library} cannot parse it: {where}: operator not supported")


@runtime_checkable
class Engine(Protocol):
    """A loaded model that runs on numpy arrays.

    inputs, outputs: their names, types and shapes, in the order of the arguments and results of `run`.
    """

    @property
    def inputs(self) -> list[TensorSpec]: ...

    @property
    def outputs(self) -> list[TensorSpec]: ...

    @property
    def input_names(self) -> list[str]: ...

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run the model once and return its outputs in the order of `outputs`.

        inputs: arrays in the order of `inputs`, with the shapes and dtypes given there. Raises BadInput if number, shapes
        or dtypes differ.
        """

    def close(self) -> None:
        """Release device memory and threads. The engine cannot be used afterwards."""


class HostEngine:
    """Base class of engines. A subclass sets inputs and outputs, and calls the checks of the arguments of `run`."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    @property
    def input_names(self) -> list[str]:
        return [spec.name for spec in self.inputs]

    def _check_count(self, inputs: Sequence[np.ndarray]) -> None:
        if len(inputs) != len(self.inputs):
            names = ", ".join(self.input_names)
            raise BadInput(f"the engine takes {len(self.inputs)} inputs ({names}), got {len(inputs)}")

    def _check_dtype(self, spec: TensorSpec, array: np.ndarray) -> None:
        if array.dtype != np.dtype(spec.dtype):
            raise BadInput(f"input {spec.name}: the engine takes {spec.dtype}, got {array.dtype}")


@dataclass
class EngineReport:
    """The report of a build. All values are read from the library or from the files.

    - version: version of the library.
    - path: the engine file.
    - precision: "fp32", "fp16", "bf16", "int8" or "fp8".
    - kernels: kernels in execution order.
    - memory: bytes by purpose: "weights", "activations", "scratch", as far as the library reports them.
    - warnings: warnings of the library and of graphcomb.

    `build_engine` sets the rest if the backend has not: backend and target (their names), bytes (size of the file), seconds
    (build time), and origins (by ONNX node of the kernels, where it was exported from, if the ONNX file says so).
    """

    version: str
    path: Path
    precision: str
    kernels: list[Kernel] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    backend: str = ""
    target: str = ""
    bytes: int = 0
    seconds: float = 0.0
    origins: dict[str, Origin] = field(default_factory=dict)

    @property
    def padding(self) -> list[Kernel]:
        """The kernels that only pad tensors or change their layout."""
        return [k for k in self.kernels if k.padding]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values (docs/formats.md, Engine); `padding` is a list of names of kernels."""
        return to_jsonable_python(self) | {"padding": [k.name for k in self.padding]}
