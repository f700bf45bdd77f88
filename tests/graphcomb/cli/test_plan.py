"""`graphcomb plan` and `graphcomb comb`, on a toy network."""

import json
from pathlib import Path

import torch
import yaml
from rich.console import Console

from graphcomb import load


def test_plan_is_printed_edited_and_applied(cli, recipe, tmp_path: Path) -> None:
    path = recipe(passes=[{"RemoveChannels": {"ratio": 0.5, "round_to": 1}}])
    outcome = cli("plan", path, "--out", tmp_path / "plan.yaml")
    assert outcome.code == 0, outcome.err
    assert "0.weight:0" in outcome.out
    tree = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    rows = {row["name"]: row for row in tree["groups"]}
    assert {n: (r["size"], r["keep"], r["kind"]) for n, r in rows.items()} == {
        "0.weight:0": (16, 8, "channel"),
        "3.weight:0": (32, 16, "channel"),
    }
    assert all(0 < row["saves_macs"] < 1 for row in rows.values())
    assert {row["name"]: row["why"] for row in tree["frozen"]}.keys() == {"0.weight:1", "8.weight:0"}

    rows["0.weight:0"]["keep"] = 5
    rows["3.weight:0"]["prune"] = False
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree))
    assert cli("run", path, "--plan", tmp_path / "plan.yaml", "--out", tmp_path / "out").code == 0
    shapes = {n: tuple(p.shape) for n, p in load(tmp_path / "out" / "model.pt2").module().named_parameters()}
    assert shapes["0.weight"] == (5, 3, 3, 3)
    assert shapes["3.weight"] == (32, 5, 3, 3)


def test_an_unedited_plan_gives_the_unplanned_result(cli, recipe, tmp_path: Path) -> None:
    path = recipe()
    assert cli("plan", path, "--out", tmp_path / "plan.yaml").code == 0
    assert cli("run", path, "--plan", tmp_path / "plan.yaml", "--out", tmp_path / "planned").code == 0
    assert cli("run", path, "--out", tmp_path / "plain").code == 0
    first, second = (load(tmp_path / n / "model.pt2").module().state_dict() for n in ("planned", "plain"))
    assert all(torch.equal(first[k], second[k]) for k in second)


def test_nothing_to_plan(refused, recipe) -> None:
    assert refused("plan", recipe(passes=["Comb"])).startswith("passes: no RemoveChannels in the recipe")


def test_comb_lists_groups_and_reasons(cli) -> None:
    outcome = cli("comb", "toys:net", "--input", "1,3,8,8", "--arg", "classes=7", "--json")
    found = json.loads(outcome.out)
    groups = {g["name"]: g for g in found["groups"]}
    assert ["3.weight", 0] in groups["3.weight:0"]["members"]
    assert ["8.weight", 1] in groups["3.weight:0"]["members"]
    assert groups["3.weight:0"]["frozen"] is None
    assert groups["8.weight:0"]["size"] == 7
    assert "output of the program" in groups["8.weight:0"]["frozen"]
    table = cli("comb", "toys:net", "--input", "1,3,8,8").out
    assert "2 of 4 groups can shrink" in table
    why = cli("comb", "toys:net", "--input", "1,3,8,8", "--why", "0.weight").out
    assert "0.weight:1" in why
    assert "an input of the program" in why
    assert "no parameter 0.wait" in cli("comb", "toys:net", "--input", "1,3,8,8", "--why", "0.wait").err


def test_plan_lists_the_blocks_of_a_recipe_that_prunes_depth(cli, recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("graphcomb.cli.plan.console", Console(width=80))
    path = recipe(model={"source": "torchvision.models:resnet18"}, data=None, inputs=[[1, 3, 64, 64]],
                  passes=[{"PruneDepth": {"blocks": 2}}])  # fmt: skip
    out = cli("plan", path, "--out", tmp_path / "plan.yaml")
    assert out.code == 0, out.err
    assert all(text in out.out for text in ("residual", "kernels"))
    table = [[c.strip() for c in line.split("│")[1:-1]] for line in out.out.splitlines() if line.startswith("│")]
    assert table[0] == ["layer1.0", "residual", "18.9 M", "73,984", "9.4 M", "1"], "whole numbers at 80 columns"
    assert [row[0] for row in table] == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    text = (tmp_path / "plan.yaml").read_text()
    listed = [yaml.safe_load(line[4:]) for line in text.splitlines() if line.startswith("# - {")]
    assert [b["name"] for b in listed] == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert all(0 < b["saves_macs"] < b["macs"] and b["saves_kernels"] > 0 for b in listed)
    assert yaml.safe_load(text)["groups"] == []
