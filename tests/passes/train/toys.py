"""Residual networks for scikit-learn's digits, and the digits."""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import graphcomb as g


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.short = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return F.relu(self.body(x) + self.short(x))


def network(width, last=None, dropout=0.1):
    torch.manual_seed(width)
    last = last or 2 * width
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), Block(width, 2 * width, 2),
        Block(2 * width, last, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(last, 10),
    )  # fmt: skip


def capture(model, dynamic="batch", batch=3):
    return g.capture(model, torch.randn(batch, 1, 8, 8), dynamic_shapes=dynamic)


@functools.cache
def small(width):
    """A network, captured once; passes leave their input program alone."""
    return capture(network(width))


@functools.cache
def tensors():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def loaders(batch=64, count=512, shuffle=True):
    x, y = tensors()
    return (
        DataLoader(TensorDataset(x[:count], y[:count]), batch, shuffle=shuffle),
        DataLoader(TensorDataset(x[-400:], y[-400:]), 128),
    )
