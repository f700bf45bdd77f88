"""The few CUDA runtime calls that running an engine takes, through ctypes.

PyTorch may be a CPU build on the device (Jetson), so its CUDA bindings are no way in; the runtime library always is.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator

import numpy as np

from ..graph.errors import MissingBackend

# Newest first. torch, where it is a CUDA build, has loaded one of these already, so the plain name finds it.
LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76


class CudaError(RuntimeError):
    """A CUDA call failed; the message is CUDA's own."""


class Cuda:
    """The current device and one stream of it. Raises MissingBackend where there is no CUDA runtime, driver or GPU."""

    def __init__(self) -> None:
        self._library = _load()
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        try:
            self._call("cudaGetDeviceCount", ctypes.byref(count))
        except CudaError as error:
            raise MissingBackend(f"no usable NVIDIA GPU here: {error}") from error
        if count.value == 0:
            raise MissingBackend("no NVIDIA GPU here")
        self._stream: ctypes.c_void_p | None = None

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Of the current device: (8, 6)."""
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("cudaGetDevice", ctypes.byref(device))
        self._call("cudaDeviceGetAttribute", ctypes.byref(major), CAPABILITY_MAJOR, device)
        self._call("cudaDeviceGetAttribute", ctypes.byref(minor), CAPABILITY_MINOR, device)
        return major.value, minor.value

    @property
    def stream(self) -> int:
        """The handle of the stream, made on first use."""
        if self._stream is None:
            self._stream = ctypes.c_void_p()
            self._call("cudaStreamCreate", ctypes.byref(self._stream))
        return self._stream.value or 0

    def allocate(self, size: int) -> int:
        """The address of `size` bytes of device memory; to be freed."""
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value or 0

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Copy a C-contiguous array to the device, in stream order; the array must live until `synchronize`."""
        self._copy(address, array.ctypes.data, array.nbytes, HOST_TO_DEVICE)

    def to_host(self, array: np.ndarray, address: int) -> None:
        """Fill a C-contiguous array from the device, in stream order; it is complete after `synchronize`."""
        self._copy(array.ctypes.data, address, array.nbytes, DEVICE_TO_HOST)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def close(self) -> None:
        """Destroy the stream."""
        if self._stream is not None:
            self._call("cudaStreamDestroy", self._stream)
            self._stream = None

    def _copy(self, to: int, start: int, size: int, kind: int) -> None:
        pointers = ctypes.c_void_p(to), ctypes.c_void_p(start)
        self._call("cudaMemcpyAsync", *pointers, ctypes.c_size_t(size), kind, ctypes.c_void_p(self.stream))

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            text = self._library.cudaGetErrorString(status)
            raise CudaError(f"{name}: {text.decode() if text else f'error {status}'}")


def _load() -> ctypes.CDLL:
    for name in _names():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise MissingBackend("no CUDA runtime here (libcudart); install CUDA or the nvidia-cuda-runtime package")


def _names() -> Iterator[str]:
    yield from LIBRARIES
    if found := ctypes.util.find_library("cudart"):
        yield found
