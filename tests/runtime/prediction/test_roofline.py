"""Rooflines: what they say of a layer, what they are fitted to, and what they refuse."""

import copy
import json

import pytest
import torch

import graphcomb
from graphcomb.graph.errors import BadInput
from graphcomb.graph.workload.layer import Layer
from graphcomb.passes import RemoveChannels
from graphcomb.runtime import Roofline, get_target, predict, run_bundle, write_bundle
from graphcomb.runtime.prediction.layers import describe, from_dict, to_dict
from graphcomb.runtime.prediction.measured import kernels
from graphcomb.runtime.prediction.roofline import FEW

TRUE = Roofline(get_target("agx-orin"), "fp16", compute=0.4, memory=0.7, launch=5e-6, per_run=40e-6)


def matmul(inputs, outputs, rows):
    sizes = (("batch", 1), ("inputs", inputs), ("outputs", outputs))
    return Layer("matmul", sizes, (("rows", rows), ("shared", 1)))


def copying(entries):
    return Layer("copy", (("entries", entries),))


# Compute-bound, memory-bound and launch-bound layers, and models that have them in different parts.
HEAVY, WIDE, TINY = matmul(2048, 2048, 4096), copying(20_000_000), copying(100)
MODELS = {
    "heavy": [HEAVY] * 6 + [TINY] * 3, "wide": [WIDE] * 8 + [TINY] * 5, "long": [TINY] * 200, "short": [TINY],
    "both": [HEAVY, WIDE] * 4 + [TINY] * 20,
}  # fmt: skip


def results(names=tuple(MODELS), profile=False, truth=TRUE, factor=1.0, **changed):
    """What a bundle with these models would write on a device that is exactly as `truth` says."""
    about, measured = {}, {}
    for name in names:
        layers = MODELS[name]
        seconds = factor * (truth.per_run + sum(map(truth.seconds, layers)))
        rows = [to_dict(layer) | {"name": str(i), "onnx": [f"/{i}"]} for i, layer in enumerate(layers)]
        about[name] = {"layers": rows}
        found = [{"name": f"/{i} + /other", "ms": 1e3 * factor * truth.seconds(x)} for i, x in enumerate(layers)]
        latency = {"graph": {"runs": 100, "host_ms": {"median": 9e9}, "gpu_ms": {"median": 1e3 * seconds}}}
        measured[name] = {"engine": {}, "latency": latency, "layers": found if profile else []}
    head = {"format": "graphcomb-bench/1", "engine": "tensorrt", "version": "10.3", "device": {"model": "an Orin"}}
    bundle = {"target": "agx-orin", "precision": "fp16", "models": about}
    # Through JSON, as a file would be.
    return json.loads(json.dumps(head | {"bundle": bundle | changed.pop("bundle", {}), "models": measured} | changed))


@pytest.mark.parametrize("profile", [False, True])
def test_a_device_that_is_a_roofline_is_found(profile):
    found = Roofline.calibrated(results(profile=profile))
    assert found.compute == pytest.approx(0.4, rel=0.02)
    assert found.memory == pytest.approx(0.7, rel=0.02)
    assert found.start == pytest.approx(5e-6, rel=0.03)
    assert found.per_run == pytest.approx(40e-6, rel=0.1)
    record = found.calibration
    assert record["error"]["worst"] < 0.02
    assert record["left_out"]["median"] < 0.15
    assert record["fitted"] == ["compute_share", "memory_share", "launch_us", "run_us"]
    assert (record["models"], record["modes"]) == (5, ["graph"])
    assert record["kernels"] == (sum(map(len, MODELS.values())) if profile else 0)
    assert "0.4 of peak" in str(found)
    json.dumps(record)


def test_a_profile_is_scaled_to_the_run():
    """The profiler slows everything down by the same factor, which is no property of the device."""
    given = results(("heavy", "wide"), profile=True)
    for model in given["models"].values():
        for row in model["layers"]:
            row["ms"] *= 3
    found = Roofline.calibrated(given)
    assert found.compute == pytest.approx(0.4, rel=0.03)
    assert found.memory == pytest.approx(0.7, rel=0.03)


def test_one_wild_measurement_does_not_decide():
    given = results(profile=True)
    given["models"]["wide"]["layers"][0]["ms"] *= 50
    found = Roofline.calibrated(given)
    assert found.compute == pytest.approx(0.4, rel=0.1)
    assert found.memory == pytest.approx(0.7, rel=0.15)


