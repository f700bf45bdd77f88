"""A network around a function, and what every captured one has to be."""

from __future__ import annotations

import copy

import torch
from torch import nn

import graphcomb as g
from graphcomb.graph.nodes import op_name


class Net(nn.Module):
    """A function of two linear layers and an input (B, 4, 6)."""

    def __init__(self, function):
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def same(model, *args, dynamic=None, **kwargs):
    """Capture; the program gives exactly what the model gives, on the example and on other numbers.

    The proof inside `capture` has tests of its own; here it is off, as some of these models have gradients of their own.
    """
    program = g.capture(model, tuple(copy.deepcopy(args)), copy.deepcopy(kwargs), dynamic_shapes=dynamic, prove=False)
    for shift in (0.0, 0.7):
        moved = [a + shift if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        with torch.no_grad():
            expected = copy.deepcopy(model).eval()(*copy.deepcopy(moved), **copy.deepcopy(kwargs))
            found = program.module()(*copy.deepcopy(moved), **copy.deepcopy(kwargs))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    return program


def names(program):
    return [op_name(n) for n in program.graph.nodes if n.op == "call_function"]


def functional(program):
    return not any(n.target._schema.is_mutable for n in program.graph.nodes if hasattr(n.target, "_schema"))


def a_view_of_strided_memory(y):
    """Reshaping a transposed tensor does not copy when it only splits: writing to it reaches the base."""
    y.transpose(1, 2).reshape(y.shape[0], 2, 4, 4)[:, 0].relu_()
    return y
