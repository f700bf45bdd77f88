"""Wrong merges are caught, one by one or by the whole network, and not done."""

import dataclasses

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.passes.fuse import merge_in_graph as module
from graphcomb.passes.fuse.fuse import Fuse

from .toys import lively, norms


@pytest.mark.parametrize("planted", ["weight", "bias"])
def test_a_wrong_merge_is_caught_and_not_done(planted, monkeypatch):
    right = module.merged_kernel

    def wrong(merge, values):
        found = right(merge, values)
        tensor = getattr(found, planted).clone()
        tensor.view(-1)[-1] += 1e-6
        return dataclasses.replace(found, **{planted: tensor})

    monkeypatch.setattr(module, "merged_kernel", wrong)
    model = lively(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)))
    program = g.capture(model, torch.randn(2, 3, 6, 6), dynamic_shapes="batch")
    result = Fuse()(program)
    assert norms(result) == 1
    assert result.record["changed"] == []
    assert "the merged layer is" in result.record["refused"][0]["why"]
    assert torch.equal(result.program.module()(program.args[0]), program.module()(program.args[0]))


def test_a_merge_that_only_the_whole_network_shows_to_be_wrong_is_rolled_back(monkeypatch):
    right = module.merged_kernel
    monkeypatch.setattr(module, "merge_error", lambda *args: 0.0)  # the check of one merge goes blind
    monkeypatch.setattr(module, "merged_kernel", lambda *args: right(*args).scaled(1.0001))
    model = lively(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()))
    program = g.capture(model, torch.randn(2, 3, 6, 6), dynamic_shapes="batch")
    result = Fuse()(program)
    assert norms(result) == 1
    assert "in the whole network it is" in result.record["refused"][0]["why"]
    assert torch.equal(result.program.module()(program.args[0]), program.module()(program.args[0]))


class Wild(nn.Module):
    """Moves its outputs by 1e-7 when its inputs move by 1e-16: comparing outputs proves nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.more = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        x = (self.norm(self.conv(x)) * 1e9).sin()
        return self.more(x) + x


def test_a_network_that_magnifies_rounding_errors_is_proven_node_by_node():
    program = g.capture(lively(Wild().double()), torch.randn(2, 3, 5, 5, dtype=torch.float64))
    result = Fuse()(program)
    assert norms(result) == 0
    assert "magnifies rounding errors" in result.record["note"]
    assert result.record["error"] <= 1e-12
    assert result.record["verified"]["oracle"] == "input program, node by node"


def test_in_such_a_network_only_the_wrong_merge_is_dropped(monkeypatch):
    right = module.merged_kernel

    def wrong(merge, values):
        found = right(merge, values)
        return found.scaled(1.0001) if merge.source.op == "placeholder" else found

    monkeypatch.setattr(module, "merge_error", lambda *args: 0.0)  # the check of one merge goes blind
    monkeypatch.setattr(module, "merged_kernel", wrong)
    program = g.capture(lively(Wild().double()), torch.randn(2, 3, 5, 5, dtype=torch.float64))
    result = Fuse()(program)
    assert [c["into"] for c in result.record["changed"]] == ["more.0.weight"]
    assert norms(result) == 1
    assert "in the whole network it is" in result.record["refused"][0]["why"]
