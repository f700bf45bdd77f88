"""One budget, a plan, and what carries it out: from Python and through the command line."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import onnx
import pytest
import torch
import yaml
from torch import nn

import graphcomb
from graphcomb import BadInput, Unreachable
from graphcomb.cli import main
from graphcomb.graph.errors import Contended
from graphcomb.graph.verify import equivalence
from graphcomb.passes.quantize.regions import quantised_layers
from graphcomb.runtime import LatencyTable, Roofline, get_target
from graphcomb.runtime.export.to_onnx import export_onnx
from graphcomb.runtime.onnx_file import precision
from graphcomb.tuning.plan import LayerRow, load_plan
from graphcomb.tuning.sensitivity import measure
from graphcomb.tuning.tables import latency_model

OPTIONS = {"table": "roofline", "samples": 16, "importance": "magnitude", "rounds": 1}


class Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.one, self.two = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.Conv2d(inner, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.two(torch.relu(self.norm(self.one(x)))))


def net(width: int = 16, inner: int = 32) -> nn.Module:
    """Two residual blocks on a trunk; recipes name it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), Block(width, inner), Block(width, inner),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4),
    )  # fmt: skip
    return model.eval()


def pointwise(width: int) -> nn.Module:
    """Three pointwise convolutions and a classifier, of which the second and the third convolution are one region."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4),
    )  # fmt: skip
    return model.eval()


def batches() -> list[torch.Tensor]:
    """Images without labels; recipes name them."""
    return list(torch.randn(4, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def dense():
    return graphcomb.capture(net(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")


def test_a_plan_meets_its_budget_and_carries_itself_out(dense, tmp_path):
    before, data = dense.copy(), batches()
    first, second = graphcomb.tune(dense, data=data, latency=[0.7, 0.4], folder=tmp_path, **OPTIONS)
    assert equivalence(before, dense) == 0  # untouched
    for plan, share in ((first, 0.7), (second, 0.4)):
        figures = plan.tuned
        assert figures.met
        assert figures.ms["achieved"] <= 1.02 * share * figures.ms["dense"]
        assert figures.ms["achieved"] == pytest.approx(figures.ms["predicted"], rel=0.1)
        assert figures.loss["held_out"]
    assert first.tuned.loss["measured"] <= second.tuned.loss["measured"]
    path = second.save(tmp_path / "plan.yaml")
    assert load_plan(path) == second
    result = load_plan(path).run(dense, data=data)
    assert result.program.macs < 0.6 * dense.macs
    assert all(r["verified"]["error"] <= 1e-10 for r in result.record["passes"] if r["pass"] == "RemoveChannels")
    decided = second.decided
    assert [r["what"] for r in result.record["passes"][0]["changed"]] == list(decided.blocks) or not decided.blocks
    assert equivalence(before, dense) == 0


def test_what_is_edited_by_hand_stands_and_the_rest_is_chosen_around_it(dense, tmp_path):
    data = batches()
    plan = graphcomb.tune(dense, data=data, latency=0.5, folder=tmp_path, **OPTIONS)
    path = plan.save(tmp_path / "plan.yaml")
    tree = yaml.safe_load(path.read_text())
    for row in tree["blocks"]:
        row["goes"] = row["name"] == "3"
    row = next(r for r in tree["groups"] if r["name"] == "2.one.weight:0")
    row["keep"] = 27
    path.write_text(yaml.safe_dump(tree))
    again = graphcomb.tune(dense, data=data, latency=0.5, plan=path, folder=tmp_path, **OPTIONS)
    assert again.decided.blocks == ("3",) or "3" in again.decided.blocks
    if any(b.name == "2" and b.proposed for b in plan.blocks):
        assert "2" not in again.decided.blocks
    assert "2" in again.decided.blocks or again.decided.widths["2.one.weight:0"] == 27
    assert again.tuned.ms["achieved"] <= 1.02 * again.tuned.ms["asked"]
    tree["blocks"] = [row | {"goes": False} for row in tree["blocks"]]
    path.write_text(yaml.safe_dump(tree))
    result = load_plan(path).run(dense, data=data)  # as it is, without choosing anew
    assert result.program.module().get_parameter("2.one.weight").shape[0] == 27


def test_a_plan_runs_for_its_own_target_unless_told(dense, tmp_path):
    """INT8 for a CPU places other values than for TensorRT, which is what a run without a target once built."""
    options = OPTIONS | {"folder": tmp_path, "data": batches(), "sizes": 1}
    plan = graphcomb.tune(dense, latency=1.0, extra=["int8"], **options)
    layers = [
        row.model_copy(update={"precision": "int8"}) if row.region == "2.one.weight" else row for row in plan.layers
    ]
    edited = plan.model_copy(update={"layers": layers})
    contexts: list[dict] = [{}, {"target": "cpu"}, {"target": get_target("cpu")}]
    programs = [edited.run(dense, data=batches(), **given).program for given in contexts]
    assert [p.history[-1]["placement"] for p in programs] == ["cpu"] * 3
    with pytest.raises(BadInput, match=r"^plan: for target cpu, not orin-nano"):
        edited.run(dense, data=batches(), target="orin-nano")
    with pytest.raises(BadInput, match="nowhere"):
        edited.run(dense, data=batches(), target="nowhere")


def edited(plan, change):
    """The plan after a change of its parsed file."""
    tree = yaml.safe_load(yaml.safe_dump(plan.model_dump(exclude_none=True)))
    change(tree)
    return type(plan).model_validate(tree)


def row(tree: dict, table: str, name: str) -> dict:
    return next(row for row in tree[table] if row["name"] == name)


def test_what_was_decided_by_hand_outlives_two_tunings(dense, tmp_path):
    """Rows, recovery and repair; a mark that is deleted lets the row be chosen again."""
    options = {"table": "roofline", "rounds": 1, "data": batches(), "folder": tmp_path, "sizes": 3, "extra": ["int8"]}
    plan = graphcomb.tune(dense, latency=0.9, samples=16, importance="magnitude", **options)

    def by_hand(tree: dict) -> None:
        row(tree, "groups", "0.weight:0")["keep"] = 13
        row(tree, "blocks", "2")["goes"] = not row(tree, "blocks", "2")["goes"]
        row(tree, "layers", "6.weight")["precision"] = "fp16"
        tree["recovery"] = {"steps": 2}

    first = edited(plan, by_hand)
    second = graphcomb.tune(dense, latency=0.9, plan=first, **options)
    third = graphcomb.tune(dense, latency=0.9, plan=load_plan(second.save(tmp_path / "plan.yaml")), **options)
    assert first.fixed == second.fixed == third.fixed
    assert first.fixed.widths == {"0.weight:0": 13}
    assert first.fixed.precisions == {"6.weight": "fp16"}
    assert third.decided.widths["0.weight:0"] == 13
    assert (tmp_path / "plan.yaml").read_text().count("fixed: true") == 4  # one of them in the head
    assert first.figures()["edited"]
    assert not third.figures()["edited"]
    assert third.recovery == {"steps": 2}
    assert third.repair == plan.repair
    assert graphcomb.tune(dense, latency=0.9, samples=8, plan=first, **options).repair.samples == 8
    whole = edited(plan, lambda tree: row(tree, "groups", "0.weight:0").update(keep=16, fixed=True))
    assert graphcomb.tune(dense, latency=0.9, plan=whole, **options | {"sizes": 1}).fixed == whole.fixed
    freed = edited(third, lambda tree: row(tree, "groups", "0.weight:0").pop("fixed"))
    assert not freed.fixed.widths


def test_a_decision_inside_a_block_keeps_the_block(dense, tmp_path):
    options = OPTIONS | {"folder": tmp_path, "data": batches(), "sizes": 3}
    plan = graphcomb.tune(dense, latency=0.4, **options)
    assert "2" in plan.decided.blocks
    whole = edited(plan, lambda tree: [b.update(goes=False, proposed=False) for b in tree["blocks"]])
    for table, name, change in (
        ("groups", "2.one.weight:0", {"keep": 27}), ("layers", "2.one.weight", {"precision": "fp16"}),
    ):  # fmt: skip

        def by_hand(tree: dict, table=table, name=name, change=change) -> None:
            if table == "layers":
                tree["layers"].append({"name": name, "inside": "2", "precision": "fp32", "proposed": "fp32"})
            row(tree, table, name).update(change)

        again = graphcomb.tune(dense, latency=0.6, plan=edited(whole, by_hand), **options)
        assert "2" not in again.decided.blocks
        assert again.fixed == edited(whole, by_hand).fixed
        assert row(again.model_dump(), table, name)["inside"] == "2"
        with pytest.raises(BadInput, match=r"^plan: 2.one.weight\S* (keeps 27|becomes fp16), and its block 2 goes"):
            edited(again, lambda tree: row(tree, "blocks", "2").update(goes=True)).run(dense, data=batches())


def test_plans_that_do_not_fit_are_one_line(dense, tmp_path):
    data = batches()
    plan = graphcomb.tune(dense, data=data, latency=0.5, folder=tmp_path, **OPTIONS)
    gpu = plan.tuned.model_copy(update={"target": "rtx-sm86"})
    other = graphcomb.capture(net(8, 16), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")
    with pytest.raises(BadInput, match=r"^plan: of another model than this one"):
        plan.run(other, data=data)
    with pytest.raises(BadInput, match=r"^plan: for target cpu, not rtx-sm86"):
        plan.run(dense, data=data, target=graphcomb.runtime.get_target("rtx-sm86"))
    with pytest.raises(BadInput, match=r"^plan: for target cpu, not rtx-sm86"):
        graphcomb.tune(dense, data=data, latency=0.5, plan=plan, target="rtx-sm86", folder=tmp_path, **OPTIONS)
    with pytest.raises(BadInput, match=r"^plan: in fp32, not fp16; leave it out"):
        graphcomb.tune(
            dense, data=data, latency=0.5, plan=plan.model_copy(update={"tuned": gpu}), target="rtx-sm86",
            precision="fp16", folder=tmp_path, **OPTIONS,
        )  # fmt: skip
    gone = [b.model_copy(update={"goes": True}) if b.name == "2" else b for b in plan.blocks]
    rows = [r.model_copy(update={"keep": 5}) if r.name == "2.one.weight:0" else r for r in plan.groups]
    broken = plan.model_copy(update={"blocks": gone, "groups": rows})
    with pytest.raises(BadInput, match=r"^plan: 2.one.weight:0 keeps 5, and its block 2 goes"):
        broken.run(dense, data=data)
    for changed in ({"precision": "fp16"}, {"sparse": True}):
        layer = LayerRow(name="2.one.weight", inside="2", **changed)
        broken = plan.model_copy(update={"blocks": gone, "layers": [layer]})
        with pytest.raises(BadInput, match=r"^plan: 2.one.weight becomes (fp16|2:4 sparse), and its block 2 goes"):
            broken.run(dense, data=data)
    unknown = plan.model_copy(update={"blocks": [plan.blocks[0].model_copy(update={"name": "9", "goes": True})]})
    with pytest.raises(BadInput, match=r"^plan: no block '9'"):
        unknown.run(dense, data=data)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, BadInput, "^tune: give one of latency and loss"),
        ({"latency": 0.5, "loss": 1.0}, BadInput, "^tune: give one of latency and loss"),
        ({"latency": "fast"}, BadInput, r"^tune\.latency: a share above 0"),
        ({"loss": -1.0}, BadInput, r"^tune\.loss: a divergence above 0"),
        ({"latency": []}, BadInput, r"^tune\.latency: no budget"),
        ({"latency": 0.5, "points": 3}, BadInput, r"^tune\.points: a whole number from 1 to 2"),
        ({"latency": 0.5, "data": None}, BadInput, "^tune: needs images"),
        ({"latency": 0.5, "data": [torch.ones(4, 3, 8, 8)] * 2}, BadInput, "^data: all calibration images give the same"),
        ({"latency": "1 us"}, Unreachable, r"^tune\.latency: 0\.001 of .* cannot be reached; .* ms can; cannot shrink or"),
        ({"latency": 0.5, "target": "nowhere"}, BadInput, "nowhere"),
        ({"latency": 0.5, "importance": "size"}, BadInput, r"^tune\.importance: one of magnitude, .*, not 'size'"),
        *(({"latency": bad}, BadInput, r"^tune\.latency: a share above 0") for bad in ([None], {}, [[0.5]], True, [1.5])),
        *(({"loss": bad}, BadInput, r"^tune\.loss: a divergence above 0") for bad in (math.inf, True, [None], {})),
        *(({"latency": 0.5, "rounds": n}, BadInput, r"^tune\.rounds: a whole number from 1, not") for n in (0, "3")),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_one_line(dense, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        graphcomb.tune(dense, **{"data": batches(), "folder": tmp_path} | OPTIONS | arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("other", [lambda p: p.module(), lambda p: p.exported(), lambda p: None])
def test_what_is_no_program_is_one_line(dense, other):
    with pytest.raises(BadInput, match=r"^tune: takes a Program, got \w+; graphcomb\.capture makes one"):
        graphcomb.tune(other(dense), batches(), latency=0.5, **OPTIONS)


def test_of_several_budgets_those_that_can_be_reached_get_plans_and_none_is_worse_than_another(dense, tmp_path):
    """Networks that are built for a loose budget may be better for a tight one before it, which once kept its own."""
    options = OPTIONS | {"data": batches(), "folder": tmp_path, "sizes": 4}
    budgets = [0.8, 0.75, 0.7, 0.65]
    with pytest.warns(UserWarning, match=r"^tune\.latency: \S+ of \S+ ms cannot be reached"):
        plans = graphcomb.tune(dense, latency=[*budgets, "1 us"], **options)
    figures = [(p.tuned.ms["achieved"], p.tuned.loss["measured"]) for p in plans]
    assert [p.tuned.ms["asked"] / p.tuned.ms["dense"] for p in plans] == pytest.approx(budgets, rel=1e-3)
    for i, (ms, loss) in enumerate(figures):
        assert not any(b[0] <= ms and b[1] < loss for b in figures[:i] + figures[i + 1 :])
    with pytest.raises(Unreachable, match=r"^tune\.latency: 0\.001 of"):
        graphcomb.tune(dense, latency=["1 us", "2 us"], **options)


def test_rows_that_contradict_one_another_or_the_program_are_one_line(dense, tmp_path):
    options = OPTIONS | {"data": batches(), "folder": tmp_path, "sizes": 3}
    plan = graphcomb.tune(dense, latency=0.6, extra=["int8"], **options)

    def doubled(table: str, name: str, **change):
        return lambda tree: tree[table].append(dict(row(tree, table, name)) | change)

    def changed(**change):
        return lambda tree: row(tree, "groups", "0.weight:0").update(change)

    cases = [
        (doubled("groups", "0.weight:0"), "two rows for the group 0.weight:0; delete one"),
        (doubled("blocks", "2"), "two rows for the block 2; delete one"),
        (doubled("layers", "2.one.weight", precision="fp16"), "two rows for the precision of 2.one.weight; delete one"),
        (changed(size=8, keep=8), "0.weight:0: size is 16 in this program, not 8"),
        (changed(name="O.weight:0"), "no group 'O.weight:0' in this program"),
    ]  # fmt: skip
    for change, message in cases:
        wrong = edited(plan, change)
        with pytest.raises(BadInput, match=f"^plan: {message}"):
            wrong.run(dense, data=batches())
        with pytest.raises(BadInput, match=f"^plan: {message}"):
            graphcomb.tune(dense, latency=0.6, plan=wrong, **options)


class Clock:
    """Stands in for measurements: seconds by multiply-accumulates, of whole networks twice as many, and a third of that
    where all layers are in INT8."""

    def __init__(self) -> None:
        self.layers, self.networks, self.busy = 0, 0, False
        self.engines: set[str] = set()

    def layer(self, layer) -> float:
        self.layers += 1
        return 1e-6 if layer is None else 1e-7 + 1e-10 * layer.macs()

    def network(self, programs, **options):
        self.networks += 1
        self.engines.add(options["engine"])
        assert options["patient"]  # slow networks are not taken for a busy machine
        if self.busy:
            return SimpleNamespace(note="no figure")
        ms = []
        for program in programs:
            integer = sum(1 for _ in quantised_layers(program)) / 4
            ms.append(1e3 * (2e-6 + 2e-10 * program.macs / 2 * (1 - 2 / 3 * integer)))
        times = [SimpleNamespace(ms={"median": t, "p25": 0.9 * t, "p75": 1.1 * t}) for t in ms]
        ratio = ms[0] / ms[-1]
        row = {"median": ratio, "low": 0.9 * ratio, "high": 1.25 * ratio}
        return SimpleNamespace(note="", timings=times, ratios={options["names"][-1]: row})


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(LatencyTable, "_time", clock.layer)
    monkeypatch.setattr(LatencyTable, "anchored", lambda self, program: self)
    monkeypatch.setattr(graphcomb.runtime, "bench", clock.network)
    return clock


def test_regions_in_int8_are_tried_out_where_layers_are_measured(dense, tmp_path, clock):
    """A region's measured saving decides, is kept on disk, and the plan that it leads to says so."""
    options = OPTIONS | {"table": tmp_path / "layers.json", "folder": tmp_path, "data": batches(), "sizes": 3}
    plan = graphcomb.tune(dense, latency=0.75, extra=["int8"], **options)
    integer = [row for row in plan.layers if row.precision == "int8"]
    assert integer
    assert all(row.saves_ms > 0 for row in plan.layers if row.saves_ms is not None)
    assert plan.tuned.ms["achieved"] <= 1.02 * plan.tuned.ms["asked"]
    assert {name for _, name in quantised_layers(plan.run(dense, data=batches()).program)} == {r.name for r in integer}
    before = clock.networks
    assert graphcomb.tune(dense, latency=0.75, extra=["int8"], **options) == plan
    tried = 2 * before - clock.networks
    assert tried == len({row.region for row in plan.layers if row.region})  # once, not again
    rows = measure(dense, **{k: v for k, v in options.items() if k != "rounds"}, extra=["int8"])
    assert any("measured with its conversions" in row.note for row in rows)


