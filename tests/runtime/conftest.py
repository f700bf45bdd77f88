import sys

import pytest

from graphcomb.runtime.kit import cuda

from .standins import FakeCudart, fake_tensorrt


@pytest.fixture
def cudart(monkeypatch):
    """A stand-in for the CUDA runtime."""
    fake = FakeCudart()
    monkeypatch.setattr(cuda, "_load", lambda: fake)
    return fake


@pytest.fixture(params=["8.5.2", "8.6.1", "10.3.0", "11.4.0"])
def classic(request, monkeypatch, cudart):
    """A stand-in for classic TensorRT, in four versions."""
    made = fake_tensorrt(request.param, cudart)
    monkeypatch.setitem(sys.modules, "tensorrt", made.module)
    return made
