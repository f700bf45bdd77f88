"""Which samples of the data scores and statistics look at, and how many numbers they hold at a time."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.passes.base import Context
from graphcomb.passes.channels.importance import scores
from graphcomb.passes.channels.importance.sums import weighted_sums
from graphcomb.passes.channels.remove_channels import RemoveChannels
from graphcomb.passes.common import processes, samples
from graphcomb.passes.common.feed import Batch, Feed
from graphcomb.passes.common.weights import layers
from graphcomb.passes.sparse.statistics import unfold
from graphcomb.passes.sparse.statistics.gradients import Gradients
from graphcomb.passes.sparse.statistics.moments import input_moments


class Numbered(torch.utils.data.Dataset):
    """Two classes, one after the other; remembers which samples were asked for."""

    def __init__(self, count=64):
        self.count, self.asked = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.asked.append(i)
        x = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(i))
        return x + (2 * i >= self.count), int(2 * i >= self.count)


def small_network(static=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    return g.capture(model, torch.randn(8, 2, 5, 5), dynamic_shapes=None if static else "batch")


@pytest.mark.parametrize("static", [False, True])
def test_gradients_are_taken_of_random_samples_up_to_the_limit(static):
    program, asked = small_network(static), []
    for seed in (0, 0, 1):
        data = Numbered()
        before = torch.get_rng_state()
        loader = torch.utils.data.DataLoader(data, batch_size=8)
        RemoveChannels(importance="fisher", samples=20, round_to=1)(program, data=loader, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        assert len(set(data.asked)) == 24, "whole batches"
        assert {i < 32 for i in data.asked} == {True, False}, "of both classes, though they come one after the other"
        asked.append(data.asked)
    assert asked[0] == asked[1] != asked[2]
    data = Numbered()
    RemoveChannels(importance="fisher", round_to=1)(program, data=torch.utils.data.DataLoader(data, batch_size=8))
    assert sorted(data.asked) == list(range(64))
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield torch.randn(8, 2, 5, 5), torch.zeros(8, dtype=torch.long)

    RemoveChannels(importance="fisher", samples=20, round_to=1)(program, data=endless())
    assert taken == [0, 1, 2]


class Elsewhere:
    """The accelerator, on a device that is told from the one of programs."""

    device = torch.device("cpu", 0)

    def __getattr__(self, name):
        return getattr(processes.accelerator(), name)


@pytest.mark.parametrize("importance", ["fisher", "taylor-paper"])
def test_gradients_are_taken_on_the_device_and_show_how_far_they_are(importance, monkeypatch):
    places, shown, inputs = [], [], []

    @contextlib.contextmanager
    def bar(show, title, total):
        shown.append((show, title, total))
        yield lambda done, text: shown.append(done)

    def placed(module, device):
        places.append(device)
        return processes.placed(module, device)

    def moved(batch, device):
        inputs.append(device)
        return batch

    for module in (scores, samples):
        monkeypatch.setattr(module, "accelerator", Elsewhere)
    monkeypatch.setattr(scores, "placed", placed)
    monkeypatch.setattr(samples, "bar", bar)
    monkeypatch.setattr(Batch, "to", moved)
    data = torch.utils.data.DataLoader(Numbered(32), batch_size=8)
    RemoveChannels(importance=importance, round_to=1)(small_network(), data=data, progress=True)
    assert places == [Elsewhere.device]
    assert inputs == 4 * [Elsewhere.device]
    assert shown == [(True, "importance", 1024), 8, 16, 24, 32]


def test_sums_of_many_weights_on_a_device_are_copied_once(monkeypatch):
    copied = []

    def cpu(tensor):
        copied.append(tensor.device.type)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    items = [(torch.empty(4, n, device="meta"), None, (0, 1)) for n in range(1, 20)]
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    result = weighted_sums(items)
    assert copied == ["meta"]
    assert [{d: len(row) for d, row in rows.items()} for rows in result] == [{0: 4, 1: n} for n in range(1, 20)]


class Attends(nn.Module):
    """Attention, whose queries and keys are read where they are multiplied."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("importance", ["fisher", "taylor"])
