import pytest
import torch
from torch import nn

from graphcomb.graph.program import Program

from .toys import Net, calibrated, captured


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return calibrated(Net(), 3, 12, 12)


@pytest.fixture(scope="module")
def program(net: nn.Module) -> Program:
    torch.manual_seed(1)
    return captured(net, 3, 12, 12)
