"""Distill: what it learns, what it leaves alone, what it refuses, and that a killed run ends where a whole one does."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import graphcomb.graph as g
from graphcomb.graph.errors import BadInput
from graphcomb.passes import RemoveChannels, Sparsify
from graphcomb.passes.base import Context
from graphcomb.passes.batch import split_batch
from graphcomb.passes.common.feed import Feed
from graphcomb.passes.common.loaders import Every, shard
from graphcomb.passes.common.losses import accuracy, default_loss, logits_of
from graphcomb.passes.common.processes import placed
from graphcomb.passes.common.repeat import rng_state
from graphcomb.passes.common.scoring import evaluate
from graphcomb.passes.train.callbacks import Callback
from graphcomb.passes.train.distill import Distill, feature_distance, soft_kl
from graphcomb.passes.train.features import matching_features
from graphcomb.passes.train.options import Training, learning_rate


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.short = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return F.relu(self.body(x) + self.short(x))


def network(width, last=None, dropout=0.1):
    torch.manual_seed(width)
    last = last or 2 * width
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), Block(width, 2 * width, 2),
        Block(2 * width, last, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(last, 10),
    )  # fmt: skip


def capture(model, dynamic="batch", batch=3):
    return g.capture(model, torch.randn(batch, 1, 8, 8), dynamic_shapes=dynamic)


def tensors():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def loaders(batch=64, count=512, shuffle=True):
    x, y = tensors()
    return (
        DataLoader(TensorDataset(x[:count], y[:count]), batch, shuffle=shuffle),
        DataLoader(TensorDataset(x[-400:], y[-400:]), 128),
    )


@pytest.fixture(scope="module")
def teacher():
    data, _ = loaders(count=1300)
    return Distill(epochs=4, lr=5e-3)(capture(network(12)), data=data).program


def state(program):
    return {k: v.clone() for k, v in program.module().state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------------------- gain
@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"labels": False}, {"optimizer": "sgd", "lr": 0.1}])
def test_the_student_learns_and_nothing_else_changes(options, teacher):
    data, val = loaders(count=1300)
    student = capture(network(6))
    before, taught, rng = state(student), state(teacher), rng_state()
    codes = student.module().code, teacher.module().code
    result = Distill(epochs=4, **{"lr": 5e-3, **options})(student, data=data, val=val, teacher=teacher)
    record = result.record
    assert record["val_before"] < 0.3
    assert record["val_teacher"] > 0.9
    assert record["epochs"][-1]["val"] > 0.85
    assert record["epochs"][-1]["val"] == pytest.approx(evaluate(result.program, val))
    assert [e["loss"] for e in record["epochs"]] == sorted((e["loss"] for e in record["epochs"]), reverse=True)
    parts = {"task", "kl"} - ({"kl"} if options.get("alpha") == 0 else {"task"} if "labels" in options else set())
    assert parts == record["epochs"][0].keys() - {"epoch", "steps", "loss", "val"}
    assert same(state(student), before)
    assert same(state(teacher), taught)
    assert codes == (student.module().code, teacher.module().code)
    assert result.program.module().code == student.module().code, "taps or training flags are left in the graph"
    assert torch.equal(rng_state()["torch"], rng["torch"]), "the global random state is the caller's"
    assert len(result.program.history) == 1
    assert result.program.history[0]["options"]["epochs"] == 4


def test_unlabelled_batches_are_enough(teacher):
    x, _ = tensors()
    plain, named = TensorDataset(x[:256]), [{"input": t} for t in x[:256].split(64)]
    student = capture(network(6))
    results = [
        Distill(epochs=1)(student, data=data, teacher=teacher)
        for data in (DataLoader(plain, 64), named, [t for (t,) in DataLoader(plain, 64)])
    ]
    assert all(same(state(r.program), state(results[0].program)) for r in results)
    assert "task" not in results[0].record["epochs"][0]


def test_features_of_equal_width_are_learnt_and_the_others_named(teacher):
    student = capture(network(6, last=24))  # the last block is as wide as the teacher's
    kept, refused = matching_features(teacher, student)
    names = list(kept)
    assert len(names) == len(refused) == 1
    assert refused[0].why == "its shape is (12, 4, 4) in the student, (24, 4, 4) in the teacher"
    data, _ = loaders()
    plain, matched = (
        Distill(epochs=3, lr=5e-3, features=f, labels=False)(student, data=data, teacher=teacher) for f in (0.0, 2.0)
    )
    assert matched.record["matched"] == names
    assert matched.record["refused"] == [r.row() for r in refused]
    x = tensors()[0][-100:]

    def distance(program):
        node = next(n for n in program.graph.nodes if n.name == names[0])
        values = {}
        interpreter = torch.fx.Interpreter(program.module(), garbage_collect_values=False)
        interpreter.run(x)
        values = interpreter.env
        return values[node]

    with torch.no_grad():
        far, near = (feature_distance([distance(r.program)], [distance(teacher)]) for r in (plain, matched))
    assert near < 0.5 * far
    assert len(matched.record["epochs"][0]) == 5


def test_the_loss_is_what_its_formula_says(teacher):
    """One SGD step against the formula written out in eager mode, frozen statistics, no dropout."""
    x, y = tensors()
    model, a, t = network(6, dropout=0.0), 0.3, 3.0
    student = capture(model)
    plain = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "clip": 0.0, "weight_decay": 0.0}
    distill = Distill(steps=1, lr=0.1, alpha=a, temperature=t, batch_norm="frozen", **plain)
    result = distill(student, data=[(x[:32], y[:32])], teacher=teacher)
    model.eval()
    with torch.no_grad():
        p = (teacher.module()(x[:32]) / t).softmax(1)
    scores = model(x[:32])
    kl = (p * (p.log() - (scores / t).log_softmax(1))).sum(1).mean()
    loss = (1 - a) * F.cross_entropy(scores, y[:32]) + a * t**2 * kl
    loss.backward()
    assert result.record["epochs"][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        expected = parameter - 0.1 * parameter.grad
        torch.testing.assert_close(result.program.module().get_parameter(name), expected, rtol=1e-4, atol=1e-6)


def test_soft_kl_is_per_pixel_and_feature_distance_is_a_cosine():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    by_pixel = soft_kl(student.permute(0, 2, 3, 1).reshape(-1, 5), teacher.permute(0, 2, 3, 1).reshape(-1, 5), 2.0)
    torch.testing.assert_close(soft_kl(student, teacher, 2.0), by_pixel)
    assert soft_kl(teacher, teacher, 2.0).abs() < 1e-6
    cosine = F.cosine_similarity(student.flatten(1), teacher.flatten(1)).mean()
    torch.testing.assert_close(feature_distance([student], [7 * teacher]), 2 * (1 - cosine))
    with pytest.raises(BadInput, match=r"class scores are \(2, 4\), the program's \(2, 5\)"):
        soft_kl(torch.zeros(2, 5), torch.zeros(2, 4), 1.0)


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.extra = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 3, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = F.relu(self.body(x))
        return {"out": self.head(y), "aux": self.extra(y)}


def test_segmentation_with_named_outputs(teacher):
    """Three classes by brightness; the auxiliary output takes no part."""
    torch.manual_seed(0)
    x, _ = tensors()
    y = (x[:, 0] * 2.99).long()
    y[:, 0] = -100  # ignored
    data, val = (DataLoader(TensorDataset(x[part], y[part]), 64) for part in (slice(0, 1024), slice(1024, None)))
    options = {"epochs": 4, "lr": 5e-2}
    first = Distill(**options)(capture(Segmenter()), data=data, val=val)
    assert first.record["epochs"][-1]["val"] > 0.9
    second = Distill(**options, labels=False)(capture(Segmenter()), data=data, val=val, teacher=first.program)
    assert second.record["epochs"][-1]["val"] > 0.85
    extra = "extra.weight"
    assert torch.equal(second.program.module().get_parameter(extra), state(second.program)[extra])


# ------------------------------------------------------------------------------------------------- options of training
def test_learning_rates_warm_up_and_end_low():
    rates = [learning_rate(Training(lr=2.0, warmup=0.2), i, 10) for i in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1
    assert learning_rate(Training(lr=1.0, warmup=0.0, schedule="linear"), 5, 10) == pytest.approx(0.5)
    assert learning_rate(Training(lr=1.0, warmup=0.0, schedule="constant"), 9, 10) == 1.0


def test_frozen_statistics_stay_and_decay_spares_scales():
    data, _ = loaders()
    student = capture(network(6))
    before = state(student)
    result = Distill(epochs=1, batch_norm="frozen")(student, data=data)
    after = state(result.program)
    assert {k for k in before if torch.equal(before[k], after[k])} == {k for k in before if "running" in k}
    # weight decay alone, gradients too small to matter: matrices shrink, vectors do not
    options = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "batch_norm": "frozen"}
    quiet = Distill(steps=2, lr=0.5, weight_decay=0.2, **options)
    after = state(quiet(student, data=data, loss=lambda outputs, labels: 0 * outputs.sum()).program)
    for name, tensor in before.items():
        shrunk = tensor.dim() > 1
        assert (after[name].norm() < 0.9 * tensor.norm()) if shrunk else torch.equal(after[name], tensor), name


def test_bfloat16_trains_and_keeps_full_precision_weights(teacher):
    data, val = loaders(count=1300)
    result = Distill(epochs=3, lr=5e-3, precision="bf16")(capture(network(6)), data=data, val=val, teacher=teacher)
    assert result.record["epochs"][-1]["val"] > 0.7
    assert all(t.dtype == torch.float32 for t in state(result.program).values())


def test_the_seed_decides_everything(teacher):
    data, _ = loaders()
    student = capture(network(6))
    runs = [Distill(epochs=2)(student, data=data, teacher=teacher, seed=seed).program for seed in (1, 1, 2)]
    assert same(state(runs[0]), state(runs[1]))
    assert not same(state(runs[0]), state(runs[2]))


class Masks(Callback):
    """Sums Fisher scores of the first layer's filters and, every third step, masks the lowest for good."""

    def __init__(self):
        self.scores, self.alive, self.steps = torch.zeros(6), torch.ones(6), []

    def after_backward(self, step, module):
        weight = module.get_parameter("0.weight")
        self.scores += (weight * weight.grad).sum((1, 2, 3)).detach() ** 2

    def after_step(self, step, module):
        self.steps.append(step)
        if step % 3 == 2:
            self.alive[(self.scores + 1e9 * (1 - self.alive)).argmin()] = 0
            self.scores.zero_()
        module.get_parameter("0.weight").data *= self.alive.view(-1, 1, 1, 1)

    def state_dict(self):
        return {"scores": self.scores, "alive": self.alive, "steps": self.steps}

    def load_state_dict(self, state):
        self.__dict__.update(state)


