"""Build INT8 networks with the scales of a calibration cache, as a DLA needs them up to TensorRT 10.

Sources: TensorRT developer guide, "INT8 calibration" and "Layer-level control of precision"; the format of the cache as
TensorRT writes it.
"""

from __future__ import annotations

import struct
from typing import Any, Iterable, Mapping


def calibrates(trt: Any) -> bool:
    """Return whether a version of the library has implicit quantisation (up to 10.x)."""
    return hasattr(trt.IBuilderConfig, "int8_calibrator")


def calibrate(trt: Any, network: Any, config: Any, scales: Mapping[str, float], int8: Iterable[str]) -> str:
    """Give a network without Q/DQ nodes the scales of its tensors, and each layer the type that the nodes gave it.

    scales: by tensor. int8: names of the layers that compute in INT8; they are bound to INT8, the other floating-point
    layers to fp16, in which a DLA computes them. Returns the text of the calibration cache.
    """
    cache, named = calibration_cache(scales, trt.__version__), set(int8)
    config.int8_calibrator = new_calibrator(trt, cache)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.SHUFFLE):
            continue  # they do not compute, and a constant may be of another type
        layer.precision = trt.DataType.INT8 if layer.name in named else trt.DataType.HALF
    return cache


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


def calibration_cache(scales: Mapping[str, float], version: str) -> str:
    """Return the text of a calibration cache for a version of TensorRT, such as "10.3.0"."""
    major, minor, patch = (int(part) for part in [*version.split("."), "0", "0"][:3])
    number = (major * 10 if major >= 10 else major) * 1000 + minor * 100 + patch
    lines = [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in scales.items()]
    return "\n".join([f"TRT-{number}-EntropyCalibration2", *lines]) + "\n"
