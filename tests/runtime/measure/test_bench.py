"""The bench on a clock of its own, which makes figures exact, and once on a processor that is really contended."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.runtime import bench
from graphcomb.runtime.measure import bench as bench_module
from graphcomb.runtime.onnx_file import TensorSpec


class Clock:
    """Wall and CPU time that pass only when work is done."""

    def __init__(self) -> None:
        self.wall, self.cpu = 0.0, 0.0
        self.calls: list[str] = []

    def work(self, name: str, seconds: float, share: Callable[[int], float] = lambda run: 1.0) -> Callable[[], None]:
        """Something that takes `seconds` of wall time, of which its n-th run has the processor for a share."""
        runs = iter(range(10**9))

        def run() -> None:
            self.calls.append(name)
            self.wall += seconds
            self.cpu += seconds * share(next(runs))

        run.__name__ = name
        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    times = SimpleNamespace(perf_counter=lambda: clock.wall, process_time=lambda: clock.cpu)
    monkeypatch.setattr(bench_module, "time", times)
    monkeypatch.setattr(bench_module, "stolen", lambda: 0.0)  # in the time of this machine
    monkeypatch.setattr(bench_module, "processor_mhz", lambda: None)
    return clock


# ------------------------------------------------------------------------------------------------------------- figures
def test_ratio_and_latency(clock: Clock) -> None:
    result = bench([clock.work("slow", 0.03), clock.work("fast", 0.01)], seconds=10)
    assert result.ratio == pytest.approx(3)
    assert [t.name for t in result.timings] == ["slow", "fast"]
    assert result.timings[1].ms["median"] == pytest.approx(10)
    assert result.timings[1].ms["p99"] == pytest.approx(10)
    assert (result.rejected, result.note, result.contended) == (0, "", False)
    assert result.rounds == pytest.approx(10 / 0.04, abs=2)
    assert json.loads(json.dumps(result.to_dict()))["ratio"] == pytest.approx(3)


def test_the_order_alternates(clock: Clock) -> None:
    bench([clock.work("a", 0.01), clock.work("b", 0.01)], seconds=1)
    measured = "".join(clock.calls[8:])  # after warming up, four calls each
    assert measured.startswith("abbaabbaab")


def test_a_drift_does_not_shift_the_ratio(clock: Clock) -> None:
    """A machine that slows down by half during the measurement."""

    def work(seconds: float) -> Callable[[], None]:
        def run() -> None:
            now = seconds * (1 + clock.wall / 20)
            clock.wall += now
            clock.cpu += now

        return run

    result = bench([work(0.02), work(0.01)], seconds=10)
    assert result.ratio == pytest.approx(2, rel=5e-3)


def test_short_runs_are_repeated_within_a_sample(clock: Clock) -> None:
    result = bench([clock.work("short", 1e-5), clock.work("long", 0.01)], seconds=2)
    assert [t.repeats for t in result.timings] == [pytest.approx(200, abs=1), 1]
    assert result.timings[0].ms["median"] == pytest.approx(0.01)
    assert result.ratio == pytest.approx(1e-3)


def test_disturbed_runs_do_not_count(clock: Clock) -> None:
    """Every third run of b has half of the processor, and takes as long."""
    disturbed = clock.work("b", 0.01, lambda run: 0.5 if run % 3 == 0 else 1.0)
    result = bench([clock.work("a", 0.01), disturbed], seconds=6)
    a, b = result.timings
    assert a.rejected == 0
    assert b.rejected == pytest.approx(result.rounds / 2, abs=1)
    assert result.rejected == b.rejected
    assert b.runs == result.rounds
    assert result.ratio == pytest.approx(1)


@pytest.mark.parametrize(("share", "counts"), [(0.92, False), (0.94, True), (1.05, True), (1.1, False)])
def test_the_guard_is_93_percent_of_the_threads_asked_for(clock: Clock, share: float, counts: bool) -> None:
    result = bench([clock.work("a", 0.01, lambda run: share)], seconds=2)
    assert bool(result.timings[0].ms) is counts
    assert result.contended is not counts


def test_too_few_runs_give_no_figure(clock: Clock) -> None:
    contended = clock.work("b", 0.01, lambda run: 1.0 if run % 10 == 0 else 0.4)
    result = bench([clock.work("a", 0.01), contended], seconds=1)
    assert (result.ratio, result.ratios) == (None, {"b": None})
    assert result.timings[0].ms
    assert not result.timings[1].ms
    assert "of 50 rounds ran undisturbed in 1 s (20 needed); the machine is contended" in result.note
    assert result.to_dict()["contended"] is True


def test_a_slow_model_is_not_a_busy_machine(clock: Clock) -> None:
    result = bench([clock.work("a", 1.5), clock.work("b", 1.0)], seconds=10)
    assert (result.ratio, result.contended, result.rejected) == (None, False, 0)
    assert result.note == (
        "no figure: only 4 rounds fit into 10 s (20 needed), the models are slow; give it 60 seconds"
    )
    assert bench([clock.work("a", 1.5), clock.work("b", 1.0)], seconds=60).ratio == pytest.approx(1.5)
    assert clock.calls[:4] == ["a", "a", "b", "b"]  # once to warm up, once to see how long it takes
    patient = bench([clock.work("a", 1.5), clock.work("b", 1.0)], seconds=10, min_runs=12, patient=True)
    assert (patient.rounds, patient.ratio) == (12, pytest.approx(1.5))


def test_patience_ends_on_a_busy_machine(clock: Clock) -> None:
    def half(run: int) -> float:
        return 0.5

    result = bench([clock.work("a", 1.5, half), clock.work("b", 1.0)], seconds=10, min_runs=12, patient=True)
    assert (result.ratio, result.contended) == (None, True)
    assert result.seconds == pytest.approx(4 * 12 * 2.5)
    result = bench([clock.work("a", 0.01, half), clock.work("b", 0.01)], seconds=10, min_runs=12, patient=True)
    assert (result.ratio, result.contended) == (None, True)
    assert result.seconds == pytest.approx(40, abs=1)


@pytest.mark.parametrize("seconds", [1.0, 0.01])
def test_a_moment_in_which_the_machine_is_busy_does_not_end_a_patient_measurement(clock: Clock, seconds: float) -> None:
    """The machine is busy during the first 20 s."""
    items = [clock.work("a", 1.5 * seconds, lambda run: 0.5 if clock.wall < 20 else 1.0), clock.work("b", seconds)]
    assert bench(items, seconds=10, min_runs=12).contended
    items[0] = clock.work("a", 1.5 * seconds, lambda run: 0.5 if clock.wall < end else 1.0)
    end = clock.wall + 20
    result = bench(items, seconds=10, min_runs=12, patient=True)
    assert (result.rounds, result.contended, result.ratio) == (12, False, pytest.approx(1.5))
    assert 20 < result.seconds < 60


def test_the_interval_is_that_of_the_median(clock: Clock) -> None:
    """100 rounds whose ratios are drawn evenly from 1 to 2: the median is known far better than they scatter."""
    random = np.random.default_rng(0)

    def scattered() -> None:
        seconds = 0.01 / random.uniform(1, 2)
        clock.wall += seconds
        clock.cpu += seconds

    result = bench([clock.work("a", 0.01), scattered], names=["a", "b"], seconds=100, min_runs=100, max_runs=100)
    ratio = result.ratios["b"]
    assert ratio is not None
    assert ratio["low"] < ratio["median"] < ratio["high"]
    assert ratio["low"] < 1.5 < ratio["high"]
    assert ratio["high"] - ratio["low"] == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.4)  # of a uniform density
    assert ratio["iqr"] == pytest.approx(0.5, rel=0.3)  # the scatter of pairs
    ms = result.timings[1].ms
    assert ms["p25"] < ms["low"] < ms["median"] < ms["high"] < ms["p75"]
    assert "order statistics" in result.estimator
    few = bench([clock.work("a", 0.01), clock.work("b", 0.01)], seconds=10, min_runs=5, max_runs=5).ratios["b"]
    assert few is not None
    assert "low" not in few


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
def test_what_a_hypervisor_takes_is_seen(clock: Clock, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """In hundredths of a second, as Linux counts it, so that most samples show nothing of it."""
    monkeypatch.setattr(bench_module, "stolen", lambda: int(100 * share * clock.wall + 1e-9) / 100)
    result = bench([clock.work("a", 0.01), clock.work("b", 0.01)], seconds=10)
    assert (result.rejected > 0) == (share > 0)
    assert (result.ratio is None) == result.contended == (share == 0.2)
    if share == 0.2:
        assert result.note == "no figure: the hypervisor took the processors for 2.0 s of 10 s; measure again"


def test_it_stops_at_max_runs(clock: Clock) -> None:
    result = bench([clock.work("a", 0.01)], seconds=100, min_runs=5, max_runs=30)
    assert result.rounds == 30
    assert clock.wall < 1


def test_several_threads_may_idle_but_not_wait(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    half_idle = clock.work("a", 0.01, lambda run: 1.2)  # of two threads
    monkeypatch.setattr(bench_module, "_waited", lambda: 0.05 * clock.wall)
    assert bench([half_idle], seconds=1, threads=2).note == ""
    monkeypatch.setattr(bench_module, "_waited", lambda: 0.3 * clock.wall)
    assert bench([half_idle], seconds=1, threads=2).contended


@pytest.mark.parametrize(("seen", "shared"), [(None, False), (0.0, False), (5.0, False), (34.0, True)])
def test_an_accelerator_is_guarded_by_what_others_do_there(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, seen: float | None, shared: bool
) -> None:
    """Its runs leave the processor idle, and all of them count, unless other processes had the GPU."""
    monkeypatch.setattr(bench_module, "OtherProcesses", lambda: SimpleNamespace(percent=lambda: seen))
    run = clock.work("gpu", 0.01, lambda run: 0.1)
    engine = SimpleNamespace(
        inputs=[TensorSpec("x", "float16", (None, 2))],
        outputs=[],
        input_names=["x"],
        on_device=True,
        run=lambda inputs: run(),
        close=lambda: None,
    )
    result = bench([engine, engine], seconds=1)
    assert result.timings[0].ms["median"] == pytest.approx(10)
    assert (result.ratio is None) == result.contended == shared
    wanted = "no figure: other processes had the GPU for 34 % of the time; measure again"
    assert result.note == (wanted if shared else "")
    assert result.environment["gpu_others_percent"] == seen


# ------------------------------------------------------------------------------------------------------------- clocks
def test_rounds_at_two_clocks_do_not_count(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock falls by half between the two runs of every fourth round; a slow drift is no reason."""
    reads = iter(range(10**6))
    monkeypatch.setattr(bench_module, "processor_mhz", lambda: 1000.0 if next(reads) % 8 == 1 else 2000.0)
    result = bench([clock.work("a", 0.01), clock.work("b", 0.01)], seconds=4)
    assert result.rejected == pytest.approx((result.rounds + result.rejected) / 4, abs=1)
    assert result.ratio == pytest.approx(1)
    assert result.environment["cpu_mhz"] == [1000, 2000]
    drift = iter(range(10**6))
    monkeypatch.setattr(bench_module, "processor_mhz", lambda: 3000.0 - next(drift))
    result = bench([clock.work("a", 0.01), clock.work("b", 0.01)], seconds=4)
    assert (result.rejected, result.note) == (0, "")


