"""`graphcomb targets` and `graphcomb check`."""

import json
from pathlib import Path

from graphcomb.runtime.devices.table import TARGETS, TRIED

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def test_every_target_is_listed_with_how_far_it_was_tried(cli, tmp_path) -> None:
    outcome = cli("targets", "--json", tmp_path / "t.json")
    assert outcome.code == 0, outcome.err
    rows = {row["name"]: row for row in json.loads((tmp_path / "t.json").read_text())}
    assert list(rows) == list(TARGETS)
    assert all(name in outcome.out for name in TARGETS)
    assert rows["agx-orin"]["releases"]["JetPack 6.1, 6.2"] == "10.3"
    assert {row["evidence"] for row in rows.values()} == {"measured", "built", "untested"}


def test_what_is_said_to_be_built_is_in_the_results() -> None:
    text = (RESULTS / "engines.json").read_text()
    assert {name for name in TARGETS if f'"{name}"' in text} == {n for n, tried in TRIED.items() if tried == "built"}


def test_a_machine_is_described_with_what_each_part_is_for(cli, tmp_path) -> None:
    outcome = cli("check", "--json", tmp_path / "c.json")
    assert outcome.code == 0, outcome.err
    found = {row["what"]: row for row in json.loads((tmp_path / "c.json").read_text())}
    assert {"processor", "GPU", "onnxruntime", "tensorrt", "inductor"} <= found.keys()
    assert "builds and runs engines on this processor" in found["onnxruntime"]["means"]
    assert all(row["means"] for row in found.values() if row["what"] != "driver")
