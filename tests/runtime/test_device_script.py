"""What runs on a device: reading its sensors, and driving its TensorRT.

The lines are recorded ones. tegrastats: Nano, TX2 and AGX Xavier from the tests of DataDog's agent (pkg/collector/
corechecks/nvidia/jetson), Xavier NX from a device log, AGX Orin with JetPack 7.2 from the tests of jetson-stats
(jtop/tests), Orin Nano with JetPack 6 and Thor with L4T 38.4 from device logs, DRIVE Orin from NVIDIA's DriveOS
documentation. TensorRT and CUDA are stand-ins (`standins.py`), which show what is called and not what a GPU would do.
"""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from standins import FakeCudart, flags

from graphcomb.runtime.kit import bench as bench_device
from graphcomb.runtime.kit import measuring, telemetry, trt


@pytest.fixture
def script():
    """The script that a bundle takes to a device."""
    return bench_device


# ---------------------------------------------------------------------------------------------------------- tegrastats
NANO = (
    "RAM 1220/3964MB (lfb 430x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) "
    "CPU [26%@102,24%@102,off,8%@204] EMC_FREQ 7%@408 GR3D_FREQ 38%@76 APE 25 PLL@28.5C CPU@30.5C PMIC@100C "
    "GPU@31C AO@38.5C thermal@30.75C POM_5V_IN 1210/1303 POM_5V_GPU 0/0 POM_5V_CPU 200/250"
)
TX2 = (
    "RAM 2135/7855MB (lfb 1057x4MB) CPU [2%@2035,0%@2035,0%@2035,2%@2035,2%@2036,2%@2035] EMC_FREQ 1%@1866 "
    "GR3D_FREQ 0%@1300 APE 150 MTS fg 0% bg 0% BCPU@30C MCPU@30C GPU@29C PLL@30C Tboard@28C Tdiode@28.25C PMIC@100C "
    "thermal@29.4C VDD_IN 3104/4029 VDD_CPU 291/730 VDD_GPU 145/207 VDD_SOC 727/746 VDD_WIFI 0/180 VDD_DDR 1248/1375"
)
AGX_XAVIER = (
    "RAM 721/31927MB (lfb 7291x4MB) SWAP 0/15963MB (cached 0MB) CPU [2%@1190,0%@1190,0%@1190,0%@1190,off,off,off,off] "
    "EMC_FREQ 0%@665 GR3D_FREQ 0%@318 APE 150 MTS fg 0% bg 0% AO@37.5C GPU@37.5C Tdiode@40C PMIC@100C AUX@36C CPU@37.5C "
    "thermal@36.9C Tboard@37C GPU 0/0 CPU 311/311 SOC 932/932 CV 0/0 VDDRQ 621/621 SYS5V 1482/1482"
)
XAVIER_NX = (
    "RAM 2690/6854MB (lfb 6x1MB) SWAP 479/3427MB (cached 3MB) CPU [3%@1904,7%@1906,1%@1905,0%@1907,off,off] "
    "EMC_FREQ 0%@1600 GR3D_FREQ 0%@[510] VIC_FREQ 601 APE 150 AUX@39C CPU@39.5C AO@37.5C GPU@37.5C PMIC@50C "
    "VDD_IN 5079mW/5079mW VDD_CPU_GPU_CV 696mW/696mW VDD_SOC 1104mW/1104mW"
)
AGX_ORIN = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201,4%@2201,14%@2201] EMC_FREQ 3%@3199 "
    "GR3D_FREQ 12%@[1300,1300] NVENC0 off NVDEC0 off NVJPG0 off NVJPG1 off VIC off OFA off NVDLA0 off NVDLA1 off "
    "PVA0_FREQ off APE 174 cpu@52.968C/52.968C soc2@48.406C/48.406C soc0@49.531C/49.531C gpu@47.625C/47.625C "
    "VDD_GPU_SOC 5139mW/5139mW/5139mW VDD_CPU_CV 3268mW/3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW/5500mW"
)
ORIN_NANO = (
    "RAM 2505/7775MB (lfb 1429x4MB) SWAP 0/3887MB (cached 0MB) CPU [2%@1510,off] GR3D_FREQ 45% cpu@38.25C "
    "soc2@36.25C cv0@-256C tj@38.25C gpu@36.5C VDD_IN 4880mW/4880mW VDD_CPU_GPU_CV 520mW/520mW VDD_SOC 1400mW/1400mW"
)
THOR = (
    "05-17-2026 10:00:32 RAM 4208/125773MB (lfb 31x4MB) SWAP 0/2048MB (cached 0MB) CPU [1%@972,0%@972] EMC_FREQ 0%@665 "
    "GR3D_FREQ @[0,0,0] NVENC0_FREQ @0 NVDEC0_FREQ @0 VIC off OFA_FREQ @0 PVA0_FREQ off APE 300 cpu@34.468C tj@34.5C "
    "soc012@33.781C soc345@34.5C VDD_GPU -392mW/-392mW VDD_CPU_SOC_MSS 4165mW/4165mW VIN_SYS_5V0 4126mW/4126mW"
)
AGX_ORIN_5 = (  # JetPack 5: the memory's rail is fed by the system's, and one channel is not connected
    "11-15-2023 09:12:34 RAM 2502/30588MB (lfb 6542x4MB) SWAP 0/15294MB (cached 0MB) CPU [1%@1190,0%@1190,off,off] "
    "EMC_FREQ 0%@2133 GR3D_FREQ 61%@[1300,1295] VIC_FREQ 115 APE 174 CV0@-256C CPU@45.25C Tboard@33C SOC2@41.187C "
    "Tdiode@33.25C SOC0@42.281C CV1@-256C GPU@40.5C tj@45.25C SOC1@41.593C CV2@-256C VDD_GPU_SOC 2400mW/2400mW "
    "VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 3000mW/3000mW NC 0mW/0mW VDDQ_VDD2_1V8AO 500mW/500mW NC 0mW/0mW"
)
ORIN_NX_6 = (  # JetPack 6.0, as root
    "05-03-2024 10:21:42 RAM 3051/15656MB (lfb 2x4MB) SWAP 0/7828MB (cached 0MB) CPU [4%@1984,2%@1984,off,off] "
    "EMC_FREQ 1%@3199 GR3D_FREQ 97%@[918] NVDEC off NVJPG off NVJPG1 off VIC off OFA off APE 200 cpu@52.5C soc2@50.1C "
    "soc0@50.4C gpu@51.2C tj@52.5C soc1@50.5C VDD_IN 11842mW/11842mW VDD_CPU_GPU_CV 5280mW/5280mW VDD_SOC 2240mW/2240mW"
)
DRIVE_ORIN = (
    "RAM 264/28409MB (lfb 7004x4MB) CPU [0%@1817,0%@1817] EMC_FREQ @2133 GR3D_FREQ 0%@1109 APE 245 AUX@30C CPU@31.5C "
    "Tdiode@30.75C AO@31C GPU@30.5C tj@41C"
)
TX1 = (
    "RAM 3468/3983MB (lfb 48x4MB) SWAP 873/8192MB (cached 295MB) cpu [17%,13%,29%,5%]@408 EMC 1%@408 APE 25 GR3D 3%@76"
)
CASES = {  # line: power by rail, total, some temperatures, clocks, loads, memory
    NANO: (
        {"POM_5V_IN": 1210, "POM_5V_GPU": 0, "POM_5V_CPU": 200}, 1210, {"GPU": 31.0, "CPU": 30.5},
        {"gpu": 76, "memory": 408, "cpu": 204}, {"gpu": 38, "memory": 7, "cpu": 19.3}, 1220,
    ),
    TX2: (
        {"VDD_IN": 3104, "VDD_CPU": 291, "VDD_GPU": 145, "VDD_SOC": 727, "VDD_WIFI": 0, "VDD_DDR": 1248}, 3104,
        {"GPU": 29.0, "Tdiode": 28.25}, {"gpu": 1300, "memory": 1866, "cpu": 2036},
        {"gpu": 0, "memory": 1, "cpu": 1.3}, 2135,
    ),
    AGX_XAVIER: (
        {"GPU": 0, "CPU": 311, "SOC": 932, "CV": 0, "VDDRQ": 621, "SYS5V": 1482}, 3346, {"GPU": 37.5},
        {"gpu": 318, "memory": 665, "cpu": 1190}, {"gpu": 0, "memory": 0, "cpu": 0.5}, 721,
    ),
    XAVIER_NX: (
        {"VDD_IN": 5079, "VDD_CPU_GPU_CV": 696, "VDD_SOC": 1104}, 5079, {"AUX": 39.0},
        {"gpu": 510, "memory": 1600, "cpu": 1907}, {"gpu": 0, "memory": 0, "cpu": 2.8}, 2690,
    ),
    AGX_ORIN: (
        {"VDD_GPU_SOC": 5139, "VDD_CPU_CV": 3268, "VIN_SYS_5V0": 5500}, 13907, {"gpu": 47.625, "cpu": 52.968},
        {"gpu": 1300, "memory": 3199, "cpu": 2201}, {"gpu": 12, "memory": 3, "cpu": 12.8}, 20642,
    ),
    ORIN_NANO: (
        {"VDD_IN": 4880, "VDD_CPU_GPU_CV": 520, "VDD_SOC": 1400}, 4880, {"tj": 38.25},
        {"cpu": 1510}, {"gpu": 45, "cpu": 2.0}, 2505,
    ),
    THOR: (
        {"VDD_GPU": -392, "VDD_CPU_SOC_MSS": 4165, "VIN_SYS_5V0": 4126}, 7899, {"soc345": 34.5},
        {"gpu": 0, "memory": 665, "cpu": 972}, {"memory": 0, "cpu": 0.5}, 4208,
    ),
    AGX_ORIN_5: (
        {"VDD_GPU_SOC": 2400, "VDD_CPU_CV": 400, "VIN_SYS_5V0": 3000, "VDDQ_VDD2_1V8AO": 500}, 5800,
        {"CPU": 45.25, "tj": 45.25, "GPU": 40.5}, {"gpu": 1300, "memory": 2133, "cpu": 1190},
        {"gpu": 61, "memory": 0, "cpu": 0.5}, 2502,
    ),
    ORIN_NX_6: (
        {"VDD_IN": 11842, "VDD_CPU_GPU_CV": 5280, "VDD_SOC": 2240}, 11842, {"tj": 52.5},
        {"gpu": 918, "memory": 3199, "cpu": 1984}, {"gpu": 97, "memory": 1, "cpu": 3.0}, 3051,
    ),
    DRIVE_ORIN: ({}, None, {"tj": 41.0}, {"gpu": 1109, "memory": 2133, "cpu": 1817}, {"gpu": 0, "cpu": 0.0}, 264),
    TX1: ({}, None, {}, {"gpu": 76, "memory": 408, "cpu": 408}, {"gpu": 3, "memory": 1, "cpu": 16.0}, 3468),
}  # fmt: skip


