"""Element types of ONNX, NumPy and PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from ..errors import Refused

P = onnx.TensorProto
TORCH: dict[int, torch.dtype] = {
    P.FLOAT: torch.float32, P.DOUBLE: torch.float64, P.FLOAT16: torch.float16, P.BFLOAT16: torch.bfloat16,
    P.INT64: torch.int64, P.INT32: torch.int32, P.INT16: torch.int16, P.INT8: torch.int8, P.UINT8: torch.uint8,
    P.UINT16: torch.uint16, P.UINT32: torch.uint32, P.UINT64: torch.uint64, P.BOOL: torch.bool,
}  # fmt: skip


def torch_dtype(kind: int) -> torch.dtype:
    """PyTorch's dtype for an element type of ONNX. Raises Refused for text and for types narrower than a byte."""
    if kind not in TORCH:
        names = {value: name for name, value in P.DataType.items()}
        raise Refused(f"element type {names.get(kind, kind)} has no counterpart")
    return TORCH[kind]


def numpy_dtype(kind: int) -> np.dtype:
    """NumPy's dtype for an element type of ONNX. Raises Refused as `torch_dtype` does."""
    torch_dtype(kind)
    return onnx.helper.tensor_dtype_to_np_dtype(kind)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A copy of an array as a tensor."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array on the host; bfloat16 becomes float32."""
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