@pytest.mark.parametrize(("target", "library"), [("cpu", "onnxruntime"), ("cpu-openvino", "openvino")])
def test_networks_are_measured_in_the_library_of_the_target(dense, tmp_path, clock, target, library):
    pytest.importorskip(library)
    options = OPTIONS | {"table": tmp_path / "layers.json", "folder": tmp_path, "data": batches(), "sizes": 3}
    plan = graphcomb.tune(dense, latency=0.75, extra=["int8"], target=target, **options)
    assert clock.engines == {library}
    assert plan.tuned.target == target
    assert plan.tuned.by.startswith(f"latency table of {library}")


def test_measured_layers_and_networks(dense, tmp_path, clock):
    """The table of layers is kept, whole networks are measured, and a busy machine is an error."""
    options = OPTIONS | {"table": tmp_path / "layers.json", "folder": tmp_path, "data": batches(), "sizes": 3}
    plan = graphcomb.tune(dense, latency=0.6, **options)
    figures = plan.tuned.ms
    assert figures["measured"]
    assert plan.tuned.met_by == "measured"
    assert clock.networks >= 2
    assert figures["dense_low"] == pytest.approx(0.9 * figures["dense"], rel=1e-3)
    assert figures["low"] == pytest.approx(figures["achieved"] / 1.25, rel=1e-3)
    assert figures["high"] == pytest.approx(figures["achieved"] / 0.9, rel=1e-3)
    assert figures["predicted_high"] > figures["predicted"] > figures["predicted_low"]  # as the table's error says
    assert figures["achieved"] <= 1.02 * figures["asked"]
    measured = clock.layers
    again = graphcomb.tune(dense, latency=0.6, **options)
    assert again == plan
    assert clock.layers == measured > 0
    clock.busy = True
    with pytest.raises(Contended, match=r"^tune: the machine is too busy to measure; the tables are kept"):
        graphcomb.tune(dense, latency=0.6, **options)