@pytest.mark.parametrize(
    "line",
    CASES,
    ids="nano tx2 agx-xavier xavier-nx agx-orin orin-nano thor agx-orin-5 orin-nx-6 drive-orin tx1".split(),
)
def test_a_line_of_tegrastats(script, line):
    power, total, temperatures, clocks, loads, memory = CASES[line]
    found = telemetry.parse_tegrastats(line)
    assert found["power_mw"] == power
    assert telemetry.total_power(found["power_mw"]) == total
    assert temperatures.items() <= found["temperatures_c"].items()
    assert not {"PMIC", "cv0", "CV0"} & found["temperatures_c"].keys()  # a constant, and a sensor that is off
    assert found["clocks_mhz"] == clocks
    assert found["load_percent"] == loads
    assert found["ram_mb"] == memory


def test_other_lines_give_an_empty_sample(script):
    assert not any(telemetry.parse_tegrastats("tegrastats: error while loading shared libraries").values())
    assert telemetry.parse_smi("") == {}


# ---------------------------------------------------------------------------------------------------- nvidia-smi, means
def test_a_line_of_nvidia_smi(script):
    assert telemetry.parse_smi("71.52, 34, 1980, 2619, 100\n") == {
        "power_mw": {"GPU": 71520.0}, "temperatures_c": {"gpu": 34.0},
        "clocks_mhz": {"gpu": 1980.0, "memory": 2619.0}, "load_percent": {"gpu": 100.0},
    }  # fmt: skip
    assert telemetry.parse_smi("[N/A], 34, 1980, [N/A], 100")["power_mw"] == {}


