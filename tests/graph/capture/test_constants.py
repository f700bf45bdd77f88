"""What depends on no input and no parameter is folded."""

from __future__ import annotations

import torch
from torch import nn

import graphcomb as g

from .toys import names, same


def test_input_independent_subgraphs_fold():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8)

        def forward(self, x):
            n = x.shape[1]
            angle = torch.arange(n).float()[:, None] / 10 ** torch.linspace(0, 1, 4)
            table = torch.cat([angle.sin(), angle.cos()], 1)
            return self.a(x) + table.unsqueeze(0) + torch.ones_like(x[:, :, :1]) + x.new_zeros(n, 8)

    program = same(Positions(), torch.randn(2, 4, 6))
    assert not {"arange", "linspace", "sin", "cos", "cat", "new_zeros"} & set(names(program))
    folded = {n for n, _ in program.module().named_buffers()}
    assert folded
    assert all(n.startswith("_folded_") for n in folded)


def test_random_constants_are_drawn_in_every_call():
    class Noise(nn.Module):
        def forward(self, x):
            return (
                x + torch.empty(3).uniform_() + torch.empty(3).exponential_() + torch.randn(3) + torch.rand_like(x[:1])
            )

    module, x = g.capture(Noise(), torch.zeros(2, 3)).module(), torch.zeros(2, 3)
    assert not torch.equal(module(x), module(x))
    assert not any(buffer.any() for buffer in module.buffers())  # memory that nobody has written yet is zeros


def test_an_expanded_constant_is_stored_once():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.randn(1, 1, 16, 16))
            self.a = nn.Linear(16, 16)

        def forward(self, x):
            return self.a(x) + self.mask.expand(8, 12, 16, 16)

    program = same(Masked(), torch.randn(8, 12, 16, 16))
    assert sum(b.numel() for b in program.module().buffers()) == 16 * 16


def test_constants_lie_where_the_model_lies():
    class Shift(nn.Module):
        def forward(self, x):
            return x + torch.ones_like(x[:, :1]) + x.new_zeros(6) + torch.arange(x.shape[0], device=x.device)[:, None]

    module = g.capture(Shift(), torch.randn(2, 6, device="meta")).module()
    assert module(torch.randn(2, 6, device="meta")).device.type == "meta"
    module = g.capture(Shift(), torch.randn(3, 6), dynamic_shapes="batch").module().to("meta")
    assert module(torch.randn(2, 6, device="meta")).device.type == "meta"
    assert "device(type='cpu')" not in module.code


def test_constants_that_depend_on_a_dynamic_size_do_not_fold():
    class Steps(nn.Module):
        def forward(self, x):
            return x * torch.arange(x.shape[0]).view(-1, 1, 1)

    program = same(Steps(), torch.randn(3, 4, 6), dynamic="batch")
    assert "arange" in names(program)
    x = torch.randn(5, 4, 6)
    torch.testing.assert_close(program.module()(x), Steps()(x))


def test_parameters_never_fold():
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return x + self.table.softmax(0).unsqueeze(0)

    program = same(Tables(), torch.randn(2, 4, 6))
    assert "softmax" in names(program)
    assert [n for n, _ in program.module().named_parameters()] == ["table"]