def test_a_loss_that_is_infinite_is_none_with_its_reason(dense, tmp_path):
    """Such losses are stored as null; plans once showed them as 0."""
    options = OPTIONS | {"data": batches(), "folder": tmp_path, "sizes": 2}
    graphcomb.tune(dense, latency=0.9, **options)
    (file,) = tmp_path.glob("*.json")
    stored = json.loads(file.read_text())
    width = next(key for key in stored if key.startswith("width 3.one"))
    file.write_text(json.dumps(stored | {"block 2": None, "block 3": None, "why block 3": "it is loose", width: None}))
    plan = graphcomb.tune(dense, latency=0.9, **options)
    assert [(b.goes, b.loss, b.why) for b in plan.blocks] == [
        (False, None, "without it the network's outputs are not finite"), (False, None, "it is loose"),
    ]  # fmt: skip
    narrow = edited(plan, lambda tree: row(tree, "groups", "3.one.weight:0").update(keep=int(width.split()[-1])))
    again = graphcomb.tune(dense, latency=0.9, plan=narrow, **options)
    shown = next(r for r in again.groups if r.name == "3.one.weight:0")
    assert (shown.loss, shown.why) == (None, "the network's outputs are not finite at this width")
    assert load_plan(again.save(tmp_path / "plan.yaml")) == again