def test_callbacks_see_gradients_hold_masks_and_resume(teacher, tmp_path):
    data, _ = loaders()
    distill, programs, masks = Distill(epochs=1, checkpoint_every=2), [capture(network(6)) for _ in range(3)], Masks()
    distill.train(programs[0], Context(data=data, teacher=teacher, out=tmp_path), [masks])
    assert masks.steps == list(range(8))
    assert masks.alive.sum() == 4
    dead = programs[0].module().get_parameter("0.weight").flatten(1).abs().sum(1) == 0
    assert torch.equal(dead, masks.alive == 0)
    with pytest.raises(Stop):
        distill.train(programs[1], Context(data=stopping_after(data, 5), teacher=teacher, out=tmp_path), [Masks()])
    resumed = Masks()
    record = distill.train(programs[2], Context(data=data, teacher=teacher, out=tmp_path), [resumed])
    assert record["resumed_at"] == 4
    assert resumed.steps == masks.steps
    assert torch.equal(resumed.alive, masks.alive)
    assert same(state(programs[2]), state(programs[0]))


def test_a_module_on_another_device_takes_the_tensors_it_creates_along():
    class Adds(nn.Module):
        def forward(self, x):
            return x + torch.zeros(x.shape[0], 1, 8, 8)

    program = capture(Adds())
    made = [n for n in program.graph.nodes if "device" in n.kwargs]
    assert made, "the graph creates no tensor, so the test shows nothing"
    with placed(program.module(), torch.device("meta")) as module:
        assert module(torch.empty(5, 1, 8, 8, device="meta")).device.type == "meta"
    assert torch.equal(program.module()(torch.ones(5, 1, 8, 8)), torch.ones(5, 1, 8, 8))


