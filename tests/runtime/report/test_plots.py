"""Plots of the report: valid, in its colours, the same for the same summary, and said in words."""

import re
from xml.etree import ElementTree

import pytest

from .toys import layer, page, summary


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


def test_plots_say_in_words_what_they_show(tmp_path, quick):
    found, html = page(tmp_path, summary())
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', html)
    assert len(labels) == found.count("figure")
    assert "Accuracy against multiply-accumulates. dense: 800 M, 98.61 %" in labels[0]


def test_same_summary_same_plots(tmp_path):
    plots = [re.findall(r"<svg.*?</svg>", page(tmp_path, summary())[1], re.DOTALL) for _ in range(2)]
    assert plots[0] == plots[1]
