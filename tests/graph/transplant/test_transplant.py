"""The user's class back, with the smaller weights: exact, or refused with the line."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import graphcomb
from graphcomb import Refused
from graphcomb.passes import RemoveChannels


class Attention(nn.Module):
    """Says its sizes as timm's does: number of heads and width of one."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width // heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, self.attn_dim))


class Fixed(nn.Module):
    """Computes the width of a head from what cannot change."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 12)
        self.b = nn.Linear(8, 12)
        self.b.weight = self.a.weight
        self.c = nn.Linear(12, 3)

    def forward(self, x):
        return self.c(F.relu(self.a(x)) + F.relu(self.b(x.flip(-1))))


class Halved(Tied):
    def forward(self, x):
        return self.c(F.relu(self.a(x)))


def pruned(model, x, **options):
    torch.manual_seed(0)
    program = graphcomb.capture(model.eval(), (x,))
    return RemoveChannels(**({"ratio": 0.5, "round_to": 1} | options))(program)


SLOW = ("mobilenet_v2", "densenet121", "regnet_y_400mf", "efficientnet_b0", "convnext_tiny")


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_classes_of_torchvision(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    result = pruned(model, x, round_to=8)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    new = result.transplant(model)
    assert type(new) is type(model)
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert new.state_dict().keys() == model.state_dict().keys()
    assert torch.allclose(new(x), result.program.module().eval()(x), rtol=1e-3, atol=1e-5)
    again = graphcomb.capture(new, (x,))
    assert again.macs == result.program.macs
    assert not new.training
    for m in new.modules():
        if isinstance(m, nn.Conv2d):
            assert (m.out_channels, m.in_channels // m.groups) == tuple(m.weight.shape[:2])


def test_numbers_of_heads_are_found():
    model = Attention()
    result = pruned(model, torch.randn(2, 5, 16), kinds=("head",))
    new = result.transplant(model)
    assert (new.num_heads, new.head_dim, new.attn_dim) == (2, 4, 8)
    assert model.num_heads == 4


def test_the_line_that_fixes_a_size_is_named():
    model = Fixed()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Refused, match=r"test_transplant.py:\d+: q, k, v = self.qkv\(x\).reshape.*fixes a size"):
        pruned(model, torch.randn(2, 5, 16), kinds=("head",)).transplant(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tied_weights_stay_tied():
    model = Tied()
    new = pruned(model, torch.randn(2, 8)).transplant(model)
    assert new.a.weight is new.b.weight
    assert new.a.weight.shape == (6, 8)


def test_another_model_is_refused():
    result = pruned(Tied(), torch.randn(2, 8))
    with pytest.raises(Refused, match=r"no parameter a\.weight"):
        result.transplant(nn.Linear(8, 3))
    with pytest.raises(Refused, match="computes something else"):
        result.transplant(Halved())


def test_a_module_in_training_stays_so():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 2))
    result = pruned(model, torch.randn(2, 8))
    model.train()
    model[1].eval()
    new = result.transplant(model)
    assert [m.training for m in new.modules()] == [m.training for m in model.modules()]


class Bias(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads, self.table = heads, nn.Parameter(torch.randn(heads, 5))

    def forward(self):
        return self.table.view(self.heads, 1, 5)


class Nested(nn.Module):
    """A number of heads in a module and in one inside it, and sizes in a list."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.num_heads, self.sizes = heads, [width, 2 * width]
        self.qkv, self.proj, self.bias = nn.Linear(width, 3 * width), nn.Linear(width, width), Bias(heads)

    def forward(self, x):
        n, t, _ = x.shape
        q, kv = self.qkv(x).split(self.sizes, -1)
        k, v = kv.reshape(n, t, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = q.reshape(n, t, self.num_heads, -1).transpose(1, 2)
        weights = (q @ k.transpose(-2, -1) / 2 + self.bias()).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def test_sizes_in_lists_and_in_modules_inside_are_found():
    model = Nested()
    new = pruned(model, torch.randn(2, 5, 16), kinds=("head",)).transplant(model)
    assert (new.num_heads, new.bias.heads, new.sizes) == (2, 2, [8, 16])
    assert (model.num_heads, model.sizes) == (4, [16, 32])
    assert "forward" not in vars(new)


def test_what_differs_without_an_error_is_named_by_its_module():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.a(x)
            return self.b(x / x.shape[-1])

    model = nn.Sequential(Scaled(), nn.ReLU())
    with pytest.raises(Refused, match=r"something else.*; first in 0 \(test_transplant.py:\d+: Scaled.forward\)"):
        pruned(model, torch.randn(2, 8)).transplant(model)


def test_buffers_that_capture_folded_are_cut_with_the_constant_they_became():
    """A frozen BatchNorm computes its scale and shift from buffers alone; two removals in a row number indices anew."""
    frozen = torchvision.ops.FrozenBatchNorm2d
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, bias=False), frozen(12), nn.ReLU(), nn.Conv2d(12, 16, 3, bias=False), frozen(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    for m in model:
        for buffer in m._buffers.values():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    x = torch.randn(2, 3, 12, 12)
    program = graphcomb.capture(model.eval(), (x,))
    once = RemoveChannels(ratio=0.25, round_to=1)(program)
    twice = RemoveChannels(ratio=0.25, round_to=1)(once.program)
    new = twice.transplant(model)
    assert [len(new[i].running_var) for i in (1, 4)] == [7, 9]
    with torch.no_grad():
        assert torch.allclose(new(x), twice.program.module()(x), atol=1e-6)
    assert len(model[1].weight) == 12, "the model itself stays as it was"


class TwoHeads(nn.Module):
    """Also returns what no program was asked for."""

    def __init__(self):
        super().__init__()
        self.body, self.boxes, self.logits = nn.Linear(6, 12), nn.Linear(6, 4), nn.Linear(12, 4)

    def forward(self, x):
        return {"hidden": x, "boxes": [self.boxes(x), x.mean()], "logits": self.logits(F.relu(self.body(x)))}


@pytest.mark.parametrize("outputs", [["logits"], ["logits", "boxes.0"]])
def test_a_program_with_some_of_the_outputs_is_transplanted_into_the_whole_class(outputs):
    model = TwoHeads().eval()
    program = graphcomb.capture(model, (torch.randn(3, 6),), outputs=outputs)
    new = RemoveChannels(ratio=0.5, round_to=1, include=("body*",))(program).transplant(model)
    assert new.body.out_features == 6
    assert set(new(torch.randn(3, 6))) == {"hidden", "boxes", "logits"}


class Levels(nn.Module):
    """Gives an attention the sizes of its feature maps as a tensor, of which export makes a constant."""

    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(6, 16), SizedAttention()

    def forward(self, x):
        return self.attention(self.first(x), torch.tensor([[2, 3]]))


class SizedAttention(Attention):
    def forward(self, x, sizes):
        return super().forward(x)


def test_sizes_that_a_module_gets_as_a_tensor_do_not_hide_its_attributes() -> None:
    torch.manual_seed(0)
    model = Levels().eval()
    program = graphcomb.capture(model, torch.randn(2, 6, 6), dynamic_shapes="batch")
    result = RemoveChannels(ratio=0.5, round_to=1, kinds=("head",))(program)
    new = result.transplant(model)
    assert (new.attention.num_heads, new.attention.attn_dim) == (2, 8)


@pytest.mark.slow
def test_a_detector_of_transformers_is_trained_on_in_its_class_and_its_own_loss() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the zoo extra")
    from ..toys.vision_tasks import TASKS

    config = TASKS["RTDETR"][0]().config
    config.num_denoising = 4  # queries that only training has; d_model, their width, stays since it is an output
    torch.manual_seed(0)
    model = transformers.RTDetrForObjectDetection(config).eval()
    images = torch.randn(2, 3, 64, 64)
    program = graphcomb.capture(model, images)
    remove = RemoveChannels(macs=0.5, importance="repair", repair=True, samples=2, round_to=1, for_class=True)
    result = remove(program, data=[images])
    assert result.program.macs <= 0.5 * program.macs
    smaller = result.transplant(model).train()
    assert isinstance(smaller, transformers.RTDetrForObjectDetection)
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    loss = smaller(images, labels=[target, target]).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in smaller.parameters() if p.grad is not None)
    assert smaller.model.denoising_class_embed.weight.grad.any()


