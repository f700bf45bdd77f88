"""Networks, data and matrices that several tests of sparsity share."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from graphcomb.passes.common.scoring import evaluate
from graphcomb.passes.sparse.statistics import fisher

D = torch.float64
METHODS = ("cap", "fastcap", "woodfisher", "sparsegpt", "wanda", "magnitude")
ORIN = SimpleNamespace(name="agx-orin", compute_capability=(8, 7))


def problem(blocks, size, count, damping=1e-3, seed=0):
    """Weights, gradients `(count, blocks, size)` and the Fisher matrix they have by definition."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(blocks, size, generator=generator, dtype=D)
    mixing = torch.randn(blocks, size, size, generator=generator, dtype=D) / size**0.5
    gradients = torch.einsum("kbi,bij->kbj", torch.randn(count, blocks, size, generator=generator, dtype=D), mixing)
    matrix = torch.einsum("kbi,kbj->bij", gradients, gradients) / count + damping * torch.eye(size, dtype=D)
    return weights, gradients, matrix


def fisher_of(gradients, damping=1e-3, cuts=(5, 6)):
    count, blocks, size = gradients.shape
    found = fisher.Fisher(blocks, size, count, damping, D)
    for part in torch.tensor_split(gradients, cuts):
        found.add(part)
    return found


class Attention(nn.Module):
    """A fused projection, a residual and a grouped convolution in front."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 4, 4)
        self.conv = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.qkv, self.proj, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.conv(self.stem(x)).relu())
        x = (x + self.deep(x)).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def batches(count=4, size=8, labels=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [
        (torch.randn(size, 1, 16, 16, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]
    return made if labels else [x for x, _ in made]


def weights(program):
    return {n: p.detach() for n, p in program.module().named_parameters() if p.dim() > 1}


def zero_counts(program):
    return {n: int((w == 0).sum()) for n, w in weights(program).items()}


def loss_of(program, data):
    return -evaluate(program, data, lambda out, y: -F.cross_entropy(out, y, reduction="none"))
