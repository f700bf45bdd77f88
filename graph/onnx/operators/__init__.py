"""The counterpart in PyTorch of each operator of ONNX; importing this package fills the tables."""

from . import layers, movement, pointwise, pooling, recurrent, reduction, resize, shapes

__all__ = ["layers", "movement", "pointwise", "pooling", "recurrent", "reduction", "resize", "shapes"]
