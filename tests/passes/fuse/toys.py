"""Networks to fuse, and their fusion compared with the eager module."""

from collections import Counter

import torch
from torch import nn

import graphcomb as g
from graphcomb.graph.nodes import op_name
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


def fused_in_fp32(model, shape, dynamic="batch"):
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


def scramble(model, seed=0):
    """Every parameter and statistic away from its initial value, in float64: nothing can hide behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            positive = name.endswith("running_var") or "gamma" in name
            noise = torch.rand(tensor.shape, generator=generator) + 0.5 if positive else None
            scale = 1 if tensor.dim() < 2 else tensor[0].numel() ** -0.5
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * scale if noise is None else noise)
    return model


def fused_in_fp64(model, *sizes):
    """The fused program, after comparing it with the eager model in float64 at another batch size."""
    model = scramble(model)
    program = g.capture(model, torch.randn(2, *sizes, dtype=torch.float64), dynamic_shapes="batch")
    result = Fuse()(program)
    x = torch.randn(3, *sizes, dtype=torch.float64)
    with torch.no_grad():
        expected, found = model(x), result.program.module()(x)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    result.program.graph.lint()
    before, after = (result.record["cost"][key]["macs"] for key in ("before", "after"))
    assert after <= before
    return result


def ops(result):
    return Counter(op_name(n) for n in result.program.graph.nodes if n.op == "call_function")


class Residual(nn.Module):
    def __init__(self, *layers, scale=None):
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.gamma = None if scale is None else nn.Parameter(torch.full(scale, 1e-6))

    def forward(self, x):
        y = self.body(x)
        return x + (y if self.gamma is None else self.gamma * y)


class Branches(nn.Module):
    def __init__(self, *branches, minus=()):
        super().__init__()
        self.plus, self.minus = nn.ModuleList(branches), nn.ModuleList(minus)

    def forward(self, x):
        total = self.plus[0](x)
        for branch in self.plus[1:]:
            total = total + branch(x)
        for branch in self.minus:
            total = torch.sub(total, branch(x), alpha=2)
        return total


def conv(a, b, k, **more):
    return nn.Sequential(nn.Conv2d(a, b, k, bias=False, **more), nn.BatchNorm2d(b))
