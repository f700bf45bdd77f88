"""Outputs by name, and capture of some of them."""

import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.graph.outputs import named_outputs


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.scores = nn.Linear(4, 8), nn.Linear(8, 3)
        self.aux, self.boxes = nn.Linear(8, 5), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return {"scores": self.scores(x), "aux": [self.aux(x), {"boxes": self.boxes(x)}]}


X = torch.randn(2, 4)


def test_places_are_names():
    assert list(named_outputs(Heads()(X))) == ["scores", "aux.0", "aux.1.boxes"]
    assert list(named_outputs((X, [X]))) == ["0", "1.0"]
    assert list(named_outputs(X)) == ["out"]


def test_only_what_is_asked_for_is_captured():
    model = Heads()
    program = g.capture(model, X, outputs=["aux.1.boxes", "scores"])
    found, expected = program.module()(X), model(X)
    assert list(found) == ["aux.1.boxes", "scores"]
    assert torch.equal(found["aux.1.boxes"], expected["aux"][1]["boxes"])
    assert not any(name.startswith("aux") for name, _ in program.module().named_parameters())
    assert program.proof.error == {"eval": 0.0, "train": 0.0}
    assert torch.equal(g.capture(model, X, outputs=["scores"]).module()(X), expected["scores"])
    assert not model._forward_hooks
    assert list(model(X)) == ["scores", "aux"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["score"], "the model has no output score; did you mean scores"),
        ([], "takes a list of different names"),
        ("scores", "takes a list of different names"),
        (["scores", "scores"], "takes a list of different names"),
    ],
)
def test_odd_names_are_refused(names, message):
    model = Heads()
    with pytest.raises(BadInput, match=message):
        g.capture(model, X, outputs=names)
    assert not model._forward_hooks
