"""Small networks of the families that depth pruning knows, and their capture in float64."""

import torch
import torch.nn.functional as F
from torch import nn

import graphcomb.graph as g


def conv(a, b, k=3, stride=1, groups=1, act=True):
    layers = [nn.Conv2d(a, b, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(b)]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


class Add(nn.Module):
    def __init__(self, body, skip=None, act=False, scale=None):
        super().__init__()
        self.body, self.skip, self.act = body, skip or nn.Identity(), act
        self.scale = nn.Parameter(torch.full(scale, 0.3)) if scale else None

    def forward(self, x):
        y = self.body(x)
        y = self.skip(x) + (y if self.scale is None else y * self.scale)
        return y.relu() if self.act else y


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class Move(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(*self.order)


class Gate(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3), keepdim=True)).sigmoid()


def inverted(a, b, stride=1, act=nn.ReLU6):
    first, second = conv(a, 6 * a, 1), conv(6 * a, 6 * a, 3, stride, 6 * a)
    first[2], second[2] = act(), act()
    body = nn.Sequential(first, second, conv(6 * a, b, 1, act=False))
    return Add(body) if stride == 1 and a == b else body


def convnext(dim):
    body = [nn.Conv2d(dim, dim, 7, padding=3, groups=dim), Move(0, 2, 3, 1), nn.LayerNorm(dim), nn.Linear(dim, 4 * dim),
            nn.GELU(), nn.Linear(4 * dim, dim), Move(0, 3, 1, 2)]  # fmt: skip
    return Add(nn.Sequential(*body), scale=(dim, 1, 1))


def mlp(dim):
    return Add(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)))


class Tokens(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1)


def head(*layers):
    return nn.Sequential(conv(3, 8), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


NETWORKS = {
    "resnet": (
        lambda: head(
            Add(nn.Sequential(conv(8, 8), conv(8, 8, act=False)), act=True),
            Add(nn.Sequential(conv(8, 8, 3, 2), conv(8, 8, act=False)), conv(8, 8, 1, 2, act=False), act=True),
        ),
        ["residual", "residual"],
    ),
    "mobilenet": (lambda: head(inverted(8, 8), inverted(8, 8, 2), inverted(8, 8, act=nn.Hardswish)), [
        "inverted residual", "chain", "inverted residual"]),
    "convnext": (lambda: head(convnext(8), convnext(8)), ["convnext", "convnext"]),
    "transformer": (lambda: Tokens(Add(Attention(8)), mlp(8), Add(Attention(8)), mlp(8)), [
        "attention", "mlp", "attention", "mlp"]),
    "plain": (lambda: nn.Sequential(*(conv(a, b) for a, b in ((3, 8), (8, 8), (8, 8), (8, 8)))), ["chain", "chain"]),
    "group norm": (
        lambda: head(Add(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1)))),
        ["residual"],
    ),
}  # fmt: skip


def captured(model, seed=0):
    """The model as a float64 program, with statistics and scales that a mistake cannot hide behind."""
    torch.manual_seed(seed)
    model = model.double().eval()
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return g.capture(model, torch.randn(2, 3, 16, 12, dtype=torch.float64), dynamic_shapes="batch")


class Tied(nn.Module):
    """Two linear layers with one weight, between two others; (N, 3) to (N, 2)."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.last(self.b(self.a(self.first(x)).tanh()).tanh())