def test_normalised_weights_come_back_and_a_model_that_cannot_be_copied_is_refused() -> None:
    def network(norm):
        return nn.Sequential(nn.Linear(6, 16), norm(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 3)).eval()

    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):  # the second one keeps computed weights
        model = network(norm)
        result = RemoveChannels(ratio=0.5, round_to=1)(graphcomb.capture(model, (torch.randn(4, 6),)))
        if norm is nn.utils.weight_norm:
            with pytest.raises(Refused, match=r"transplant: the model cannot be copied .*weight_norm"):
                result.transplant(model)
        else:
            new = result.transplant(model)
            assert new[1].parametrizations.weight.original1.shape == (8, 8)


class Masked(nn.Module):
    """Attention in a block that gives it a mask, of which capture makes another constant."""

    class Inner(Attention):
        def forward(self, x, mask):
            n, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask * 2)
            return self.proj(y.transpose(1, 2).reshape(n, t, self.attn_dim))

    def __init__(self):
        super().__init__()
        self.width, self.depth = 16, 7
        self.attention = self.Inner()

    def forward(self, x):
        return x + self.attention(x, torch.full((x.shape[1],) * 2, -1.0).triu(1))


def test_a_mask_that_is_not_in_the_program_does_not_hide_the_attributes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), Masked(), nn.Linear(16, 3)).eval()
    result = RemoveChannels(ratio=0.5, round_to=1, for_class=True)(graphcomb.capture(model, (torch.randn(2, 6, 5),)))
    new = result.transplant(model)
    assert new[1].attention.num_heads < 4 or new[1].attention.head_dim < 4


def test_a_refusal_does_not_search_in_the_modules_around() -> None:
    calls = []

    class Counted(Fixed):
        def forward(self, x):
            calls.append(x.shape)
            return super().forward(x)

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.a, self.b, self.c = inner, 16, 48, 4

        def forward(self, x):
            return self.inner(x) + x

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), Around(Around(Around(Counted()))), nn.Linear(16, 3)).eval()
    result = RemoveChannels(ratio=0.5, round_to=1)(graphcomb.capture(model, (torch.randn(2, 6, 5),)))
    calls.clear()
    with pytest.raises(Refused, match="Counted"):
        result.transplant(model)
    assert len(calls) < 200  # thousands, if every module around tries its numbers
