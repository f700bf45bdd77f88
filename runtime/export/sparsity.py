"""Find zeros in the weights of an ONNX file, and whether a sparse kernel can use them. Source: ours.

A kernel for 2:4 sparsity needs two zeros in every four consecutive entries along the dimension that is summed over: the
input channels of a convolution (for each output channel and kernel position), or the rows of the right factor of a matrix
product.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from ...graph import sparse
from ...graph.errors import Refused
from ...graph.program import Program

PASSED_ON = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear")


@dataclass(frozen=True)
class SparseWeight:
    """The constant weight of one Conv, Gemm or MatMul.

    name, op, shape: name of the initializer, operator of its node, and shape as the node uses it. sparsity: share of zeros.
    pattern: "2:4" if every four entries have two zeros, else None.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    sparsity: float
    pattern: str | None


def sparse_weights(model: onnx.ModelProto) -> list[SparseWeight]:
    """Return the constant weights of all convolutions and matrix products of a model, whose weights must be loaded."""
    constants = {t.name: t for t in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    rows = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
            continue
        name, flipped = _origin(node.input[1], made)
        if name not in constants:
            continue
        values = numpy_helper.to_array(constants[name])
        values = values.T if flipped else values
        if node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute):
            values = values.T
        axis = 1 if node.op_type == "Conv" else values.ndim - 2
        zero = np.moveaxis(values, axis, -1) == 0
        two = zero.shape[-1] % 4 == 0 and bool((zero.reshape(-1, 4).sum(1) >= 2).all())
        rows.append(
            SparseWeight(name, node.op_type, values.shape, float(zero.mean()), "2:4" if two and zero.size else None)
        )
    return rows


def _origin(name: str, made: Mapping[str, onnx.NodeProto]) -> tuple[str, bool]:
    """Follow a value back through casts, quantisation and transposition. Return its origin and whether it was transposed."""
    flipped = False
    while name in made and made[name].op_type in (*PASSED_ON, "Transpose"):
        flipped ^= made[name].op_type == "Transpose"
        name = made[name].input[0]
    return name, flipped


def check_sparsity(program: Program, model: onnx.ModelProto) -> list[SparseWeight]:
    """Return the constant weights of a model (`sparse_weights`) that have zeros.

    Raises Refused if a weight that is 2:4 sparse in the program is not 2:4 sparse in the model.
    """
    weights = [w for w in sparse_weights(model) if w.sparsity > 0]
    stored = [(sorted(w.shape), w.sparsity) for w in weights if w.pattern]
    for name, shape, sparsity in sorted(_expected(program), key=lambda e: -e[2]):
        # Folded norms and narrower types may add zeros. Of the candidates the one with the fewest zeros is taken, so that
        # sparser ones remain for the other weights.
        enough = [f for f in stored if f[0] == shape and f[1] > sparsity - 1e-2]
        match = min(enough, key=lambda f: f[1], default=None)
        if match is None:
            raise Refused(f"{name}: it is 2:4 sparse in the program, but no weight of the ONNX file has it so")
        stored.remove(match)
    return weights


def _expected(program: Program) -> Iterator[tuple[str, list[int], float]]:
    seen = set()
    for name, pattern in sparse.sparse_weights(program).items():
        tensor = sparse.weight(program, name)
        if tensor is None or tensor.data_ptr() in seen:
            continue
        if sparse.implies(pattern, "2:4") and tensor.shape[1] % 4 == 0:
            seen.add(tensor.data_ptr())  # a tied weight counts once
            yield name, sorted(tensor.shape), float((tensor == 0).double().mean())
