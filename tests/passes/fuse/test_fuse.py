"""Folding of batch normalisation: exact where done, named with a reason where refused."""

import dataclasses

import pytest
import torch
from torch import nn

import graphcomb.graph as g
from graphcomb.graph.nodes import op_name
from graphcomb.passes.fuse import merge as module
from graphcomb.passes.fuse.fuse import Fuse


def lively(model, seed=0):
    """The model in eval mode with normalisations that scale and shift, so that a wrong fold shows."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for tensor in (m.weight, m.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2, generator=generator)
            for tensor in (m.bias, m.running_mean):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
    return model.eval()


def fused(model, shape, dynamic="batch"):
    """The result of Fuse, after checking it against the eager module in both precisions at another batch size."""
    torch.manual_seed(0)
    program = g.capture(lively(model), torch.randn(2, *shape), dynamic_shapes=dynamic)
    before = {k: v.clone() for k, v in program.module().state_dict().items()}
    code = program.module().code
    result = Fuse()(program)
    x = torch.randn(5 if dynamic else 2, *shape)
    with torch.no_grad():
        torch.testing.assert_close(result.program.module()(x), model(x), rtol=1e-4, atol=1e-4)
    assert program.module().code == code
    assert all(torch.equal(program.module().state_dict()[k], v) for k, v in before.items())
    stored = {str(n.target): n.meta["val"].shape for n in result.program.graph.nodes if n.op == "get_attr"}
    assert stored == {k: v.shape for k, v in result.program.module().state_dict().items()}, "dead or stale tensors"
    result.program.graph.lint()
    assert result.record["error"] <= 1e-12
    assert all(c["error"] <= 1e-12 for c in result.record["changed"])
    return result


def norms(result):
    return sum(op_name(n) == "batch_norm" for n in result.program.graph.nodes)


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
    result = fused(model, shape)
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
    result = fused(nn.Sequential(nn.ReLU(), norm, layer(bias)), shape)
    assert norms(result) == 0
    assert set(result.program.module().state_dict()) == {"2.weight", "2.bias"}


def test_both_rules_meet_in_one_layer_and_chains_fold_whole():
    model = nn.Sequential(
        nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Flatten(1),
        nn.BatchNorm1d(96), nn.Linear(96, 3, bias=False), nn.BatchNorm1d(3),
    )  # fmt: skip
    result = fused(model, (4, 6, 6))
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
    result = fused(model, shape)
    assert norms(result) == left == len(result.record["refused"])
    assert result.record["changed"] == []
    assert why in result.record["refused"][0]["why"]


def test_a_normalisation_by_batch_statistics_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    result = fused(model, (3, 4, 4), dynamic=None)
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


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "densenet121"])
def test_real_networks_fold_and_still_save(name, tmp_path):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.get_model(name, num_classes=10)
    result = fused(model, (3, 32, 32))
    left = {"densenet121": 62}.get(name, 0)  # DenseNet normalises concatenations before its activations
    assert norms(result) == left == len(result.record["refused"])
    assert result.record["cost"]["after"]["macs"] == result.record["cost"]["before"]["macs"]
    assert result.program.params < sum(p.numel() for p in model.parameters())
    if name == "resnet18":
        loaded = g.load(result.program.save(tmp_path / "fused.pt2"))
        x = torch.randn(3, 3, 32, 32)
        torch.testing.assert_close(loaded.module()(x), result.program.module()(x))
        assert loaded.history[-1]["pass"] == "Fuse"


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


class Promoted(nn.Module):
    """A layer in half precision, whose output a scale in single precision widens."""

    def __init__(self, where):
        super().__init__()
        self.conv, self.where = nn.Conv2d(3, 4, 1).bfloat16(), where
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.side = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.conv(x.bfloat16())
        if self.where == "scale":
            return y * self.scale
        return y + self.side(x) if self.where == "sum" else y.float() * self.scale


@pytest.mark.parametrize("where", ["scale", "sum", "cast"])
def test_merges_do_not_cross_a_change_of_precision(where):
    torch.manual_seed(0)
    model, x = Promoted(where).eval(), torch.randn(2, 3, 5, 5)
    program = g.capture(model, (x,))
    result = Fuse()(program)
    found, expected = result.program.module()(x), model(x)
    assert found.dtype == expected.dtype == torch.float32
    assert result.record["changed"] == []
    torch.testing.assert_close(found, expected)


def test_a_scale_that_keeps_the_precision_still_merges():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 1).bfloat16(), nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return self.conv(x) * self.scale  # of no dimension: the result stays in half precision

    result = Fuse()(g.capture(Scaled().eval(), (torch.randn(2, 3, 5, 5, dtype=torch.bfloat16),)))
    assert len(result.record["changed"]) == 1
    assert result.program.module()(torch.randn(2, 3, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Tokens(nn.Module):
    """A layer of tokens whose normalisation folds batch and tokens into one dimension, in several spellings."""

    def __init__(self, spelling):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.spelling = spelling

    def forward(self, x):
        x = self.one(x)
        match self.spelling:
            case "reshape_as":
                x = self.norm(x.flatten(0, 1)).reshape_as(x)
            case "view":
                x = self.norm(x.reshape(-1, 8)).view(x.shape)
            case "unflatten":
                x = self.norm(x.flatten(0, 1)).unflatten(0, (-1, 5))
            case "other tokens":
                x = self.norm(x.flatten(0, 1)).view(x.shape[0], -1, 4)
                return x
        return self.two(x.relu())


@pytest.mark.parametrize("dynamic", ["batch", None])
@pytest.mark.parametrize("spelling", ["reshape_as", "view", "unflatten"])
def test_a_normalisation_of_folded_tokens_merges_with_their_layer(spelling, dynamic):
    result = fused(Tokens(spelling), (5, 6), dynamic)
    assert norms(result) == 0
    assert [c["into"] for c in result.record["changed"]] == ["one.weight"]
    x = torch.randn(2, 5, 6)
    assert result.program.module()(x).shape == (2, 5, 4)


def test_a_normalisation_of_tokens_that_are_cut_otherwise_afterwards_stays():
    assert norms(fused(Tokens("other tokens"), (5, 6))) == 1


def test_levit_keeps_no_normalisation():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = lively(timm.create_model("levit_128s", num_classes=10, img_size=64))
    program = g.capture(model, torch.randn(2, 3, 64, 64))
    result = Fuse()(program)
    assert norms(result) == 0
    torch.testing.assert_close(result.program.module()(program.args[0]), model(program.args[0]), rtol=1e-3, atol=1e-3)
