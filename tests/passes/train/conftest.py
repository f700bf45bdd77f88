import pytest

from graphcomb.passes.train.distill import Distill

from .toys import capture, loaders, network


@pytest.fixture(scope="session")
def teacher():
    """A network for digits, trained."""
    data, _ = loaders(count=1300)
    return Distill(epochs=4, lr=5e-3)(capture(network(12)), data=data).program
