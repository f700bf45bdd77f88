"""What a machine is said to have, on machines made up."""

import pytest

from graphcomb.runtime.kit.cuda import NoCuda
from graphcomb.runtime.measure import machine


@pytest.fixture
def here(monkeypatch):
    """A machine: `here(gpu=(8, 7), flags="...", load=0.1, installed={"tensorrt"})`."""

    def make(gpu=None, flags="", load=0.1, installed=()):
        class Device:
            def __init__(self):
                if gpu is None:
                    raise NoCuda("no usable NVIDIA GPU here")
                self.compute_capability = gpu

        about = {"cpu": "a processor", "cores": 4, "load": load, "governor": "schedutil"}
        monkeypatch.setattr(machine, "Cuda", Device)
        monkeypatch.setattr("graphcomb.runtime.devices.here.Cuda", Device)
        monkeypatch.setattr(machine, "environment", lambda: about)
        monkeypatch.setattr(machine, "read_line", lambda path: flags if path == "/proc/cpuinfo" else None)
        device = {"model": "Jetson AGX Orin", "power_mode": "MODE_30W"}
        monkeypatch.setattr(machine, "describe_device", lambda: device)
        versions = {name: "1.0" if b.package in installed else "" for name, b in machine.BACKENDS.items()}
        monkeypatch.setattr(machine, "_versions", lambda: versions)
        return {finding.what: finding for finding in machine.examine()}

    return make


def test_without_a_gpu_engines_are_built_for_others(here):
    found = here(flags="flags : avx2 avx512_vnni", load=3.9, installed={"tensorrt_rtx", "tensorrt", "onnxruntime"})
    assert "avx512_vnni" in found["processor"].means
    assert "busy" in found["load"].means
    assert "graphcomb bundle" in found["GPU"].means
    assert "builds engines for rtx-sm75" in found["tensorrt_rtx"].means
    assert found["tensorrt"].means == "builds engines on a GPU alone"
    assert found["openvino"].means == "pip install 'graphcomb[openvino]'"
    assert "cpupower" in found["processor clocks"].means


def test_on_a_jetson_the_target_and_its_power_mode_are_said(here):
    found = here(gpu=(8, 7), installed={"tensorrt", "torch"})
    assert "orin" in found["GPU"].means
    assert found["power mode"].here == "MODE_30W"
    assert "GPU" in found["inductor"].means
    assert found["tensorrt"].means == "builds and runs engines on this GPU"
    assert "no instructions for INT8" in found["processor"].means


def test_a_gpu_that_the_table_lacks_is_said(here):
    assert here(gpu=(6, 1))["GPU"].means == "no target of the table has it"
