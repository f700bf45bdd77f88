"""Distill: what it learns, what it leaves alone, what it refuses, and that a killed run ends where a whole one does."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.passes import RemoveChannels, Sparsify
from graphcomb.passes.base import Context
from graphcomb.passes.common.processes import placed
from graphcomb.passes.common.repeat import rng_state
from graphcomb.passes.common.scoring import evaluate
from graphcomb.passes.train.callbacks import Callback
from graphcomb.passes.train.distill import Distill, feature_distance
from graphcomb.passes.train.features import matching_features
from graphcomb.passes.train.options import Training, learning_rate
from graphcomb.passes.train.teaching import soft_kl

from ..toys import Cut, Stop, same, state
from .toys import capture, loaders, network, small, tensors


# ---------------------------------------------------------------------------------------------------------------- gain
@pytest.mark.parametrize("options", [{}, {"alpha": 0.0}, {"labels": False}, {"optimizer": "sgd", "lr": 0.1}])
def test_the_student_learns_and_nothing_else_changes(options, teacher):
    data, val = loaders(count=1300)
    student = small(6)
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
    student = small(6)
    results = [
        Distill(epochs=1)(student, data=data, teacher=teacher)
        for data in (DataLoader(plain, 64), named, [t for (t,) in DataLoader(plain, 64)])
    ]
    assert all(same(state(r.program), state(results[0].program)) for r in results)
    assert "task" not in results[0].record["epochs"][0]


def test_a_teacher_whose_outputs_look_like_values_is_questioned_once():
    """The softmax of an angle and a speed says nothing, so that a student would learn nothing from it."""
    model = nn.Linear(6, 2)
    with torch.no_grad():
        model.weight *= torch.tensor([[0.1], [3.0]])
        model.bias.copy_(torch.tensor([0.0, 60.0]))
    x = torch.randn(64, 6)
    program = g.capture(model, x[:2], dynamic_shapes="batch")

    def warned(data, **options) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Distill(epochs=2, **options)(program, Context(data=data, teacher=program, loss=F.mse_loss))
        return [str(w.message) for w in caught if str(w.message).startswith("Distill")]

    (text,) = warned(list(x.split(32)))
    assert "the teacher's out looks like values, not like class scores" in text
    assert 'outputs={"out": "values"}' in text
    assert len(warned([(b, model(b).detach()) for b in x.split(32)])) == 1  # labels that are numbers
    assert not warned(list(x.split(32)), outputs={"out": "values"})
    assert not warned(list(x.split(32)), class_dim=1)
    with torch.no_grad():
        model.bias.zero_()
    program = g.capture(model, x[:2], dynamic_shapes="batch")
    assert not warned(list(x.split(32)))


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
    student = small(6)
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
    result = Distill(epochs=3, lr=5e-3, precision="bf16")(small(6), data=data, val=val, teacher=teacher)
    assert result.record["epochs"][-1]["val"] > 0.7
    assert all(t.dtype == torch.float32 for t in state(result.program).values())


def test_the_seed_decides_everything(teacher):
    data, _ = loaders()
    student = small(6)
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
        distill.train(programs[1], Context(data=Cut(data, 5), teacher=teacher, out=tmp_path), [Masks()])
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
        Distill(**options)(small(4), **context)
    assert "\n" not in str(caught.value)


def test_a_diverging_loss_names_the_step():
    data, _ = loaders()
    calls = itertools.count(1)

    def loss(outputs, labels):
        return outputs.sum() * (float("inf") if next(calls) == 3 else 1.0)

    with pytest.raises(BadInput, match=r"Distill: the loss is -?(inf|nan) at step 3 \(epoch 1\).*try a lower lr"):
        Distill(lr=1e-3)(small(4), data=data, loss=loss)


def test_an_unfitting_teacher_is_named():
    data, _ = loaders()
    other = g.capture(nn.Flatten(), torch.zeros(3, 2, 8, 8), dynamic_shapes="batch")
    with pytest.raises(BadInput, match=r"teacher: an input is torch.float32"):
        Distill()(small(4), data=data, teacher=other)
    wide = capture(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    with pytest.raises(BadInput, match=r"teacher: its class scores are \(64, 5\), the program's \(64, 10\)"):
        Distill()(small(4), data=data, teacher=wide)


def test_half_precision_needs_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BadInput, match='precision: "fp16" needs a GPU'):
        Distill(precision="fp16")(small(4), data=loaders()[0])


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