# ----------------------------------------------------------------------------------------------------- data and scores
def test_batches_of_every_form():
    x, y = torch.zeros(2, 1), torch.zeros(2)
    assert split_batch((x, y)) == ((x,), {}, y)
    assert split_batch([x, y]) == ((x,), {}, y)
    assert split_batch(x) == split_batch([x]) == split_batch((x,)) == ((x,), {}, None)
    assert split_batch({"a": x, "labels": y}) == ((), {"a": x}, y)
    assert split_batch(({"a": x}, y)) == ((), {"a": x}, y)
    assert split_batch(([x, y], y)) == ((x, y), {}, y)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ("text", "yields a str"), ((1, 2), "yields a int"), ((torch.ones(1),) * 3, r"a tuple of 3 \(Tensor\)"),
        ({"labels": torch.ones(1)}, "an empty dict"), ({"a": [1]}, '"a": list'), ([], "a list of 0"),
    ],
)  # fmt: skip
def test_other_batches_are_refused_by_what_they_are(batch, says):
    with pytest.raises(BadInput, match=says):
        split_batch(batch)


def test_keyword_inputs_are_put_in_the_programs_order():
    class Two(nn.Module):
        def forward(self, x, scale, *, shift):
            return x * scale + shift

    a, b, c = (torch.full((3, 2), float(i)) for i in (2, 3, 4))
    program = g.capture(Two(), (a, b), {"shift": c}, dynamic_shapes="batch")
    feed = Feed(program)
    for batch in ({"shift": c, "scale": b, "x": a}, ([a, b, c], None)):
        found = feed.fit(batch)
        assert torch.equal(program.module()(*found.args, **found.kwargs), torch.full((3, 2), 10.0))
    with pytest.raises(BadInput, match='lacks the input "scale"'):
        feed.fit({"x": a, "shift": c})
    with pytest.raises(BadInput, match='no input "y" in the program; it takes x, scale, shift'):
        feed.fit({"x": a, "y": b})
    with pytest.raises(BadInput, match="a batch has 4 inputs"):
        feed.fit(([a, b, c, c], None))


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(4, 8, 8), r'input "input" has shape \(4, 8, 8\), the program takes \(batch, 1, 8, 8\)'),
        (torch.zeros(4, 3, 8, 8), r"has shape \(4, 3, 8, 8\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.float64), "is torch.float64, the program takes torch.float32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(x, says):
    with pytest.raises(BadInput, match=says):
        Distill()(capture(network(4)), data=[(x, torch.zeros(4).long())])


def test_a_program_of_fixed_batch_size_trains_and_scores_every_sample(teacher):
    x, y = tensors()
    x, y = x[:150], y[:150]
    data = DataLoader(TensorDataset(x, y), 32)  # the last batch is short
    student = capture(network(6), dynamic=None, batch=32)
    result = Distill(epochs=2)(student, data=data, val=data, teacher=teacher)
    assert result.record["skipped_batches"] == 2
    assert result.record["steps"] == 8
    with torch.no_grad():
        padded = torch.cat([x, x[:10]]).split(32)
        hits = torch.cat([result.program.module()(part) for part in padded])[:150].argmax(1) == y
    assert evaluate(result.program, data) == pytest.approx(hits.float().mean().item())
    says = r'a batch has 16 samples, the program is fixed to 32; capture it with dynamic_shapes="batch"'
    with pytest.raises(BadInput, match=says):
        Distill()(student, data=DataLoader(TensorDataset(x, y), 16))
    with pytest.raises(BadInput, match="a batch has 64 samples"):
        evaluate(student, DataLoader(TensorDataset(x, y), 64))


def test_filling_up_a_batch_leaves_alone_what_is_not_batched():
    """A table as long as the short batch, as an input and as an output."""

    class Anchored(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.head = nn.Linear(4, classes)

        def forward(self, x, table):
            return self.head(x) @ table, table * 2

    program = g.capture(Anchored(3), (torch.zeros(5, 4), torch.zeros(3, 3)))
    x, table = torch.randn(3, 4), torch.randn(3, 3)

    def metric(outputs, labels):
        assert outputs[0].shape == (3, 3)
        assert torch.equal(outputs[1], table * 2)
        return outputs[0].sum(1)

    expected = program.module()(torch.cat([x, x[-1:], x[-1:]]), table)[0][:3].sum(1).mean().item()
    assert evaluate(program, [((x, table), torch.zeros(3))], metric) == pytest.approx(expected)
    program = g.capture(Anchored(5), (torch.zeros(5, 4), torch.zeros(5, 5)))  # the table is complete already
    (batch,) = Feed(program).batches([((x, table := torch.randn(5, 5)), torch.zeros(3))], pad=True)
    assert batch.args[0].shape == (5, 4)
    assert torch.equal(batch.args[1], table)


def test_evaluate_restores_every_flag_and_takes_a_metric():
    _, val = loaders()
    model = network(6).train()
    model[3].eval()
    modes = [m.training for m in model.modules()]
    program = capture(model)
    code = program.module().train().code
    assert evaluate(model, val) == evaluate(program, val)
    assert [m.training for m in model.modules()] == modes
    assert program.module().training
    assert program.module().code == code
    margin = evaluate(program, val, lambda outputs, labels: outputs.max(1).values)
    assert margin == pytest.approx(torch.cat([program.module().eval()(x).max(1).values for x, _ in val]).mean().item())
    with pytest.raises(BadInput, match="val: the batches have no labels"):
        evaluate(program, [torch.zeros(3, 1, 8, 8)])
    with pytest.raises(BadInput, match="metric: does not take these outputs"):
        evaluate(program, [(torch.zeros(3, 1, 8, 8), torch.zeros(2))])
    with pytest.raises(BadInput, match="yields nothing"):
        evaluate(program, [])


def test_class_scores_are_found_or_asked_for():
    scores = torch.zeros(2, 3)
    assert logits_of(scores) is logits_of([scores]) is logits_of({"logits": scores, "h": scores}) is scores
    with pytest.raises(BadInput, match=r"no single tensor of class scores \(found \(2, 3\), \(2, 3\)\)"):
        logits_of((scores, scores))
    assert accuracy(torch.eye(3), torch.tensor([0, 2, -100])).tolist() == [1.0, 0.0]
    assert default_loss(torch.eye(3), torch.tensor([0, -100, -100])) < 0.6


def test_processes_share_the_batches():
    data = DataLoader(TensorDataset(torch.arange(22)), 4)
    whole = [b[0].tolist() for b in data]
    for even, count in itertools.product((True, False), (1, 2, 4)):
        parts = [shard(data, i, count, even) for i in range(count)]
        taken = [[b[0].tolist() for b in part] for part in parts]
        assert [len(p) for p in parts] == [len(t) for t in taken]
        merged = [b for group in itertools.zip_longest(*taken) for b in group if b is not None]
        assert merged == (whole[: len(whole) // count * count] if even else whole)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(6))

    assert [b.tolist() for b in shard(DataLoader(Stream(), 2), 1, 2)] == [[2, 3]]
    assert list(Every("abcde", 0, 2, even=False)) == ["a", "c", "e"]


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 0}, "Distill.epochs: at least 1, not 0"),
        ({"lr": -1.0}, "Distill.lr: above 0, not -1"),
        ({"optimizer": "lion"}, "Distill.optimizer: adamw or sgd, not 'lion'"),
        ({"schedule": "step"}, "Distill.schedule: cosine, linear or constant"),
        ({"alpha": 1.5}, "Distill.alpha: 0 to 1, not 1.5"),
        ({"temperature": 0}, "Distill.temperature"),
        ({"warmup": 2}, "Distill.warmup"),
        ({"batch_norm": "eval"}, "Distill.batch_norm"),
        ({"precision": "fp8"}, "Distill.precision"),
    ],
)
def test_options_out_of_range_are_named(options, says):
    with pytest.raises(BadInput, match=says):
        Distill(**options)