def test_nothing_to_prune_is_unreachable(tmp_path):
    program = graphcomb.capture(nn.Linear(4, 3), torch.randn(2, 4), dynamic_shapes="batch")
    with pytest.raises(Unreachable, match=r"cannot be reached; .*there is nothing to prune"):
        graphcomb.tune(program, data=list(torch.randn(2, 8, 4)), latency=0.5, folder=tmp_path, **OPTIONS)


def test_a_budget_of_loss_is_kept(dense, tmp_path):
    plan = graphcomb.tune(dense, data=batches(), loss=0.01, folder=tmp_path, **OPTIONS)
    assert plan.tuned.loss["measured"] <= 0.01
    assert plan.tuned.ms["achieved"] < plan.tuned.ms["dense"]
    assert plan.tuned.ms["asked"] is None


def test_a_budget_in_points_is_kept_on_labelled_data(dense, tmp_path):
    """Labels are the dense network's own answers, of which nine in ten must stay."""
    data = batches()
    with torch.no_grad():
        val = [(x, dense.module()(x).argmax(1)) for x in data]
    options = OPTIONS | {"folder": tmp_path, "val": val, "rounds": 2}
    plan = graphcomb.tune(dense, data=data, loss="10 points", **options)
    assert plan.tuned.ms["achieved"] < plan.tuned.ms["dense"]
    built = plan.run(dense, data=data[::2]).program
    with torch.no_grad():
        right = sum(int((built.module()(x).argmax(1) == y).sum()) for x, y in val)
    assert plan.tuned.loss["points"] == pytest.approx(100 - 100 * right / sum(len(y) for _, y in val), abs=1e-2)
    assert plan.tuned.loss["points"] <= 10
    with pytest.raises(BadInput, match=r'^tune\.loss: "points" need labelled data; pass val='):
        graphcomb.tune(dense, data=data, loss="10 points", **options | {"val": None})