def test_what_slows_a_gpu_down_is_named():
    def sample(clock, reasons, load=99):
        return telemetry.parse_smi(f"71.52, 84, {clock}, 2619, {load}, {reasons}")

    steady = [sample(1980, "0x0000000000000000")] * 9 + [sample(210, "0x0000000000000001", load=0)]  # idle
    assert telemetry.throttling(steady, ("gpu", "memory")) == []
    assert telemetry.throttling([sample(1980, "[N/A]")] * 9, ("gpu",)) == []
    capped = [sample(1980, "0x0000000000000000")] * 5 + [sample(1400, "0x0000000000000024")] * 5
    assert telemetry.throttling(capped, ("gpu", "memory")) == [
        "the GPU was slowed down by its power cap and temperature",
        "the gpu clock went between 1400 and 1980 MHz at up to 84 °C; fix the clocks, or cool it",
    ]
    hot = [telemetry.parse_tegrastats(ORIN_NX_6.replace("918", str(clock))) for clock in (918, 918, 918, 612, 612, 612)]
    assert telemetry.throttling(hot, ("gpu",))[0].startswith(
        "the gpu clock went between 612 and 918 MHz at up to 52 °C"
    )


def test_samples_are_averaged_rail_by_rail(script):
    samples = [
        telemetry.parse_tegrastats(line) for line in (XAVIER_NX, XAVIER_NX.replace("VDD_IN 5079", "VDD_IN 7079"), "")
    ]
    found = script.average(samples)
    assert found["power_mw"]["VDD_IN"] == found["total_mw"] == 6079
    assert found["power_mw"]["VDD_SOC"] == 1104
    assert found["samples"] == 3
    assert script.average([]) == {}
    assert script.average([{"power_mw": {"GPU": None}}, {"power_mw": {"CPU": 12}}])["total_mw"] == 12


