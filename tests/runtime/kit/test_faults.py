"""Each call of TensorRT and CUDA fails once while a bundle is measured: the results are whole or absent, and nothing of the
device is kept."""

import json

import pytest

from graphcomb.runtime.device_results import read_results

from .toys import QUICKLY

TIMED_OUT = 702  # cudaErrorLaunchTimeout
QUERIES = (  # they fail in no other way than by an exception
    "get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_shape get_input get_layer set_flag set_shape"
).split()


def measured(script, bundle):
    """Measure the bundle, and check what a reader relies on."""
    out = bundle / "r.json"
    out.unlink(missing_ok=True)
    code = script.main(["--out", str(out), *QUICKLY, "--quiet", "--rebuild", "--idle-seconds", "0"])
    assert code in (0, 1, 2)
    assert out.exists() == (code != 2)
    assert not list(bundle.glob(".*"))
    if out.exists():
        found = read_results(out)
        assert all(row["latency"] for row in found["models"].values())
        assert bool(found["failed"]) == (code == 1)
    return code


@pytest.mark.parametrize("classic", ["8.6.1", "10.13.0", "11.4.0"], indirect=True)
def test_a_call_of_the_library_that_fails(script, classic, cudart, bundle, capsys):
    assert measured(script, bundle) == 0
    called = dict.fromkeys(classic.library.calls)
    assert len(called) > 20
    codes = []
    for name in called:
        failure = classic.library.failures.get(name)
        plain = name.rpartition(".")[2] in QUERIES
        for fault in (RuntimeError("it  broke"), None if plain else lambda *given, result=failure, **more: result):
            classic.library.faults = {} if fault is None else {name: fault}
            codes.append(measured(script, bundle))
            assert (cudart.blocks, cudart.graphs, cudart.events, cudart.recording) == ({}, {}, 0, None), name
    assert set(codes) == {0, 2}  # the call fails for both models or for none


@pytest.mark.parametrize("classic", ["10.3.0"], indirect=True)
@pytest.mark.parametrize("name", ["cudaGraphLaunch", "cudaStreamSynchronize", "cudaMemcpyAsync", "cudaEventRecord"])
@pytest.mark.parametrize("first", [1, 9, 60])
def test_a_kernel_that_takes_too_long(script, classic, cudart, bundle, monkeypatch, name, first):
    done, real = [], getattr(cudart, name)

    def call(*arguments):
        done.append(name)
        return cudart.fail(TIMED_OUT) if len(done) >= first else real(*arguments)

    monkeypatch.setattr(cudart, name, call, raising=False)
    measured(script, bundle)
    assert cudart.blocks == cudart.graphs == {}


@pytest.mark.parametrize("classic", ["10.3.0"], indirect=True)
@pytest.mark.parametrize("bad", ["dense", "compressed"])
def test_a_model_that_stops_working_while_it_is_measured_leaves_the_other(script, classic, bundle, monkeypatch, bad):
    engines, real = [], script.TensorRT.time

    def time(engine, mode):
        if engine not in engines:
            engines.append(engine)
        if engine.about["file"].startswith(bad) and mode == "graph":
            raise RuntimeError("the device was lost")
        return real(engine, mode)

    monkeypatch.setattr(script.TensorRT, "time", time)
    assert measured(script, bundle) == 1
    found = json.loads((bundle / "r.json").read_text())
    (good,) = {"dense", "compressed"} - {bad}
    assert found["failed"] == {bad: "the device was lost"}
    assert list(found["models"]) == [good]
    assert found["models"][good]["layers"]
