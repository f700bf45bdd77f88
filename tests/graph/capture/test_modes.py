"""Capture carries what training changes, names what it cannot carry, and proves the rest against the user's model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb as g
from graphcomb.graph.capture.functional import CaptureWarning
from graphcomb.graph.errors import CaptureError

from .modes import capture, same_in_both_modes


class Attention(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.inner, self.weights = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True), weights

    def forward(self, x):
        return self.inner(x, x, x, need_weights=self.weights)


class KeptFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.drop(self.norm(self.a(x)))


class AlwaysOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        x = F.dropout(x, 0.5, training=True)
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True)


MODELS = {
    "instance norm with statistics": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 5, 5)),
    "rrelu": (nn.RReLU, (4, 6)),
    "batch norm that never learns": (lambda: nn.BatchNorm1d(6, momentum=0.0), (4, 6)),
    "batch norm that averages": (lambda: nn.BatchNorm1d(6, momentum=None), (4, 6)),
    "batch norm kept frozen by train()": (KeptFrozen, (4, 6)),
    "attention with dropout": (lambda: Attention(False), (2, 5, 6)),
    "attention that returns its weights": (lambda: Attention(True), (2, 5, 6)),
    "recurrent dropout": (lambda: nn.LSTM(6, 4, 2, dropout=0.5), (5, 2, 6)),
    "always on": (AlwaysOn, (8, 6)),
    "feature and alpha dropout": (lambda: nn.Sequential(nn.Dropout2d(0.5), nn.AlphaDropout(0.2)), (2, 4, 3, 3)),
    "dropout in place": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5, inplace=True), nn.Linear(6, 6)), (4, 6)),
}  # fmt: skip


@pytest.mark.parametrize(("build", "shape"), MODELS.values(), ids=MODELS.keys())
def test_train_and_eval_are_those_of_the_model(build, shape, tmp_path):
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape)
    program = capture(model, x)
    loaded = g.load(program.save(tmp_path / "m.pt2")).module()
    copied = copy.deepcopy(program.module())
    twins = [copy.deepcopy(model) for _ in range(3)]
    for module, twin in zip((program.module(), loaded, copied), twins, strict=True):
        same_in_both_modes(twin, module, x)


def test_submodules_are_switched_as_in_eager():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Dropout(0.5))), torch.randn(4, 6)
    module = capture(model, x).module().train()
    model.train()
    for path in ("1", "2.0", "2"):
        model.get_submodule(path).eval()
        module.get_submodule(path).eval()
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module.get_buffer("1.running_mean"), model[1].running_mean)
    same_in_both_modes(model, module, x)


def test_the_exported_program_can_be_in_train_mode():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)), torch.randn(4, 6)
    program = g.capture(model, x)
    module = program.exported(training=True).module()
    torch.manual_seed(0)
    expected = model.train()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module.get_buffer("1.running_mean"), model[1].running_mean)
    assert not program.module().training


@pytest.mark.parametrize("training", [False, True])
def test_a_program_exported_elsewhere_follows_its_mode(training):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)).train(training), torch.randn(4, 6)
    module = g.Program.from_exported(torch.export.export(model, (x,))).module()
    same_in_both_modes(model, module, x)


def test_parts_without_gradients_stay_without():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.back, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            with torch.no_grad():
                y = self.back(x).relu()
                self.mean.mul_(0.9).add_(y.mean(0))
                with torch.enable_grad():
                    z = self.back(x)
            return self.head(y + z - self.mean)

    model, x = Frozen(), torch.randn(4, 6)
    module = capture(model, x).module()
    for form in (model, module):
        for _ in range(2):
            form(x).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(module.get_parameter(name).grad, parameter.grad)
    torch.testing.assert_close(module.mean, model.mean)


# --------------------------------------------------------------------------------------------------- named or refused
class Stochastic(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.a, self.drop, self.norm = nn.Linear(6, 6), drop, nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(x + self.drop(self.a(x)))


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], 1).bernoulli_(0.5).div_(0.5)


def test_stochastic_depth_is_named_and_the_rest_proven():
    with pytest.warns(CaptureWarning, match=r"only in training, and so not in the program: drop \(DropPath\)"):
        program = g.capture(Stochastic(DropPath()), torch.randn(4, 6))
    assert program.proof.skipped == []
    assert program.proof.error["train"] < 1e-5


def test_auxiliary_heads_are_named():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.head, self.aux = (
                nn.Linear(6, 6),
                nn.BatchNorm1d(6),
                nn.Linear(6, 2),
                nn.Linear(6, 2),
            )

        def forward(self, x):
            y = self.norm(self.a(x))
            return (self.head(y), self.aux(y)) if self.training else self.head(y)

    with pytest.warns(CaptureWarning, match=r"aux \(Linear\); 2 parameters \(aux.bias, aux.weight, …\); other outputs"):
        program = g.capture(Heads(), torch.randn(4, 6))
    assert program.proof.error["train"] < 1e-5


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Binary(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(Sign.apply(self.a(x)))


@pytest.mark.parametrize("prove", [True, False])
def test_a_custom_backward_is_named(prove):
    with pytest.warns(CaptureWarning, match="the backward of Sign is replaced by that of its forward"):
        g.capture(Binary(), torch.randn(4, 6), prove=prove)
    assert "apply" in torch.autograd.Function.__dict__


def test_a_gradient_that_differs_is_refused_with_its_line():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.a(x).relu()
            if y.requires_grad:
                y.register_hook(lambda gradient: -gradient)
            return self.b(y)

    with pytest.raises(CaptureError, match=r"other gradients than the model in eval mode at relu \(.*self.a\(x\)"):
        g.capture(Reversed(), torch.randn(4, 6))


def test_a_value_that_differs_is_refused_with_its_line(monkeypatch):
    from graphcomb.graph.capture import functional

    def wrong(module):
        node = next(n for n in module.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
        node.update_arg(1, 3.0)

    monkeypatch.setattr(functional, "fold_constants", wrong)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x).relu() * 2)

    with pytest.raises(CaptureError, match=r"differs from the model in eval mode at mul \(.*relu\(\) \* 2") as error:
        g.capture(Scaled(), torch.randn(4, 6))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- the model afterwards
def test_the_model_is_left_as_it_was():
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.cache, self.anchors = nn.Linear(6, 6), nn.BatchNorm1d(6), {}, torch.empty(0)

        def forward(self, x):
            self.anchors = x.new_zeros(x.shape[0])
            self.cache["last"] = x
            return F.dropout(self.norm(self.a(x)), 0.5, self.training) + self.anchors[:, None]

    model, x = Caches().train(), torch.randn(4, 6, requires_grad=True)
    model.norm.eval()
    model(x).sum().backward()
    model.cache.clear()
    anchors = model.anchors
    before = copy.deepcopy((model.state_dict(), [p.grad for p in model.parameters()], x.grad))
    state = torch.random.get_rng_state()
    g.capture(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in (model, model.a, model.norm)] == [True, True, False]
    assert model.cache == {}
    assert model.anchors is anchors
    after = model.state_dict(), [p.grad for p in model.parameters()], x.grad
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    copy.deepcopy(model)


def test_an_input_that_no_graph_can_take_is_named():
    class Words(nn.Module):
        def forward(self, **inputs):
            return inputs["class"] + inputs["labels"]

    x = torch.randn(2, 3)
    with pytest.raises(CaptureError, match='the input "class" is a keyword of Python'):
        g.capture(Words(), (), {"class": x, "labels": x})


class Scaled(nn.Module):
    """Runs an expression on what a layer gives."""

    def __init__(self, code):
        super().__init__()
        self.a, self.code = nn.Linear(6, 6), code

    def forward(self, x):
        return eval(self.code, {"y": self.a(x), "self": self, "torch": torch, "F": F})


@pytest.mark.parametrize("code", ["y * (1.0 if self.training else 0.5)", "y + torch.rand_like(y) * self.training"])
def test_a_number_that_training_changes_is_named(code):
    with pytest.warns(CaptureWarning, match="only in training, .*other inputs or numbers of mul"):
        g.capture(Scaled(code), torch.randn(3, 6))


@pytest.mark.parametrize(
    "code", ["y + F.dropout(y, 1.0, self.training)", "sum(F.dropout(y, 0.5, self.training) for _ in 'abc')"]
)
def test_what_reads_the_input_of_a_dropout_reads_it_in_training_too(code):
    model, x = Scaled(code), torch.randn(3, 6)
    same_in_both_modes(model, capture(model, x).module(), x)


def test_a_forward_that_counts_its_calls_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.calls, self.shape = nn.Linear(6, 6), 0, None

        def forward(self, x):
            self.calls, self.shape = self.calls + self.step, x.shape
            return self.a(x) / (1 + self.calls)

    model = Counts()
    model.step = 0
    capture(model, torch.randn(3, 6))
    model.step = 1
    with pytest.raises(CaptureError, match=r"second call of the model in eval mode .*\(calls, shape\)"):
        g.capture(model, torch.randn(3, 6))
    assert model.calls == 0


class Caching(nn.Module):
    """Keeps what it gathers from a parameter in eval mode until it trains again, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.layer, self.bias = nn.Linear(4, 6), nn.Parameter(torch.randn(3))
        self.cache = {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return self.layer(x) + self.bias[[0, 1, 2, 2, 1, 0]]
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias[[0, 1, 2, 2, 1, 0]]
        return self.layer(x) + self.cache["bias"]


def test_what_a_model_cached_in_eval_mode_is_computed_and_trained():
    model, x = Caching().eval(), torch.randn(2, 4)
    model(x)
    cached = model.cache["bias"]
    program = g.capture(model, x)
    assert model.cache["bias"] is cached, "the model keeps its cache"
    assert "bias" in dict(program.module().named_parameters())
    assert not program.proof.skipped


def test_a_layer_that_training_drops_at_random_leaves_train_mode_uncompared():
    class LayerDrop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            states = []
            for layer in self.layers:
                if self.training and torch.rand([]) < 0.5:
                    continue
                x = layer(x)
                if self.training or layer is self.layers[-1]:
                    states.append(x)
            return torch.stack(states), x

    with pytest.warns(CaptureWarning) as said:
        program = g.capture(LayerDrop(), torch.randn(5, 4))
    assert any("train mode does not export" in str(w.message) for w in said)
    assert any("not compared with the model in train mode" in str(w.message) for w in said)
    assert program.proof.error["eval"] == 0.0