@pytest.mark.parametrize(
    ("options", "context", "says"),
    [
        ({}, {}, "Distill: needs data"),
        ({"labels": False}, {"data": []}, "no teacher to learn from"),
        ({}, {"data": [torch.zeros(4, 1, 8, 8)]}, "no labels and there is no teacher"),
        ({"features": 1.0}, {"data": []}, "Distill.features: needs a teacher"),
        ({}, {"data": []}, "data: holds no batch"),
        ({}, {"data": iter([1])}, "Distill.steps: give the number of steps"),
        ({"steps": 5}, {"data": iter([(torch.zeros(4, 1, 8, 8), torch.zeros(4).long())])}, "no batch in epoch 2"),
        ({"checkpoint_every": 1}, {"data": [1]}, "pass out="),
        ({}, {"data": [(torch.zeros(4, 1, 8, 8), torch.full((4,), 10))]}, "loss: does not take .* out of bounds"),
        ({}, {"data": [(torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4).long())]}, "data itself holds NaN"),
    ],
)
def test_what_cannot_run_says_so_in_one_line(options, context, says):
    with pytest.raises(BadInput, match=says) as caught:
        Distill(**options)(capture(network(4)), **context)
    assert "\n" not in str(caught.value)


def test_a_diverging_loss_names_the_step():
    data, _ = loaders()
    calls = itertools.count(1)

    def loss(outputs, labels):
        return outputs.sum() * (float("inf") if next(calls) == 3 else 1.0)

    with pytest.raises(BadInput, match=r"Distill: the loss is -?(inf|nan) at step 3 \(epoch 1\).*try a lower lr"):
        Distill(lr=1e-3)(capture(network(4)), data=data, loss=loss)


