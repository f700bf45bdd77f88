"""Reading a device's sensors: the lines of its tools, and the monitor that reads them."""

import os
import time
import types

import pytest

from graphcomb.runtime.kit import measuring, telemetry

from .recorded import (
    AGX_ORIN,
    AGX_ORIN_5,
    AGX_XAVIER,
    DRIVE_ORIN,
    NANO,
    ORIN_NANO,
    ORIN_NX_6,
    THOR,
    TX1,
    TX2,
    XAVIER_NX,
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
def test_a_line_of_tegrastats(line):
    power, total, temperatures, clocks, loads, memory = CASES[line]
    found = telemetry.parse_tegrastats(line)
    assert found["power_mw"] == power
    assert telemetry.total_power(found["power_mw"]) == total
    assert temperatures.items() <= found["temperatures_c"].items()
    assert not {"PMIC", "cv0", "CV0"} & found["temperatures_c"].keys()  # a constant, and a sensor that is off
    assert found["clocks_mhz"] == clocks
    assert found["load_percent"] == loads
    assert found["ram_mb"] == memory


def test_other_lines_give_an_empty_sample():
    assert not any(telemetry.parse_tegrastats("tegrastats: error while loading shared libraries").values())
    assert telemetry.parse_smi("") == {}


def test_a_line_of_nvidia_smi():
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


def test_samples_are_averaged_rail_by_rail():
    samples = [
        telemetry.parse_tegrastats(line) for line in (XAVIER_NX, XAVIER_NX.replace("VDD_IN 5079", "VDD_IN 7079"), "")
    ]
    found = telemetry.average(samples)
    assert found["power_mw"]["VDD_IN"] == found["total_mw"] == 6079
    assert found["power_mw"]["VDD_SOC"] == 1104
    assert found["samples"] == 3
    assert telemetry.average([]) == {}
    assert telemetry.average([{"power_mw": {"GPU": None}}, {"power_mw": {"CPU": 12}}])["total_mw"] == 12


def test_the_monitor_reads_the_tool_that_is_there(tmp_path, monkeypatch):
    tool = tmp_path / "tegrastats"
    tool.write_text(f'#!/bin/sh\nwhile :; do echo "{ORIN_NANO}"; sleep 0.02; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monitor = telemetry.Monitor()
    assert monitor.source == "tegrastats"
    wait(lambda: len(monitor.samples) > 2)
    engine = types.SimpleNamespace(modes=("stream",), time=lambda mode: time.sleep(0.01))
    found = measuring.watch(engine, monitor, 1.0)
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


def test_a_tool_that_says_nothing_is_named(tmp_path, monkeypatch):
    (tmp_path / "tegrastats").write_text("#!/bin/sh\necho 'tegrastats: permission denied'\nexit 1\n")
    (tmp_path / "tegrastats").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monitor = telemetry.Monitor()
    wait(lambda: monitor._process is not None and monitor._process.poll() is not None)
    monitor.close()
    assert monitor.notes() == ["tegrastats gave no samples: power and clocks are not known"]


def test_without_a_tool_nothing_is_made_up(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monitor = telemetry.Monitor()
    assert (monitor.source, monitor.samples) == (None, [])


def test_the_power_mode_is_read(tmp_path, monkeypatch):
    (tmp_path / "nvpmodel").write_text("#!/bin/sh\nprintf 'NV Power Mode: MAXN_SUPER\\n2\\n'\n")
    (tmp_path / "nvpmodel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert telemetry.describe_device()["power_mode"] == "MAXN_SUPER"
