"""Networks with zeros, which the tests of this folder share."""

import torch
from torch import nn


def with_zeros(model, seed=0, share=0.5):
    """Set rows, columns and scattered entries of a random part of the weights to zero, in place; now and then biases."""
    generator = torch.Generator().manual_seed(seed)

    def some(count, p):
        return torch.rand(count, generator=generator) < p

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                if some(1, 0.3):
                    parameter[some(len(parameter), 0.4)] = 0
                continue
            for dim in range(min(2, parameter.dim())):
                if some(1, 0.6):
                    parameter.movedim(dim, 0)[some(parameter.shape[dim], share)] = 0
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


def zero(tensor, indices, dim=0):
    """Set rows (or what lies along another dimension) of a parameter to zero."""
    with torch.no_grad():
        tensor.movedim(dim, 0)[indices] = 0


def convolutions(bias_of_dead=-1.0, last=3):
    """A normalised convolution, a 1x1 one, one with a kernel of `last`, a classifier; (N, 3, 6, 6) to (N, 4), float64.

    Channels 1 and 5 of the first have no weights: 1 is negative in front of the activation, 5 is `bias_of_dead`."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, last, padding=last // 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).double().eval()  # fmt: skip
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    zero(model[0].weight, [1, 5])
    with torch.no_grad():
        shift = model[1].running_mean * model[1].weight / (model[1].running_var + 1e-5).sqrt()
        model[1].bias[1] = shift[1] - 1
        model[1].bias[5] = shift[5] + bias_of_dead
    return model
