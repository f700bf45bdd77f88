"""Networks that are captured or trained once for all tests of depth pruning."""

import pytest
import torch

import graphcomb as g
from graphcomb.passes import Distill

from .toys import NETWORKS, Digits, captured, digits


@pytest.fixture(scope="session")
def program():
    torch.manual_seed(0)
    dense = g.capture(Digits().eval(), torch.randn(2, 1, 8, 8), dynamic_shapes="batch")
    return Distill(steps=120, lr=3e-3)(dense, data=digits(slice(None, 1200))).program


@pytest.fixture(params=NETWORKS)
def network(request):
    model, kinds = NETWORKS[request.param]
    return captured(model()), kinds