def test_recovery_trains_after_the_repair(dense, tmp_path):
    data = batches()
    plan = graphcomb.tune(dense, data=data, latency=0.5, folder=tmp_path, **OPTIONS)
    labelled = [(x, dense.module()(x).argmax(1)) for x in data]
    trained = plan.model_copy(update={"recovery": {"steps": 2, "lr": 1e-3}})
    before, after = (p.run(dense, data=labelled, teacher=dense) for p in (plan, trained))
    passes = [r["pass"] for r in after.record["passes"]]
    assert passes == [*(r["pass"] for r in before.record["passes"]), "Distill"]
    pairs = zip(before.program.module().parameters(), after.program.module().parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert load_plan(trained.save(tmp_path / "plan.yaml")).recovery == {"steps": 2, "lr": 1e-3}
    with pytest.raises(BadInput, match=r"^plan\.recovery.*stepz") as raised:
        plan.model_copy(update={"recovery": {"stepz": 2}}).run(dense, data=labelled)
    assert "\n" not in str(raised.value)
    default = plan.model_copy(update={"recovery": {}})
    assert type(default.passes(dense)[-1]).__name__ == "Distill"
    assert load_plan(default.save(tmp_path / "plan.yaml")).recovery == {}


def test_a_table_of_another_device_is_one_line(dense, tmp_path):
    path = tmp_path / "layers.json"
    about = LatencyTable(tmp_path / "own.json").about | {"device": "another processor"}
    path.write_text(json.dumps({"about": about, "seconds": {}}))
    with pytest.raises(BadInput, match=r"another device, engine or precision \(device another processor\)") as raised:
        graphcomb.tune(dense, data=batches(), latency=0.5, folder=tmp_path, **OPTIONS | {"table": path})
    assert "\n" not in str(raised.value)


def test_times_of_another_device_or_precision_are_one_line(dense):
    for table in (Roofline(get_target("rtx-sm86"), "fp32"), Roofline(get_target("cpu"), "int8")):
        with pytest.raises(BadInput, match=r"^tune\.table: the times are of \S+ in \S+, not of cpu in fp32"):
            graphcomb.tune(dense, data=batches(), latency=0.5, **OPTIONS | {"table": table})
    for wrong in ({}, 3, [1]):
        with pytest.raises(BadInput, match=r'^tune\.table: "roofline", a file, a LatencyTable or a Roofline, not'):
            graphcomb.tune(dense, data=batches(), latency=0.5, **OPTIONS | {"table": wrong})


def test_a_stale_or_broken_table_in_the_cache_is_measured_anew(tmp_path, monkeypatch):
    """It once became the data sheet without a word; that is for targets that are not at hand."""
    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path))
    path, cpu = tmp_path / "latency-cpu.json", get_target("cpu")
    stale = {"about": LatencyTable(path).about | {"engine": "onnxruntime 0.1"}, "seconds": {"run": 1e-5}}
    for text in (json.dumps(stale), "garbage"):
        path.write_text(text)
        with pytest.warns(
            UserWarning, match=r"latency-cpu\.json: .*; it is now latency-cpu\.json\.old, and layers are"
        ):
            table = latency_model(None, cpu, "fp32")
        assert isinstance(table, LatencyTable)
        assert not table.entries
        assert (tmp_path / "latency-cpu.json.old").read_text() == text
        path.write_text(text)
        with pytest.raises(BadInput, match="latency table"):
            latency_model(path, cpu, "fp32")
    assert isinstance(latency_model(None, get_target("orin-nano"), "fp16"), Roofline)