def test_an_unfitting_teacher_is_named():
    data, _ = loaders()
    other = g.capture(nn.Flatten(), torch.zeros(3, 2, 8, 8), dynamic_shapes="batch")
    with pytest.raises(BadInput, match=r"teacher: an input is torch.float32"):
        Distill()(capture(network(4)), data=data, teacher=other)
    wide = capture(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    with pytest.raises(BadInput, match=r"teacher: its class scores are \(64, 5\), the program's \(64, 10\)"):
        Distill()(capture(network(4)), data=data, teacher=wide)


def test_half_precision_needs_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BadInput, match='precision: "fp16" needs a GPU'):
        Distill(precision="fp16")(capture(network(4)), data=loaders()[0])


# --------------------------------------------------------------------------------------------------- checkpoint, resume
class Noisy(torch.utils.data.Dataset):
    """Digits with noise drawn from the global generator while training goes on, the hardest case for a resume."""

    def __init__(self):
        self.x, self.y = tensors()

    def __len__(self):
        return 256

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(1, 8, 8), self.y[i]


class Stop(Exception):
    pass


def stopping_after(data, count):
    """The loader, cut off by an exception before batch `count` + 1 in all."""

    class Cut:
        seen, generator = 0, data.generator

        def __len__(self):
            return len(data)

        def __iter__(self):
            for batch in data:
                if self.seen == count:
                    raise Stop
                self.seen += 1
                yield batch

    return Cut()


