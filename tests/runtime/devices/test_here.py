"""Which target this machine is."""

import pytest

from graphcomb.graph.errors import BadInput, MissingBackend
from graphcomb.runtime.devices import here
from graphcomb.runtime.devices.here import local_target


@pytest.fixture
def machine(cudart, monkeypatch):
    """A machine with a GPU and a name."""

    def make(capability, *names):
        cudart.capability = capability
        monkeypatch.setattr(here, "_machine_names", lambda: here._words(" ".join(names)))

    return make


@pytest.mark.parametrize(
    ("capability", "name", "target"),
    [
        ((7, 5), "", "rtx-sm75"),
        ((8, 0), "NVIDIA A100-SXM4-40GB", "rtx-sm80"),
        ((8, 6), "", "rtx-sm86"),
        ((8, 9), "NVIDIA L40S", "rtx-sm89"),
        ((9, 0), "NVIDIA H200", "h200"),
        ((9, 0), "NVIDIA H100 80GB HBM3", "h100"),
        ((10, 0), "NVIDIA B200", "b200"),
        ((10, 3), "NVIDIA B300 SXM6 AC", "b300"),
        ((12, 0), "", "rtx-sm120"),
        ((8, 7), "NVIDIA Jetson AGX Orin Developer Kit", "agx-orin"),
        ((8, 7), "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super Orin", "orin-nano"),
        ((8, 7), "NVIDIA Orin NX Developer Kit", "orin-nx"),
        ((8, 7), "NVIDIA DRIVE AGX Orin", "drive-orin"),
        ((11, 0), "NVIDIA Jetson AGX Thor Developer Kit", "agx-thor"),
        ((10, 1), "NVIDIA DRIVE AGX Thor", "drive-thor"),  # as CUDA 12 calls it
    ],
)
def test_classic_has_a_target_on_every_gpu(machine, recwarn, capability, name, target):
    machine(capability, name)
    assert local_target("tensorrt").name == target
    assert not recwarn


def test_boards_that_cannot_be_told_apart_are_named(machine):
    machine((8, 7), "a carrier board")
    with pytest.warns(UserWarning, match=r"\(SM87\) is taken for orin-nano; it may be orin-nx, agx-orin, drive-orin"):
        local_target("tensorrt")


def test_this_machines_gpu_is_a_target(machine, cudart):
    machine((8, 7), "Jetson AGX Orin")
    assert local_target("tensorrt").compute_capability == (8, 7)
    with pytest.raises(BadInput, match=r"TensorRT-RTX: no target for this machine's GPU \(SM87\)"):
        local_target("tensorrt_rtx")
    cudart.count = 0
    with pytest.raises(MissingBackend, match="tensorrt builds for this machine's GPU; no NVIDIA GPU here"):
        local_target("tensorrt")