def test_sensitivity_says_what_int8_costs_and_which_layers_leave_fp16(dense, tmp_path):
    wide = dense.copy()
    wide.module().get_parameter("3.one.weight").data *= 1e5
    wide.module().get_parameter("3.two.weight").data *= 1e-5
    options = measure(
        wide, batches(), table="roofline", samples=16, importance="magnitude", folder=tmp_path, extra=["int8"],
        target="rtx-sm86", precision="fp16",
    )  # fmt: skip
    region = next(o for o in options if o.option == "int8" and o.what == "2.one.weight")
    assert region.saves_ms < 0  # a network as small as this spends its time starting kernels
    assert "2 conversions take" in region.note
    assert region.note.startswith("with 2.two.weight; ")
    assert {o.what for o in options if o.option == "fp16"} == {"3.one.weight", "3.two.weight"}
    assert any(o.what == "0.weight" and o.option == "int8" and "reads the network's inputs" in o.note for o in options)


def test_sensitivity_lists_every_option(dense, tmp_path):
    options = measure(dense, batches(), table="roofline", samples=16, importance="magnitude", folder=tmp_path)
    blocks = [o for o in options if o.what in ("2", "3")]
    assert len(blocks) == 2
    assert all(o.measured and o.saves_ms > 0 for o in blocks)
    inner = [o for o in options if o.what == "2.one.weight:0"]
    assert {o.option for o in inner} == {"8 of 32", "16 of 32", "24 of 32"}
    assert sum(o.measured for o in inner) == 1
    assert next(o.note for o in options if o.what == "6.weight:0").endswith("an output of the program")
    prices = [o.price for o in options if o.saves_ms > 0]
    assert prices == sorted(prices)