def test_a_few_measurements_give_one_factor():
    plain = Roofline(get_target("agx-orin"), "fp16")
    found = Roofline.calibrated(results(("heavy", "wide"), truth=plain, factor=2.5))
    assert len(MODELS) > FEW["models"] > 2
    assert found.calibration["fitted"] == ["common factor"]
    assert found.rates == pytest.approx((plain.rates[0] / 2.5, plain.rates[1] / 2.5, 2.5 * plain.start))
    assert found.start == pytest.approx(2.5 * plain.start)
    assert found.calibration["error"]["worst"] < 1e-9
    assert found.calibration["left_out"] is None
    more = Roofline.calibrated([results(("heavy",), truth=plain), results(("wide", "long"), truth=plain)])
    assert (more.calibration["models"], more.compute) == (3, pytest.approx(plain.rates[0]))


@pytest.mark.parametrize(
    ("changed", "asked", "message"),
    [
        ({}, ("orin-nano", None), "measured for target agx-orin, not orin-nano"),
        ({}, ("agx-orin", "int8"), "measured in fp16, not int8"),
        ({"bundle": {"target": None}}, (None, None), "names no target"),
        ({"bundle": {"target": "agx-oren"}}, (None, None), "did you mean agx-orin"),
        ({"engine": "onnxruntime"}, (None, None), "with onnxruntime, and agx-orin runs tensorrt"),
        ({"bundle": {"models": {}}}, (None, None), "not the results of a bench bundle"),
        ({"models": {}}, (None, None), "says nothing about the layers"),
    ],
)
def test_other_results_are_refused(changed, asked, message):
    with pytest.raises(BadInput, match=message):
        Roofline.calibrated(results(**changed), *asked)


def test_results_of_two_devices_are_not_joined():
    other = results(device={"model": "another Orin"})
    with pytest.raises(BadInput, match="device another Orin, not an Orin"):
        Roofline.calibrated([results(), other])


def test_a_busy_machine_is_no_measurement():
    given = results()
    given["models"]["wide"]["engine"]["contended"] = 90
    with pytest.raises(BadInput, match="wide was measured on a busy machine"):
        Roofline.calibrated(given)


def test_kernels_that_share_a_layer_are_one():
    rows = [{"onnx": ["a", "b"]}, {"onnx": ["c"]}, {"onnx": []}]
    profile = [{"name": n, "ms": ms} for n, ms in (("a + relu", 1.0), ("x", 8.0), ("c", 2.0), ("b + c", 4.0))]
    inspector = [{"Name": "x", "Metadata": "[ONNX Layer: y]"}]
    found = kernels({"layers": profile, "engine": {"inspector": inspector}}, rows)
    assert sorted((sorted(which), ms) for which, _, ms in found) == [([], 8.0), ([0, 1], 7.0)]
    inspector[0]["Metadata"] = "[ONNX Layer: y]\x1e[ONNX Layer: a]"
    assert (
        sum(bool(which) for which, _, _ in kernels({"layers": profile, "engine": {"inspector": inspector}}, rows)) == 1
    )


