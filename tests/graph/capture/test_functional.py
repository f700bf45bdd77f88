"""From eager model to functional graph: the same outputs, bit for bit, whatever the model writes in place."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb as g

from .toys import Net, a_view_of_strided_memory, functional, same


def relu_of_a_slice(y):
    y[:, 1:3].relu_()
    return y


def add_to_a_view(y):
    z = y.view(y.shape[0], 4, 2, 4)
    z.add_(1.5)
    return y


def read_another_view_later(y):
    z = y.transpose(1, 2)
    w = y.reshape(y.shape[0], -1)
    z.mul_(2)
    return y + w.view(y.shape) + z.transpose(1, 2)


def a_copy_is_not_a_view(y):
    """Reshaping a transposed tensor copies when rows are merged: it keeps the old values."""
    old = y.transpose(1, 2).reshape(y.shape[0], -1)
    y.mul_(3)
    return y + old.view(y.shape[0], 8, 4).transpose(1, 2)


def assign_to_a_slice(y):
    y = y.clone()
    y[:, 0] = 0.5
    y[..., 2:4] = y[..., 4:6] * 2
    return y


def copy_into_a_row(y):
    z = torch.zeros_like(y)
    z[:, 1].copy_(y[:, 2])
    z[:, 3:].copy_(y[:, :1])
    return z


def fill_and_zero(y):
    y[:, 0].fill_(0.25)
    y[:, :, 1].zero_()
    return y


def chains_of_views(y):
    y.unsqueeze(1).permute(0, 2, 3, 1).squeeze(-1)[:, ::2].narrow(2, 1, 3).sigmoid_()
    return y


def views_of_views_read_after(y):
    rows = y[:, 1:]
    row = rows[:, 0]
    flat = y.flatten(1)
    row.exp_()
    return y + rows.mean(1, keepdim=True) + flat.view(y.shape) + row.unsqueeze(1)


def pieces(y):
    left, right = y.chunk(2, -1)
    left.relu_()
    right.add_(left)
    return y


def pieces_taken_before_and_after(y):
    parts = y.split([3, 5], -1)
    first = parts[0]
    y.mul_(2)
    first.add_(1)
    return torch.cat([parts[1] * 2, first], -1) + y


def unbound_rows(y):
    for row in y.unbind(1)[1:3]:
        row.tanh_()
    return y


def moved_dimensions(y):
    y.movedim(2, 0)[1:3].neg_()
    y.swapaxes(0, 2).mT[2].abs_()
    return y


def values_of_a_maximum_are_their_own_memory(y):
    top, _ = y.max(1, keepdim=True)
    top.mul_(10)
    return y + top


def dropout_is_the_identity(y):
    F.dropout(y, 0.5, False).add_(1)
    return y


def a_cast_that_does_nothing(y):
    y.to(torch.float32).contiguous().add_(1)
    y.to(torch.float32, copy=True).add_(100)
    return y


def twice(y):
    y += 1
    z = y[:, 0]
    z *= 2
    y -= 3
    return y * z.unsqueeze(1)


def masked(y):
    y.masked_fill_(y < 0, 0.1)
    y.clamp_(max=0.8)
    return y


def divided_without_a_rest(y):
    y *= 10
    y //= 3  # its in-place overload has another name
    return y


def a_copy_is_written_to(y):
    """The copy has memory of its own: what is written to it does not reach the source."""
    z = torch.zeros_like(y)
    z.copy_(y)
    z.add_(1)
    return z * 2 + y


def written_through_detach(y):
    z = y.detach()
    z.add_(1)
    z.mul_(2)
    return z + y


WRITES = [
    relu_of_a_slice, add_to_a_view, read_another_view_later, a_copy_is_not_a_view, a_view_of_strided_memory,
    assign_to_a_slice, copy_into_a_row, fill_and_zero, chains_of_views, views_of_views_read_after, pieces,
    pieces_taken_before_and_after, unbound_rows, moved_dimensions, values_of_a_maximum_are_their_own_memory,
    divided_without_a_rest, a_copy_is_written_to, written_through_detach,
    dropout_is_the_identity, a_cast_that_does_nothing, twice, masked,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_in_place_operators_become_functional(write):
    program = same(Net(write), torch.randn(3, 4, 6))
    assert functional(program)


@pytest.mark.parametrize("write", [pieces, views_of_views_read_after, moved_dimensions], ids=lambda f: f.__name__)
def test_in_place_operators_with_a_dynamic_batch(write):
    program = same(Net(write), torch.randn(3, 4, 6), dynamic="batch")
    assert program.module()(torch.randn(5, 4, 6)).shape == (5, 4, 3)


VIEWS = [
    lambda t: t.transpose(1, 2), lambda t: t[:, 1:], lambda t: t[:, ::2], lambda t: t.detach(),
    lambda t: t.contiguous(), lambda t: t.reshape(t.shape[0], -1, t.shape[1]), lambda t: t.chunk(2, 1)[0],
    lambda t: t.unbind(1)[0].unsqueeze(1), lambda t: t.to(torch.float32), lambda t: t.permute(0, 2, 1),
    lambda t: t.unsqueeze(1).squeeze(1), lambda t: t.movedim(1, 2),
    lambda t: t.flatten(1).unflatten(1, (t.shape[1], t.shape[2])), lambda t: t * 0.5 + 1,
]  # fmt: skip
IN_PLACE = [
    lambda t, u: t.add_(0.5), lambda t, u: t.mul_(1.25), lambda t, u: t.relu_(), lambda t, u: t.zero_(),
    lambda t, u: t.add_(0.3 * u), lambda t, u: t.copy_(u),
]  # fmt: skip


class RandomWrites(nn.Module):
    """Takes random views of two tensors and of their views, writes to some, and reads all of them at the end."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def forward(self, x):
        draw = random.Random(self.seed)
        tensors = [(x * 1.5, 0), (x + 0.25, 1)]  # with which of the two they share memory
        for _ in range(draw.randint(2, 9)):
            t, memory = draw.choice(tensors)
            if draw.random() < 0.5:
                tensors.append((draw.choice(VIEWS)(t), memory))
            else:
                others = [u for u, its in tensors if u.shape == t.shape and its != memory]
                draw.choice(IN_PLACE)(t, draw.choice(others or [t + 1]))
        return sum((i + 1) * t.flatten(1).sin().sum(1) for i, (t, _) in enumerate(tensors))


@pytest.mark.parametrize("seed", range(40))
def test_random_writes_through_random_views(seed):
    assert functional(same(RandomWrites(seed), torch.randn(3, 2, 4)))


def test_modules_with_inplace_flags():
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.Hardswish(inplace=True))
    assert functional(same(body, torch.randn(2, 3, 6, 6)))


def test_buffers_the_model_updates_stay_and_are_frozen():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("seen", torch.zeros(8))

        def forward(self, x):
            y = self.a(x)
            self.seen.add_(y.detach().mean((0, 1)))
            return self.b(y) + self.seen.sum()

    model, x = Counts(), torch.randn(2, 4, 6)
    program = g.capture(model, x)
    assert torch.equal(model.seen, torch.zeros(8))  # capturing does not run the update on the model's own buffer
    for _ in range(2):
        torch.testing.assert_close(program.module()(x), model(x))
    torch.testing.assert_close(program.module().seen, model.seen)
