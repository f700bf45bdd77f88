"""Any part of a summary may be missing, and wrong values are named."""

import re

import pytest

from graphcomb.graph.errors import BadInput
from graphcomb.runtime.report.report import write_report

from .toys import page, summary


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


def test_a_summary_that_is_none_and_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(BadInput, match="report: the summary is a mapping of names to values, not a list"):
        write_report([1], tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"report\.html: cannot be written"):
        write_report({}, tmp_path / "file" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
