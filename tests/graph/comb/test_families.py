"""Every family of torchvision classifiers: half of every axis goes, exactly; errors planted on purpose are noticed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from graphcomb import Program, capture, verify
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.errors import GraphcombError
from graphcomb.passes import PassResult, RemoveChannels

from ...oracles.mutate import mutation_test
from ...oracles.restriction import interference, restriction

models = pytest.importorskip("torchvision.models")


def resnet() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 2, 1, 1], num_classes=7, width_per_group=32)


def mobilenet_v2() -> nn.Module:
    blocks = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
    return models.MobileNetV2(num_classes=7, inverted_residual_setting=blocks, width_mult=0.5)


def mobilenet_v3() -> nn.Module:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    block = partial(InvertedResidualConfig, width_mult=1.0)
    blocks = [
        block(16, 3, 16, 16, True, "RE", 2, 1),
        block(16, 3, 40, 24, False, "RE", 2, 1),
        block(24, 5, 56, 24, True, "HS", 1, 1),
    ]
    return MobileNetV3(blocks, last_channel=48, num_classes=7)


def efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    block = partial(MBConvConfig, width_mult=1.0, depth_mult=1.0)
    blocks = [block(1, 3, 1, 16, 16, 1), block(6, 3, 2, 16, 24, 2), block(6, 5, 2, 24, 40, 1)]
    return EfficientNet(blocks, dropout=0.2, num_classes=7)


def densenet() -> nn.Module:
    return models.DenseNet(growth_rate=8, block_config=(2, 3, 2), num_init_features=16, num_classes=7)


def regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    return RegNet(BlockParams.from_init_params(4, 16, 8.0, 2.0, 8, se_ratio=0.25), num_classes=7)


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], num_classes=7)


def vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=40, num_classes=7
    )


def swin() -> nn.Module:
    return models.SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[3, 6], window_size=[4, 4], num_classes=7
    )


def swin_v2() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    return models.SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[3, 6], window_size=[4, 4], num_classes=7,
        block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip


def shufflenet() -> nn.Module:
    return models.ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 64], num_classes=7)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet": (resnet, 32),
    "MobileNetV2": (mobilenet_v2, 32),
    "MobileNetV3": (mobilenet_v3, 32),
    "EfficientNet": (efficientnet, 32),
    "DenseNet": (densenet, 64),
    "RegNet": (regnet, 32),
    "ConvNeXt": (convnext, 32),
    "ViT": (vit, 32),
    "Swin": (swin, 32),
    "SwinV2": (swin_v2, 32),
    "ShuffleNetV2": (shufflenet, 64),
}
WHOLE = {
    "resnet50": 64, "mobilenet_v2": 64, "mobilenet_v3_large": 64, "efficientnet_b0": 64, "densenet121": 64,
    "regnet_y_400mf": 64, "convnext_tiny": 64, "vit_b_16": 224, "swin_t": 64, "maxvit_t": 224, "inception_v3": 96,
}  # fmt: skip


@functools.cache
def captured(family: str, dynamic: str | None) -> Program:
    build, side = FAMILIES[family]
    torch.manual_seed(0)
    return capture(build(), torch.randn(3, 3, side, side), dynamic_shapes=dynamic)


def with_weights(program: Program, seed: int) -> Program:
    """A copy with other weights, so that other indices go."""
    copy, generator = program.copy(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in copy.module().parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return copy


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), "batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_exact(family: str, dynamic: str | None) -> None:
    program = captured(family, dynamic)
    for seed in range(3):
        weighted = with_weights(program, seed)
        for scope in ("local", "global"):
            result = RemoveChannels(ratio=0.5, scope=scope, round_to=1)(weighted)
            assert verify.surgery(weighted, result, seed=seed) <= 1e-10
            if scope == "local":
                assert result.program.params < 0.45 * weighted.params
            x = torch.randn(5 if dynamic else 3, *program.args[0].shape[1:])
            assert result.program.module()(x).shape == (len(x), 7)
    assert restriction(weighted, result) <= 1e-10
    assert interference(weighted, result) <= 1e-10
    assert Comb(program).coverage() > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_errors_are_noticed(family: str) -> None:
    """One wrong index in one dimension of one parameter."""
    program = captured(family, "batch")
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    report = mutation_test(program, result, count=25)
    assert report.total >= 20
    assert report.share >= 0.9
    assert all(m.why for m in report.missed)  # a shift before a softmax is invisible, and the like


def test_an_error_in_what_was_reported_is_noticed() -> None:
    program = captured("ResNet", None)
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    name = next(n for n, dims in result.removed.items() if 0 in dims)
    lost = result.removed[name][0]
    other = next(i for i in range(10_000) if i not in lost)
    removed = result.removed | {name: {**result.removed[name], 0: sorted([*lost[1:], other])}}
    with pytest.warns(UserWarning, match=name):
        assert verify.surgery(program, PassResult(result.program, {}, removed)) > 1e-3


def test_an_unbalanced_removal_is_noticed() -> None:
    """Channels that disagree about what is gone: one consumer keeps what its producer lost."""
    program = captured("ConvNeXt", None)
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    name = next(n for n, dims in result.removed.items() if 1 in dims)
    removed = {n: dict(dims) for n, dims in result.removed.items()}
    lost = removed[name][1]
    kept = [i for i in range(max(lost) + 2) if i not in lost]
    removed[name][1] = sorted([*lost[1:], kept[0]])
    with pytest.warns(UserWarning, match="surgery: "):
        assert verify.surgery(program, PassResult(result.program, {}, removed)) > 1e-3


def test_a_removal_that_changes_nothing_proves_nothing() -> None:
    class Muted(nn.Module):
        """The hidden layer is multiplied by zero, so no error in it could ever show."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(x) + self.b(self.a(x).relu()) * 0.0

    program = capture(Muted(), torch.randn(4, 6))
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    assert result.removed
    assert verify.check(program, result).vacuous
    with pytest.raises(GraphcombError, match="vacuous"):
        verify.surgery(program, result)


def test_nothing_removed_is_no_error() -> None:
    program = captured("ViT", None)
    assert verify.surgery(program, SimpleNamespace(program=program.copy(), removed={})) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, "batch"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_are_exact(name: str, dynamic: str | None) -> None:
    torch.manual_seed(0)
    side = WHOLE[name]
    program = capture(models.get_model(name), torch.randn(2, 3, side, side), dynamic_shapes=dynamic)
    for seed, scope in enumerate(("local", "global", "local")):
        weighted = with_weights(program, seed)
        result = RemoveChannels(ratio=0.5, scope=scope, round_to=1)(weighted)
        assert verify.surgery(weighted, result, seed=seed) <= 1e-10
    assert Comb(program).coverage() > 0.99
