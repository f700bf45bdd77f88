"""Pruning inside a plain PyTorch loop: two calls a step, then the class back.

    python examples/plain_loop.py --macs 0.5 --epochs 10 --out small.pt

On digits of scikit-learn; put your own model, loaders and loss in their place.
"""

import argparse

import torch
from torch import nn

import graphcomb
from graphcomb.data import digits
from graphcomb.models import SmallResNet
from graphcomb.passes import RemoveChannels


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--out", default="small.pt")
    options = parser.parse_args(argv)
    model = SmallResNet(width=options.width)
    train, test = digits()
    images, _ = next(iter(train))
    steps = options.epochs * len(train)
    session = graphcomb.attach(
        model, RemoveChannels(macs=options.macs, interval=10, for_class=True), example=(images,), steps=steps
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(options.epochs):
        for images, labels in train:
            nn.functional.cross_entropy(session.module(images), labels).backward()
            session.before_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            session.after_step()
            schedule.step()
    result = session.finish()
    small = result.transplant(model).eval()
    torch.save(small.state_dict(), options.out)
    with torch.no_grad():
        accuracy = sum((small(x).argmax(1) == y).sum().item() for x, y in test) / len(test.dataset)
    print(f"{result.program.macs / session.program.macs:.0%} of the MACs, accuracy {accuracy:.1%}")
    return small, result


if __name__ == "__main__":
    main()