def test_scores_of_a_step_wait_for_the_device_as_often_for_many_groups_as_for_few(importance, monkeypatch):
    counts = []
    of_batch = scores.GradientScores.of_batch

    def counted(self, *rest):
        calls = []
        with monkeypatch.context() as patch:
            for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
                plain = getattr(torch.Tensor, name)

                def call(tensor, *args, plain=plain, name=name, **kwargs):
                    calls.append(name)
                    return plain(tensor, *args, **kwargs)

                patch.setattr(torch.Tensor, name, call)
            result = of_batch(self, *rest)
        counts.append(sum(name != "numpy" for name in calls))  # what was copied already
        return result

    monkeypatch.setattr(scores.GradientScores, "of_batch", counted)
    data = [(torch.randn(4, 2, 8, 8), torch.zeros(4, dtype=torch.long))]
    for depth in (1, 12):
        layers = [Attends() for _ in range(depth)]
        model = nn.Sequential(nn.Conv2d(2, 8, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
        RemoveChannels(importance=importance, round_to=1)(g.capture(model.eval(), data[0][0]), data=data)
    assert counts[0] == counts[1] <= 2


def test_the_batch_is_found_wherever_it_is_among_the_inputs():
    class Anchored(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, anchors, x):
            return self.a(x) @ anchors.t()

    anchors, x = torch.randn(7, 4), torch.randn(5, 3)
    batch = torch.export.Dim("batch", min=1)
    shapes = {"anchors": None, "x": {0: batch}}
    for dynamic in (shapes, None):
        feed = Feed(g.capture(Anchored(), (anchors, x), dynamic_shapes=dynamic))
        assert feed.batched == [False, True]
        assert feed.static == (None if dynamic else 5)
        assert feed.outputs == [True]
        assert feed.fit(((anchors, torch.randn(3, 3)), None)).size == 3
        with pytest.raises(BadInput, match=r'input "anchors" has shape \(6, 4\), the program takes \(7, 4\)'):
            feed.fit(((anchors[:6], x), None))


@pytest.mark.parametrize("full", [True, False])
def test_unfolded_inputs_and_gradients_of_samples_are_bounded(full, monkeypatch):
    """Whatever the limit, the result is the same, and no piece is larger than it, or than a row of positions of a sample."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, (3, 2), 2, groups=2), nn.Flatten(), nn.Linear(48, 3)
    )
    program = g.capture(model, torch.randn(4, 2, 8, 9), dynamic_shapes="batch")
    names = [layer.name for layer in layers(program)[0]]
    data = [(torch.randn(4, 2, 8, 9), torch.randint(3, (4,))) for _ in range(2)]
    pieces, moments, gradients = unfold.pieces, [], []
    sizes = []

    def watched(*args, **kwargs):
        for piece, where in pieces(*args, **kwargs):
            sizes.append(piece.numel() if kwargs.get("flat", True) else 0)
            yield piece, where

    for module in ("gradients", "moments"):
        monkeypatch.setattr(f"graphcomb.passes.sparse.statistics.{module}.pieces", watched)
    for limit in (1, 500, 10**9):
        sizes.clear()
        moments.append(input_moments(program.copy(), names, Context(data=data), 8, full, limit)[0])
        stream = Gradients(7, "sample", "labels").stream(program.copy(), names, Context(data=data), limit)
        found = list(stream)
        gradients.append({name: torch.cat([f[name] for f in found]) for name in names})
        assert max(sizes) <= max(limit, 9 * 6 * 9), "a row of 9 positions with 6 channels of 9 taps"
    for name in names:
        for some in (0, 1):
            torch.testing.assert_close(moments[some][name], moments[2][name])
            torch.testing.assert_close(gradients[some][name], gradients[2][name], rtol=1e-4, atol=1e-7)


def test_a_stream_of_gradients_leaves_the_callers_state_alone():
    program, data = small_network(), [(torch.randn(8, 2, 5, 5), torch.zeros(8, dtype=torch.long))] * 2
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        stream = Gradients(16, "sample", "teacher").stream(program, ["0.weight"], Context(data=data), 1)
        seen = []
        for _, value in zip(stream, expected, strict=False):
            assert not torch.is_grad_enabled()
            seen.append(torch.rand(()))
            assert torch.equal(seen[-1], value)
        stream.close()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
