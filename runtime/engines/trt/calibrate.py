"""Build INT8 networks with the scales of a calibration cache, as a DLA needs them up to TensorRT 10.

Source: TensorRT developer guide, "INT8 calibration" and "Layer-level control of precision".
"""

from typing import Any

from .implicit import Implicit, calibration_cache


def calibrates(trt: Any) -> bool:
    """Return whether a version of the library has implicit quantisation (up to 10.x)."""
    return hasattr(trt.IBuilderConfig, "int8_calibrator")


def calibrate(trt: Any, network: Any, config: Any, found: Implicit) -> None:
    """Give a network the scales of its tensors, and each layer the type that the Q/DQ nodes gave it.

    Layers that compute in INT8 by the Q/DQ nodes are bound to INT8, the other floating-point layers to fp16, in which a DLA
    computes them.
    """
    config.int8_calibrator = new_calibrator(trt, calibration_cache(found.scales, trt.__version__))
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.SHUFFLE):
            continue  # they do not compute, and a constant may be of another type
        layer.precision = trt.DataType.INT8 if layer.name in found.int8 else trt.DataType.HALF


def new_calibrator(trt: Any, cache: str) -> Any:
    """Return a calibrator that has a cache and needs no images."""
    base: Any = trt.IInt8EntropyCalibrator2

    class Calibrator(base):
        def __init__(self) -> None:
            base.__init__(self)

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> None:
            return None

        def read_calibration_cache(self) -> bytes:
            return cache.encode()

        def write_calibration_cache(self, cache: Any) -> None:
            pass

    return Calibrator()