@pytest.mark.parametrize("stop", [1, 3, 8, 11])
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_resumed_run_ends_bit_by_bit_where_a_whole_one_does(stop, own_generator, teacher, tmp_path):
    def data():
        generator = torch.Generator().manual_seed(5) if own_generator else None
        return DataLoader(Noisy(), 32, shuffle=True, generator=generator)

    student, distill = capture(network(6)), Distill(epochs=2, checkpoint_every=3)
    _, val = loaders()
    whole = distill(student, data=data(), val=val, teacher=teacher, out=tmp_path / "whole")
    out = tmp_path / "cut"
    with pytest.raises(Stop):
        distill(student, data=stopping_after(data(), stop), val=val, teacher=teacher, out=out)
    assert len(list(out.glob("*"))) == (stop >= 3)
    resumed = distill(student, data=data(), val=val, teacher=teacher, out=out)
    assert resumed.record.get("resumed_at") == {1: None, 3: 3, 8: 6, 11: 9}[stop]
    assert same(state(resumed.program), state(whole.program))
    assert resumed.record["epochs"] == whole.record["epochs"]
    assert list(out.glob("*")) == [], "a finished run leaves no checkpoint"


def job(out, *, kill_at=0, per_process=64, epochs=2):
    """The run of the tests with several processes: no dropout and frozen statistics, so that only the global batch
    counts. kill_at: the checkpoint in whose middle the process kills itself."""
    student, teacher = capture(network(6, dropout=0.0)), capture(network(12))
    data, val = loaders(batch=per_process)
    save, calls = torch.save, itertools.count(1)

    def half_a_file(value, path, **options):
        if isinstance(path, Path) and next(calls) == kill_at:
            path.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, path, **options)

    torch.save = half_a_file
    try:
        distill = Distill(epochs=epochs, checkpoint_every=3, batch_norm="frozen")
        return distill(student, data=data, val=val, teacher=teacher, out=out)
    finally:
        torch.save = save


