import sys

import pytest

from graphcomb.runtime.kit import cuda

from .fakes.tensorrt import fake_tensorrt
from .standins import FakeCudart


@pytest.fixture
def cudart(monkeypatch):
    """A stand-in for the CUDA runtime."""
    fake = FakeCudart()
    monkeypatch.setattr(cuda, "_load", lambda: fake)
    return fake


@pytest.fixture(params=["8.5.2", "8.6.1", "10.3.0", "10.13.0", "11.4.0"])
def classic(request, monkeypatch, cudart):
    """A stand-in for classic TensorRT, in five versions."""
    made = fake_tensorrt(request.param, cudart)
    monkeypatch.setitem(sys.modules, "tensorrt", made.module)
    return made


@pytest.fixture
def rtx(monkeypatch, cudart):
    """A stand-in for TensorRT-RTX."""
    made = fake_tensorrt("rtx", cudart)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", made.module)
    return made
