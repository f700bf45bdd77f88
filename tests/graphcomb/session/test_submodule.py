"""The image backbone of a larger network, compressed where it is and trained through the larger network's loss."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb
from graphcomb import BadInput
from graphcomb.passes import RemoveChannels

from .toys import Block

STEPS = 20


class Backbone(nn.Module):
    def __init__(self, width=8, outputs=6):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.neck = nn.Conv2d(width, outputs, 1)

    def forward(self, images):
        return self.neck(self.blocks(self.stem(images)))


class BirdsEyeView(nn.Module):
    """Several cameras, one image backbone, a grid seen from above that gathers from where each camera looks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.cells = Backbone(), 9
        self.depth, self.head = nn.Conv2d(6, self.cells, 1), nn.Conv1d(6, 2, 1)
        self.double()

    def forward(self, images, cameras):
        n, views = images.shape[:2]
        features = self.backbone(images.flatten(0, 1))
        weights = (self.depth(features).flatten(2) + cameras.reshape(n * views, self.cells, 1)).softmax(-1)
        grid = torch.einsum("bcp,bgp->bcg", features.flatten(2), weights)
        return self.head(grid.reshape(n, views, 6, self.cells).sum(1))


def batch(step, size=3):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 2, 3, 8, 8, generator=generator, dtype=torch.float64)
    cameras = torch.randn(size, 2, 9, generator=generator, dtype=torch.float64)
    return (images, cameras), (images.mean((1, 2, 3, 4))[:, None] > 0).long().expand(size, 9)


def trained(model, session, optimizer, ema=None):
    losses = []
    for step in range(STEPS):
        inputs, targets = batch(step)
        loss = F.cross_entropy(session.module(*inputs), targets)
        loss.backward()
        session.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step()
        losses.append(float(loss))
        if ema is not None:
            ema.update_parameters(model)
    return losses


def attached(model, **options):
    pass_ = RemoveChannels(macs=0.5, interval=2, round_to=1)
    return graphcomb.attach(model, pass_, example=batch(0)[0], steps=STEPS, submodule="backbone", **options)


@pytest.mark.parametrize("averaged", [False, True])
def test_the_small_backbone_is_what_the_large_model_trained(averaged):
    model = BirdsEyeView().train()
    session = attached(model)
    assert session.module is model
    assert model.training
    ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True) if averaged else None
    if ema is not None:
        session.follow(ema)
    before = copy.deepcopy(model.state_dict())
    losses = trained(model, session, torch.optim.AdamW(model.parameters(), lr=5e-3), ema)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert not torch.equal(before["head.weight"], model.head.weight)
    result = session.finish(weights=ema)
    assert result.program.macs <= 0.5 * session.program.macs
    assert graphcomb.verify.surgery(result.masked, result) <= 1e-10

    large = (ema.module if averaged else model).eval()
    inputs = batch(99)[0]
    with torch.no_grad():
        expected = large(*inputs)
        large.set_submodule("backbone", result.transplant(large.backbone))
        torch.testing.assert_close(large(*inputs), expected, rtol=1e-10, atol=1e-12)
    assert type(large.backbone) is Backbone
    assert large.backbone.blocks[0].a.out_channels < 8
    assert large.backbone.neck.out_channels == 6


def test_mistakes_are_named():
    model = BirdsEyeView()
    with pytest.raises(BadInput, match=r"submodule: the model has no 'bakbone'; did you mean .?backbone"):
        graphcomb.attach(model, RemoveChannels(macs=0.5), example=batch(0)[0], steps=5, submodule="bakbone")
    with pytest.raises(BadInput, match=r'takes a module and cut="end"'):
        attached(model, cut="during")
    with pytest.raises(BadInput, match="give example"):
        graphcomb.attach(model, RemoveChannels(macs=0.5), steps=5, submodule="backbone")
    session = attached(model)
    with pytest.raises(BadInput, match="the optimizer holds no parameter"):
        session.before_step(torch.optim.SGD(model.head.parameters(), lr=0.1))


def test_a_submodule_that_is_not_called_is_named():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(BadInput, match="does not call the forward of 'unused'"):
        graphcomb.attach(Holder(), RemoveChannels(macs=0.5), example=(torch.ones(2, 3),), steps=5, submodule="unused")
