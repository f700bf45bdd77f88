"""BatchNorm statistics taken anew."""

import pytest
import torch
from torch import nn

import graphcomb
from graphcomb import BadInput
from graphcomb.graph.nodes import fetch
from graphcomb.passes import Recalibrate


def program() -> graphcomb.Program:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    ).double()
    return graphcomb.capture(model.eval(), torch.zeros(2, 3, 6, 6).double(), dynamic_shapes="batch")


def batches() -> list[torch.Tensor]:
    return list(torch.randn(40, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).split(16))


def test_statistics_are_those_of_the_images_layer_after_layer() -> None:
    before = program()
    result = Recalibrate()(before, data=batches())
    module, x = result.program.module().eval(), torch.cat(batches())
    a = nn.functional.conv2d(x, fetch(module, "0.weight"), fetch(module, "0.bias"))
    torch.testing.assert_close(fetch(module, "1.running_mean"), a.mean((0, 2, 3)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        fetch(module, "1.running_var"), a.movedim(1, 0).flatten(1).var(1), rtol=1e-10, atol=1e-10
    )
    out = module(x)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-6)
    assert [row["what"] for row in result.record["changed"]] == ["1.running_mean", "4.running_mean"]
    assert torch.equal(fetch(before.module(), "1.running_mean"), torch.zeros(8).double())


def test_a_prior_draws_to_the_old_statistics_and_means_may_stay() -> None:
    full, half = (Recalibrate(prior=p)(program(), data=batches()).program.module() for p in (0.0, 40.0))
    torch.testing.assert_close(fetch(half, "1.running_mean"), fetch(full, "1.running_mean") / 2)
    only = Recalibrate(statistics="variance")(program(), data=batches()).program.module()
    assert not fetch(only, "1.running_mean").any()
    torch.testing.assert_close(fetch(only, "1.running_var"), fetch(full, "1.running_var"))


def test_needs_images_and_leaves_what_is_not_finite() -> None:
    with pytest.raises(BadInput, match=r"^Recalibrate: needs images"):
        Recalibrate()(program())
    data = batches()
    data[0][:] = float("inf")
    result = Recalibrate()(program(), data=data)
    assert {row["why"] for row in result.record["refused"]} == {"its inputs are not finite numbers"}
