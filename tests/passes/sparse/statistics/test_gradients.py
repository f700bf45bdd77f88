"""Gradients of single samples: those of each sample alone, whatever way the network is laid out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.passes import Sparsify
from graphcomb.passes.base import Context
from graphcomb.passes.common.weights import layers
from graphcomb.passes.sparse.statistics.gradients import Gradients

from ..toys import batches, weights


@pytest.mark.parametrize("largest", [1, 10**9])
def test_gradients_of_samples_are_those_of_each_sample_alone(program, largest):
    data = batches(2)
    names = [layer.name for layer in layers(program)[0]]
    found = list(Gradients(12, "sample", "labels").stream(program.copy(), names, Context(data=data), largest))
    found = {n: torch.cat([f[n] for f in found]) for n in names}
    assert all(len(f) == 12 for f in found.values())
    module = program.copy().module()
    x, y = (torch.cat(t) for t in zip(*data, strict=True))
    for i in (0, 7, 11):  # among others: alone, torch's batch normalisation has a wrong gradient here
        module.zero_grad()
        F.cross_entropy(module(x)[i : i + 1], y[i : i + 1]).backward()
        for n in names:
            torch.testing.assert_close(found[n][i], module.get_parameter(n).grad, rtol=1e-4, atol=1e-6)


class TokensFirst(nn.Module):
    """Samples in the second dimension of the layer's input, and in blocks of windows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.a(x.transpose(0, 1)).tanh().transpose(0, 1)
        windows = self.b(x.reshape(-1, 2, 4)).tanh()
        return self.head(windows.reshape(x.shape[0], -1, 4).mean(1))


class Mixing(nn.Module):
    """Samples end up in other places."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x.mean(1)).tanh().flip(0)).flip(0)


@pytest.mark.parametrize("dynamic", ["batch", None])
@pytest.mark.parametrize("model", [TokensFirst, Mixing])
def test_samples_are_followed_through_other_layouts_or_taken_one_by_one(model, dynamic):
    torch.manual_seed(0)
    program = g.capture(model(), torch.randn(5, 4, 3), dynamic_shapes=dynamic)
    names = [layer.name for layer in layers(program)[0]]
    x, y = torch.randn(5, 4, 3), torch.randint(2, (5,))
    stream = Gradients(4, "sample", "labels").stream(program.copy(), names, Context(data=[(x, y)]), 10**9)
    if dynamic is None:
        with pytest.raises(BadInput, match='set per to "batch"'):
            list(stream)
        return
    parts = list(stream)
    assert len(parts) == (1 if model is TokensFirst else 4)
    module = program.module()
    for i in range(4):
        module.zero_grad()
        F.cross_entropy(module(x[i : i + 1]), y[i : i + 1]).backward()
        for n in names:
            expected = module.get_parameter(n).grad
            torch.testing.assert_close(torch.cat([p[n] for p in parts])[i], expected, rtol=1e-4, atol=1e-6)


def test_a_fixed_batch_has_gradients_of_samples_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    fixed, free = g.capture(net, x), g.capture(net, x, dynamic_shapes="batch")
    options = Sparsify(block=16, gradients=3)
    one, two = (options(p, data=[(x, y)]).program for p in (fixed, free))
    assert (weights(one)["1.weight"] == 0).sum() == 8
    torch.testing.assert_close(weights(one)["1.weight"], weights(two)["1.weight"])


def test_frozen_parameters_stay_frozen(program):
    copied = program.copy()
    copied.module().requires_grad_(False)
    result = Sparsify(gradients=8, block=32)(copied, data=batches())
    assert not any(p.requires_grad for p in result.program.module().parameters())


def test_gradients_of_batches(program):
    data = batches(3)
    found = list(Gradients(2, "batch", "labels").stream(program.copy(), ["proj.weight"], Context(data=data), 1))
    assert [len(f["proj.weight"]) for f in found] == [1, 1]
    module = program.copy().module()
    F.cross_entropy(module(data[1][0]), data[1][1]).backward()
    torch.testing.assert_close(found[1]["proj.weight"][0], module.get_parameter("proj.weight").grad)


def test_labels_from_the_teacher_need_no_labels_and_repeat(program):
    data = batches(labels=False)
    options = Gradients(16, "sample", "teacher")
    one, two = (
        torch.cat(
            [f["proj.weight"] for f in options.stream(program.copy(), ["proj.weight"], Context(data=data), 10**9)]
        )
        for _ in range(2)
    )
    assert torch.equal(one, two)
    assert one.abs().max() > 0
    result = Sparsify(against="teacher", gradients=16, block=32)(program, data=data, teacher=program)
    assert result.record["stages"][0]["steps"][0]["gradients"] == 16


class Table(nn.Module):
    """Scores of images against a table of classes, an input without a batch dimension."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x, table):
        return self.c(self.b(self.a(x).relu()).relu()) @ table.T


def test_an_input_that_is_as_long_as_the_batch_is_not_cut():
    torch.manual_seed(0)
    x, table, y = torch.randn(60, 16), torch.randn(10, 8), torch.randint(10, (60,))
    program = g.capture(Table(), (x[:7], table), dynamic_shapes={"x": {0: torch.export.Dim("b")}, "table": {}})
    found = []
    for size in (12, 10):
        data = [((x[i : i + size], table), y[i : i + size]) for i in range(0, 60, size)]
        for gradients in (60, 55):
            found.append(Sparsify(sparsity=0.5, gradients=gradients, block=32)(program, data=data))
    for a, b in (found[0], found[2]), (found[1], found[3]):
        torch.testing.assert_close(weights(a.program)["b.weight"], weights(b.program)["b.weight"])


def test_a_fixed_batch_of_images_of_any_size():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    sizes = {"input": {2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}}
    fixed = g.capture(net, torch.randn(8, 1, 16, 16), dynamic_shapes=sizes)
    free = g.capture(net, torch.randn(8, 1, 16, 16), dynamic_shapes="batch")
    found = [Sparsify(sparsity=0.5, gradients=16)(p, data=batches()) for p in (fixed, free)]
    torch.testing.assert_close(*(weights(f.program)["2.weight"] for f in found))


def test_a_teacher_whose_scores_are_not_finite_is_refused(program):
    broken = program.copy()
    broken.module().get_parameter("head.bias").data.fill_(float("nan"))
    with pytest.raises(BadInput, match="the teacher's scores are not finite"):
        Sparsify(against="teacher")(program, data=batches(), teacher=broken)