def test_a_clock_that_never_rests_gives_no_figure(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter(range(10**6))
    monkeypatch.setattr(bench_module, "processor_mhz", lambda: 3400.0 if next(reads) % 2 else 800.0)
    result = bench([clock.work("a", 0.01), clock.work("b", 0.01)], seconds=4)
    assert (result.ratio, result.contended) == (None, True)
    assert "the processor's clock, 800 to 3400 MHz, changed within 20" in result.note
    assert result.note.endswith("rounds; fix it: sudo cpupower frequency-set --governor performance")


# ---------------------------------------------------------------------------------------------------------- contention
def busy(rounds: int) -> Callable[[], int]:
    return lambda: sum(i * i for i in range(rounds))


@pytest.fixture
def one_core() -> Iterator[int]:
    """This process on one processor."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("pinning to a processor needs Linux")
    before = os.sched_getaffinity(0)
    core = min(before)
    os.sched_setaffinity(0, {core})
    yield core
    os.sched_setaffinity(0, before)


def test_a_contended_processor_gives_no_figure(one_core: int) -> None:
    """Another process takes half of this one's processor: runs longer than a time slice never count."""
    call, start = busy(10_000), time.process_time()
    call()
    rounds = int(10_000 * 0.05 / max(time.process_time() - start, 1e-6))  # 50 ms of work
    code = f"import os\nos.sched_setaffinity(0, {{{one_core}}})\nprint(1, flush=True)\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        result = bench([busy(rounds), busy(rounds)], seconds=1.5, min_runs=3, names=["a", "b"])
    finally:
        other.kill()
        other.wait()
    assert result.contended
    assert result.ratio is None
    assert sum(t.rejected for t in result.timings) >= sum(t.runs for t in result.timings)  # on a busy machine both 0


def test_waiting_threads_are_seen(one_core: int) -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("needs the scheduler's statistics")
    before = bench_module._waited()
    code = f"import os,time\nos.sched_setaffinity(0, {{{one_core}}})\nend=time.time()+1\nwhile time.time()<end: pass"
    other = subprocess.Popen([sys.executable, "-c", code])
    while other.poll() is None:
        pass
    assert bench_module._waited() - before > 0.2


# --------------------------------------------------------------------------------------------------------------- items
def model(path: Path, width: int, dtype: int = TensorProto.FLOAT) -> Path:
    weights = np.ones((8, width), helper.tensor_dtype_to_np_dtype(dtype))
    x, y = (helper.make_tensor_value_info(n, dtype, ["n", c]) for n, c in (("x", 8), ("y", width)))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")]
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_everything_that_runs_can_be_compared(tmp_path: Path) -> None:
    program = g.capture(nn.Linear(8, 4), torch.randn(2, 8), dynamic_shapes="batch")
    seen = []

    def function(x: torch.Tensor) -> None:
        seen.append(tuple(x.shape))

    items = [
        model(tmp_path / "single.onnx", 4),
        model(tmp_path / "half.onnx", 4, TensorProto.FLOAT16),
        program,
        function,
    ]
    result = bench(items, seconds=0.2, min_runs=1)
    assert [t.name for t in result.timings] == ["single", "half", "Program", "function"]
    assert set(seen) == {(2, 8)}
    assert set(result.ratios) == {"half", "Program", "function"}
    assert result.environment["threads"] == 1
    assert result.environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    json.dumps(result.to_dict())


def test_random_inputs_take_the_batch_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    arrays = bench_module.host_arrays
    monkeypatch.setattr(
        bench_module,
        "host_arrays",
        lambda e, i: shapes.append([x.shape for x in i]) or arrays(e, i),  # type: ignore[func-returns-value]
    )
    bench([model(tmp_path / "a.onnx", 4)], batch=5, seconds=0.1, min_runs=1)
    assert shapes == [[(5, 8)]]


def test_inputs_with_more_than_a_dynamic_batch_want_a_shape(tmp_path: Path) -> None:
    path = dynamic(tmp_path / "net.onnx")
    message = r"input x has dynamic dimensions beyond the batch, \(None, 3, None, None\): .* \(--shape x=1x3xNxN; "
    with pytest.raises(BadInput, match=message):
        bench([path], seconds=0.1)
    assert bench([path, path], seconds=0.2, min_runs=1, shapes={"x": (2, 3, 4, 5)}).timings[0].ms
    for shapes, message in (
        ({"z": (1, 3, 4, 5)}, "shapes: no input z; known: x"),
        ({"x": (1, 4, 4, 5)}, r"input x: shape \(1, 4, 4, 5\) does not fit"),
        ({"x": (1, 3, 4)}, r"input x: shape \(1, 3, 4\) does not fit"),
    ):
        with pytest.raises(BadInput, match=message):
            bench([path], seconds=0.1, shapes=shapes)


def dynamic(path: Path) -> Path:
    """A network of which only the channels are fixed."""
    sides = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3, "h", "w"]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], "relu")], "g", sides[:1], sides[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_bad_input(tmp_path: Path) -> None:
    path = model(tmp_path / "a.onnx", 4)
    for arguments, message in (
        (([],), "nothing to measure"),
        (([3],), "cannot run a int"),
        (([path], [np.ones((1, 8)), np.ones(3)]), "takes 1 inputs, 2 were given"),
        (([path], [np.ones((1, 7))]), "do not fit the engine"),
        (([tmp_path / "none.onnx"],), "no such file"),
    ):
        with pytest.raises(BadInput, match=message):
            bench(*arguments, seconds=0.1)  # type: ignore[arg-type]
    for options in ({"threads": 0}, {"seconds": 0}, {"min_runs": 9, "max_runs": 3}):
        with pytest.raises(BadInput, match="at least"):
            bench([path], **options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="names must be 1 different ones"):
        bench([path], names=["a", "b"])


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [model(tmp_path / "a.onnx", 4), model(tmp_path / "other" / "a.onnx", 4)]
    assert [t.name for t in bench(paths, seconds=0.1, min_runs=1).timings] == ["a", "a 1"]


def test_the_name_is_a_function() -> None:
    assert bench is bench_module.bench
