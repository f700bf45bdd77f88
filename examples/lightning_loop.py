"""Pruning inside Lightning's Trainer: one callback.

python examples/lightning_loop.py        # pip install lightning
"""

import sys

import lightning.pytorch as pl
import torch
from torch import nn

from graphcomb.data import digits
from graphcomb.models import SmallResNet
from graphcomb.passes import RemoveChannels
from graphcomb.session.lightning import SessionCallback


class Classifier(pl.LightningModule):
    """A module of yours; `model` is the part that is pruned."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.model = SmallResNet(width=width)

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(steps: int = 400, width: int = 32):
    train, _ = digits()
    images, _ = next(iter(train))
    callback = SessionCallback(RemoveChannels(macs=0.5, interval=10, for_class=True), example=(images,))
    module = Classifier(width)
    trainer = pl.Trainer(
        max_steps=steps, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, train)
    module.model = callback.result.transplant(module.model)  # the smaller network in its place
    callback.result.program.save("small.pt2")
    return module, callback


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
