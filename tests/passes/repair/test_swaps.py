"""The local search over what goes: predicted changes, never worse, and how near it comes to the best of all choices."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphcomb
from graphcomb.passes import Context, RemoveChannels
from graphcomb.passes.channels.sizes.selection import lowest_removed
from graphcomb.passes.repair import readers as readers_of_groups
from graphcomb.passes.repair import score
from graphcomb.passes.repair.swaps import Columns, _changes, loss, swapped


def readers(seed: int, size: int, count: int = 2) -> list[Columns]:
    """Readers of a group with inputs that depend on one another; each reads another part, at other places."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(4 * size, size // 2, generator=g, dtype=torch.float64)
        x = torch.cat([x, x @ torch.randn(size // 2, size, generator=g, dtype=torch.float64)], 1)
        x += 0.3 * torch.randn(x.shape, generator=g, dtype=torch.float64)
        w = torch.randn(3, x.shape[1], generator=g, dtype=torch.float64) * torch.rand(x.shape[1], generator=g)
        a = x.T @ x
        places = torch.randperm(x.shape[1], generator=g)[:size].numpy()
        if size > 3:
            places[torch.randint(size, (1,), generator=g)] = -1
        found.append(Columns(torch.linalg.inv(a + 1e-3 * torch.diag(a.diagonal())), w.T @ w, places))
    return found


@given(st.integers(0, 10_000), st.integers(3, 9), st.data())
@settings(max_examples=40, deadline=None)
def test_every_swap_changes_the_loss_as_predicted(seed: int, size: int, data: st.DataObject) -> None:
    found = readers(seed, size)
    count = data.draw(st.integers(1, size - 1))
    order = np.random.default_rng(seed).permutation(size)
    gone, left = np.sort(order[:count]), np.sort(order[count:])
    now, changes = loss(found, gone), _changes(found, gone, left)
    for i, j in itertools.product(range(len(gone)), range(len(left))):
        trial = gone.copy()
        trial[i] = left[j]
        assert now + changes[i, j] == pytest.approx(loss(found, trial), rel=1e-8, abs=1e-9 * now)


@given(st.integers(0, 10_000), st.integers(2, 8), st.data())
@settings(max_examples=40, deadline=None)
def test_it_is_never_worse_than_without_nor_better_than_the_best_of_all(
    seed: int, size: int, data: st.DataObject
) -> None:
    found, keep = readers(seed, size), data.draw(st.integers(1, size))
    mask = lowest_removed(np.random.default_rng(seed).random(size), keep)
    after, swaps = swapped(found, mask)
    before, now = (loss(found, np.flatnonzero(~m)) for m in (mask, after))
    best = min(loss(found, np.array(s, dtype=int)) for s in itertools.combinations(range(size), size - keep))
    assert after.sum() == keep
    assert best * (1 - 1e-9) <= now <= before
    assert (now < before) == (swaps > 0)
    _, again = swapped(found, after)
    assert again == 0, "no swap is left that helps"


def redundant(seed: int) -> list[Columns]:
    """Ten inputs that four numbers make up but for a little noise."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 4, generator=g, dtype=torch.float64) @ torch.randn(4, 10, generator=g, dtype=torch.float64)
    x += 0.1 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    w, a = torch.randn(3, 10, generator=g, dtype=torch.float64), x.T @ x
    return [Columns(torch.linalg.inv(a + 1e-3 * torch.diag(a.diagonal())), w.T @ w, np.arange(10))]


def test_it_finds_what_one_index_after_another_cannot() -> None:
    """Of 40 redundant groups, how many end at the best of all choices: 18 after removal one by one, 36 after swaps."""
    ends = np.zeros(2)
    for seed in range(40):
        found, gone = redundant(seed), []
        for _ in range(6):
            rest = [i for i in range(10) if i not in gone]
            gone.append(min(rest, key=lambda i: loss(found, np.array([*gone, i]))))
        mask = ~np.isin(np.arange(10), gone)
        best = min(loss(found, np.array(s)) for s in itertools.combinations(range(10), 6))
        for k, own in enumerate((mask, swapped(found, mask)[0])):
            ends[k] += loss(found, np.flatnonzero(~own)) <= best * (1 + 1e-9)
    assert ends[0] <= 20
    assert ends[1] >= 34


class Branches(nn.Module):
    """A group that a grouped layer, a concatenation and a sum read, one that a layer reads flattened, and one with weights
    that outweigh all others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.side = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.grouped, self.deep = nn.Conv2d(12, 12, 1, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.join, self.loud = nn.Conv2d(20, 6, 1), nn.Conv2d(12, 12, 1)
        self.head = nn.Linear(6 * 9, 4)
        with torch.no_grad():
            self.loud.weight.mul_(100)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.deep(self.side(x).relu()).relu()
        x = self.loud(x).tanh() + self.grouped(x).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(self.join(torch.cat([x, y], 1)).relu(), 3).flatten(1))


def test_a_network_with_swaps_loses_less_by_the_joint_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readers in a row; the losses are those of refitting by hand, up to the ridge."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)).double().eval()
    program = graphcomb.capture(model, torch.zeros(2, 4).double(), dynamic_shapes="batch")
    data = list(torch.randn(256, 4, dtype=torch.float64).split(64))
    monkeypatch.setattr(readers_of_groups, "RIDGES", (1e-9,))
    options = {"ratio": 0.6, "round_to": 1, "importance": "repair"}
    found = RemoveChannels(**options)(program, data=data)
    with monkeypatch.context() as patch:
        patch.setattr(score.Losses, "swapped", lambda losses, masks: (masks, {}))
        plain = RemoveChannels(**options)(program, data=data)
    assert "0.weight:0" in found.record["swaps"]
    assert "swaps" not in plain.record
    assert [r["after"] for r in found.record["changed"]] == [r["after"] for r in plain.record["changed"]]
    comb = graphcomb.comb(program)
    group = next(g for g in comb.groups if g.name == "0.weight:0")
    (reader,), count = readers_of_groups.readers(comb, [group], Context(data=data), 1024)
    root = (reader.sensitivity * reader.coherent[0] / reader.coherent[1] / count).sqrt() / count**0.5  # of one sample
    hidden, lost = model[:2](torch.cat(data)).detach(), []
    for result in (found, plain):
        gone = result.removed["0.weight"][0]
        rest = torch.cat([hidden[:, [i for i in range(16) if i not in gone]], torch.ones(count, 1)], 1)
        residual = hidden[:, gone] - rest @ torch.linalg.lstsq(rest, hidden[:, gone]).solution
        lost.append(float((root[:, None] * model[2].weight[:, gone].detach() @ residual.T).square().sum()))
    prepared = reader.prepared()
    state = [Columns(prepared.inverse, prepared.power, np.arange(16))]
    for result, by_hand in zip((found, plain), lost, strict=True):
        assert loss(state, np.array(result.removed["0.weight"][0])) == pytest.approx(by_hand, rel=1e-4)
    assert lost[0] < lost[1]


def test_groups_with_unlike_readers_are_searched_as_far_as_they_can_be() -> None:
    program = graphcomb.capture(Branches().double().eval(), torch.zeros(2, 3, 8, 8).double(), dynamic_shapes="batch")
    data = list(torch.randn(64, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).split(16))
    result = RemoveChannels(ratio=0.5, round_to=1, importance="repair", repair=True)(program, data=data)
    assert "join.weight:0" not in result.record.get("swaps", {}), "its reader has nine columns for each index"
    assert graphcomb.verify.surgery(program, result) < 1e-10
    x = torch.cat(data)
    wanted = program.module()(x)
    assert (result.program.module()(x) - wanted).square().mean() < 0.5 * wanted.var()
