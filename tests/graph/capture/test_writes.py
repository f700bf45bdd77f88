"""Whatever a model writes in place: the same values and gradients as eager, in float64, in eval and in train mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb as g
from graphcomb.graph.errors import CaptureError

WRITES = {
    "power": "y **= 2",
    "remainder": "y %= 2",
    "fmod": "y.fmod_(2)",
    "square and clip": "y.square_().clip_(0, 1)",
    "nan_to_num": "y.nan_to_num_()",
    "cumsum": "y.cumsum_(1)",
    "hardtanh": "F.hardtanh_(y); F.leaky_relu_(y, 0.2)",
    "transpose": "y.transpose_(1, 2); y = y.mT",
    "swapdims through a view": "y[:, 1:].swapdims_(1, 2).mul_(3)",
    "unsqueeze and squeeze": "y.unsqueeze_(1); y.mul_(2); y.squeeze_(1)",
    "a view that is unsqueezed": "z = y[:, 0]; z.unsqueeze_(1); z.mul_(2); y = z + y",
    "index_copy": "y.index_copy_(1, torch.tensor([0]), y[:, :1] * 0 + 1)",
    "index_add": "y.index_add_(1, torch.tensor([0, 1]), y[:, :2] * 0 + 1)",
    "index_fill": "y.index_fill_(1, torch.tensor([0, 1]), 2.0)",
    "index_put": "y[torch.tensor([0, 2]), :, torch.tensor([1, 3])] = 5.0",
    "index_put added": "y[:, torch.tensor([0, 1])] += 1",
    "boolean mask": "y[y > 0] = 1",
    "masked_scatter": "y.masked_scatter_(y > 0, torch.ones(200).to(y))",
    "scatter": "y.scatter_(1, torch.zeros(3, 1, 8, dtype=torch.long), 1.0)",
    "scatter_add": "y.scatter_add_(1, torch.zeros(3, 4, 8, dtype=torch.long), y.clone())",
    "tril": "y.tril_()",
    "masks": "m = y > 0; m &= y < 1; m |= y > 2; m ^= y < -1; y = y * m",
    "counters": "i = torch.tensor([1]); i += 1; y = y[:, i]",
    "hsplit": "y.hsplit(2)[0].mul_(2)",
    "diagonal": "y.diagonal(dim1=1, dim2=2).mul_(2)",
    "fill_diagonal": "y = y[0] * 1; y.fill_diagonal_(0)",
    "as_strided": "y.as_strided((2, 2), (1, 2)).add_(1)",
    "unfold": "y.unfold(2, 2, 2).mul_(2)",
    "a slice of a slice": "y[:, -2:][:, 0].add_(1); y[..., -1].zero_()",
    "steps": "y[:, ::2, 1::3].mul_(-1)",
    "copy of another type": "y[:, 1:3].copy_(torch.arange(8))",
    "rows swapped": "t = y[:, 0].clone(); y[:, 0].copy_(y[:, 1]); y[:, 1].copy_(t)",
    "select of a view": "y.view(12, 8)[5].zero_(); y.flatten(1)[:, 3:9].fill_(1)",
    "complex parts": "c = torch.view_as_complex(y.view(3, 4, 4, 2)); c.mul_(2); y = torch.view_as_real(c)",
    "out=": "o = torch.empty_like(y); y = torch.mul(y.detach(), 2, out=o) + y",
    "stale views": "z = y.view(3, 32); w = y.mT; y.add_(1); z.mul_(2); y = y + w.mT",
    "dropout in place": "F.dropout(y, 0.5, self.training, True); y = F.rrelu(y, 0.1, 0.3, self.training, True)",
    "dropout, then a write": "z = F.dropout(y, 0.5, self.training); z += 1; y = z * 2",
}  # fmt: skip


class Writes(nn.Module):
    """Runs a snippet on `y`, of shape (3, 4, 8) and its own memory, between two layers."""

    def __init__(self, code):
        super().__init__()
        self.a, self.norm, self.code = nn.Linear(6, 8), nn.BatchNorm1d(4), code

    def forward(self, x):
        scope = {"y": self.norm(self.a(x)) * 1, "self": self, "torch": torch, "F": F}
        exec(self.code, scope)
        return scope["y"]


def gradients(module, x):
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad((y * y).sum(), [x, *module.parameters()], allow_unused=True)]


@pytest.mark.parametrize("code", WRITES.values(), ids=WRITES.keys())
def test_what_is_written_in_place_has_the_values_and_gradients_of_eager(code):
    model, x = Writes(code).double(), torch.randn(3, 4, 6, dtype=torch.float64)
    module = g.capture(model, x, prove=False).module()
    assert not any(n.target._schema.is_mutable for n in module.graph.nodes if hasattr(n.target, "_schema"))
    for training in (False, True):
        eager = copy.deepcopy(model).train(training)
        for found, expected in zip(gradients(module.train(training), x + 1), gradients(eager, x + 1), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for name, buffer in eager.named_buffers():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(module.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)
        model.load_state_dict(eager.state_dict())


def test_buffers_written_through_views_are_updated():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))
            self.register_buffer("last", torch.zeros(2, 3))

        def forward(self, x):
            self.seen[0].add_(1)
            self.seen[1:] = x.mean(0)[1:]
            self.last[1].copy_(x[0])
            return x + self.seen + self.last.sum(0)

    model, x = Counts(), torch.randn(4, 3, requires_grad=True)
    module = g.capture(model, x.detach()).module()
    assert not model.seen.any()
    for _ in range(3):
        torch.testing.assert_close(module(x), model(x), rtol=0, atol=0)
        model.seen.detach_(), model.last.detach_()
    assert torch.equal(module.seen, model.seen)
    assert not module.seen.requires_grad


def test_what_dropout_hides_from_eval_mode_is_named():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop = nn.Linear(6, 8), nn.Dropout(0.5)

        def forward(self, x):
            y = self.a(x)
            z = self.drop(y)
            z.add_(1)  # in eval mode, this is y as well
            return y + z

    model, x = Alias(), torch.randn(3, 6)
    if torch.__version__ < "2.12":  # whose trace takes the dropout for a copy
        with pytest.raises(CaptureError, match="differs from the model in eval mode at add_1"):
            g.capture(model, x)
        return
    with pytest.warns(UserWarning, match=r"only in training, .*other inputs or numbers of add"):
        module = g.capture(model, x, prove=False).module()
    torch.testing.assert_close(module(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("code", ["y.detach().add_(1)", "with torch.no_grad(): y.mul_(2)"])
def test_a_write_hidden_from_autograd_is_refused_with_its_line(code):
    with pytest.raises(CaptureError, match=r"other gradients than the model in eval mode at ") as error:
        g.capture(Writes(f"{code}\ny = y * y"), torch.randn(3, 4, 6))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_that_writes_to_a_parameter_is_refused_unless_it_is_frozen(training):
    class Clamps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            if self.training or not training:
                with torch.no_grad():
                    self.a.weight[2:].clamp_(-0.1, 0.1)
            return self.a(x)

    model, x = Clamps(), torch.randn(3, 6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError, match=r"clamp_ .*writes to the parameter a.weight of the model itself"):
        g.capture(model, x)
    model.a.weight.requires_grad_(False)
    if not training:
        torch.testing.assert_close(g.capture(model, x).module()(x), copy.deepcopy(model).eval()(x), rtol=0, atol=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_embedding_that_renorms_itself_is_refused():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 8, max_norm=0.5)

        def forward(self, i):
            return self.words(i)

    with pytest.raises(CaptureError, match=r"embedding_renorm_ .*writes to the parameter words\.weight"):
        g.capture(Words(), torch.randint(0, 10, (3, 5)))
