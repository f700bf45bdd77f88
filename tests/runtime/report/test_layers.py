"""What the report says of layers: every one shows, with what it was predicted and measured to take."""

import copy
import re

from .toys import layer, page, prediction, summary


def test_hundreds_of_layers_are_folded_and_none_is_lost(tmp_path):
    values = summary(layers=300)
    values["passes"][0]["refused"] = [{"what": f"w{i}", "why": f"roll_{i}: roll along the axis"} for i in range(200)]
    found, html = page(tmp_path, values)
    assert "the 20 layers that take longest, as predicted" in found.text
    assert "All 301 layers" in found.text
    before, _, folded = html.partition("All 301 layers")
    assert "layers.299.weight" in before
    assert "layers.9.weight" not in before  # those before it may be the largest savings
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
