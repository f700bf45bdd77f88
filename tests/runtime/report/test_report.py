"""The HTML report: everything in the summary shows, nothing is assumed, nothing escapes."""

import copy
import itertools
import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest

from graphcomb.graph.errors import BadInput
from graphcomb.graph.files import finite
from graphcomb.runtime.report.report import render, write_report
from graphcomb.runtime.summary import read_summary

from .toys import Page, page, prediction, summary


def test_everything_of_the_summary_shows(tmp_path):
    found, html = page(tmp_path, summary())
    text = " ".join(found.text.split())
    for expected in (
        "my.models:net",
        "4× fewer multiply-accumulates, 4× fewer parameters, 3.12× faster",
        "98.33 %", "from 98.61 %, −0.28 points; 95 % interval 96.41 % to 99.23 %",
        "800 M → 200 M", "11 M → 2.75 M",
        "5.1 ms → 1.63 ms, 95 % interval of the median 3.09× to 3.14×, 90 % of pairs 3.02× to 3.19×",
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
    assert not [t for t, _ in found.tags if t in ("link", "img", "iframe")]
    assert [a for t, a in found.tags if t == "script"] == [{}]  # inline: the one that sorts
    links = {v for _, a in found.tags for k, v in a.items() if v and k.split(":")[-1] in ("href", "src")}
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)|@import", html)
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in links} <= set(found.ids)
    assert 'name="viewport" content="width=device-width' in html
    assert "prefers-color-scheme: dark" in html


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
    assert html.count("<script") == 1  # the page's own, in which there are no values
    assert "alert(1)" not in html[html.index("<script") :]
    assert "<script>" in found.text  # as text
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


def test_a_contended_machine_gives_no_figure_and_a_slower_result_says_so(tmp_path):
    values = summary() | {"latency_ratio": None}
    values["bench"]["note"] = "no figure: only 3 of 50 rounds ran undisturbed"
    found, html = page(tmp_path, values)
    assert "only 3 of 50 rounds ran undisturbed" in found.text
    assert 'class="tile watch"' in html
    found, _ = page(tmp_path, summary() | {"latency_ratio": 0.8})
    assert "1.25× slower" in found.text


def test_a_metric_that_is_nan_is_not_replaced_by_the_dense_one(tmp_path, quick):
    values = summary() | {"accuracy_after": float("nan")}
    found, html = page(tmp_path, values)
    assert "not finite" in found.text
    assert "from 98.61" in found.text
    assert 'class="tile watch"' in html


def test_a_ratio_says_what_was_measured_where(tmp_path, quick):
    values = summary() | {"inputs": [[2, 3, 8, 8]]}
    values["bench"]["environment"] = {"cpu": "EPYC 7", "threads": 1, "versions": {"onnxruntime": "1.31.1"}}
    text = " ".join(page(tmp_path, values)[0].text.split())
    where = "ONNX Runtime 1.31.1, fp32, 1 thread of EPYC 7, batch 2"
    assert f"3.12× faster in {where}" in text, "in the headline"
    values["bench"]["environment"]["versions"]["openvino"] = "2026.4"
    other = " ".join(page(tmp_path, values | {"target": "cpu-openvino"})[0].text.split())
    assert "3.12× faster in OpenVINO 2026.4, fp32, 1 thread of EPYC 7" in other
    assert "another device than rtx-sm86, where padding and kernel launches weigh otherwise" in text
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


def test_what_comes_first_is_score_latency_a_plot_savings_and_refusals(tmp_path, quick):
    found, html = page(tmp_path, summary())
    text = " ".join(found.text.split())
    first = (
        "98.33 %",
        "3.12× faster",
        "Accuracy against",
        "Saved most",
        "layers.0.weight",
        "Left alone most often",
        "Layers",
    )
    places = [text.index(word, 0 if i < 2 else text.index("Accuracy against")) for i, word in enumerate(first)]
    assert places[2:] == sorted(places[2:])
    assert html.index("98.33") < html.index("3.12× faster</div>") < html.index("<figure") < html.index("Saved most")
    assert "750 µ" not in text
    assert "0.75 ms predicted, 33 % of what was saved, 64 → 32 channels" in text
    assert "an output of the programfc.weight:0 and 1 more" in text


def test_savings_are_multiply_accumulates_without_a_prediction(tmp_path, quick):
    text = " ".join(page(tmp_path, summary() | {"prediction": None})[0].text.split())
    assert "layers.2.weight 2.25 M multiply-accumulates, 50 % of what was saved, 64 → 32 channels" in text.replace(
        "weight2", "weight 2"
    )


def test_headings_are_in_order_and_tables_have_captions(tmp_path, quick):
    found, _ = page(tmp_path, summary())
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert found.count("table") == found.count("caption") > 4
    assert all(attributes.get("scope") == "col" for tag, attributes in found.tags if tag == "th")


def places(value, path=()):
    """The places of all numbers in JSON values."""
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(child, (*path, key))
    elif isinstance(value, float):
        yield path


@pytest.mark.parametrize("bad", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_no_number_that_is_not_finite_breaks_the_page(bad, quick):
    for path in places(summary()):
        values = json.loads(json.dumps(summary()))
        *above, last = path
        parent = values
        for key in above:
            parent = parent[key]
        parent[last] = bad
        try:
            found = read_summary(values, "summary.json")
        except BadInput:  # a field that is a whole number, so that a run cannot write it either
            continue
        Page(render(found))
        stored = json.loads(json.dumps(finite(values), allow_nan=False))
        if path[0].startswith(("accuracy", "onnx_parity", "latency", "surgery")) or {"accuracy", "epochs"} & set(path):
            Page(render(read_summary(stored, "summary.json")))


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="needs Chromium")
def test_a_browser_sorts_a_table(tmp_path):
    path = tmp_path / "report.html"
    page(tmp_path, summary())
    path.write_text(
        path.read_text()
        + """<p id=r></p><script>
      const t = document.querySelector("table.layers"), b = t.querySelectorAll("th button")[3];
      const macs = () => [...t.tBodies[0].rows].map(r => r.cells[3].dataset.key);
      b.click(); const up = macs(), state = b.parentNode.ariaSort; b.click();
      document.getElementById("r").textContent = JSON.stringify([up, state, macs()]);</script>"""
    )
    options = "--headless --no-sandbox --disable-gpu --virtual-time-budget=2000 --dump-dom"
    command = [chromium(), *options.split(), f"--user-data-dir={tmp_path}/profile", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    up, state, down = json.loads(re.search(r'<p id="r">(.*?)</p>', done.stdout)[1].replace("&quot;", '"'))
    assert state == "ascending"
    assert [float(v) for v in up] == sorted(map(float, up))
    assert down == up[::-1]