def command(*arguments):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_run_killed_while_it_writes_a_checkpoint_resumes(tmp_path):
    whole = job(tmp_path / "whole")
    done = command(__file__, str(tmp_path / "killed"), "3")
    assert done.returncode == -signal.SIGKILL, done.stderr
    files = sorted(f.name for f in (tmp_path / "killed").iterdir())
    assert [f.split(".")[-1] for f in files] == ["part", "ckpt"]
    assert (tmp_path / "killed" / files[0]).read_bytes() == b"half a file"
    resumed = job(tmp_path / "killed")
    assert resumed.record["resumed_at"] == 6
    assert same(state(resumed.program), state(whole.program))
    assert resumed.record["epochs"] == whole.record["epochs"]
    assert list((tmp_path / "killed").iterdir()) == []


def test_a_checkpoint_of_another_run_is_not_taken_and_a_damaged_one_is_named(tmp_path):
    data, _ = loaders()
    student = capture(network(6))
    with pytest.raises(Stop):
        Distill(checkpoint_every=2)(student, data=stopping_after(data, 5), out=tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    for options, context in (({"lr": 2e-3}, {}), ({}, {"seed": 1})):
        other = Distill(checkpoint_every=2, **options)(student, data=data, out=tmp_path, **context)
        assert "resumed_at" not in other.record
    other = Distill(checkpoint_every=2)(capture(network(7)), data=data, out=tmp_path)
    assert "resumed_at" not in other.record
    assert list(tmp_path.iterdir()) == [checkpoint]
    checkpoint.write_bytes(b"half a file")
    with pytest.raises(BadInput, match=r"distill-\w+.ckpt: no usable checkpoint .*delete it to train from the start"):
        Distill(checkpoint_every=2)(student, data=data, out=tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    data, _ = loaders()
    with pytest.raises(BadInput, match="the checkpoint cannot be written"):
        Distill(checkpoint_every=2)(capture(network(4)), data=data, out=tmp_path / "file")


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_the_same_global_batch(tmp_path):
    one = job(tmp_path / "one")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = command(*launch, __file__, str(tmp_path / "two"), "0", "32")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"two-{rank}.pt") for rank in range(2))
    assert first["record"]["processes"] == 2
    assert first["record"]["steps"] == one.record["steps"]
    assert same(first["state"], second["state"])
    for name, tensor in state(one.program).items():
        torch.testing.assert_close(first["state"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    for found, expected in zip(first["record"]["epochs"], one.record["epochs"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    # killed in the middle of a checkpoint, the launcher stops both; started again, they end at the same bits
    done = command(*launch, __file__, str(tmp_path / "killed"), "2", "32")
    assert done.returncode != 0
    done = command(*launch, __file__, str(tmp_path / "killed"), "0", "32")
    assert done.returncode == 0, done.stderr
    again = torch.load(tmp_path / "killed-0.pt")
    assert again["record"]["resumed_at"] == 3
    assert same(again["state"], first["state"])
    assert again["record"]["epochs"] == first["record"]["epochs"]


if __name__ == "__main__":
    folder, kill, per_process = (*sys.argv[1:], "64")[:3]
    rank = os.environ.get("RANK", "0")
    result = job(folder, kill_at=int(kill) if rank == "0" else 0, per_process=int(per_process))
    torch.save({"state": state(result.program), "record": result.record}, f"{folder}-{rank}.pt")


class Archive(IterableDataset):
    """Samples without a number, as they come from an archive."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(32):
            yield torch.randn(16, generator=generator), torch.randint(5, (), generator=generator)


@pytest.mark.parametrize(
    "pass_",
    [
        Distill(steps=4),
        Sparsify(gradients=16, block=32),
        Sparsify(method="wanda", gradients=16),
        RemoveChannels(macs=0.5, importance="taylor", train=Distill(steps=4)),
        Sparsify(schedule=((0, 0.5),), method="magnitude", train=Distill(epochs=1)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_a_loader_without_a_length_will_do(pass_):
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 5))
    program = g.capture(net, torch.randn(2, 16), dynamic_shapes="batch")
    loader = DataLoader(Archive(), 8)
    if isinstance(pass_, Sparsify) and pass_.schedule:
        with pytest.raises(BadInput, match=r"Distill\.steps: give the number of steps, the data has no length"):
            pass_(program, data=loader, teacher=program)
    else:
        pass_(program, data=loader, val=loader, teacher=program)
