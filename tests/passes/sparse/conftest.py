"""Networks that are captured or trained once for all tests of sparsity."""

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.data import digits
from graphcomb.passes import Distill

from .toys import Attention


@pytest.fixture(scope="session")
def program():
    torch.manual_seed(0)
    return g.capture(Attention(), torch.randn(2, 1, 16, 16), dynamic_shapes="batch")


@pytest.fixture(scope="session")
def trained():
    """A small network that recognises digits, and its data."""
    torch.manual_seed(0)
    train, val = digits(augment=False)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    captured = g.capture(net, next(iter(train))[0], dynamic_shapes="batch")
    return Distill(epochs=4, alpha=0)(captured, data=train).program, train, val
