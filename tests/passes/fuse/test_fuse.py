"""Normalisations folded: exact where done, named with a reason where refused; and real networks."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.graph.nodes import op_name
from graphcomb.passes.fuse.fuse import Fuse

from .toys import fused_in_fp32, lively, norms, ops, scramble


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda b: nn.Conv1d(4, 6, 3, padding=1, groups=2, bias=b), nn.BatchNorm1d(6), (4, 9)),
        (lambda b: nn.Conv2d(4, 6, 3, 2, padding=2, dilation=2, bias=b), nn.BatchNorm2d(6), (4, 11, 9)),
        (lambda b: nn.Conv2d(4, 8, (3, 1), padding="same", groups=4, bias=b), nn.BatchNorm2d(8), (4, 7, 8)),
        (lambda b: nn.Conv2d(6, 6, 5, groups=6, bias=b), nn.BatchNorm2d(6, affine=False), (6, 7, 7)),
        (lambda b: nn.Conv3d(2, 4, 3, padding=1, bias=b), nn.BatchNorm3d(4, eps=1e-2), (2, 4, 5, 6)),
        (lambda b: nn.ConvTranspose1d(4, 6, 3, 2, groups=2, bias=b), nn.BatchNorm1d(6), (4, 5)),
        (lambda b: nn.ConvTranspose2d(6, 9, 3, 2, 1, 1, groups=3, bias=b), nn.BatchNorm2d(9), (6, 5, 4)),
        (lambda b: nn.ConvTranspose3d(2, 4, 2, bias=b), nn.BatchNorm3d(4), (2, 3, 4, 5)),
        (lambda b: nn.Linear(5, 7, bias=b), nn.BatchNorm1d(7), (5,)),
    ],
)
def test_a_normalisation_after_a_linear_map_folds(layer, norm, shape, bias):
    torch.manual_seed(1)
    model = nn.Sequential(layer(bias), norm, nn.ReLU())
    result = fused_in_fp32(model, shape)
    assert norms(result) == 0
    assert [c["into"] for c in result.record["changed"]] == ["0.weight"]
    assert set(result.program.module().state_dict()) == {"0.weight", "0.bias"}
    assert result.record["refused"] == []
    assert isinstance(result.program.module().get_parameter("0.bias"), nn.Parameter)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("norm", "layer", "shape"),
    [
        (nn.BatchNorm1d(4), lambda b: nn.Conv1d(4, 6, 3, 2, groups=2, bias=b), (4, 9)),
        (nn.BatchNorm2d(4), lambda b: nn.Conv2d(4, 6, 3, dilation=2, bias=b), (4, 8, 9)),
        (nn.BatchNorm2d(6), lambda b: nn.Conv2d(6, 12, 3, groups=6, padding="valid", bias=b), (6, 5, 5)),
        (nn.BatchNorm3d(2), lambda b: nn.Conv3d(2, 3, 2, bias=b), (2, 4, 5, 3)),
        (nn.BatchNorm1d(5), lambda b: nn.Linear(5, 7, bias=b), (5,)),
    ],
)
def test_a_normalisation_before_an_unpadded_linear_map_folds(norm, layer, shape, bias):
    torch.manual_seed(1)
    result = fused_in_fp32(nn.Sequential(nn.ReLU(), norm, layer(bias)), shape)
    assert norms(result) == 0
    assert set(result.program.module().state_dict()) == {"2.weight", "2.bias"}


def test_both_rules_meet_in_one_layer_and_chains_fold_whole():
    model = nn.Sequential(
        nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Flatten(1),
        nn.BatchNorm1d(96), nn.Linear(96, 3, bias=False), nn.BatchNorm1d(3),
    )  # fmt: skip
    result = fused_in_fp32(model, (4, 6, 6))
    assert norms(result) == 0
    assert [c["rule"] for c in result.record["changed"]] == [
        "batch_norm + linear + batch_norm", "batch_norm + conv2d + batch_norm + batch_norm"
    ]  # fmt: skip
    assert set(result.program.module().state_dict()) == {"2.weight", "2.bias", "7.weight", "7.bias"}


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.one(self.conv(x)) + self.two(self.conv(x.relu()))


class Tied(Shared):
    def __init__(self):
        super().__init__()
        self.second = nn.Conv2d(3, 3, 1)
        self.second.weight = self.conv.weight

    def forward(self, x):
        return self.one(self.conv(x)) + self.second(x.relu())


class TwiceUsed(Shared):
    def forward(self, x):
        y = self.conv(x)
        return self.one(y) + y.relu()


class Standardised(Shared):
    def forward(self, x):
        weight = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
        return self.one(nn.functional.conv2d(x, weight, self.conv.bias))


@pytest.mark.parametrize(
    ("model", "shape", "left", "why"),
    [
        (Shared(), (3, 4, 4), 2, "conv.weight is shared with another layer"),
        (Tied(), (3, 4, 4), 1, "weight is shared with"),
        (TwiceUsed(), (3, 4, 4), 1, "is used by 2 nodes"),
        (Standardised(), (3, 4, 4), 1, "the layer's weights are computed by"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)), (3, 4, 4), 1, "zero-padded convolution"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding="same")), (3, 4, 4), 1, "zero-padded convolution"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 3, 3)), (3, 4, 4), 1, "transposed convolution"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3)), (3, 4), 1, "another axis than the layer's features"),
        (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 4)), (3, 4), 1, "another axis than the layer's features"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), (3, 4, 4), 1, "relu -> batch_norm -> output"),
    ],
)
def test_what_cannot_be_folded_is_left_alone_with_the_reason(model, shape, left, why):
    result = fused_in_fp32(model, shape)
    assert norms(result) == left == len(result.record["refused"])
    assert result.record["changed"] == []
    assert why in result.record["refused"][0]["why"]


def test_a_normalisation_by_batch_statistics_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    result = fused_in_fp32(model, (3, 4, 4), dynamic=None)
    assert norms(result) == 1
    assert "statistics of the batch" in result.record["refused"][0]["why"]


def test_an_unbatched_convolution_is_not_taken_for_a_batched_one():
    class Unbatched(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.conv(x))  # normalises the rows of one picture

    program = g.capture(lively(Unbatched()), torch.randn(3, 4, 5))
    result = Fuse()(program)
    assert norms(result) == 1
    assert "another axis" in result.record["refused"][0]["why"]


def test_a_program_left_in_training_mode_folds_its_running_statistics():
    model = lively(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    program = g.capture(model, torch.randn(2, 3, 6, 6), dynamic_shapes="batch")
    program.module().train()
    statistics = program.module().get_buffer("1.running_mean").clone()
    result = Fuse()(program)
    assert norms(result) == 0
    assert program.module().training
    assert torch.equal(program.module().get_buffer("1.running_mean"), statistics)
    torch.testing.assert_close(result.program.module()(program.args[0]), model(program.args[0]))


def short_efficientnet():
    """The first kinds of blocks of EfficientNet-B0, with their squeeze and excitation."""
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 1)]
    return EfficientNet([MBConvConfig(*block) for block in blocks], dropout=0.2, num_classes=10)


def short_densenet():
    """DenseNet-121 with 9 of its 58 dense layers; all three transitions."""
    from torchvision.models import DenseNet

    return DenseNet(block_config=(2, 3, 2, 2), num_classes=10)


def whole(name):
    def make():
        from torchvision import models

        return models.get_model(name, num_classes=10)

    return make


@pytest.mark.parametrize(
    ("make", "left"),
    [
        pytest.param(whole("resnet18"), 0, id="resnet18"),
        pytest.param(short_efficientnet, 0, id="short efficientnet"),
        pytest.param(short_densenet, 9 + 3 + 1, id="short densenet"),
        pytest.param(whole("efficientnet_b0"), 0, id="efficientnet_b0", marks=pytest.mark.slow),
        pytest.param(whole("densenet121"), 58 + 3 + 1, id="densenet121", marks=pytest.mark.slow),
    ],
)
def test_real_networks_fold_and_still_save(make, left, tmp_path):
    """left: normalisations of concatenations before their activations, which DenseNet has in every layer."""
    pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = make()
    result = fused_in_fp32(model, (3, 32, 32))
    assert norms(result) == left == len(result.record["refused"])
    assert result.record["cost"]["after"]["macs"] == result.record["cost"]["before"]["macs"]
    assert result.program.params < sum(p.numel() for p in model.parameters())
    if left == 0:
        loaded = g.load(result.program.save(tmp_path / "fused.pt2"))
        x = torch.randn(3, 3, 32, 32)
        torch.testing.assert_close(loaded.module()(x), result.program.module()(x))
        assert loaded.history[-1]["pass"] == "Fuse"


@pytest.mark.parametrize("depth", [(1, 1, 1), pytest.param((2, 3, 4), marks=pytest.mark.slow)])
def test_levit_keeps_no_normalisation(depth):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = lively(timm.create_model("levit_128s", num_classes=10, img_size=64, depth=depth))
    program = g.capture(model, torch.randn(2, 3, 64, 64))
    result = Fuse()(program)
    assert norms(result) == 0
    torch.testing.assert_close(result.program.module()(program.args[0]), model(program.args[0]), rtol=1e-3, atol=1e-3)


def shortened(name):
    """Options of timm by which every stage of a network keeps its first one or two blocks."""
    if name == "repvit_m1":
        return {"depth": (1, 1, 2, 1)}
    if name == "fastvit_t8":
        return {"layers": (1, 1, 2, 1)}
    from timm.models.byobnet import model_cfgs

    blocks = model_cfgs[name].blocks
    if isinstance(blocks[0], list):
        return {"blocks": tuple(stage[:2] for stage in blocks)}
    return {"blocks": tuple(dataclasses.replace(stage, d=min(stage.d, 2)) for stage in blocks)}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "whole"])
@pytest.mark.parametrize(
    "name",
    ["repvgg_a0", "mobileone_s0", *(pytest.param(n, marks=pytest.mark.slow) for n in ("repvit_m1", "fastvit_t8"))],
)
def test_reparameterisable_networks_match_the_librarys_own_fused_model(name, whole):
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    torch.set_default_dtype(torch.float64)
    try:
        model = timm.create_model(name, num_classes=7, **({} if whole else shortened(name)))
        model = scramble(model)
        x = torch.randn(2, 3, 64, 64)
        program = g.capture(model, x, dynamic_shapes="batch")
        library = g.capture(reparameterize_model(model), x, dynamic_shapes="batch")
    finally:
        torch.set_default_dtype(torch.float32)
    result = Fuse()(program)
    with torch.no_grad():
        expected, found = library.module()(x), result.program.module()(x)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    ours, theirs = ops(result), Counter(op_name(n) for n in library.graph.nodes if n.op == "call_function")
    for kind in ("conv2d", "linear", "batch_norm", "add", "mul", "sub"):
        assert ours[kind] <= theirs[kind], kind
    assert result.program.params <= library.params  # fewer where layer scales were folded too
    assert result.program.macs <= library.macs
    assert all("border" in r["why"] for r in result.record["refused"])  # layers only, no normalisation is left
