"""Calls to the CUDA runtime, a stand-in on host memory for it."""

import numpy as np
import pytest

from graphcomb.runtime.kit import cuda
from graphcomb.runtime.kit.cuda import Cuda, CudaError, NoCuda

from ..standins import FakeCudart, gpu


@pytest.mark.skipif(gpu() is None, reason="needs an NVIDIA GPU and its driver")
def test_memory_goes_to_the_gpu_and_back():
    device, data = Cuda(), np.arange(1000, dtype=np.float32)
    address, back = device.allocate(data.nbytes), np.empty_like(data)
    device.to_device(address, data)
    device.to_host(back, address)
    device.synchronize()
    device.free(address)
    device.close()
    assert (back == data).all()


def test_the_first_cuda_library_that_works_is_taken(monkeypatch):
    """The newest one may want a newer driver than there is."""
    made = {"libcudart.so.13": FakeCudart(count=0), "libcudart.so.12": FakeCudart()}
    made["libcudart.so.13"].cudaGetDeviceCount = lambda count: 35  # the driver is too old
    made["libcudart.so.13"].cudaGetErrorString = lambda status: b"driver is insufficient"

    def load(name):
        if name not in made:
            raise OSError(name)
        return made[name]

    monkeypatch.setattr(cuda.ctypes, "CDLL", load)
    assert cuda._load() is made["libcudart.so.12"]
    del made["libcudart.so.12"]
    with pytest.raises(NoCuda, match="no usable NVIDIA GPU here: cudaGetDeviceCount: driver is insufficient"):
        Cuda()
    made.clear()
    with pytest.raises(NoCuda, match="no CUDA runtime here"):
        Cuda()


def test_cuda_errors_carry_cudas_words(cudart):
    with pytest.raises(CudaError, match="cudaMalloc: out of memory"):
        Cuda().allocate(1 << 30)
