"""What each operator of ONNX is in PyTorch; importing this package fills the tables."""

from . import layers, movement, pointwise, pooling, recurrent, reduction, resize, shapes

__all__ = ["layers", "movement", "pointwise", "pooling", "recurrent", "reduction", "resize", "shapes"]
