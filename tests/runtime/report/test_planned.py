"""The section on a plan: what was asked for, predicted and measured."""

import pytest

from .toys import page, summary

MS = {
    "dense": 4.0, "dense_low": 3.9, "dense_high": 4.2, "asked": 2.0, "predicted": 1.9, "predicted_low": 1.5,
    "predicted_high": 2.5, "achieved": 2.1, "low": 2.05, "high": 2.15, "measured": True,
}  # fmt: skip


def planned(**fields):
    return {
        "target": "cpu", "precision": "fp32", "by": "latency table", "method": "joint", "met": True, "met_by": "measured",
        "edited": False, "ms": MS, "loss": {"predicted": 0.01, "measured": 0.02, "images": 64, "held_out": True},
        "changes": [{"what": "stem.weight:0", "option": "8 of 16", "saves_ms": 0.25, "loss": 0.003}],
    } | fields  # fmt: skip


@pytest.mark.parametrize("by", ["measured", "predicted"])
def test_times_stand_with_their_errors_and_with_what_they_are(tmp_path, by):
    ms = MS | {"measured": by == "measured"}
    found, _ = page(tmp_path, summary() | {"plan": planned(met_by=by, ms=ms)})
    for text in ("2 ms on cpu, fp32", "1.9 ms (1.5 to 2.5), by latency table", "2.1 ms (2.05 to 2.15): met"):
        assert text in found.text
    assert ("met as predicted, not measured" in found.text) == (by == "predicted")
    assert "stem.weight:0" in found.text
    assert "8 of 16" in found.text
    assert "measured in this run" in found.text


def test_a_budget_that_was_missed_and_a_plan_edited_by_hand_say_so(tmp_path):
    found, _ = page(tmp_path, summary() | {"plan": planned(ms=MS | {"asked": 1.5}, met=False)})
    assert "2.1 ms (2.05 to 2.15): missed" in found.text
    found, _ = page(tmp_path, summary() | {"plan": planned(edited=True)})
    assert "changed by hand" in found.text
    assert "2.05" not in found.text


def test_without_a_plan_there_is_no_section(tmp_path):
    found, _ = page(tmp_path, summary())
    assert ("h2", {}) in found.tags
    assert "Plan\n" not in found.text