# ------------------------------------------------------------------------------------------------------------- programs
class Net(torch.nn.Module):
    """Every kind of layer that a profile has a name for."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU())
        self.deep = torch.nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm, self.attention = torch.nn.LayerNorm(32), torch.nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 7))

    def forward(self, x):
        x = self.stem(x)
        x = self.norm((x + self.deep(x)).flatten(2).transpose(1, 2))
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.fixture(scope="module")
def programs():
    torch.manual_seed(0)
    program = graphcomb.capture(Net().eval(), (torch.randn(2, 3, 16, 16),), dynamic_shapes="batch")
    return {"before": program, "after": RemoveChannels(ratio=0.5, round_to=8)(program).program}


def test_layers_survive_json(programs):
    rows = describe(programs["before"], batch=4)
    layers = [from_dict(row) for row in json.loads(json.dumps(rows))]
    assert layers == [from_dict(row) for row in rows]
    conv = next(layer for layer in layers if layer.op == "conv")
    assert (conv["batch"], conv["image"], rows[0]["name"]) == (4, (16, 16), "stem.0.weight")


def test_what_a_machine_measures_is_matched_and_calibrates(programs, tmp_path):
    """A bundle for the CPU, run here: every weight's kernel is found in ONNX Runtime's profile."""
    folder = write_bundle(tmp_path / "b", programs, "fp32", "cpu", batch=2)
    arguments = ["--engine", "onnxruntime", "--rounds", "2", "--power-seconds", "0.1", "--seconds", "3", "--quiet"]
    found = run_bundle(folder, tmp_path / "r.json", arguments=arguments)
    for name, model in found["models"].items():
        rows = found["bundle"]["models"][name]["layers"]
        assert [from_dict(row) for row in rows] == [from_dict(row) for row in describe(programs[name], batch=2)]
        profiled = kernels(model, rows)
        matched = {rows[i]["name"] for which, _, _ in profiled for i in which}
        assert {"stem.0.weight", "deep.weight", "norm.weight", "head.0.weight", "head.2.weight"} <= matched
        assert any(rows[i]["op"] == "attention" for which, _, _ in profiled for i in which)
        assert all(ms >= 0 for *_, ms in profiled)
        model["engine"].pop("contended", None)  # what counts here is that it can be read
    roofline = Roofline.calibrated(found, "cpu", "fp32")
    assert roofline.calibration["models"] == 2
    assert roofline.calibration["kernels"] >= 12
    assert roofline.compute > 0
    assert roofline.memory > 0


def test_layers_are_predicted_side_by_side(programs):
    target = get_target("rtx-sm86")
    found = predict(programs, target, "fp16")
    roofline = Roofline(target, "fp16")
    for which, program in programs.items():
        rows = [row[which] for row in found["layers"]]
        assert sum(row["ms"] for row in rows) == pytest.approx(found["ms"][which])
        assert sum(row["macs"] for row in rows) == pytest.approx(program.macs / 2)  # of a batch of two
        assert [roofline.seconds(from_dict(row)) for row in rows] == pytest.approx([row["ms"] / 1e3 for row in rows])
    by_name = {row["name"]: row for row in found["layers"]}
    stem = by_name["stem.0.weight"]
    assert (stem["before"]["sizes"]["outputs"], stem["after"]["sizes"]["outputs"]) == (32, 16)
    assert stem["before"]["padded_macs"] == 256 * 9 * 8 * 32  # 3 channels are 8 to the kernel
    assert found["calibration"] is None
    json.dumps(found)


def test_which_layers_will_not_profit(programs):
    def verdicts(roofline):
        found = predict({"before": programs["before"]}, roofline.target, "fp16", roofline, batch=64)["layers"]
        return {row["name"]: (row["before"]["bound"], row["before"]["verdict"]) for row in found}

    target = get_target("rtx-sm86")
    slow = verdicts(Roofline(target, "fp16", launch=1.0))
    assert {bound for bound, _ in slow.values()} == {"launch"}
    assert slow["head.0.weight"][1] == "starting its kernel takes longer than its work"
    moving = verdicts(Roofline(target, "fp16", memory=1e-6, launch=0.0))
    assert moving["head.0.weight"] == ("memory", "time falls with its bytes, not with its MACs")
    working = verdicts(Roofline(target, "fp16", compute=1e-6, launch=0.0))
    assert working["head.0.weight"] == ("compute", "")
    assert working["deep.weight"] == ("compute", "")
    frozen = graphcomb.capture(torch.nn.Linear(8, 8).eval(), (torch.randn(1, 8),))
    (row,) = predict({"before": frozen}, target, "fp16")["layers"]
    assert row["before"]["verdict"] == "none of its channels can go"
    narrow = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).eval()
    found = predict(
        {"before": graphcomb.capture(narrow, (torch.randn(1, 8),))}, target, "fp16", Roofline(target, compute=1e-9)
    )
    assert {row["before"]["verdict"] for row in found["layers"]} == {"its kernel cannot be narrower"}


def test_a_results_dict_is_left_as_it_is():
    given = results(profile=True)
    before = copy.deepcopy(given)
    Roofline.calibrated(given)
    assert given == before


def test_a_data_sheet_says_how_far_off_it_is_and_public_figures_are_within(programs):
    """ResNet-50 in INT8 on an AGX Orin takes 0.64 ms in MLPerf Inference 3.1 (single stream)."""
    models = pytest.importorskip("torchvision").models
    program = graphcomb.capture(models.resnet50(weights=None).eval(), (torch.randn(1, 3, 224, 224),))
    found = predict({"before": program}, get_target("agx-orin"), "int8")
    factor = found["uncertainty"]["factor"]
    assert factor == Roofline(get_target("agx-orin"), "int8").error.factor
    assert 1 / factor < found["ms"]["before"] / 0.64 < factor
    assert f"on Orin take {0.64 / found['ms']['before']:.1f} and" in found["uncertainty"]["source"]
    assert 0.6 < found["ms"]["before"] < 0.9


def test_a_quantised_program_has_the_layers_of_the_plain_one(programs):
    """Fake-quantisation is no kernel, weights' names stay, and the batch is the one asked for."""
    from graphcomb.passes import Quantize

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, 1, 1), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, 1, 1)).eval()
    plain = graphcomb.capture(net, (torch.randn(2, 3, 32, 32),), dynamic_shapes="batch")
    quantised = Quantize(samples=4, include="*")(plain, data=[torch.randn(2, 3, 32, 32)] * 2).program
    found = predict({"before": plain, "after": quantised}, get_target("orin-nano"), "int8")
    assert found["ms"]["after"] == pytest.approx(found["ms"]["before"])
    for row in found["layers"]:
        assert row["before"]["sizes"] == row["after"]["sizes"]
        assert row["after"]["options"].get("batch", 1) == 1
