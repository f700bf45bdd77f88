"""The HTML report: everything in the summary shows, nothing is assumed, nothing escapes."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from graphcomb.graph.errors import BadInput
from graphcomb.runtime.engines.base import EngineReport
from graphcomb.runtime.report import charts
from graphcomb.runtime.report.report import write_report
from graphcomb.runtime.report.text import si, size
from graphcomb.runtime.summary import Kernel

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Text, tags and ids of a page; fails where tags do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.text, self.skip = [], [], [], "", 0
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in VOID:
            self.open.append(tag)
        self.skip += tag == "style"

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for key, value in attributes if key == "id"]
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.skip -= tag == "style"

    def handle_data(self, data):
        if not self.skip:
            self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def layer(i, before=64, after=32):
    macs = {"before": 1e6 * (i + 1), "after": 2.5e5 * (i + 1)}
    return {
        "name": f"layers.{i}.weight",
        "kind": "conv",
        "channels": {"before": [16, before], "after": [8, after]},
        "macs": macs,
    }


def cost(macs, params):
    return {"macs": macs, "params": params}


def device():
    """What a bench bundle measured."""
    ms = {"p5": 4.0, "median": 4.25, "p95": 5.0, "p99": 5.5}

    def model(factor, error):
        run = {"runs": 100, "host_ms": ms, "gpu_ms": {k: v / factor for k, v in ms.items()}}
        return {
            "latency": {"graph": run},
            "power": {"total_mw": 7250.0, "energy_mj": 30.8 / factor, "temperatures_c": {"tj": 48.2}},
            "parity": {"finite": error is not None, "error": error},
            "layers": [{"name": "conv1 + relu", "ms": 3.0 / factor}, {"name": "/fc0", "ms": 1.0 / factor}],
            "engine": {},
            "file": "net.onnx",
        }

    return {
        "device": {"model": "Jetson Orin Nano", "power_mode": "MAXN_SUPER"},
        "format": "graphcomb-bench/1", "engine": "tensorrt", "version": "10.3.0", "date": "", "idle": {}, "monitor": None,
        "bundle": {
            "precision": "fp16", "target": "orin-nano",
            "models": {"big": {"layers": [work(0, 1024)]}, "small": {"layers": [work(0, 512)]}},
        },
        "models": {"big": model(1, 2e-3), "small": model(2.5, None)},
        "ratios": {"small": {"graph": {"median": 2.5}}},
        "notes": ["small: outputs that are not finite"],
    }  # fmt: skip


def work(i, width):
    """A linear layer of a bundle, or of one side of a prediction."""
    return {
        "name": f"layers.{i}.weight", "node": f"linear_{i}", "call": "linear", "op": "matmul",
        "sizes": {"batch": 1, "inputs": width, "outputs": width}, "options": {"rows": 4096, "shared": 1},
        "onnx": [f"/fc{i}", f"fc{i}_out"],
    }  # fmt: skip


def prediction(layers=3):
    """What is predicted of a network whose first layer has no channels that can go, and whose last op has no weights."""

    def side(i, width, ms):
        verdict = "" if i else "none of its channels can go"
        cost = {"macs": 1000 * width, "padded_macs": 1000 * (width + 4), "bytes": 8e5 * width, "ms": ms, "half": 0.5}
        return work(i, width) | cost | {"bound": "compute" if ms > 1 else "launch", "verdict": verdict}

    rows = [
        {"name": f"layers.{i}.weight", "op": "matmul", "before": side(i, 64, 1.5), "after": side(i, 32, 0.75)}
        for i in range(layers)
    ]
    loose = {
        "node": "add",
        "call": "add",
        "half": 1.0,
        "op": "copy",
        "sizes": {"entries": 5},
        "options": {},
        "macs": 0,
        "padded_macs": 0,
        "bytes": 40,
        "ms": 0.002,
    }
    gone = {"name": "add", "op": "copy", "before": loose | {"bound": "memory", "verdict": ""}, "after": None}
    return {
        "by": "a roofline", "target": "orin-nano", "precision": "fp16", "batch": 1, "run_ms": 0.0, "calibration": None,
        "ms": {"before": 1.5 * layers + 0.002, "after": 0.75 * layers}, "layers": [*rows, gone],
    }  # fmt: skip


def summary(layers=3):
    ms = {"p5": 4.9, "p25": 5.0, "median": 5.1, "p75": 5.2, "p95": 5.4, "p99": 5.9}
    runs = {"runs": 50, "rejected": 0, "repeats": 1}
    engine = EngineReport(
        "1.7", "net.rtx", "fp16",
        [Kernel(name="conv_k", kind="correlation", nodes=("conv", "relu"), inputs=("fp16[1,3,8,8]",),
                outputs=("fp16[1,61,8,8]",)),
         Kernel(name="pad_k", kind="kgen", nodes=("conv2",), padding=True)],
        {"weights": 89_128, "activations": 8_716_288}, ["a warning of the library"], "tensorrt_rtx", "rtx-sm86", 768_020,
        0.42,
    )  # fmt: skip
    pads = [{"kernel": "pad_k", "how": "kernel", "nodes": ["conv2"], "axis": 1, "before": 61, "after": 62,
             "alignment": 2},
            {"kernel": "pad_k", "how": "kernel", "nodes": ["conv3"], "axis": 1, "before": 64, "after": 128,
             "alignment": None, "note": "each of its 64 groups has 1"}]  # fmt: skip
    return {
        "model": "my.models:net",
        "target": "rtx-sm86",
        "accuracy_before": 0.9861,
        "accuracy_after": 0.9833,
        "cost": {"before": cost(8e8, 11e6), "after": cost(2e8, 2.75e6)},
        "macs_ratio": 4.0,
        "params_ratio": 4.0,
        "latency_ratio": 3.12,
        "bench": {
            "timings": [
                {"name": "dense", "ms": ms} | runs,
                {"name": "small", "ms": {k: v / 3.12 for k, v in ms.items()}} | runs,
            ],
            "ratio": 3.12,
            "rounds": 50,
            "contended": False,
            "environment": {},
            "ratios": {"small": {"p5": 3.02, "median": 3.12, "p95": 3.19}},
            "note": "",
        },
        "surgery_error": 3.4e-14,
        "onnx_parity": 2.1e-6,
        "onnx_parity_fp16": 1.3e-3,
        "engine": "net.rtx",
        "engines": [
            engine.to_dict()
            | {
                "pads": pads,
                "unfused": [{"kernel": "q_k", "how": "float", "nodes": ["conv2"]}],
                "origins": {"conv2": {"node": "conv2d_1", "module": "b", "passes": ["SlimPass"]}},
            }
        ],
        "devices": [device()],
        "prediction": prediction(layers),
        "passes": [
            {
                "pass": "RemoveChannels",
                "options": {"ratio": 0.5, "kinds": ["channel", "head"], "macs": None},
                "changed": [],
                "layers": [layer(i) for i in range(layers)],
                "refused": [
                    {"what": "fc.weight:0", "why": "linear (/a/b/c/net.py:7: return fc(x)): an output of the program"},
                    {"what": "aux.weight:0", "why": "linear_1 (/a/b/c/net.py:9: aux(x)): an output of the program"},
                    {"what": "stem.weight:1", "why": "x: an input of the program"},
                ],
                "cost": {"before": cost(8e8, 11e6), "after": cost(2e8, 2.75e6)},
                "accuracy": {"before": 0.9861, "after": 0.51},
                "verified": {"error": 3.4e-14},
                "seconds": 1.31,
            },
            {
                "pass": "Distill",
                "options": {"epochs": 2},
                "changed": ["weights"],
                "refused": [],
                "cost": {"before": cost(2e8, 2.75e6), "after": cost(2e8, 2.75e6)},
                "accuracy": {"before": 0.51, "after": 0.9833},
                "epochs": [{"epoch": 1, "loss": 2.0, "val": 0.7}, {"epoch": 2, "loss": 0.5, "val": 0.98}],
                "seconds": 60.2,
            },
        ],
        "environment": {"python": "3.11.7", "cpu": "a CPU", "seed": 7, "versions": {"torch": "2.14.1"}},
        "files": {"onnx": "out/model.onnx"},
    }


@pytest.fixture
def quick(monkeypatch):
    """Plots are drawn but not written out, which takes most of the time."""
    monkeypatch.setattr(charts, "_svg", lambda figure, name: "<svg></svg>")


def page(tmp_path, values):
    path = write_report(values, tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    return Page(html), html


def test_everything_of_the_summary_shows(tmp_path):
    found, html = page(tmp_path, summary())
    text = " ".join(found.text.split())
    for expected in (
        "my.models:net",
        "4× fewer multiply-accumulates, 4× fewer parameters, 3.12× faster",
        "98.33 %", "from 98.61 %, −0.28 points",
        "800 M → 200 M", "11 M → 2.75 M",
        "5.1 ms → 1.63 ms, 90 % of pairs 3.02× to 3.19×",
        "surgery error", "3.4e-14",
        "ONNX parity, fp16", "1.3e-03", "the fp16 file, relative to the fp32 program",
        "2 kernels, 768 kB, 1 padding kernel",
        "layers.0.weight", "64 → 32", "1 M → 250 k",
        "RemoveChannels", "ratio 0.5", "kinds channel, head", "51.00 %", "1.3 s", "Distill",
        "an output of the program · 2", "fc.weight:0", "linear c/net.py:7: return fc(x)", "an input of the program · 1",
        "Engine for rtx-sm86", "2 from 3 ONNX nodes", "1 only pad", "weights 89.1 kB", "a warning of the library",
        "61 → 62", "none (each of its 64 groups has 1)", "an extra kernel", "fp16[1,3,8,8] → fp16[1,61,8,8]",
        "SlimPass", "Quantisation that buys nothing · 1", "computes in floating point although",
        "Measured on Jetson Orin Nano", "CUDA graph", "4.25 ms", "1.7 ms", "2.5× faster", "7.25 W", "30.8 mJ", "12.3 mJ",
        "MAXN_SUPER", "tensorrt 10.3.0", "big: tj 48 °C", "2.0e-03", "no figure", "small: outputs that are not finite",
        "Slowest layers", "conv1 + relu", "75.0 %", "Accuracy against latency on Jetson Orin Nano",
        "a CPU", "torch=2.14.1", "out/model.onnx",
    ):  # fmt: skip
        assert expected in text, expected
    assert "2.1e-06" not in text, "the fp32 file's, which no engine was built from"
    assert "macs None" not in text
    assert len(re.findall("<svg", html)) == found.count("figure") == 8


def test_the_page_is_self_contained_and_fits_a_phone(tmp_path):
    found, html = page(tmp_path, summary())
    assert not [t for t, _ in found.tags if t in ("script", "link", "img", "iframe")]
    links = {v for _, a in found.tags for k, v in a.items() if v and k.split(":")[-1] in ("href", "src")}
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)|@import", html)
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in links} <= set(found.ids)
    assert 'name="viewport" content="width=device-width' in html
    assert "prefers-color-scheme: dark" in html


def test_plots_are_valid_svg_in_the_pages_colours(tmp_path):
    _, html = page(tmp_path, summary())
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
        assert "var(--after)" in svg
        assert not re.search(r"#0102|<style", svg)
        assert 'width="' not in svg[: svg.index(">")]


def test_the_plot_of_channels_has_the_layers_heights(tmp_path):
    values = summary() | {"prediction": None}
    values["passes"][0]["layers"] = [layer(0, 100, 100), layer(1, 100, 50)]
    _, html = page(tmp_path, values)
    svg = re.search(r"<figcaption>Output channels.*?(<svg.*?</svg>)", html, re.DOTALL)[1]
    path = re.search(r'<path d="([^"]*)"[^>]*style="[^"]*fill: var\(--after\)', svg)[1]
    numbers = [
        [float(n) for n in re.findall(r"[-\d.]+", line)] for line in path.strip().splitlines() if "z" not in line
    ]
    ys = sorted({round(y, 3) for _, y in numbers})
    top, middle, bottom = ys
    assert bottom - middle == pytest.approx((bottom - top) / 2, rel=1e-3)


@pytest.mark.parametrize("key", summary())
def test_any_part_may_be_missing(tmp_path, quick, key):
    values = summary()
    del values[key]
    page(tmp_path, values)
    values[key] = None
    page(tmp_path, values)


def test_a_nearly_empty_summary(tmp_path):
    found, html = page(tmp_path, {})
    assert "graphcomb run" in found.text
    assert "<svg" not in html
    found, html = page(tmp_path, {"accuracy_after": 31.5, "passes": [], "engine": "a/net.rtx", "engines": []})
    assert "31.5" in found.text
    assert "net.rtx" in found.text


def shown_or_named(tmp_path, values, key):
    """A page, or one line that names the field."""
    try:
        page(tmp_path, values)
        return
    except BadInput as error:
        line = str(error)
    assert re.match(rf"report: {key}\b.*, got ", line), line
    assert "\n" not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("junk", ["text", [1, None, "x"], {"a": {"b": None}}, float("nan"), True])
@pytest.mark.parametrize("key", summary())
def test_wrong_values_are_named(tmp_path, quick, key, junk):
    shown_or_named(tmp_path, summary() | {key: junk}, key)


@pytest.mark.parametrize("junk", [None, "text", [1], {"a": 1}])
@pytest.mark.parametrize("key", ["layers", "refused", "cost", "accuracy", "verified", "options", "epochs", "seconds"])
def test_wrong_values_in_a_record_are_named(tmp_path, quick, key, junk):
    values = summary()
    values["passes"][0][key] = junk
    shown_or_named(tmp_path, values, rf"passes\.0\.{key}")


def test_text_is_escaped_everywhere(tmp_path):
    evil = "<script>alert(1)</script>$x^2$\"'&"

    def spoil(value):
        if isinstance(value, str):
            return evil
        if isinstance(value, dict):
            return {k if k in KEEP else k + evil: spoil(v) for k, v in value.items()}
        return [spoil(v) for v in value] if isinstance(value, list) else value

    KEEP = set(re.findall(r"\w+", repr(summary())))
    values = spoil(copy.deepcopy(summary()))
    found, html = page(tmp_path, values)
    assert found.count("script") == 0
    assert "<script>" in found.text  # as text
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


def test_hundreds_of_layers_are_folded_and_none_is_lost(tmp_path):
    values = summary(layers=300)
    values["passes"][0]["refused"] = [{"what": f"w{i}", "why": f"roll_{i}: roll along the axis"} for i in range(200)]
    found, html = page(tmp_path, values)
    assert "the 20 layers that take longest, as predicted" in found.text
    assert "All 301 layers" in found.text
    before, _, folded = html.partition("All 301 layers")
    assert "layers.299.weight" in before
    assert "layers.0.weight" not in before
    assert all(f"layers.{i}.weight" in folded for i in range(300))
    assert "roll along the axis" in found.text
    assert re.search(r"<details>\s*<summary>roll along the axis", html)
    assert len(html) < 1_500_000


def test_layers_over_several_passes_are_the_first_before_and_the_last_after(tmp_path):
    values = summary()
    again = copy.deepcopy(values["passes"][0])
    again["layers"] = [layer(0, 32, 24)]
    values["passes"].append(again)
    found, _ = page(tmp_path, values)
    assert "64 → 24" in found.text
    assert "32 → 24" not in found.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"kernels": 5},
        {"kernels": [{"name": "k", "nodes": 5, "inputs": 5, "outputs": [5]}, {}, 5]},
        {"warnings": 5},
        {"pads": [{}, {"how": ["kernel"]}, {"nodes": 5}, {"nodes": [["a"], "conv2"]}, 5]},
        {"unfused": [{}, {"how": 5, "nodes": 5}, {"nodes": [5]}]},
        {"origins": {"conv2": {"passes": 5}}},
        {"origins": {"conv2": 5}},
        {"memory": 5, "padding": 5, "bytes": "x", "seconds": "x"},
    ],
)
def test_an_engine_report_that_is_not_one_is_named(tmp_path, wrong):
    values = summary()
    values["engines"][0] |= wrong
    with pytest.raises(BadInput, match=rf"^report: engines\.0\.({'|'.join(wrong)})\b[^\n]*, got [^\n]*$"):
        write_report(values, tmp_path / "report.html")


def test_a_contended_machine_gives_no_figure_and_a_slower_result_says_so(tmp_path):
    values = summary() | {"latency_ratio": None}
    values["bench"]["note"] = "no figure: only 3 of 50 rounds ran undisturbed"
    found, html = page(tmp_path, values)
    assert "only 3 of 50 rounds ran undisturbed" in found.text
    assert 'class="tile watch"' in html
    found, _ = page(tmp_path, summary() | {"latency_ratio": 0.8})
    assert "1.25× slower" in found.text


def test_a_ratio_says_what_was_measured_where(tmp_path, quick):
    values = summary() | {"inputs": [[2, 3, 8, 8]]}
    values["bench"]["environment"] = {"cpu": "EPYC 7", "threads": 1, "versions": {"onnxruntime": "1.31.1"}}
    text = " ".join(page(tmp_path, values)[0].text.split())
    where = "ONNX Runtime 1.31.1, fp32, 1 thread of EPYC 7, batch 2"
    assert f"3.12× faster in {where}" in text, "in the headline"
    assert f"measured in {where}, says nothing of rtx-sm86" in text
    assert "predicted on orin-nano 4.5 ms → 2.25 ms 2× faster, fp16, batch 1" in text.replace("ms2×", "ms 2×").replace(
        "orin-nano4", "orin-nano 4"
    )


def test_the_cost_of_int8_layers_that_write_floats_is_named(tmp_path, quick):
    values = summary()
    values["engines"][0]["unfused"] += [{"kernel": "c", "how": "wide", "nodes": [f"conv{i}"]} for i in range(3)]
    text = page(tmp_path, values)[0].text
    assert "Quantisation that buys nothing · 1" in text
    assert "write floating point, and take a kernel more each · 3" in text
    assert "conv0" in text


def test_plots_say_in_words_what_they_show(tmp_path, quick):
    found, html = page(tmp_path, summary())
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', html)
    assert len(labels) == found.count("figure")
    assert "Accuracy against multiply-accumulates. dense: 800 M, 98.61 %" in labels[0]


def test_bars_have_the_width_of_their_column_and_layers_are_sorted(tmp_path, quick):
    values = summary()
    values["prediction"]["layers"][1]["before"]["ms"] = 9.0
    found, html = page(tmp_path, values)
    first = html.index("largest first, by predicted time")
    assert html.index("layers.1.weight", first) < html.index("layers.0.weight", first)
    assert "All 4 layers in the order of the network" in found.text
    assert re.search(r"\.bar \{ display: block;[^}]*width: 100%", html), "not what the number beside leaves"


def test_bars_of_a_column_have_one_scale(tmp_path, quick):
    values = summary()
    before, after = {"ms": 8.0}, {"ms": 2.0}
    for row in values["prediction"]["layers"][:2]:
        row["before"] |= before
        row["after"] |= after
        before, after = {"ms": 4.0}, {"ms": 1.0}
    _, html = page(tmp_path, values)
    widths = re.findall(r'aria-label="predicted time [^"]*"><i[^>]*width:([\d.]+)%"></i><i[^>]*width:([\d.]+)%', html)
    assert {("100.0", "25.0"), ("50.0", "12.5")} <= set(widths)


def test_the_error_of_a_prediction_is_said(tmp_path, quick):
    doubt = {"factor": 1.9, "source": "a data sheet"}
    found, _ = page(tmp_path, summary() | {"prediction": prediction() | {"uncertainty": doubt}})
    assert "off by up to 1.9 times: a data sheet" in " ".join(found.text.split())


def test_the_parity_is_that_of_the_file_engines_are_built_from(tmp_path, quick):
    files = {"fp16": {"agreement": 0.975, "tolerance": 0.1, "float32": {"a": "Exp: ...", "b": "Mul: ..."}}}
    files["fp16"] |= {
        "path": "",
        "precision": "fp16",
        "opset": 20,
        "bytes": 1,
        "parity": 9.6e-4,
        "cosine": 1.0,
        "nodes": {},
    }
    values = {"precision": "fp16", "onnx_parity": 2.8e-7, "onnx_parity_fp16": 9.6e-4, "onnx": files}
    text = page(tmp_path, values)[0].text
    assert "9.6e-04" in text
    assert "2.8e-07" not in text
    assert "97.5\u00a0% of decisions on real samples the same, limit 0.1, 2 nodes kept in fp32" in text


def test_the_prediction_stands_beside_the_measurement(tmp_path, quick):
    found, _ = page(tmp_path, summary() | {"latency_predicted": 3.5, "target": "cpu"})
    assert "predicted 3.5×, 12 % off" in " ".join(found.text.split())
    found, _ = page(tmp_path, summary() | {"latency_predicted": 3.5})  # measured on the CPU, predicted for a GPU
    assert "predicted 3.5× on rtx-sm86" in " ".join(found.text.split())
    found, _ = page(tmp_path, {"latency_predicted": 2.0})
    assert "2× faster" in found.text
    assert "predicted, not measured" in found.text


def test_layers_show_what_they_are_predicted_to_take_and_what_was_measured(tmp_path, quick):
    found, _ = page(tmp_path, summary())
    text = " ".join(found.text.split())
    for expected in (
        "predicted by", "a roofline", "1.5 → 0.75 ms", "padding adds 6 → 12 %, 51.2 MB → 25.6 MB", "compute → launch",
        "predicted on orin-nano", "4.5 ms → 2.25 ms", "measured on Jetson Orin Nano: 4.25 ms → 1.7 ms",
        "4.25 ms measured, 4.5 ms predicted (+6 %) → 1.7 ms measured, 2.25 ms predicted (+32 %)",
        "none of its channels can go: 1 layer, 33 % of the time", "measured 1 ms → 0.4 ms", "0.002 → 0 ms",
        "calibrated with 2 models and 2 kernels measured by tensorrt 10.3.0 (common factor)",
    ):  # fmt: skip
        assert expected in text, expected
    assert re.search(r"4\.25 ms5\.5 ms[\d.]+ ms \([+−]\d+ %\)", text)  # median, p99, predicted
    here = prediction() | {"target": "cpu", "measured_ms": {"before": 4.0, "after": 2.5}}
    found, _ = page(tmp_path, summary() | {"prediction": here})
    assert "this machine: 4 ms measured, 4.5 ms predicted (+13 %)" in " ".join(found.text.split())
    found, _ = page(tmp_path, {"prediction": None, "prediction_note": "the machine is too busy"})
    assert "predicted time" not in found.text  # there are no layers to stand beside


def test_a_network_that_no_pass_lists_shows_its_predicted_layers(tmp_path, quick):
    found, _ = page(tmp_path, {"prediction": prediction()})
    text = " ".join(found.text.split())
    assert "layers.2.weight" in text
    assert "64 → 32" in text
    assert "add" in text


def chromium():
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(tmp_path, width):
    path = write_report(summary(60), tmp_path / "report.html")
    # The page in a frame of the width, since a headless window has a smallest one; the outer page measures it.
    outer = tmp_path / "outer.html"
    outer.write_text(
        f"""<iframe id=f src=report.html style="width:{width}px;height:800px;border:0"></iframe><p id=r></p>
        <script>onload = () => {{
          const d = f.contentDocument, wide = [...d.querySelectorAll("body *")].filter(e =>
            e.getBoundingClientRect().right > {width} + 1 && !e.closest("svg"));
          const closed = [...d.querySelectorAll("h2")].filter(h => h.getBoundingClientRect().height < 10).length;
          r.textContent = JSON.stringify({{scroll: d.documentElement.scrollWidth, sections: d.querySelectorAll("h2").length,
            wide: wide.length, closed, first: wide.length ? wide[0].outerHTML.slice(0, 200) : ""}}) }}</script>"""
    )
    options = (
        "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --virtual-time-budget=5000 --dump-dom"
    )
    command = [chromium(), *options.split(), f"--user-data-dir={tmp_path}/profile", outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = json.loads(
        re.search(r'<p id="r">(\{.*?\})</p>', done.stdout)[1].replace("&quot;", '"').replace("&lt;", "<")
    )
    assert found["scroll"] <= width, found
    assert found["sections"] >= 6
    assert found["closed"] == 0
    assert path.exists()


def test_more_kernels_and_dead_branches_are_named(tmp_path):
    given = summary()
    records = given["passes"]
    records[0]["kernels"] = {"before": 46, "after": 52, "more": ["mean_1"], "dead": {"softmax_1": ["conv2d_4"]}}
    text = write_report(given, tmp_path / "report.html").read_text()
    assert "46 → 52 predicted; new: mean_1" in text
    assert "softmax_1 has a single entry left and decides nothing; only for it: conv2d_4" in text
    records[0]["kernels"] = {"before": 1, "after": 2}
    write_report(given, tmp_path / "report.html")
    for junk in (5, {"before": "x", "more": 5, "dead": [1]}, {"dead": {"a": 5}}):
        records[0]["kernels"] = junk
        with pytest.raises(BadInput, match=r"^report: passes\.0\.kernels"):
            write_report(given, tmp_path / "report.html")


def test_same_summary_same_plots(tmp_path):
    plots = [re.findall(r"<svg.*?</svg>", page(tmp_path, summary())[1], re.DOTALL) for _ in range(2)]
    assert plots[0] == plots[1]


def test_a_summary_that_is_none_and_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(BadInput, match="report: the summary is a mapping of names to values, not a list"):
        write_report([1], tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"report\.html: cannot be written"):
        write_report({}, tmp_path / "file" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.6, "1 k"), (1000, "1 k"), (4.09e9, "4.09 G"), (2.5e15, "2.5e+03 T")],
)
def test_counts_in_thousands(value, text):
    assert si(value) == text


def test_bytes():
    assert [size(n) for n in (80, 768_020, 8_716_288, None)] == ["80 B", "768 kB", "8.72 MB", "–"]
