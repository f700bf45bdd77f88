"""Pruning while training: what is scored, what an event cuts, that masked equals sliced, and that several processes and
resumed runs end where one whole run does."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from graphcomb import verify
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.comb.surgery import remove
from graphcomb.graph.program import load
from graphcomb.passes.base import Context
from graphcomb.passes.channels.importance.members import Members
from graphcomb.passes.channels.importance.scores import TRANSFORMS
from graphcomb.passes.channels.remove_channels import RemoveChannels
from graphcomb.passes.channels.while_training import event_steps
from graphcomb.passes.train import loop
from graphcomb.passes.train.distill import Distill, feature_distance
from graphcomb.passes.train.features import matching_features

from ..toys import same, state
from .toys import Segmenter, Transformer, batches, capture, convolutions, dense, pruning

EXACT = 1e-10


def value(program, name, x):
    """What a node computes."""
    found = torch.fx.Interpreter(program.module(), garbage_collect_values=False)
    found.run(x)
    return next(v for n, v in found.env.items() if n.name == name)


# ------------------------------------------------------------------------------------------------------------- schedule
def test_events_ramp_to_the_target():
    steps = event_steps("adaptive", 1000, 100, 5, 0.5)
    assert list(steps) == [100, 200, 300, 400, 500]
    shares = list(steps.values())
    assert shares[-1] == 1
    gains = np.diff([0, *shares])
    assert (np.diff(gains) < 0).all(), "less and less at a time"
    assert event_steps("iterative", 1000, 100, 4, 0.8) == {200: 0.25, 400: 0.5, 600: 0.75, 800: 1}
    assert event_steps("iterative", 4, 1, 9, 0.5) == {1: 0.5, 2: 1}
    assert event_steps("adaptive", 30, 100, 5, 0.5) == {15: 1}
    assert event_steps("adaptive", 1, 100, 5, 0.1) == {1: 1}
    assert event_steps("one-shot", 1000, 100, 5, 0.5) == {0: 1}


# --------------------------------------------------------------------------------------------------------------- scores
def test_scores_of_a_pruned_network_are_in_the_originals_numbering():
    """The formula written out, on the network after it has lost some channels."""
    program = capture(convolutions(norm=False))
    comb = Comb(program)
    first, second = (next(x for x in comb.groups if x.name == f"{n}.weight:0") for n in ("0", "2"))
    masks = {first.atom: np.array([1, 0, 1, 1, 0, 1, 1, 1], dtype=bool)}
    small, _ = remove(comb, masks)
    module = small.module()
    for x, y in batches(2):
        module.zero_grad()
        F.cross_entropy(module(x), y).backward()
        found = Members(comb, [first.atom, second.atom], masks).gradient_scores(module, TRANSFORMS["fisher"])
        p = dict(module.named_parameters())
        w = {n: (t * t.grad).detach().double() for n, t in p.items()}
        own = torch.stack([w["0.weight"].sum((1, 2, 3)), w["0.bias"], w["2.weight"].sum((0, 2, 3))]).square().mean(0)
        np.testing.assert_allclose(found[first.atom][masks[first.atom]], own, rtol=1e-5)
        assert (found[first.atom][~masks[first.atom]] == 0).all()
        own = torch.stack([w["2.weight"].sum((1, 2, 3)), w["2.bias"], w["6.weight"].sum(0)]).square().mean(0)
        np.testing.assert_allclose(found[second.atom], own, rtol=1e-5)


def test_the_network_with_the_least_important_channels_goes_first():
    """Channels that nobody listens to have no gradient, so they are what an event takes."""
    model = convolutions(norm=False)
    with torch.no_grad():
        model[2].weight[:, [1, 4]] = 0
        model[0].bias[[1, 4]] = -100.0
    result = pruning({"lr": 1e-6}, macs=0.9, include=("0.*",), interval=3)(capture(model), data=batches())
    assert result.removed["0.weight"] == {0: [1, 4]}


@pytest.mark.parametrize("importance", ["magnitude", "fisher"])
def test_a_target_is_met_closely_and_no_group_is_all_but_emptied(importance):
    """Nothing that was removed would still fit."""
    program = capture(convolutions(width=16))
    pass_ = RemoveChannels(macs=0.3, round_to=2, importance=importance, scope="global")
    result = pass_(program, data=batches(4))
    comb = Comb(program)
    after = {row["what"]: row["after"] for row in result.record["changed"]}
    sizes = {x.atom: after.get(x.name, x.size) for x in comb.groups}
    for group in comb.groups:
        if group.name in after:
            assert comb.macs(sizes | {group.atom: min(sizes[group.atom] + 2, group.size)}) > 0.3 * program.macs
    shares = [row["after"] / row["before"] for row in result.record["changed"]]
    assert min(shares) >= 0.1


@pytest.mark.parametrize("schedule", ["adaptive", "iterative", "one-shot"])
def test_the_target_is_never_missed(schedule):
    """Also where dense - (dense - target) is a little more than the target in floating point."""
    program = capture(convolutions(width=16))
    dense = program.macs
    shares = [s for s in np.linspace(0.2, 0.6, 200).tolist() if dense - (dense - s * dense) > s * dense][:4]
    assert shares
    for share in shares:
        result = pruning({"epochs": 1}, macs=share, schedule=schedule)(program, data=batches(6))
        assert result.program.macs <= share * dense


# ---------------------------------------------------------------------------------------------------- masked and sliced
@pytest.mark.parametrize("schedule", ["adaptive", "iterative", "one-shot"])
@pytest.mark.parametrize("importance", ["fisher", "taylor", "magnitude", "random"])
def test_the_target_is_reached_and_the_result_is_one_slice_of_the_masked_network(schedule, importance):
    program = dense()
    before = state(program)
    options = {"schedule": schedule, "importance": importance, "rounds": 3}
    result = pruning({"epochs": 2}, **options)(program, data=batches(), val=batches(2))
    record = result.record
    assert same(state(program), before), "the input program is not changed"
    assert 0.2 < record["cost"]["after"]["macs"] / record["cost"]["before"]["macs"] <= 0.4
    assert record["events"][-1]["macs"] == result.program.macs
    assert len(record["events"]) == {"adaptive": 6, "iterative": 3, "one-shot": 1}[schedule]
    macs = [e["macs"] for e in record["events"]]
    assert macs == sorted(macs, reverse=True)
    assert record["verified"]["error"] <= EXACT
    assert verify.surgery(program, result) <= EXACT
    # one exact slice, at the end, of the trained weights in the original's shape
    comb = Comb(result.masked)
    names = {x.name: x for x in comb.groups}
    masks = {}
    for event in record["events"]:
        for name, indices in event["removed"].items():
            mask = masks.setdefault(names[name].atom, np.ones(names[name].size, dtype=bool))
            assert mask[indices].all(), "nothing goes twice"
            mask[indices] = False
    once, removed = remove(comb, masks)
    assert removed == result.removed
    assert same(state(once), state(result.program))
    x = batches(1)[0][0]
    assert torch.equal(once.module()(x), result.program.module()(x))


def test_heads_and_embeddings_go_while_layer_norms_stay_exact():
    program = capture(Transformer())
    result = pruning(macs=0.5, round_to=1, interval=1)(program, data=batches())
    kinds = {row["kind"] for row in result.record["changed"]}
    assert "head" in kinds
    assert kinds & {"channel", "hidden"}
    assert verify.surgery(program, result) <= EXACT
    assert result.record["events"][-1]["macs"] <= 0.5 * program.macs


def test_training_the_sliced_network_is_training_the_masked_one():
    """Against eager float64 training of the whole network with masks on weights, gradients and momentum."""
    dtype, rate, steps = torch.float64, 0.05, 8
    data = batches(steps, dtype=dtype)
    model = convolutions(norm=False)
    program = capture(model, dtype)
    options = {"optimizer": "sgd", "lr": rate, "schedule": "constant", "clip": 0.5, "weight_decay": 0.1}
    result = pruning(options, macs=0.5, interval=2)(program, data=data, loss=F.cross_entropy)
    events = {e["step"]: e["removed"] for e in result.record["events"]}
    assert sum(map(bool, events.values())) > 1
    removed = {n: {d: [] for d in dims} for n, dims in result.removed.items()}
    parameters = dict(model.named_parameters())
    masks = {n: torch.ones_like(p) for n, p in parameters.items()}
    momentum = {n: torch.zeros_like(p) for n, p in parameters.items()}
    groups = {x.name: x.members for x in Comb(program).groups}
    for step, (x, y) in enumerate(data):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradients = {n: p.grad * masks[n] for n, p in parameters.items()}
        norm = torch.stack([t.square().sum() for t in gradients.values()]).sum().sqrt()
        for name, p in parameters.items():
            decay = 0.1 * p.detach() if p.dim() > 1 else 0
            momentum[name] = 0.9 * momentum[name] + gradients[name] * (0.5 / (norm + 1e-6)).clamp(max=1) + decay
            p.data -= rate * momentum[name]
        for group, indices in events.get(step + 1, {}).items():
            for name, dim in groups[group]:
                masks[name].index_fill_(dim, torch.tensor(indices), 0)
                removed[name][dim] += indices
        for name, p in parameters.items():
            p.data *= masks[name]
            momentum[name] *= masks[name]
    assert {n: {d: sorted(i) for d, i in dims.items()} for n, dims in removed.items()} == result.removed
    for name, p in parameters.items():
        kept = verify.removal.sliced(p.detach(), result.removed.get(name, {}))
        torch.testing.assert_close(result.program.module().get_parameter(name).detach(), kept, rtol=1e-9, atol=1e-12)
    x = torch.randn(5, 1, 8, 8, dtype=dtype)
    torch.testing.assert_close(result.program.module()(x), model(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("repair", [False, True])
def test_moments_of_adam_go_with_their_weights(monkeypatch, repair):
    """Right after an event they are slices of those before it, also where a repair has changed the weights."""
    seen = []
    carry_on = loop._Loop._carry_on

    def watched(loop, old, new, kept):
        for parameters, act in ((old, lambda: None), (new, lambda: carry_on(loop, old, new, kept))):
            act()
            moments = {n: loop.optimizer.state[p] for n, p in parameters.items()}
            seen.append({n: {k: t.clone() for k, t in m.items()} for n, m in moments.items()})

    monkeypatch.setattr(loop._Loop, "_carry_on", watched)
    result = pruning(interval=6, repair=repair)(dense(), data=batches())
    assert len(seen) == 2
    for name, moments in seen[1].items():
        lost = result.removed.get(name, {})
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[key], verify.removal.sliced(seen[0][name][key], lost)), name
        assert moments["step"] == 6


def test_a_plan_says_where_groups_end():
    program = dense()
    pass_ = pruning(interval=3, round_to=4)
    rows = pass_.plan(program, Context(data=batches()))
    first, second = [r for r in rows if "frozen" not in r][:2]
    plan = {"groups": [{"name": first["name"], "keep": 3}, {"name": second["name"], "keep": second["size"]}]}
    result = pass_(program, data=batches(), plan=plan)
    after = {row["what"]: row["after"] for row in result.record["changed"]}
    assert after[first["name"]] == 3
    assert second["name"] not in after
    assert result.record["cost"]["after"]["macs"] <= 0.4 * program.macs


# ---------------------------------------------------------------------------------------------------------- distillation
def test_features_are_compared_at_the_kept_indices():
    """The term of a pruned student against the formula, from its history, before and after a round trip through a file."""
    teacher = dense()
    once = RemoveChannels(ratio=0.25, round_to=1, importance="random")(teacher, seed=1)
    twice = RemoveChannels(ratio=0.25, round_to=1, importance="random")(once.program, seed=2)
    kept, refused = matching_features(teacher, twice.program)
    assert not refused
    assert len(kept) == 2
    x = batches(1)[0][0]
    expected = []
    for name, dims in kept.items():
        indices = np.arange(teacher.module().get_parameter(f"{len(expected)}.short.bias").shape[0])
        for result in (once, twice):  # the block ends where its shortcut's channels do
            indices = np.delete(indices, result.removed[f"{len(expected)}.short.bias"][0])
        assert dims[1].tolist() == indices.tolist()
        full, small = value(teacher, name, x), value(twice.program, name, x)
        cosine = F.cosine_similarity(small.flatten(1), full[:, indices].flatten(1)).mean()
        expected.append((2 * (1 - cosine)).item())
    quiet = {"steps": 1, "lr": 1e-12, "batch_norm": "frozen", "features": 0.5, "alpha": 0.0}
    for labels in (True, False):
        distill = Distill(**quiet, labels=labels)
        record = distill(twice.program, data=batches(1), teacher=teacher).record
        assert record["matched"] == list(kept)
        assert record["epochs"][0]["features"] == pytest.approx(sum(expected), rel=1e-5)
        parts = {k: v for k, v in record["epochs"][0].items() if k in ("task", "kl")}
        assert record["epochs"][0]["loss"] == pytest.approx(sum(parts.values()) + 0.5 * sum(expected), rel=1e-5)


def test_kept_indices_survive_a_file(tmp_path):
    teacher = dense()
    small = RemoveChannels(ratio=0.5, round_to=1, importance="random")(teacher).program
    again = load(small.save(tmp_path / "small.pt2"))
    (before, _), (after, refused) = (matching_features(teacher, p) for p in (small, again))
    assert not refused
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n][d]) for n, dims in before.items() for d, t in dims.items())
    # a teacher that has itself been pruned needs no projection, one of another width none that would fit
    assert matching_features(again, again) == ({n: {} for n in before}, [])
    kept, refused = matching_features(capture(convolutions(width=6)), small)
    assert not kept
    assert len(refused) == 2


def test_features_follow_what_is_pruned_meanwhile(monkeypatch):
    """Every feature term that training saw, against the formula with the indices kept at that step."""
    teacher = dense()
    seen = []

    def watched(student, taught):
        seen.append(
            [(s.shape[1], t.shape[1], t.requires_grad, s.requires_grad) for s, t in zip(student, taught, strict=True)]
        )
        return feature_distance(student, taught)

    monkeypatch.setattr("graphcomb.passes.train.distill.feature_distance", watched)
    for labels in (True, False):
        seen.clear()
        before = state(teacher)
        result = pruning({"features": 1.0, "labels": labels})(teacher, data=batches(labels=labels), teacher=teacher)
        assert same(state(teacher), before)
        assert seen[0] != seen[-1]
        assert all(s == t and not fixed and free for step in seen for s, t, fixed, free in step)
        last, _ = matching_features(teacher, result.program)
        assert [s for s, *_ in seen[-1]] == [len(dims[1]) for dims in last.values()]
        assert ("task" in result.record["epochs"][0]) == labels


def test_a_student_that_is_still_its_teacher_is_pruned_by_magnitude():
    """Without labels the loss has no gradient then, only rounding; AdamW would move at once, SGD does not."""
    program = dense()
    options = {"optimizer": "sgd", "lr": 1e-3, "weight_decay": 0.0, "labels": False}
    found = [
        pruning(options, interval=6, importance=i, scope="local")(program, data=batches(labels=False), teacher=program)
        for i in ("fisher", "taylor", "magnitude")
    ]
    assert found[0].removed == found[1].removed == found[2].removed


@pytest.mark.parametrize("labels", [True, False])
def test_segmentation_is_pruned_and_distilled_per_pixel(labels):
    """Three classes by brightness, one of them ignored in part; the student keeps most of its teacher's pixels."""
    data = [(x, (x[:, 0] * 1.5 + 1.5).clamp(0, 2).long()) for x, _ in batches(24)]
    data = [(x, y.masked_fill(torch.arange(8) == 0, -100)) for x, y in data]
    program = capture(Segmenter())
    teacher = Distill(epochs=6, lr=0.02)(program, data=data, val=data[:4])
    options = {"epochs": 4, "lr": 0.01, "features": 0.5, "labels": labels}
    result = pruning(options, interval=4)(
        teacher.program, data=data if labels else [x for x, _ in data], val=data[:4], teacher=teacher.program
    )
    assert result.program.macs <= 0.4 * program.macs
    assert verify.surgery(teacher.program, result) <= EXACT
    last = result.record["epochs"][-1]
    assert ("task" in last) == labels
    assert last["features"] < 0.5
    assert last["val"] > teacher.record["epochs"][-1]["val"] - 0.15 > 0.6


@pytest.mark.parametrize("importance", ["fisher", "taylor", "fisher-paper"])
def test_the_scale_of_the_loss_changes_nothing(importance):
    """Neither at once nor while training, where plain SGD needs a learning rate that makes up for it."""
    program, removed = dense(torch.float64), {}
    data = batches(dtype=torch.float64)
    for scale in (1.0, 1e-5, 2.0**-40):

        def loss(outputs, labels, scale=scale):
            return scale * F.cross_entropy(outputs, labels)

        options = {"macs": 0.4, "round_to": 2, "importance": importance, "scope": "global"}
        at_once = RemoveChannels(**options)(program, data=data, loss=loss)
        train = {"optimizer": "sgd", "lr": 1e-3 / scale, "weight_decay": 0.0, "warmup": 0.0, "clip": 0.0}
        slowly = pruning(train, **options)(program, data=data, loss=loss)
        removed[scale] = at_once.removed, slowly.removed
        assert {event["importance"] for event in slowly.record["events"]} == {importance}
    assert removed[1.0] == removed[1e-5] == removed[2.0**-40]
