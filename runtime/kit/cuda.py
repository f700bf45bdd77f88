"""The CUDA runtime calls that running an engine needs, through ctypes.

PyTorch's CUDA bindings cannot be used, since PyTorch on the device (Jetson) may be a CPU build or missing.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from typing import Callable

import numpy as np

# The newest comes first; it may need a newer driver than the installed one, then the next is tried. A CUDA build of torch
# has already loaded one of these libraries, so that its plain name is found.
LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
CAPTURE_THREAD_LOCAL = 1  # other threads may use CUDA during a capture
NON_BLOCKING = 1  # the stream does not wait for the default stream, whose use would invalidate a capture


class CudaError(RuntimeError):
    """A CUDA call failed. The message is CUDA's own."""


class NoCuda(CudaError):
    """This machine has no CUDA runtime, driver or GPU."""


class NoGraph(CudaError):
    """The work cannot be recorded as a CUDA graph. The stream is usable, so the work can run without a graph."""


class Cuda:
    """The current device and one stream of it. Raises NoCuda without a CUDA runtime, driver or GPU."""

    def __init__(self) -> None:
        self._library = _load()
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        try:
            self._call("cudaGetDeviceCount", ctypes.byref(count))
        except CudaError as error:
            raise NoCuda(f"no usable NVIDIA GPU here: {error}") from error
        if count.value == 0:
            raise NoCuda("no NVIDIA GPU here")
        self._stream: ctypes.c_void_p | None = None

    @property
    def compute_capability(self) -> tuple[int, int]:
        """The compute capability of the current device, such as (8, 6)."""
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("cudaGetDevice", ctypes.byref(device))
        self._call("cudaDeviceGetAttribute", ctypes.byref(major), CAPABILITY_MAJOR, device)
        self._call("cudaDeviceGetAttribute", ctypes.byref(minor), CAPABILITY_MINOR, device)
        return major.value, minor.value

    @property
    def stream(self) -> int:
        """The handle of the stream, which is created on first use."""
        if self._stream is None:
            self._stream = ctypes.c_void_p()
            self._call("cudaStreamCreateWithFlags", ctypes.byref(self._stream), NON_BLOCKING)
        return self._stream.value or 0

    def free_memory(self) -> int:
        """Return the number of bytes of device memory that are free; on a Jetson that is the memory of the whole system."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes of device memory and return the address. The caller frees it."""
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value or 0

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def to_device(self, address: int, array: np.ndarray) -> None:
        """Copy a C-contiguous array to the device in stream order. The array must exist until `synchronize`."""
        self._copy(address, array.ctypes.data, array.nbytes, HOST_TO_DEVICE)

    def to_host(self, array: np.ndarray, address: int) -> None:
        """Fill a C-contiguous array from the device in stream order. It is complete after `synchronize`."""
        self._copy(array.ctypes.data, address, array.nbytes, DEVICE_TO_HOST)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    # ------------------------------------------------------------------------------------------------ timing and graphs
    def event(self) -> int:
        """Create an event and return its handle. The caller destroys it."""
        event = ctypes.c_void_p()
        self._call("cudaEventCreate", ctypes.byref(event))
        return event.value or 0

    def record(self, event: int) -> None:
        """Record an event at this point of the stream."""
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(self.stream))

    def elapsed(self, start: int, end: int) -> float:
        """Return the milliseconds between two recorded events, both of which must have been reached."""
        milliseconds = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(milliseconds), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return milliseconds.value

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", ctypes.c_void_p(event))

    def capture(self, work: Callable[[], None]) -> int:
        """Record what `work` enqueues on the stream, without running it, and return the handle of an executable graph.

        The caller destroys the graph. Raises NoGraph if the work cannot be recorded or raises an exception. The capture has
        then ended, and CUDA's last error is cleared, which the next call would otherwise report.
        """
        stream, graph, executable = ctypes.c_void_p(self.stream), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", stream, CAPTURE_THREAD_LOCAL)
        try:
            try:
                work()
            finally:  # also after an interrupt, since a stream can do nothing else during a capture
                status = self._library.cudaStreamEndCapture(stream, ctypes.byref(graph))
            self._check("cudaStreamEndCapture", status)
            # cudaGraphInstantiate had other arguments before CUDA 12; this function is the same from 11.4 on.
            self._call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        except Exception as error:  # `work` may raise exceptions of the inference library
            self._library.cudaGetLastError()
            raise NoGraph(" ".join(str(error).split())) from error
        finally:
            if graph.value:
                self._library.cudaGraphDestroy(graph)
        return executable.value or 0

    def launch(self, graph: int) -> None:
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(self.stream))

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", ctypes.c_void_p(graph))

    def close(self) -> None:
        """Destroy the stream."""
        if self._stream is not None:
            self._call("cudaStreamDestroy", self._stream)
            self._stream = None

    def _copy(self, to: int, start: int, size: int, kind: int) -> None:
        pointers = ctypes.c_void_p(to), ctypes.c_void_p(start)
        self._call("cudaMemcpyAsync", *pointers, ctypes.c_size_t(size), kind, ctypes.c_void_p(self.stream))

    def _call(self, name: str, *arguments: object) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, status: int) -> None:
        if status:
            self._library.cudaGetLastError()  # clears the error, so that no later call reports it again
            text = self._library.cudaGetErrorString(status)
            raise CudaError(f"{name}: {text.decode() if text else f'error {status}'}")


def _load() -> ctypes.CDLL:
    """Return the first library that finds a GPU. If none does, return the first that loads, whose calls tell the reason.

    Raises NoCuda if no library loads.
    """
    first = None
    for name in _names():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int()
        if library.cudaGetDeviceCount(ctypes.byref(count)) == 0 and count.value > 0:
            return library
        first = first or library
    if first is None:
        raise NoCuda("no CUDA runtime here (libcudart); install CUDA or the nvidia-cuda-runtime package")
    return first


def _names() -> Iterator[str]:
    yield from LIBRARIES
    if path := ctypes.util.find_library("cudart"):
        yield path
