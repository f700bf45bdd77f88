"""BatchNorm statistics taken anew."""

import pytest
import torch
from torch import nn

import graphcomb
from graphcomb import BadInput
from graphcomb.graph.nodes import fetch
from graphcomb.passes import Recalibrate, RemoveChannels


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


def test_against_the_dense_network_layers_write_the_dense_mean_and_variance_on_the_images() -> None:
    """Of whatever images: these have another mean and variance than those that the statistics were made for."""
    dense = program()
    data = [3 * x + 2 for x in batches()]
    removed = RemoveChannels(keep={"0.weight:0": 6}, importance="random", round_to=1)(dense, data=data)
    left = [i for i in range(8) if i not in removed.removed["0.weight"][0]]
    result = Recalibrate()(removed.program, data=data, teacher=dense)
    assert [row["what"] for row in result.record["changed"]] == ["1.running_mean", "4.running_mean"]
    x = torch.cat(data)
    wanted, ours = dense.module().eval(), result.program.module().eval()
    torch.testing.assert_close(
        fetch(ours, "1.running_var"), fetch(wanted, "1.running_var")[left]
    )  # nothing was before it
    a, b = wanted(x), ours(x)
    torch.testing.assert_close(b.mean((0, 2, 3)), a.mean((0, 2, 3)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(b.var((0, 2, 3)), a.var((0, 2, 3)), rtol=1e-6, atol=1e-9)
    off = removed.program.module().eval()(x)
    assert float((off.var((0, 2, 3)) / a.var((0, 2, 3)) - 1).abs().max()) > 0.01
    assert torch.equal(Recalibrate(reference="images")(removed.program, data=data, teacher=dense).program.module()(x),
                       Recalibrate()(removed.program, data=data).program.module()(x))  # fmt: skip


def test_a_network_that_lost_nothing_keeps_its_statistics() -> None:
    dense = program()
    result = Recalibrate(reference="dense")(dense, data=[3 * x + 2 for x in batches()], teacher=dense)
    x = torch.cat(batches())
    torch.testing.assert_close(result.program.module().eval()(x), dense.module().eval()(x), rtol=1e-10, atol=1e-10)


def test_a_channel_that_is_constant_keeps_its_scale_and_unknown_layers_are_left() -> None:
    dense = program()
    with torch.no_grad():
        fetch(dense.module(), "0.weight")[3] = 0
    result = Recalibrate()(dense, data=batches(), teacher=dense)
    for key in ("running_mean", "running_var"):
        torch.testing.assert_close(fetch(result.program.module(), f"1.{key}"), fetch(dense.module(), f"1.{key}"))
    other = graphcomb.capture(nn.Conv2d(3, 4, 1).double(), torch.zeros(2, 3, 6, 6).double(), dynamic_shapes="batch")
    refused = Recalibrate()(program(), data=batches(), teacher=other).record["refused"]
    assert {row["why"] for row in refused} == {"the dense network has no such layer"}
    with pytest.raises(BadInput, match=r"^Recalibrate.reference: dense needs the dense program"):
        Recalibrate(reference="dense")(program(), data=batches())


def test_layers_that_go_into_a_sum_keep_what_the_repair_gave_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.conv(x))

    dense = graphcomb.capture(Block().double().eval(), torch.zeros(2, 3, 6, 6).double(), dynamic_shapes="batch")
    result = Recalibrate()(dense, data=batches(), teacher=dense)
    assert [row["why"] for row in result.record["refused"]] == [
        "it goes into a sum, where it makes up for what the other operand lacks"
    ]
    assert not result.record["changed"]
    assert Recalibrate()(dense, data=batches()).record["changed"]  # of the images themselves


def test_a_layer_whose_inputs_do_not_vary_keeps_its_statistics_and_so_does_a_single_channel() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1000.1
    dense = graphcomb.capture(model, torch.zeros(2, 6).double(), dynamic_shapes="batch")
    for data in ([torch.randn(1, 6).double()], [torch.ones(30, 6).double()]):
        result = Recalibrate(reference="images")(dense, data=data)
        why = [row["why"] for row in result.record["refused"]]
        assert why == ["its inputs do not vary over these images"]
        assert torch.equal(fetch(result.program.module(), "1.running_var"), torch.ones(8).double())
    module = Recalibrate(reference="images")(dense, data=[torch.randn(30, 6).double()]).program.module()
    variance, mean = fetch(module, "1.running_var"), fetch(module, "1.running_mean")
    assert (variance[2], mean[2]) == (1, 0)
    assert (variance != 1).sum() == 7


def test_samples_that_share_a_dimension_with_frames_are_counted() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.n(self.a(x.flatten(0, 1))).relu().mean((2, 3))
            return self.last(h.unflatten(0, x.shape[:2]).mean(1))

    torch.manual_seed(0)
    model, x = Frames().double().eval(), torch.randn(32, 4, 3, 8, 8).double()
    dense = graphcomb.capture(model, x[:2], dynamic_shapes="batch")
    module = Recalibrate(samples=20)(dense, data=list(x.split(8))).program.module()
    expected = model.a(x[:20].flatten(0, 1)).movedim(1, 0).flatten(1)
    torch.testing.assert_close(fetch(module, "n.running_mean"), expected.mean(1))
    torch.testing.assert_close(fetch(module, "n.running_var"), expected.var(1))


def test_a_layer_with_an_unknown_removal_is_left_with_the_reason() -> None:
    dense = program()
    removed = RemoveChannels(keep={"0.weight:0": 6}, importance="magnitude", round_to=1)(dense)
    example = torch.zeros(2, 3, 6, 6).double()
    again = graphcomb.capture(removed.program.module().eval(), example, dynamic_shapes="batch")
    assert not again.history
    result = Recalibrate()(again, data=batches(), teacher=dense)
    assert {"what": "1.running_mean", "why": "what was removed from it is not known"} in result.record["refused"]
