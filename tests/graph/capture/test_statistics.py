"""Running statistics and other buffers go on as in the model, or are named."""

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.graph.capture.functional import CaptureWarning

from .modes import capture, same_in_both_modes


def test_averages_go_on_where_the_model_was():
    model = nn.BatchNorm1d(4, momentum=None)
    for i in range(3):
        model(torch.randn(8, 4) + i)
    x = torch.randn(8, 4)
    module = capture(model, x).module()
    same_in_both_modes(model, module, x)


def test_buffers_updated_in_training_alone_are_named():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(6))

        def forward(self, x):
            if self.training:
                self.seen.add_(x.mean(0))
            return x + 1

    with pytest.warns(CaptureWarning, match="updates of the buffers seen"):
        g.capture(Counts(), torch.randn(4, 6))


def test_a_norm_that_is_called_twice_is_compared_in_training():
    class Twice(nn.Module):
        def __init__(self, momentum):
            super().__init__()
            self.a, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=momentum)

        def forward(self, x):
            return self.norm(self.a(self.norm(x)))

    for momentum in (0.1, None):
        model, x = Twice(momentum), torch.randn(5, 6)
        same_in_both_modes(model, capture(model, x).module(), x)


@pytest.mark.parametrize("reads", [True, False])
def test_the_statistics_of_a_norm_whose_result_nobody_reads_are_named(reads):
    class Unread(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            unread = self.norm(x).relu()
            return self.a(self.norm(2 * x) if reads else x), unread.shape[0]

    model, x = Unread(), torch.randn(5, 6)
    with pytest.warns(CaptureWarning, match=r"only in training, .*updates of the buffers norm\.running_mean"):
        program = g.capture(model, x)
    assert not program.proof.skipped
    assert torch.equal(program.module()(x)[0], model.eval()(x)[0])


class Twice(nn.Module):
    """Calls one norm two times in a forward pass."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=None)

    def forward(self, x):
        return self.norm(2 * self.norm(x) + x)


def test_plain_averages_count_every_call_of_a_norm():
    model = Twice().double()
    model(torch.randn(8, 4, dtype=torch.float64))  # two batches before the capture
    batches = [torch.randn(8, 4, dtype=torch.float64) for _ in range(3)]
    program = g.capture(model, batches[0])
    module = program.module().train()
    model.train()
    for x in batches:
        assert torch.equal(module(x), model(x))
    for name in ("running_mean", "running_var"):
        assert torch.allclose(getattr(module.norm, name), getattr(model.norm, name), rtol=1e-12)
