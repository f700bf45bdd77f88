"""The gate: what got worse between two builds."""

import json

import pytest

from graphcomb.graph.errors import BadInput
from graphcomb.runtime.report import gate
from graphcomb.runtime.report.gate import Build, choose, read_baseline


def kernel(name, nodes, padding=False):
    return {"name": name, "kind": "kgen", "nodes": list(nodes), "padding": padding}


def report(*kernels, pads=(), **more):
    return {"target": "rtx-sm86", "precision": "fp16", "kernels": list(kernels), "pads": list(pads), **more}


def compare(now, before):
    return gate.compare(Build.model_validate(now), Build.model_validate(before))


PAD = {"kernel": "p", "how": "kernel", "nodes": ("b/conv",), "axis": 1, "before": 61, "after": 64, "alignment": 8}


def test_a_new_padding_kernel_is_named_with_its_cure_and_its_pass():
    before = report(kernel("x_myl0_1", ["a/conv"], True))
    origin = {"b/conv": {"node": "conv_1", "module": "b", "passes": ["RemoveChannels"]}}
    now = report(kernel("y_myl0_7", ["a/conv"], True), kernel("p", ["b/conv"], True), pads=[PAD], origins=origin)
    assert compare(now, before) == [
        "new padding kernel for b/conv (changed by RemoveChannels): axis 1 61 -> 64, multiples of 8 avoid it"
    ]
    assert compare(before, now) == []
    none = PAD | {"alignment": None, "note": "each of its 61 groups has 1"}
    assert compare(now | {"pads": [none]}, before)[0].endswith("no width avoids it (each of its 61 groups has 1)")


def test_kernels_without_nodes_are_known_by_name_less_the_number():
    one = report(kernel("__myl_Pad_myl0_1", [], True))
    two = report(kernel("__myl_Pad_myl0_4", [], True), kernel("__myl_Pad_myl0_9", [], True))
    assert compare(one, two) == []
    assert compare(two, one) == ["new padding kernel for __myl_Pad"]


def test_a_line_that_cannot_be_read_is_new_once():
    now = report(unread=["Name: odd", "Name: odd"])
    assert compare(now, report()) == ["a kernel that cannot be read: Name: odd"]
    assert compare(now, now) == []


def write(path, tree):
    path.write_text(json.dumps(tree))
    return path


def test_the_baseline_is_the_engine_of_the_same_target_and_precision(tmp_path):
    engines = [report() | {"precision": "fp32"}, report(), report() | {"target": "rtx-sm89"}]
    path = write(tmp_path / "summary.json", {"engines": engines})
    assert choose(read_baseline(path, "rtx-sm86"), "fp16") == Build.model_validate(engines[1])
    with pytest.raises(BadInput, match=r"baseline has no int8 engine for rtx-sm86 \(it has fp16, fp32\)"):
        choose(read_baseline(path, "rtx-sm86"), "int8")
    del engines[2]["precision"]
    assert choose(read_baseline(write(path, {"engines": engines}), "rtx-sm89"), "int8") == Build.model_validate(
        engines[2]
    )
    with pytest.raises(BadInput, match=r"has no engine for rtx-sm75 \(it has rtx-sm86, rtx-sm89\)"):
        read_baseline(path, "rtx-sm75")


BAD = [
    (None, "cannot be read"),
    ("{", "not JSON"),
    ("[]", "no engine"),
    ("{}", "no engine"),
    ('{"engines": 5}', "no engine"),
    (json.dumps(report() | {"kernels": 5}), "kernels: should be a valid list"),
    (json.dumps(report(5)), r"kernels.0: .*; make it anew with `graphcomb build --json`"),
    (json.dumps(report(kernel("a", []), {"padding": True})), r"kernels.1.name: Field required"),
    (json.dumps(report(kernel("a", []) | {"nodes": 5})), "kernels.0.nodes: should be a valid list"),
    (json.dumps(report(kernel("a", [["b"]]))), "kernels.0.nodes.0: should be a valid string"),
    (json.dumps(report(unread=5)), "unread: should be a valid list"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_baseline_is_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "b.json").write_text(text)
    with pytest.raises(BadInput, match=f"--gate .*b.json: .*{message}"):
        read_baseline(tmp_path / "b.json", "rtx-sm86")


def test_more_kernels_and_memory_are_worse():
    before = report(kernel("a", ["a"]), bytes=1000, memory={"scratch": 100, "weights": 100})
    now = report(kernel("a", ["a"]), kernel("b", ["b"]), bytes=1100, memory={"scratch": 104, "weights": 106, "new": 7})
    assert compare(now, before) == [
        "2 kernels that compute, the baseline has 1",
        "engine: 1,100 bytes, the baseline has 1,000",
        "weights: 106 bytes, the baseline has 100",
    ]
    assert compare(before, now) == []
    assert compare(now, report(kernel("a", ["a"]), kernel("b", ["b"]))) == []  # an older report says nothing of memory


def ratio(low, high):
    return {"median": (low + high) / 2, "low": low, "high": high, "p5": 0.0}


def test_slower_is_an_interval_wholly_below_the_baselines():
    before = {"timings": [], "ratios": {"small": ratio(1.9, 2.1), "dense": None}}
    bundle = {"models": {}, "ratios": {"small": {"stream": ratio(1.9, 2.1), "graph": {}}, "dense": {}}}
    assert gate.ratios(before) == {"small": ratio(1.9, 2.1)} == gate.ratios({"model": "a run", "bench": before})
    assert gate.ratios(bundle) == {"small (stream)": ratio(1.9, 2.1)}
    for low, high, worse in ((1.5, 1.89, True), (1.5, 1.91, False), (2.2, 2.3, False)):
        lines = gate.compare_ratios({"small": ratio(low, high)}, gate.ratios(before))
        assert bool(lines) == worse
    assert gate.compare_ratios({"small": ratio(1.5, 1.7)}, gate.ratios(before)) == [
        "small: 1.60 (1.50 to 1.70) times faster, the baseline 2.00 (1.90 to 2.10)"
    ]
    assert gate.compare_ratios({}, gate.ratios(before)) == [
        "small: no figure; the baseline has 2.00 (1.90 to 2.10) times faster"
    ]


@pytest.mark.parametrize("content", ["[]", "{}", '{"ratios": {"a": null}, "timings": []}', '{"ratios": 3}'])
def test_a_baseline_without_a_ratio_is_refused(content, tmp_path):
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(BadInput, match="holds no measured ratio"):
        gate.read_ratios(path)
