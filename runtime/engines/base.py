"""The one interface behind which every inference library stands, and the report of what it built."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx
from pydantic_core import to_jsonable_python

from ...graph.errors import BadInput
from ..onnx_file import TensorSpec
from ..summary import Kernel, Origin


class UnparsedOp(BadInput):
    """The library has no form for an operator of the ONNX file; the message names node and operator."""


def unparsed(path: Path, library: str, ops: Collection[str]) -> UnparsedOp:
    """The error about operators that a library lacks, with the first node that is one."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    node = next((n for n in nodes if n.op_type in ops), None)
    where = f"node {node.name} ({node.op_type})" if node else ", ".join(ops)  # else it lies in a subgraph
    return UnparsedOp(f"{path}: {library} cannot parse it: {where}: operator not supported")


@runtime_checkable
class Engine(Protocol):
    """A loaded model that runs on the host's arrays. inputs, outputs: their names, types and shapes, in the order in which
    `run` takes and gives them."""

    @property
    def inputs(self) -> list[TensorSpec]: ...

    @property
    def outputs(self) -> list[TensorSpec]: ...

    @property
    def input_names(self) -> list[str]: ...

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs for one set of inputs, both in the order of the specs. Inputs have the dtypes that the specs say.

        Raises BadInput when number, dtype or shape do not fit.
        """

    def close(self) -> None:
        """Release device memory and threads; the engine is unusable afterwards."""


class HostEngine:
    """What engines on host arrays share: the specs, which a subclass sets, and the checks of what is given to `run`."""

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
    """What came out of a build; everything in it was read from the library or the file, nothing is assumed.

    version: of the library. path: of the engine file. precision: "fp32", "fp16", "bf16", "int8" or "fp8". memory: bytes by
    purpose ("weights", "activations", "scratch", as far as the library tells). What a backend may leave to `build_engine`:
    its own name, the target's, the size of the file in bytes, the build time in seconds, and origins: where the ONNX nodes
    of the kernels come from, as far as the ONNX file says.
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
        """The kernels that only pad or re-format."""
        return [k for k in self.kernels if k.padding]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with the count and the list of the padding kernels."""
        return to_jsonable_python(self) | {"padding": [k.name for k in self.padding]}
