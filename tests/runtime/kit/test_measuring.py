"""What runs on a device: how models take turns, and when their ratio is one."""

import io
import json
import types

import numpy as np
import pytest

from graphcomb.runtime.kit import engines, measuring, telemetry

from .recorded import ORIN_NANO
from .toys import QUICKLY


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


def test_the_interval_of_a_latency_is_of_its_blocks(script):
    """Runs of one block are alike: 8 levels of 17 equal runs are 8 values, not 136."""
    levels = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]
    blocks = (ms for ms in levels for _ in range(measuring.BLOCK))
    engine = types.SimpleNamespace(modes=("stream",), about={}, time=lambda mode: (None, next(blocks)))
    row = script.measure({"a": engine}, 60.0, len(levels))[0]["a"]["stream"]["host_ms"]
    assert (row["low"], row["high"]) == (1.0, 1.7)
    assert row["median"] == pytest.approx(1.35)


def test_what_a_hypervisor_takes_is_read_from_the_system(monkeypatch):
    files = {
        "/proc/stat": "cpu  10 0 20 3000 5 0 1 250 0 0\ncpu0 10 0 20 3000 5 0 1 250 0 0\n",
        "/proc/thread-self/schedstat": "123456 5000000 78\n",
    }
    monkeypatch.setattr(measuring, "open", lambda path: io.StringIO(files[path]), raising=False)
    monkeypatch.setattr(measuring.os, "sysconf", lambda name: 100)
    assert measuring.stolen() == 2.5
    assert measuring.waited() == 0.005
    files["/proc/stat"] = "cpu  10 0 20 3000\n"  # before Linux 2.6.11
    files["/proc/thread-self/schedstat"] = ""
    assert measuring.stolen() == measuring.waited() == 0.0


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
        monkeypatch.setattr(engines, "waited", lambda: float(next(waited)))
        monkeypatch.setattr(engines, "TRIES", 2)
    if reason == "the GPU":
        sample = telemetry.parse_smi("71.52, 34, 1980, 2619, 64")
        monitor = types.SimpleNamespace(source="nvidia-smi", since=lambda *times: [sample], close=lambda: None)
        monitor.notes = list
        monkeypatch.setattr(script, "Monitor", lambda archive: monitor)
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
    monkeypatch.setattr(script, "Monitor", lambda archive: monitor)
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


def test_models_take_turns(script):
    order = []

    def engine(name, ms):
        return types.SimpleNamespace(modes=("stream",), time=lambda mode: order.append(name) or (None, ms))

    times, ratios = script.measure({"a": engine("a", 4.0), "b": engine("b", 2.0)}, 5.0, 3)
    assert order == ["a"] * 20 + ["b"] * 40 + ["a"] * 40 + ["b"] * 20
    assert ratios == {"b": {"stream": {"p5": 2.0, "median": 2.0, "p95": 2.0, "p99": 2.0}}}
    assert times["a"]["stream"]["host_ms"]["p99"] == 4.0
    assert "gpu_ms" not in times["a"]["stream"]