@pytest.mark.slow
def test_through_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tuned_toys.py").write_text("from test_tuning import batches, net\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    common = ["tuned_toys:net", "--data", "tuned_toys:batches", "--table", "roofline", "--samples", "16", "--quiet"]
    assert main(["tune", *common, "--latency", "0.6", "--latency", "0.4", "--rounds", "1", "--out", "p.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["p-1.yaml", "p-2.yaml"]
    plan = load_plan("p-2.yaml")
    assert plan.recipe["model"]["source"] == "tuned_toys:net"
    assert main(["run", "--plan", "p-2.yaml", "--out", "out", "--set", "outputs={bench: false}", "--quiet"]) == 0
    assert (tmp_path / "out" / "model.onnx").is_file()
    smaller = graphcomb.load(tmp_path / "out" / "model.pt2")
    assert smaller.macs < 0.6 * graphcomb.capture(net(), torch.randn(2, 3, 8, 8)).macs / 1
    assert main(["tune", *common, "--latency", "1 us", "--latency", "0.6", "--rounds", "1", "--out", "q.yaml"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("unreachable: tune.latency: 0.001 of ")
    assert "\nq-2.yaml: " in printed.out
    assert load_plan("q-2.yaml").tuned.met
    assert not (tmp_path / "q-1.yaml").exists()
    assert main(["sensitivity", *common, "--out", "s.csv"]) == 0
    printed = capsys.readouterr().out
    assert "ten best" in printed
    assert "ten worst" in printed
    with open("s.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"what", "saves_ms", "loss", "measured"} <= rows[0].keys()
    page = (tmp_path / "s.html").read_text()
    assert page.count("<tr>") == len(rows) + 1
    assert main(["sensitivity", *common, "--out", "s.html"]) == 2
    assert capsys.readouterr().err == "error: --out: s.html is the name of the page; name the CSV file\n"
    assert main(["tune", *common, "--out", "p.yaml"]) == 2
    assert capsys.readouterr().err == "error: tune: give one of --latency and --loss\n"
    assert main(["run"]) == 2


def test_layers_get_precisions_and_sparsity_that_the_plan_carries_out(tmp_path):
    """Rows for INT8 and 2:4 with what they save and lose; by hand a layer becomes INT8 or stays in floating point."""
    dense, data = graphcomb.capture(pointwise(256), torch.randn(2, 3, 8, 8), dynamic_shapes="batch"), batches()
    options = OPTIONS | {"folder": tmp_path, "data": data, "target": "rtx-sm86", "precision": "fp16", "sizes": 2}
    plan = graphcomb.tune(dense, latency=0.99, extra=["int8", "2:4"], **options)
    rows = {(r.name, r.precision is None): r for r in plan.layers}
    for name in ("2.weight", "4.weight"):
        assert rows[name, False].region == "2.weight"
        assert rows[name, True].saves_ms > 0
        assert rows[name, True].loss > 0
    assert "reads the network's inputs" in rows["0.weight", False].why
    path = plan.save(tmp_path / "plan.yaml")
    assert load_plan(path) == plan
    tree = yaml.safe_load(path.read_text())
    for row in tree["layers"]:
        if row.get("sparse") is not None:
            row["sparse"] = row["name"] == "4.weight"
        elif row["name"] != "every layer":
            row["precision"] = {"2.weight": "int8", "4.weight": "int8", "8.weight": "fp32"}.get(row["name"], "fp16")
    path.write_text(yaml.safe_dump(tree))
    result = load_plan(path).run(dense, data=data)
    records = {r["pass"]: r for r in result.record["passes"]}
    assert {row["what"] for row in records["Quantize"]["changed"]} == {"2.weight", "4.weight"}
    assert {row["what"]: row["why"] for row in records["Quantize"]["refused"]} == {
        "0.weight": "excluded", "8.weight": "fp32 was asked for",
    }  # fmt: skip
    assert records["Quantize"]["fp32"] == ["8.weight"]
    assert [row["what"] for row in records["Sparsify"]["changed"]] == ["4.weight"]
    for row in tree["layers"]:
        if row["name"] == "4.weight" and "precision" in row:
            row |= {"precision": "fp32"}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(BadInput, match=r"^plan: 2.weight and 4.weight exchange INT8 values; give both one precision"):
        graphcomb.tune(dense, latency=0.99, extra=["int8", "2:4"], plan=path, **options)
    with pytest.raises(BadInput, match=r"^tune\.extra: a list of int8, fp8, 2:4, not 'int8'"):
        graphcomb.tune(dense, latency=0.99, extra="int8", **options)


def test_layers_get_fp8_where_the_target_computes_in_it(tmp_path):
    """A plan with them by hand is carried out and exported as Q/DQ of FP8."""
    dense, data = graphcomb.capture(pointwise(1024), torch.randn(2, 3, 8, 8), dynamic_shapes="batch"), batches()[:2]
    options = OPTIONS | {"folder": tmp_path, "data": data, "precision": "fp16", "sizes": 1}
    plan = graphcomb.tune(dense, latency=0.99, extra=["fp8"], target="rtx-sm89", **options)
    rows = {row.name: row for row in plan.layers}
    assert rows["2.weight"].region == rows["4.weight"].region == "2.weight"
    assert rows["2.weight"].saves_ms > 0
    assert rows["2.weight"].loss > 0
    path = plan.save(tmp_path / "plan.yaml")
    assert load_plan(path) == plan
    tree = yaml.safe_load(path.read_text())
    for row in tree["blocks"]:
        row["goes"] = False
    for row in tree["layers"]:
        row |= {"precision": "fp8"} if row["name"] in ("2.weight", "4.weight") else {}
    path.write_text(yaml.safe_dump(tree))
    again = graphcomb.tune(dense, latency=0.99, extra=["fp8"], target="rtx-sm89", plan=path, **options)
    assert again.tuned.ms["achieved"] < plan.tuned.ms["dense"]
    assert again.decided.precisions == {"2.weight": "fp8", "4.weight": "fp8"}
    result = load_plan(path).run(dense, data=data, target=get_target("rtx-sm89"))
    quantised = next(r for r in result.record["passes"] if r["pass"] == "Quantize")
    assert quantised["precision"] == "fp8"
    export_onnx(result.program, tmp_path / "fp8.onnx", "fp16", target="rtx-sm89")
    assert precision(onnx.load(tmp_path / "fp8.onnx")) == "fp8"

    refused = graphcomb.tune(dense, latency=0.99, extra=["fp8"], target="rtx-sm86", **options)
    assert [row.why for row in refused.layers if row.name == "every layer"] == ["rtx-sm86 has no FP8 kernels"]
    with pytest.raises(BadInput, match=r"^tune: both fp8 and int8; one network has one of them"):
        graphcomb.tune(dense, latency=0.99, extra=["int8", "fp8"], target="rtx-sm89", **options)
    for row in tree["layers"]:
        if row["name"] == "2.weight":
            row["precision"] = "int8"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(BadInput, match=r"^plan: both fp8 and int8; one network has one of them"):
        load_plan(path).run(dense, data=data)