def test_the_monitor_reads_the_tool_that_is_there(script, tmp_path, monkeypatch):
    tool = tmp_path / "tegrastats"
    tool.write_text(f'#!/bin/sh\nwhile :; do echo "{ORIN_NANO}"; sleep 0.02; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monitor = script.Monitor()
    assert monitor.source == "tegrastats"
    wait(lambda: len(monitor.samples) > 2)
    engine = types.SimpleNamespace(modes=("stream",), time=lambda mode: time.sleep(0.01))
    found = script.watch(engine, monitor, 1.0)
    assert monitor._process.pid != os.getpid()
    monitor.close()
    assert found["total_mw"] == 4880
    assert found["temperatures_c"]["tj"] == 38.25
    runs = 4880 * 1.0 / found["energy_mj"]
    assert 10 < runs <= 101
    assert monitor._process.poll() is not None
    assert monitor.since(time.monotonic() + 1) == []


def wait(until):
    for _ in range(200):
        if until():
            return
        time.sleep(0.05)
    raise AssertionError("waited for ten seconds")


def test_a_tool_that_says_nothing_is_named(script, tmp_path, monkeypatch):
    (tmp_path / "tegrastats").write_text("#!/bin/sh\necho 'tegrastats: permission denied'\nexit 1\n")
    (tmp_path / "tegrastats").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monitor = script.Monitor()
    wait(lambda: monitor._process is not None and monitor._process.poll() is not None)
    monitor.close()
    assert monitor.notes() == ["tegrastats gave no samples: power and clocks are not known"]


def test_without_a_tool_nothing_is_made_up(script, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monitor = script.Monitor()
    assert (monitor.source, monitor.samples) == (None, [])


def test_the_power_mode_is_read(script, tmp_path, monkeypatch):
    (tmp_path / "nvpmodel").write_text("#!/bin/sh\nprintf 'NV Power Mode: MAXN_SUPER\\n2\\n'\n")
    (tmp_path / "nvpmodel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert telemetry.describe_device()["power_mode"] == "MAXN_SUPER"


# ------------------------------------------------------------------------------------------------------------ TensorRT
@pytest.fixture
def bundle(script, tmp_path, monkeypatch):
    """A bundle of two models, whose files the stand-in does not read; the first is what it computes, the second not."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    models = {}
    for name, factor in (("dense", 2), ("compressed", 2.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(b"model")
        np.savez(tmp_path / name / "reference.npz", **{"input:x": x, "output:000": factor * x})
        digest = hashlib.sha256(b"model").hexdigest()
        models[name] = {"file": f"{name}/model.onnx", "reference": f"{name}/reference.npz", "sha256": digest}
    head = {"format": script.FORMAT, "precision": "fp16"}
    (tmp_path / "bundle.json").write_text(json.dumps(head | {"models": models}))
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setenv("PATH", "")
    return tmp_path


def test_engines_are_built_run_with_and_without_graphs_and_timed(script, classic, cudart, bundle):
    out = bundle / "r.json"
    arguments = ["--out", str(out), "--rounds", "2", "--power-seconds", "0.05", "--sparse", "--dla", "1", "--quiet"]
    assert script.main(arguments) == 0
    found = json.loads(out.read_text())
    assert (found["engine"], found["version"]) == ("tensorrt", classic.module.__version__)
    assert {"SPARSE_WEIGHTS", "GPU_FALLBACK"} <= set(classic.flags)
    assert ("FP16" in classic.flags) == classic.module.__version__.startswith("8")  # elsewhere strongly typed
    assert classic.config.DLA_core == 1
    assert classic.profile == {"x": ((2, 4), (2, 4), (2, 4))}
    for row in found["models"].values():
        for mode in ("stream", "graph"):
            assert row["latency"][mode]["gpu_ms"]["median"] == 1.5  # between two events of the stand-in
            assert row["latency"][mode]["runs"] == 34
        assert row["layers"] == [{"name": "first", "ms": 1.0}, {"name": "second", "ms": 0.5}]
        assert row["engine"]["scratch_bytes"] == 4096
        assert row["engine"]["inspector"][0]["HasSparseWeights"] == 1
    assert found["models"]["dense"]["parity"] == {"finite": True, "error": 0.0, "tolerance": 0.05}
    assert found["models"]["compressed"]["parity"]["error"] == pytest.approx(0.2)
    assert found["notes"][0] == "compressed: outputs that differ from the reference by 2.0e-01, more than 0.05"
    assert found["ratios"]["compressed"]["graph"]["median"] == 1.0
    assert cudart.launched > 34
    assert "not known" in found["notes"][-1]
    assert cudart.blocks == cudart.graphs == {}
    assert cudart.events == 0
    (cache,) = bundle.glob("timing-*.cache")
    assert cache.read_bytes().count(b"+timings") == 2  # the second build knows what the first one measured


@pytest.mark.parametrize("fails", ["the engine", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags"])
def test_a_graph_that_cannot_be_recorded_is_left_out(script, classic, cudart, bundle, monkeypatch, fails):
    """The engine then runs without one: the capture has ended, and no error is left for the next launch."""
    if fails == "the engine":
        classic.recordable = False
    else:
        real = getattr(FakeCudart, fails)
        monkeypatch.setattr(FakeCudart, fails, lambda cuda, *given: real(cuda, *given) or cuda.fail(900))
    assert script.main(["--out", str(bundle / "r.json"), "--rounds", "1", "--power-seconds", "0.01", "--quiet"]) == 0
    found = json.loads((bundle / "r.json").read_text())
    for row in found["models"].values():
        assert list(row["latency"]) == ["stream"]
        wanted = "the engine did not run" if fails == "the engine" else f"{fails}: capture failed"
        assert row["engine"]["no_graph"].startswith(wanted)
    assert found["models"]["dense"]["parity"]["error"] == 0
    assert cudart.recording is None
    assert cudart.pending == 0


def test_an_engine_that_says_it_cannot_be_recorded_is_not(script, classic, cudart, bundle, monkeypatch):
    """As TensorRT-RTX does, which also compiles its kernels for these shapes before the first run."""
    asked = []
    trt = classic.module
    trt.DynamicShapesKernelSpecializationStrategy = flags("Strategy", "LAZY EAGER NONE")
    engine = trt.Runtime(types.SimpleNamespace()).deserialize_cuda_engine(b"engine")
    make, kind = engine.create_execution_context, type(engine)
    config = types.SimpleNamespace(dynamic_shapes_kernel_specialization_strategy="LAZY")

    def context(config=None):
        asked.append(config.dynamic_shapes_kernel_specialization_strategy.name)
        found = make()
        found.is_stream_capturable = lambda stream: False
        return found

    monkeypatch.setattr(kind, "create_runtime_config", staticmethod(lambda: config), raising=False)
    monkeypatch.setattr(kind, "create_execution_context", staticmethod(context))
    made = trt.Runtime.deserialize_cuda_engine
    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda self, data: made(self, data) and engine)
    monkeypatch.setattr(FakeCudart, "cudaStreamBeginCapture", lambda *given: pytest.fail("a capture"))
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]) == 0
    assert asked == ["EAGER", "EAGER"]
    row = json.loads((bundle / "r.json").read_text())["models"]["dense"]
    assert row["engine"]["no_graph"].startswith("the engine says that its runs cannot be recorded")


def test_an_opset_that_tensorrt_8_does_not_parse_is_said_with_the_cure(script, classic, bundle, capsys):
    edit(bundle, lambda about: about["models"]["dense"].update(opset=18))
    edit(bundle, lambda about: about["models"]["compressed"].update(opset=17))
    old = classic.module.__version__.startswith("8")
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]) == int(old)
    cure = (
        f"dense: model.onnx: opset 18; tensorrt {classic.module.__version__} parses up to 17: bundle it with --opset 17"
    )
    assert (cure in capsys.readouterr().err) == old


@pytest.mark.parametrize("classic", ["10.3.0"], indirect=True)
def test_a_type_that_numpy_lacks_is_named(script, classic, bundle, capsys, monkeypatch):
    engine = classic.module.Runtime(types.SimpleNamespace()).deserialize_cuda_engine(b"engine")
    kind = types.SimpleNamespace(name="BF16")
    monkeypatch.setattr(type(engine), "get_tensor_dtype", staticmethod(lambda name: kind))
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    assert "dense: tensor x is of type BF16, which numpy does not have" in capsys.readouterr().err


def edit(bundle, change):
    about = json.loads((bundle / "bundle.json").read_text())
    change(about)
    (bundle / "bundle.json").write_text(json.dumps(about))


QUICKLY = ("--rounds", "1", "--power-seconds", "0.01")


def spoil(bundle, name):
    """Rename a model so that the stand-in's parser refuses it."""
    (bundle / name / "model.onnx").rename(bundle / name / "bad.onnx")
    edit(bundle, lambda about: about["models"][name].update(file=f"{name}/bad.onnx"))


@pytest.mark.parametrize("bad", ["dense", "compressed"])
def test_a_model_that_cannot_be_built_does_not_discard_the_others(script, classic, bundle, capsys, bad):
    spoil(bundle, bad)
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {bad}: bad.onnx: tensorrt ")
    assert "cannot parse it: no importer" in err
    assert err.count("\n") == 1
    found = json.loads((bundle / "r.json").read_text())
    (good,) = {"dense", "compressed"} - {bad}
    assert list(found["models"]) == [good]
    assert found["models"][good]["layers"]
    assert list(found["failed"]) == [bad]
    assert any(note.startswith(f"{bad}: failed: bad.onnx: ") for note in found["notes"])
    assert not found["ratios"].get(good)  # times faster than what?


def test_without_any_model_there_are_no_results(script, classic, bundle, capsys):
    spoil(bundle, "dense")
    spoil(bundle, "compressed")
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert not (bundle / "r.json").exists()
    assert script.main(["--engine", "tensorrt_rtx", "--out", str(bundle / "r.json"), "--quiet"]) == 2


def test_the_librarys_reason_is_told(script, classic, bundle, capsys, monkeypatch):
    def fail(builder, network, config):
        severity = classic.module.ILogger.Severity
        builder.logger.log(severity.ERROR, "checkMacros.cpp::catchCudaError::250: nothing telling")
        builder.logger.log(severity.ERROR, "no tactic for  conv1")

    monkeypatch.setattr(classic.module.Builder, "build_serialized_network", fail)
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    assert "builds no engine: no tactic for conv1" in capsys.readouterr().err


def test_a_missing_folder_is_noticed_before_anything_is_built(script, classic, bundle, capsys):
    assert script.main(["--out", str(bundle / "no" / "r.json"), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --out: there is no folder ")
    assert err.count("\n") == 1
    assert classic.built == 0


def test_engines_are_kept_and_used_again(script, classic, bundle, monkeypatch):
    arguments = ["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]
    assert script.main(arguments) == 0
    first = json.loads((bundle / "r.json").read_text())["models"]
    names = [row["engine"]["file"] for row in first.values()]
    assert sorted(path.name for path in bundle.glob("*.engine")) == sorted(names)
    assert all((bundle / name).read_bytes() == b"engine" for name in names)
    assert classic.built == 2
    assert script.main(arguments) == 0
    second = json.loads((bundle / "r.json").read_text())["models"]
    assert classic.built == 2
    assert all(row["engine"]["reused"] and row["engine"]["build_seconds"] is None for row in second.values())
    assert [row["engine"]["file"] for row in second.values()] == names
    # Not after a change of what they depend on, nor when the file is none any more.
    for change, built in (([], 0), (["--sparse"], 2), (["--dla", "0"], 2), (["--rebuild"], 2)):
        before = classic.built
        assert script.main([*arguments, *change]) == 0
        assert classic.built - before == built
    classic.module.__version__ += ".1"
    assert script.main(arguments) == 0
    assert not any(
        row["engine"].get("reused") for row in json.loads((bundle / "r.json").read_text())["models"].values()
    )
    names = [row["engine"]["file"] for row in json.loads((bundle / "r.json").read_text())["models"].values()]
    (bundle / names[0]).write_bytes(b"cut off")
    before = classic.built
    assert script.main(arguments) == 0
    assert classic.built - before == 1
    assert (bundle / names[0]).read_bytes() == b"engine"


def test_an_interrupt_leaves_what_was_measured(script, classic, bundle, capsys, monkeypatch):
    runs = iter(range(10**6))
    time_one = script.TensorRT.time

    def interrupt(engine, mode):
        if next(runs) == 4 * measuring.BLOCK + 5:  # in the third round
            raise KeyboardInterrupt
        return time_one(engine, mode)

    monkeypatch.setattr(script.TensorRT, "time", interrupt)
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 130
    found = json.loads((bundle / "r.json").read_text())
    assert found["interrupted"] is True
    for row in found["models"].values():
        assert row["latency"]["stream"]["runs"] == 2 * (measuring.BLOCK - measuring.SETTLE)  # of whole rounds
        assert "graph" not in row["latency"]
    assert "interrupted: what was measured until then" in found["notes"]
    assert capsys.readouterr().err == "error: interrupted\n"


def test_an_interrupt_before_anything_is_measured_leaves_nothing(script, classic, bundle, capsys, monkeypatch):
    def interrupt(builder, network, config):
        raise KeyboardInterrupt

    monkeypatch.setattr(classic.module.Builder, "build_serialized_network", interrupt)
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not (bundle / "r.json").exists()


def test_attached_it_ends_with_its_input():
    """As over ssh: nobody can press Ctrl-C there, and SIGINT may be ignored from the start."""
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from graphcomb.runtime.kit import bench\n"
        "bench._attach()\n"
        "try:\n    print(1, flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopped')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "1\n"
    assert child.communicate(timeout=60)[0] == "stopped\n"


def test_no_library_is_one_line(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "LIBRARIES", ("no_such_library",))
    with pytest.raises(
        script.Failure, match=r"none of no_such_library can run here \(no_such_library: not installed\)"
    ):
        script.library("auto")


def test_the_library_is_the_bundles_if_it_can_run(script, classic, cudart, monkeypatch):
    assert script.library("auto")[0] == "tensorrt"
    assert script.library("auto", "onnxruntime")[0] == "onnxruntime"
    cudart.count = 0
    found, missing = script.library("auto", "tensorrt")  # TensorRT is installed, and there is no GPU
    assert found == "onnxruntime"
    assert missing["tensorrt"] == "cannot be used: no NVIDIA GPU here"
    assert script.library("tensorrt", "onnxruntime")[0] == "tensorrt"  # what is asked for is tried


def test_a_library_that_does_not_load_is_not_missing(script, classic, bundle, capsys, monkeypatch):
    load = importlib.import_module

    def fail(name):
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.10: cannot open shared object file")
        return load(name)

    monkeypatch.setattr(script.importlib, "import_module", fail)
    with pytest.raises(
        script.Failure, match=r"^tensorrt: cannot be used: ImportError: libnvinfer\.so\.10: cannot open"
    ):
        script.library("tensorrt")
    _, missing = script.library("auto", "tensorrt")
    assert "libnvinfer" in missing["tensorrt"]


def test_each_model_is_built_as_it_is(script, classic, bundle, capsys):
    """An engine of TensorRT 8 is only as precise, and any engine only as sparse, as it is allowed to be."""

    def change(about):
        about |= {"engine": "tensorrt", "target": "agx-orin"}
        about["models"]["dense"] |= {"precision": "fp32"}
        about["models"]["compressed"] |= {"precision": "int8", "sparse": True, "note": "as it came"}

    edit(bundle, change)
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY]) == 0
    found = json.loads((bundle / "r.json").read_text())
    weak = classic.module.__version__.startswith("8")
    assert found["models"]["dense"]["engine"]["flags"] == []
    assert found["models"]["compressed"]["engine"]["flags"] == ["SPARSE_WEIGHTS", *(["FP16", "INT8"] if weak else [])]
    assert "compressed: kernels for 2:4 sparse weights are allowed" in capsys.readouterr().out
    assert found["notes"][0] == "compressed: as it came"
    assert [row["parity"]["tolerance"] for row in found["models"].values()] == [1e-3, 0.3]


def test_another_library_than_the_targets_is_noted(script, classic, bundle):
    edit(bundle, lambda about: about.update(engine="tensorrt_rtx", target="rtx-sm86"))
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--engine", "tensorrt", "--quiet"]) == 0
    found = json.loads((bundle / "r.json").read_text())
    assert found["notes"][0] == "measured with tensorrt; the target rtx-sm86 runs tensorrt_rtx"


@pytest.mark.parametrize("factor", [np.nan, 10])
def test_wrong_outputs_are_no_clean_speedup(script, classic, bundle, capsys, factor):
    classic.factor = factor
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "times faster; no figure to rely on, the outputs of dense and compressed are wrong" in out
    assert "note: dense: outputs that " in out


def rounds(script, ratios):
    """An engine twice, whose second one's blocks have these ratios to the first one's."""
    times = {"a": [1.0] * len(ratios), "b": [1 / ratio for ratio in ratios]}

    def engine(name):
        blocks = (ms for ms in times[name] for _ in range(measuring.BLOCK))
        return types.SimpleNamespace(modes=("stream",), about={}, time=lambda mode: (None, next(blocks)))

    return script.measure({name: engine(name) for name in times}, 60.0, len(ratios))[1]["b"]["stream"]


def test_the_interval_is_of_the_median(script):
    """By order statistics: of 20 values the sixth and the fifteenth hold the median with 95.9 %."""
    values = [1 + 0.001 * i for i in range(20)]
    found = rounds(script, values[::-1])
    assert (found["low"], found["high"]) == (pytest.approx(1.005), pytest.approx(1.014))
    assert script.unsure(found) == ""
    assert "low" not in rounds(script, values[:5])  # even the extremes hold it with 93.75 % only
    assert measuring.median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (1.0, 6.0)
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(500):
        low, high = measuring.median_interval(random.exponential(size=31))
        inside += low <= np.log(2) <= high
    assert 0.94 <= inside / 500 <= 0.99


def test_a_ratio_with_a_wide_interval_is_refused(script, classic, bundle, capsys, monkeypatch):
    random, runs = np.random.default_rng(0), iter(range(10**6))
    levels = random.uniform(1.0, 2.0, 10**4)  # milliseconds, of one block each
    monkeypatch.setattr(script.TensorRT, "time", lambda engine, mode: (levels[next(runs) // measuring.BLOCK],) * 2)
    arguments = ["--out", str(bundle / "r.json"), "--rounds", "12", "--power-seconds", "0.01", "--quiet"]
    assert script.main(arguments) == 0
    found = json.loads((bundle / "r.json").read_text())
    assert found["ratios"] == {"compressed": {}}
    assert sum("no ratio: it lies between" in note for note in found["notes"]) == 2
    assert "times faster" not in capsys.readouterr().out


@pytest.mark.parametrize("reason", ["the processor", "the GPU", "the hypervisor"])
def test_a_loaded_machine_gives_no_ratio(script, classic, bundle, monkeypatch, reason):
    if reason == "the processor":
        waited = iter(range(10**9))
        monkeypatch.setattr(trt, "waited", lambda: float(next(waited)))
        monkeypatch.setattr(trt, "TRIES", 2)
    if reason == "the GPU":
        sample = telemetry.parse_smi("71.52, 34, 1980, 2619, 64")
        monitor = types.SimpleNamespace(source="nvidia-smi", since=lambda *times: [sample], close=lambda: None)
        monitor.notes = list
        monkeypatch.setattr(script, "Monitor", lambda: monitor)
    if reason == "the hypervisor":
        taken = iter((0.0, 3600.0))
        monkeypatch.setattr(script, "stolen", lambda: next(taken))
    arguments = ["--out", str(bundle / "r.json"), "--rounds", "8", "--power-seconds", "0.01", "--idle-seconds", "0"]
    assert script.main([*arguments, "--quiet"]) == 0
    found = json.loads((bundle / "r.json").read_text())
    wanted = {
        "the processor": "the machine was busy",
        "the GPU": "something else had the GPU for 64 % of the time before",
        "the hypervisor": "the hypervisor took the processor for 3600.0 s",
    }[reason]
    assert found["ratios"] == {"compressed": {}}
    assert any(note.startswith(f"compressed (stream): no ratio: {wanted}") for note in found["notes"])


@pytest.mark.parametrize("classic", ["10.3.0"], indirect=True)
def test_power_at_rest_is_read_before_anything_is_built(script, classic, bundle, monkeypatch):
    built = []
    sample = telemetry.parse_tegrastats(ORIN_NANO)

    def since(*times):
        built.append(classic.built)
        return [sample]

    monitor = types.SimpleNamespace(source="tegrastats", since=since, close=lambda: None, notes=list)
    monkeypatch.setattr(script, "Monitor", lambda: monitor)
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--idle-seconds", "0", "--quiet"]) == 0
    assert json.loads((bundle / "r.json").read_text())["idle"]["total_mw"] == 4880
    assert built[0] == 0


@pytest.mark.parametrize("root", [True, False])
def test_clocks_that_only_root_may_know_are_noted(tmp_path, monkeypatch, root):
    (tmp_path / "jetson_clocks").write_text(f"#!/bin/sh\necho 'GPU MaxFreq=918000000'\nexit {int(not root)}\n")
    (tmp_path / "jetson_clocks").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    device = telemetry.describe_device()
    assert device["clocks"] == ("GPU MaxFreq=918000000" if root else None)
    notes = telemetry.clock_notes(device)
    assert notes == [] if root else notes[0].startswith("whether the clocks are fixed is not known: jetson_clocks says")


@pytest.mark.parametrize("option", ["--seconds", "--power-seconds"])
def test_without_time_there_is_one_round(script, classic, bundle, option):
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, option, "0", "--quiet"]) == 0
    found = json.loads((bundle / "r.json").read_text())
    assert found["models"]["dense"]["latency"]["graph"]["runs"] == 17


@pytest.mark.parametrize(
    "wrong", [("--seconds", "-1"), ("--seconds", "nan"), ("--rounds", "0"), ("--power-seconds", "-1"), ("--dla", "-1")]
)
def test_wrong_options_are_one_line(script, bundle, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        script.main(list(wrong))
    assert stop.value.code == 2
    assert "a number of at least" in capsys.readouterr().err.splitlines()[-1]


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: cut(b / "bundle.json"), "bundle.json: damaged (JSONDecodeError: "),
        (lambda b: (b / "bundle.json").unlink(), "bundle.json: No such file"),
        (
            lambda b: edit(b, lambda about: about.update(format="graphcomb-bench/0")),
            "of format graphcomb-bench/0, this",
        ),
        (lambda b: edit(b, lambda about: about.pop("format")), "bundle.json: damaged (KeyError: 'format')"),
        (lambda b: edit(b, lambda about: about.update(models={})), "bundle.json: damaged (ValueError: no models)"),
        (lambda b: edit(b, lambda about: about.update(precision="fp3")), "bundle.json: damaged (KeyError: 'fp3')"),
        (lambda b: edit(b, lambda about: about["models"]["dense"].pop("file")), "damaged (KeyError: 'file')"),
        (lambda b: cut(b / "dense" / "reference.npz"), "reference.npz: damaged (BadZipFile: "),
        (lambda b: np.savez(b / "dense" / "reference.npz", y=1), "model.onnx: takes x, and the reference has ;"),
        (lambda b: (b / "dense" / "weights").write_bytes(b"y"), "weights: not the file that was bundled"),
        (lambda b: (b / "dense" / "weights").unlink(), "weights: No such file"),
    ],
)
@pytest.mark.parametrize("classic", ["10.3.0"], indirect=True)
def test_a_damaged_bundle_is_one_line(script, classic, bundle, capsys, damage, message):
    (bundle / "dense" / "weights").write_bytes(b"x")
    data = {"dense/weights": hashlib.sha256(b"x").hexdigest()}
    edit(bundle, lambda about: about["models"]["dense"].update(data=data))
    damage(bundle)
    assert script.main(["--out", str(bundle / "r.json"), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("classic", ["10.3.0"], indirect=True)
def test_outputs_are_compared_by_name(script, classic, bundle, monkeypatch):
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    outputs = {"second": 3 * x, "first": 2 * x}
    monkeypatch.setattr(script.TensorRT, "outputs", lambda engine: outputs)
    for name in ("dense", "compressed"):
        arrays = {"input:x": x, "output:000": 2 * x, "output:001": 3 * x}
        np.savez(bundle / name / "reference.npz", **arrays)
    edit(bundle, lambda about: about["models"]["dense"].update(outputs=["first", "second"]))
    assert script.main(["--out", str(bundle / "r.json"), *QUICKLY, "--quiet"]) == 0
    found = json.loads((bundle / "r.json").read_text())["models"]
    assert found["dense"]["parity"]["error"] == 0
    assert found["compressed"]["parity"]["error"] > 0  # no names: by position


def test_outputs_of_other_shapes_are_no_parity(script):
    found = script.check([np.zeros((2, 3), np.float32)], [np.zeros((3, 2), np.float32)], 1e-3)
    assert found["error"] is None
    assert found["note"] == "outputs of shapes [[2, 3]] instead of [[3, 2]]"
    assert script.check([np.array([1.0, np.nan], np.float32)], [np.ones(2, np.float32)], 1.0)["finite"] is False


def test_models_take_turns(script):
    order = []

    def engine(name, ms):
        return types.SimpleNamespace(modes=("stream",), time=lambda mode: order.append(name) or (None, ms))

    times, ratios = script.measure({"a": engine("a", 4.0), "b": engine("b", 2.0)}, 5.0, 3)
    assert order == ["a"] * 20 + ["b"] * 40 + ["a"] * 40 + ["b"] * 20
    assert ratios == {"b": {"stream": {"p5": 2.0, "median": 2.0, "p95": 2.0, "p99": 2.0}}}
    assert times["a"]["stream"]["host_ms"]["p99"] == 4.0
    assert "gpu_ms" not in times["a"]["stream"]
