"""Depth, channels, merging, sparsity and distillation in one recipe: exact at each step, in every order that keeps all."""

import json

import pytest
import torch
from toys import residual_net

import graphcomb
from graphcomb.graph import sparse as masks
from graphcomb.graph.errors import GraphcombError
from graphcomb.pipeline import Pipeline
from graphcomb.recipe import parse_recipe

SHORT = {"steps": 3}
SPARSE = {"Sparsify": {"pattern": "2:4", "where": "all", "gradients": 16, "block": 48}}
CHANNELS = {"RemoveChannels": {"ratio": 0.25, "round_to": 4}}
TRAINED = {"RemoveChannels": {"params": 0.8, "round_to": 4, "interval": 1, "train": {"steps": 4}}}
DEPTH = {"PruneDepth": {"names": ["one.body", "three.body"], "train": SHORT}}
RELAXED = {"PruneDepth": {**DEPTH["PruneDepth"], "merged": False}}
SEARCHED = {"PruneDepth": {"blocks": 1, "supernet_steps": 2, "population": 2, "generations": 1, "train": SHORT}}
DISTILL = {"Distill": {**SHORT, "features": 0.5}}


def checked(records: list[dict]) -> None:
    """Every step by its own proof: surgery against the oracle, merging against the trained network, both in float64."""
    for record in records:
        if record["pass"] == "RemoveChannels":
            assert record["verified"]["oracle"] == "absence oracle"
            assert record["verified"]["error"] <= 1e-10
        if record["pass"] == "PruneDepth":
            assert record["changed"]
            assert record["merge"]["error"] <= 1e-10
        if record["pass"] == "Fuse" and record["changed"]:
            assert record["error"] <= 1e-10
            assert record["verified"]["error"] <= 1e-5


def all_legal(program: graphcomb.Program, count: int) -> bool:
    """Whether so many weights carry a mask, and each still the zeros of its pattern."""
    sparse = masks.sparse_weights(program)
    return len(sparse) == count and all(masks.legal(masks.weight(program, n), "2:4") for n in sparse)


def test_everything_in_one_recipe_from_the_command_line(cli, recipe, tmp_path) -> None:
    steps = [CHANNELS, SEARCHED, "Fuse", SPARSE, DISTILL]
    outputs = {"onnx": True, "report": True, "bench": False}
    path = recipe(model="toys:residual_net", passes=steps, outputs=outputs, precision="fp16")
    outcome = cli("run", path, "--out", tmp_path / "out", "--quiet")
    assert (outcome.code, outcome.err.strip()) == (0, "")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [r["pass"] for r in summary["passes"]] == ["RemoveChannels", "PruneDepth", "Fuse", "Sparsify", "Distill"]
    checked(summary["passes"])
    assert summary["passes"][1]["search"]["evaluated"] == 4
    assert summary["macs_ratio"] > 1.2
    assert summary["onnx_parity"] <= 1e-5
    assert summary["onnx_parity_fp16"] <= 1e-2
    program = graphcomb.load(tmp_path / "out" / "model.pt2")
    assert all_legal(program, len(summary["passes"][3]["changed"]))
    assert len(masks.sparse_weights(program)) >= 5
    exported = summary["onnx"]["fp32"]["sparse"]
    assert sum(w["pattern"] == "2:4" for w in exported) == len(masks.sparse_weights(program))
    before = (tmp_path / "out" / "passes" / "01-PruneDepth.pt2").stat().st_mtime_ns
    assert cli("run", path, "--out", tmp_path / "out", "--quiet").code == 0
    assert (tmp_path / "out" / "passes" / "01-PruneDepth.pt2").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def dense() -> graphcomb.Program:
    return graphcomb.capture(residual_net().eval(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")


@pytest.fixture(scope="module")
def data() -> list:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(4)
    ]


@pytest.mark.parametrize(
    "steps",
    [
        [DEPTH, TRAINED, "Fuse", SPARSE, DISTILL],
        [RELAXED, CHANNELS, DISTILL, "Fuse", SPARSE, DISTILL],
        [DEPTH, SPARSE, DISTILL, "Fuse"],  # PruneDepth has merged what Fuse would
    ],
    ids=["depth first", "merged late", "depth and sparsity"],
)
def test_orders_that_keep_everything(dense, data, steps, tmp_path) -> None:
    result = Pipeline(parse_recipe({"model": "m", "passes": steps}).passes).run(dense, data=data, val=data)
    checked(result.records)
    sparsified = next(r for r in result.records if r["pass"] == "Sparsify")
    assert all_legal(result.program, len(sparsified["changed"]))
    report = graphcomb.runtime.export_onnx(result.program, tmp_path / "model.onnx")
    assert report.parity <= 1e-5
    assert sum(w.pattern == "2:4" for w in report.sparse) == len(sparsified["changed"])
    assert result.program.macs < 0.8 * dense.macs


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [SPARSE, DEPTH],
            "one.body cannot be pruned: merging would fill up one.body.0.weight, .* run PruneDepth before",
        ),
        ([SPARSE, SEARCHED], "1 of 0 prunable blocks.* run PruneDepth before Sparsify"),
        ([SPARSE, CHANNELS], "would break the pattern of .* run RemoveChannels before Sparsify"),
    ],
    ids=["names", "search", "channels"],
)
def test_orders_that_would_destroy_masks_are_refused(dense, data, steps, message) -> None:
    with pytest.raises(GraphcombError, match=message):
        Pipeline(parse_recipe({"model": "m", "passes": steps}).passes).run(dense, data=data, val=data)


def test_blocks_without_masks_are_pruned_beside_sparse_ones(dense, data) -> None:
    sparse = {"Sparsify": {**SPARSE["Sparsify"], "include": ["two.*", "four.*"]}}
    steps = [sparse, {"PruneDepth": {**SEARCHED["PruneDepth"], "blocks": 2}}, DISTILL]
    result = Pipeline(parse_recipe({"model": "m", "passes": steps}).passes).run(dense, data=data, val=data)
    checked(result.records)
    assert {c["what"] for c in result.records[1]["changed"]} == {"one.body", "three.body"}
    assert all_legal(result.program, 4)


def test_merging_after_the_masks_is_not_done(dense, data) -> None:
    """The layers that PruneDepth left linear stay apart, each with its zeros, and the record says what to do instead."""
    steps = parse_recipe({"model": "m", "passes": [RELAXED, SPARSE, "Fuse"]}).passes
    result = Pipeline(steps).run(dense, data=data, val=data)
    fuse = result.records[2]
    why = {r["what"]: r["why"] for r in fuse["refused"]}
    for pair in ("one.body.0 + one.body.3", "three.body.1 + three.body.3"):
        assert "run Fuse before Sparsify" in why[pair]
    assert all_legal(result.program, len(result.records[1]["changed"]))
