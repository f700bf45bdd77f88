"""Latency tables: what is measured, what is interpolated, what is kept; and rooflines."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from graphcomb import capture, comb
from graphcomb.graph.errors import BadInput, GraphcombError
from graphcomb.graph.workload.layer import Layer
from graphcomb.graph.workload.layers import Layers
from graphcomb.runtime.devices.table import get_target
from graphcomb.runtime.engines.build import build_engine
from graphcomb.runtime.onnx_file import precision
from graphcomb.runtime.prediction import latency_table as latency
from graphcomb.runtime.prediction.latency_table import LatencyTable
from graphcomb.runtime.prediction.micro_models import COPIES, model
from graphcomb.runtime.prediction.roofline import Roofline

CONV = (
    ("batch", 1), ("image", (6, 6)), ("kernel", (3, 3)), ("stride", (2, 2)), ("padding", (1, 1)), ("dilation", (1, 1)),
    ("transposed", 0),
)  # fmt: skip


def conv(inputs: int, outputs: int, groups: int = 1, **options: object) -> Layer:
    changed = tuple((k, options.get(k, v)) for k, v in CONV)
    return Layer("conv", (("inputs", inputs), ("outputs", outputs), ("groups", groups)), changed)


def matmul(inputs: int, outputs: int, shared: int = 1, batch: int = 1, rows: int = 5) -> Layer:
    sizes = (("batch", batch), ("inputs", inputs), ("outputs", outputs))
    return Layer("matmul", sizes, (("rows", rows), ("shared", shared)))


def recurrent(gates: int, layers: int, directions: int) -> Layer:
    options = (("batch", 2), ("steps", 3), ("layers", layers), ("directions", directions), ("gates", gates))
    return Layer("recurrent", (("inputs", 5), ("hidden", 8)), options)


ATTENTION = Layer("attention", (("heads", 2), ("width", 4), ("value", 6)), (("batch", 1), ("queries", 5), ("keys", 3)))
LAYERS = {
    "conv": (conv(4, 8), (1, 8, 3, 3)),
    "depthwise": (conv(8, 8, 8), (1, 8, 3, 3)),
    "grouped": (conv(8, 4, 2), (1, 4, 3, 3)),
    "transposed": (conv(8, 4, 2, transposed=1, stride=(2, 2)), (1, 4, 11, 11)),
    "linear": (matmul(6, 7), (1, 5, 7)),
    "matmul": (matmul(6, 7, shared=0, batch=3), (3, 5, 7)),
    "attention": (ATTENTION, (1, 2, 5, 6)),
    "lstm": (recurrent(4, 2, 2), (3, 2, 16)),
    "gru": (recurrent(3, 1, 1), (3, 2, 8)),
    "rnn": (recurrent(1, 3, 1), (3, 2, 8)),
    "norm": (Layer("norm", (("channels", 12),), (("rows", 5),)), (5, 12)),
    "activation": (Layer("activation", (("entries", 30),)), (30,)),
    "copy": (Layer("copy", (("entries", 30),)), (30,)),
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch) -> LatencyTable:
    """A table whose measurements are computed: seconds = MACs + 1, and listed in `asked`."""
    found = LatencyTable(tmp_path / "table.json")
    asked: list[str] = []

    def timed(layer: Layer | None) -> float:
        asked.append(str(layer))
        return 1.0 if layer is None else layer.macs() + 1.0

    monkeypatch.setattr(found, "_time", timed)
    found.asked = asked  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("copies", [1, COPIES])
def test_models_of_layers_run_and_have_the_right_shape(name: str, copies: int) -> None:
    layer, shape = LAYERS[name]
    session = ort.InferenceSession(model(layer, copies).SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()}
    outputs = session.run(None, feed)
    assert all(o.shape == shape for o in outputs)
    kernels = [n.op_type for n in model(layer, copies).graph.node]
    main = {"conv": "Conv", "norm": "LayerNormalization", "activation": "Gelu", "copy": "Add"}.get(layer.op, "MatMul")
    if layer.op == "recurrent":
        assert kernels.count(name.upper()) == copies * layer["layers"]
    if layer.op in ("conv", "norm", "activation", "copy"):
        wanted = "ConvTranspose" if name == "transposed" else main
        extra = copies - 1 if layer.op == "conv" and wanted == "Add" else 0
        assert kernels.count(wanted) - extra == copies
    singles = {i.name for i in model(layer, 1).graph.input}
    assert singles == set(feed)  # both models can be fed the same arrays


def test_measured_sizes_are_exact_and_between_them_it_interpolates(table: LatencyTable) -> None:
    assert table.seconds(conv(16, 24)) == conv(16, 24).macs() + 1
    between = table.seconds(conv(20, 24))
    assert between == pytest.approx((conv(16, 24).macs() + conv(24, 24).macs()) / 2 + 1)  # MACs are linear in each size
    assert table.seconds(conv(12, 20)) == pytest.approx(conv(12, 20).macs() + 1)
    assert str(conv(12, 20)) not in table.entries


def test_sizes_off_the_engines_grain_are_measured_as_they_are(table: LatencyTable) -> None:
    table.seconds(conv(13, 24))
    table.seconds(conv(21, 21, 21))
    assert table.asked == [str(conv(13, 24)), str(conv(21, 21, 21))]


def test_an_anchored_table_gives_the_whole_programs_time(table: LatencyTable, tmp_path: Path, monkeypatch) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 1))
    program = capture(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes="batch")
    layers = [layer for _, layer in Layers(comb(program)).at({})]
    alone = table.per_run + sum(map(table.seconds, layers))
    measured = []
    monkeypatch.setattr(LatencyTable, "_whole", lambda self, program: measured.append(program) or 1.5 * alone)
    found = table.anchored(program)
    assert found.per_run + sum(map(found.seconds, layers)) == pytest.approx(1.5 * alone)
    assert found.seconds(conv(16, 24)) == pytest.approx(1.5 * table.seconds(conv(16, 24)))
    assert "times 1.5 as the whole program takes" in str(found)
    again = LatencyTable(tmp_path / "table.json").anchored(program)  # from the file
    assert again.factor == pytest.approx(1.5)
    assert len(measured) == 1


def test_a_real_program_is_measured_for_its_anchor(tmp_path: Path) -> None:
    table = LatencyTable(tmp_path / "table.json")
    program = capture(torch.nn.Conv2d(8, 8, 3), (torch.randn(2, 8, 24, 24),), dynamic_shapes="batch")
    try:
        found = table.anchored(program)
    except GraphcombError as error:
        pytest.skip(str(error))
    assert 0.1 < found.factor < 10


def test_small_sizes_are_measured_as_they_are(table: LatencyTable) -> None:
    table.seconds(conv(3, 5))
    assert table.asked == [str(conv(3, 5))]


def test_large_sizes_are_measured_sparsely(table: LatencyTable) -> None:
    for n in range(8, 513, 8):
        table.seconds(matmul(n, 8))
    assert len(table.asked) < 25


def test_depthwise_channels_go_together(table: LatencyTable) -> None:
    assert table.seconds(conv(20, 20, 20)) == pytest.approx(conv(20, 20, 20).macs() + 1)
    assert sorted(table.asked) == sorted(str(conv(n, n, n)) for n in (16, 24))


def test_nothing_is_measured_twice_and_the_file_goes_on(table: LatencyTable, tmp_path: Path) -> None:
    table.prepare([conv(8, 8), conv(8, 8), conv(8, 16)])
    table.seconds(conv(8, 8))
    assert len(table.asked) == 2
    again = LatencyTable(tmp_path / "table.json")
    assert again.seconds(conv(8, 16)) == table.seconds(conv(8, 16))


def test_a_busy_machine_leaves_what_was_measured(table: LatencyTable, tmp_path: Path, monkeypatch) -> None:
    timed = table._time

    def busy(layer: Layer | None) -> float:
        if str(layer) == str(conv(8, 16)):
            raise GraphcombError("busy")
        return timed(layer)

    monkeypatch.setattr(table, "_time", busy)
    with pytest.raises(GraphcombError, match="busy"):
        table.prepare([conv(8, 8), conv(8, 16), conv(8, 24)])
    assert list(LatencyTable(tmp_path / "table.json").entries) == [str(conv(8, 8))]


def test_too_few_undisturbed_rounds_are_an_error(tmp_path: Path, monkeypatch) -> None:
    table = LatencyTable(tmp_path / "table.json")
    module = importlib.import_module("graphcomb.runtime.measure.bench")
    monkeypatch.setattr(module, "_sample", lambda call, repeats, threads: (1e-3, False, None))
    monkeypatch.setattr(latency, "SECONDS", 0.05)
    with pytest.raises(GraphcombError, match="too busy"):
        table.seconds(matmul(8, 8))


@pytest.mark.parametrize("text", ["", "[]", '{"about": {}}', '{"about": 1, "seconds": {"x": "y"}}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(BadInput, match="not a latency table"):
        LatencyTable(path)


def test_a_table_of_another_device_is_refused(table: LatencyTable, tmp_path: Path) -> None:
    table.prepare([conv(8, 8)])
    content = json.loads((tmp_path / "table.json").read_text())
    content["about"]["device"] = "another processor"
    (tmp_path / "table.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"another device, engine or precision.*another processor"):
        LatencyTable(tmp_path / "table.json")


@pytest.fixture
def rtx(monkeypatch) -> list[str]:
    """A machine with a stand-in for TensorRT-RTX; lists the precision of what is built."""
    built: list[str] = []

    def build(file, target, **options):
        built.append(precision(onnx.load(file)))
        return SimpleNamespace(path=file.with_suffix(".rtx"))

    timing = SimpleNamespace(ms={"median": 1.0})
    here = latency.environment() | {"gpu": "a stand-in", "versions": {"tensorrt_rtx": "1.7"}}
    monkeypatch.setattr(latency, "environment", lambda: here)
    monkeypatch.setattr(latency, "_sm", lambda: "SM86")
    monkeypatch.setattr(latency, "build_engine", build)
    monkeypatch.setattr(latency, "bench", lambda files, **k: SimpleNamespace(timings=[timing] * len(files), ratio=0.5))
    return built


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_layers_and_programs_are_measured_in_the_precision_asked_for(tmp_path: Path, rtx: list[str], kind: str) -> None:
    table = LatencyTable(tmp_path / "table.json", "rtx-sm86", precision=kind)
    for layer, _ in LAYERS.values():
        table.seconds(layer)
    assert str(table).endswith(f"a stand-in, {kind}")
    table.anchored(capture(torch.nn.Conv2d(3, 8, 3), (torch.randn(2, 3, 8, 8),), dynamic_shapes="batch"))
    assert {k for k in rtx if k != kind} <= {"fp32"}  # a model without weights counts as fp32
    assert rtx.count(kind) >= 2 * 7
    other = "fp16" if kind == "fp32" else "fp32"
    with pytest.raises(BadInput, match=rf"engine or precision \(dtype {kind}\); name another file"):
        LatencyTable(tmp_path / "table.json", "rtx-sm86", precision=other)


@pytest.mark.parametrize("name", LAYERS)
def test_models_in_half_precision_have_no_other_floats(name: str) -> None:
    found = onnx.shape_inference.infer_shapes(model(LAYERS[name][0], 2, "fp16"), strict_mode=True)
    onnx.checker.check_model(found)
    values = [*found.graph.input, *found.graph.output, *found.graph.value_info]
    kinds = {v.type.tensor_type.elem_type for v in values} | {w.data_type for w in found.graph.initializer}
    assert kinds - {onnx.TensorProto.INT64} == {onnx.TensorProto.FLOAT16}  # shapes are integers


def test_half_precision_that_the_engine_would_compute_in_fp32_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(latency, "computes_half", lambda: False)
    with pytest.raises(
        BadInput, match="no fp16 kernels for this CPU and computes in fp32; measure in fp32, or use roof"
    ):
        LatencyTable(tmp_path / "table.json", precision="fp16")
    assert not (tmp_path / "table.json").exists()
    monkeypatch.setattr(latency, "computes_half", lambda: True)
    assert LatencyTable(tmp_path / "table.json", precision="fp16").about["dtype"] == "fp16"
    pytest.importorskip("openvino")
    with pytest.raises(BadInput, match="OpenVINO has no fp16 kernels"):
        LatencyTable(tmp_path / "openvino.json", "cpu-openvino", precision="fp16")


def test_layers_of_a_processor_are_measured_in_the_library_of_the_target(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("openvino")
    engines = []

    def measured(files, engine=None, **options):
        engines.append(engine)
        return SimpleNamespace(timings=[SimpleNamespace(ms={"median": 1.0})] * len(files), ratio=0.5)

    monkeypatch.setattr(latency, "bench", measured)
    for target, library in (("cpu", "onnxruntime"), ("cpu-openvino", "openvino")):
        table = LatencyTable(tmp_path / f"{target}.json", target)
        table.seconds(conv(8, 8))
        assert set(engines) == {library}
        assert str(table).startswith(f"latency table of {library} ")
        engines.clear()
    with pytest.raises(BadInput, match=r"of another device, engine or precision \(target cpu, "):
        LatencyTable(tmp_path / "cpu.json", "cpu-openvino")


def test_what_the_cpu_computes_in_half_precision_is_what_its_builds_say(tmp_path: Path) -> None:
    onnx.save(model(LAYERS["conv"][0], 1, "fp16"), tmp_path / "conv.onnx")
    warned = build_engine(tmp_path / "conv.onnx", "cpu").warnings
    assert latency.computes_half() == (not warned)


@pytest.mark.parametrize(("target", "kind"), [("cpu", "int8"), ("cpu", "half"), ("rtx-sm75", "bf16")])
def test_precisions_in_which_no_layer_is_measured_are_named(tmp_path: Path, target: str, kind: str) -> None:
    with pytest.raises(BadInput, match=f"measured in fp32 or fp16, not in {kind}"):
        LatencyTable(tmp_path / "table.json", target, precision=kind)


def test_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="roofline"):
        LatencyTable(tmp_path / "table.json", "agx-orin")


def test_a_real_measurement(tmp_path: Path) -> None:
    """A convolution of 64 times the work takes longer, and an empty run less than a millisecond."""
    table = LatencyTable(tmp_path / "table.json")
    try:
        small, large = (table.seconds(conv(n, n, image=(24, 24))) for n in (8, 64))
        empty = table.per_run
    except GraphcombError as error:
        pytest.skip(str(error))
    assert 4 * small < large < 1
    assert 0 < empty < 1e-3


def test_roofline_is_the_longer_of_arithmetic_and_traffic() -> None:
    target = get_target("agx-orin")
    found = Roofline(target, "fp16", compute=1.0, memory=1.0, launch=2e-6)
    big = matmul(4096, 4096, rows=4096)
    assert found.seconds(big) == pytest.approx(2 * 4096**3 / target.peak("fp16"), rel=0.01)
    moved = Layer("copy", (("entries", 10**8),))
    assert found.seconds(moved) == pytest.approx(2 * 2 * 10**8 / (target.bandwidth * 1e9), rel=0.01)
    assert found.seconds(Layer("copy", (("entries", 1),))) == pytest.approx(2e-6, rel=0.01)


def test_roofline_waits_for_every_step_of_a_recurrence() -> None:
    found = Roofline(get_target("agx-orin"), "fp16", compute=1.0, memory=1.0, launch=2e-6)
    assert found.seconds(recurrent(4, 2, 2)) == pytest.approx(2 * 3 * 2e-6, rel=0.01)


def test_roofline_pays_for_padding() -> None:
    found = Roofline(get_target("rtx-sm86"), "fp16")
    rows = 1 << 20
    assert found.seconds(matmul(1000, 1000, rows=rows)) > found.seconds(matmul(992, 992, rows=rows))
    assert found.seconds(matmul(1025, 1024, rows=rows)) == pytest.approx(
        found.seconds(matmul(1032, 1024, rows=rows)), rel=0.01
    )


def test_roofline_of_a_type_the_device_lacks_is_refused() -> None:
    with pytest.raises(BadInput, match="no fp8"):
        Roofline(get_target("rtx-sm86"), "fp8").seconds(matmul(8, 8))


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_a_table_of_a_gpu(tmp_path: Path, library: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip(library)
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    name = "rtx-sm{}{}".format(*torch.cuda.get_device_capability()) if library == "tensorrt_rtx" else "h200"
    table = LatencyTable(tmp_path / "table.json", name)
    assert 0 < table.seconds(conv(64, 64, image=(56, 56))) < 1e-2


def test_a_difference_of_copies_is_one_of_runs_in_turns(tmp_path: Path, monkeypatch) -> None:
    """Medians of a machine that slows down half-way lie; the ratio of pairs does not."""
    timings = [SimpleNamespace(ms={"median": ms}) for ms in (2.0, 9.0)]
    monkeypatch.setattr(latency, "bench", lambda *a, **k: SimpleNamespace(timings=timings, ratio=1 / 3))
    found = LatencyTable(tmp_path / "table.json")
    assert found._time(matmul(8, 8)) == pytest.approx((6.0 - 2.0) / (COPIES - 1) / 1e3)


@pytest.mark.parametrize("name", ["rtx-sm86", "agx-orin"])
def test_a_table_of_a_device_that_is_not_here_is_refused_before_anything_is_measured(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"{name} is not at hand"):
        LatencyTable(tmp_path / "table.json", name)


def test_a_table_builds_engines_with_the_suffix_of_their_backend(tmp_path: Path, monkeypatch) -> None:
    found, built = LatencyTable(tmp_path / "table.json"), []
    found.target = get_target("rtx-sm86")

    def build(file, target, **options):
        built.append(options)
        return SimpleNamespace(path=file.with_suffix(".rtx"))

    timing = SimpleNamespace(ms={"median": 1.0})
    monkeypatch.setattr(latency, "build_engine", build)
    monkeypatch.setattr(latency, "bench", lambda files, **k: SimpleNamespace(timings=[timing] * len(files), ratio=0.5))
    assert found._time(matmul(8, 8)) > 0
    assert built == [{}, {}]  # no name: the backend's own
