"""A training script in the manner of timm's with a session in it: parameter groups, mixup, EMA, a schedule, bf16 and
accumulated gradients. On digits of scikit-learn; put your own loaders in their place.
    python examples/timm_style.py --model resnet18 --macs 0.5 --epochs 30 --out small.pt
"""

import argparse

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import graphcomb
from graphcomb.data import digits
from graphcomb.passes import RemoveChannels

DEFAULTS = {"model": "resnet18", "macs": 0.5, "epochs": 30, "batch": 64, "accumulate": 2, "out": "small.pt"}


def main(argv=None):
    parser = argparse.ArgumentParser()
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args(argv)
    model = timm.create_model(options.model, num_classes=10, in_chans=1).train()
    loader, test = digits(options.batch, 32)
    steps = options.epochs * (len(loader) // options.accumulate)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)  # no decay for norms and biases
    schedule = CosineLRScheduler(optimizer, steps, warmup_t=steps // 10, t_in_epochs=False)
    mixup, criterion = Mixup(mixup_alpha=0.2, num_classes=10), SoftTargetCrossEntropy()
    prune = RemoveChannels(macs=options.macs, interval=10, for_class=True)
    session = graphcomb.attach(model, prune, example=(torch.randn(2, 1, 32, 32),), steps=steps)
    ema = ModelEmaV3(model, decay=0.99, use_warmup=True)
    session.follow(ema)
    for _ in range(options.epochs):
        for i, (images, labels) in enumerate(loader):
            images, targets = mixup(images[: len(images) // 2 * 2], labels[: len(images) // 2 * 2])
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(session.module(images), targets) / options.accumulate
            loss.backward()
            if i % options.accumulate == options.accumulate - 1:
                session.before_step(optimizer)
                optimizer.step()
                optimizer.zero_grad()
                session.after_step()
                schedule.step_update(session.step)
                ema.update(model, step=session.step)
    result = session.finish(weights=ema)
    small = result.transplant(ema.module).eval()  # timm's class with the averaged weights, smaller
    torch.save(small.state_dict(), options.out)
    accuracy = sum((small(x).argmax(1) == y).sum().item() for x, y in test) / len(test.dataset)
    print(f"{result.program.macs / session.program.macs:.0%} of the MACs, accuracy {accuracy:.1%}")
    return small, result, optimizer


if __name__ == "__main__":
    main()
