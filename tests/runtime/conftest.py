import sys
from pathlib import Path

import pytest

from graphcomb.runtime.kit import cuda

sys.path.insert(0, str(Path(__file__).parent))  # for standins.py


@pytest.fixture
def cudart(monkeypatch):
    """A stand-in for the CUDA runtime."""
    from standins import FakeCudart

    fake = FakeCudart()
    monkeypatch.setattr(cuda, "_load", lambda: fake)
    return fake


@pytest.fixture(params=["8.5.2", "8.6.1", "10.3.0", "11.4.0"])
def classic(request, monkeypatch, cudart):
    """A stand-in for classic TensorRT, in four versions."""
    from standins import fake_tensorrt

    made = fake_tensorrt(request.param, cudart)
    monkeypatch.setitem(sys.modules, "tensorrt", made.module)
    return made
