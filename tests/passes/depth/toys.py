"""Small networks of the families that depth pruning knows, captured in float64, and devices that predict latencies."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphcomb
import graphcomb as g
from graphcomb.passes import Distill


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


def digits(part, batch=32):
    data = load_digits()
    images, labels = torch.tensor(data.images[part], dtype=torch.float32)[:, None] / 16, torch.tensor(data.target[part])
    shuffle = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(images, labels), batch, shuffle=part.start is None, generator=shuffle)


class Digits(nn.Module):
    """Residual and inverted blocks, one of them useless, and an MLP half."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            conv(1, 8), inverted(8, 8), Add(nn.Sequential(conv(8, 8), conv(8, 8, act=False)), act=True)
        )
        self.useless = Add(nn.Sequential(conv(8, 8), conv(8, 8, act=False)))
        self.useless.body[1][1].weight.data.zero_()
        self.mlp, self.head = mlp(8), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.mlp(self.useless(self.body(x)).mean((2, 3))))


QUICK = {"supernet_steps": 6, "population": 4, "generations": 1, "train": Distill(steps=40, lr=2e-3)}


class PerMac:
    """A device that takes a nanosecond per multiply-accumulate, and a microsecond per run."""

    per_run = 1e-6

    def prepare(self, layers, progress=False):
        self.known = set(layers)

    def seconds(self, layer):
        assert layer in self.known
        return 1e-9 * layer.macs()


class Sheet(PerMac):
    """A device of which nothing was measured, and whose time is that of a few blocks."""

    measured = False

    def __str__(self):
        return "a data sheet"

    def seconds(self, layer):
        return 1e-6


class Mlp(nn.Sequential):
    def __init__(self, dim):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class ClassToken(nn.Module):
    """A small ViT that answers from its class token alone, or from all tokens."""

    def __init__(self, pooled=False, depth=3, dim=16):
        super().__init__()
        self.patch, self.pooled = nn.Conv2d(1, dim, 2, 2), pooled
        self.token, self.place = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 17, dim))
        layers = [layer for _ in range(depth) for layer in (Add(Attention(dim)), Add(Mlp(dim)))]
        self.blocks, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place)
        return self.head(self.norm(x.mean(1) if self.pooled else x[:, 0]))


def vit(pooled=False):
    torch.manual_seed(0)
    return g.capture(ClassToken(pooled).eval(), torch.randn(2, 1, 8, 8), dynamic_shapes="batch")


def last(*layers):
    """Layers of which the channels come last, in an image network."""
    return head(Move(0, 2, 3, 1), *layers, Move(0, 3, 1, 2))


def kernels(program, folder):
    graphcomb.runtime.export_onnx(program, folder / "model.onnx", precision="fp16")
    return len(graphcomb.runtime.build_engine(folder / "model.onnx", target="rtx-sm86").kernels)
