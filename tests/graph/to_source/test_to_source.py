"""A program as Python source: the written file alone, run beside the program."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import graphcomb
from graphcomb import Refused
from graphcomb.passes import RemoveChannels


class Residual(nn.Module):
    """Grouped and depthwise convolutions, norms of all kinds, dropout, and a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.GroupNorm(2, 8), nn.SiLU())
        self.b = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=2)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 5))

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.b(self.a(x))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads = heads
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.scale = nn.Parameter(torch.rand(width), requires_grad=False)
        self.qkv, self.proj, self.norm = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)
        self.register_buffer("bias", torch.randn(1, heads, 1, 1))

    def forward(self, x):
        n = x.shape[0]
        x = torch.cat([self.token.expand(n, -1, -1), self.norm(x) * self.scale], 1)
        q, k, v = self.qkv(x).reshape(n, x.shape[1], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * 0.5 + self.bias).softmax(-1)
        return self.proj((F.dropout(weights, 0.2, self.training) @ v).transpose(1, 2).flatten(2))


class Detector(nn.Module):
    """Several scales, several kinds of outputs, one head for all scales."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)])
        self.boxes, self.classes = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, images, *, size):
        maps, x = [], images["rgb"]
        for layer in self.body:
            x = layer(x).relu()
            maps.append(F.interpolate(x, scale_factor=2.0))
        return {"boxes": [self.boxes(m).exp() for m in maps], "classes": tuple(self.classes(m) for m in maps),
                "sizes": (size * 2, maps[0])}  # fmt: skip


class Tied(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False))
        self[2].weight = self[0].weight


def imported(path):
    """The written file as a module, with no graphcomb to import."""
    hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "graphcomb"}
    sys.modules["graphcomb"] = None
    try:
        spec = importlib.util.spec_from_file_location(f"written_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        del sys.modules["graphcomb"]
        sys.modules.update(hidden)


def written(program, tmp_path):
    path = program.to_source(tmp_path / "model.py")
    assert path.read_text().count("import graphcomb") == 0
    return imported(path), path


CASES = {
    "residual": (Residual, (torch.randn(2, 3, 8, 8),), {}),
    "attention": (Attention, (torch.randn(2, 5, 16),), {}),
    "detector": (Detector, ({"rgb": torch.randn(2, 3, 8, 8)},), {"size": torch.ones(2)}),
    "tied": (Tied, (torch.randn(2, 6),), {}),
}


def leaves(outputs):
    return torch.utils._pytree.tree_leaves(outputs)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_written_file_is_the_program(name, prune, tmp_path):
    torch.manual_seed(0)
    make, args, kwargs = CASES[name]
    program = graphcomb.capture(make(), args, kwargs)
    if prune:
        program = RemoveChannels(ratio=0.5, round_to=1)(program).program
    module, path = written(program, tmp_path)
    model, live = module.load().double(), program.module().double()
    args, kwargs = torch.utils._pytree.tree_map(torch.Tensor.double, (args, kwargs))
    for training in (False, True):
        model.train(training), live.train(training)
        results = []
        for m in (model, live):
            torch.manual_seed(1)
            m.zero_grad()
            outputs = m(*args, **kwargs)
            sum(t.square().sum() for t in leaves(outputs)).backward()
            results.append((outputs, {n: p.grad for n, p in m.named_parameters()}, dict(m.named_buffers())))
        (ours, gradients, buffers), (theirs, expected, statistics) = results
        assert torch.utils._pytree.tree_structure(ours) == torch.utils._pytree.tree_structure(theirs)
        for a, b in zip(leaves(ours), leaves(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert gradients.keys() == expected.keys()
        for n in expected:
            torch.testing.assert_close(gradients[n], expected[n], rtol=1e-10, atol=1e-12)
        for n in statistics:
            torch.testing.assert_close(buffers[n], statistics[n], rtol=1e-10, atol=1e-12)
    names = {n for n in load_file(path.with_suffix(".safetensors")) if not n.endswith("num_batches_tracked")}
    assert names == set(program.module().state_dict())


def test_it_reads_as_one_would_write_it(tmp_path):
    program = graphcomb.capture(Residual(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")
    module, path = written(program, tmp_path)
    text = path.read_text()
    assert "self.stem['0'] = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)" in text.replace('"', "'")
    assert "nn.BatchNorm2d(8)" in text
    assert re.search(r"# s\d+ x 8 x 4 x 4", text)
    assert "torch.ops" not in text
    assert module.load()(torch.randn(7, 3, 8, 8)).shape == (7, 5)
    assert not module.load().training


def test_a_frozen_batch_norm_stays_frozen(tmp_path):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x))

        def train(self, mode=True):
            super().train(mode)
            self.bn.eval()
            return self

    program = graphcomb.capture(Frozen(), torch.randn(4, 3, 5, 5))
    module, _ = written(program, tmp_path)
    model = module.load().train()
    model(torch.randn(4, 3, 5, 5) + 3)
    assert not model.bn.running_mean.any()


def test_what_has_no_source_is_refused_with_its_node(tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: -self.a(x), (x,))

    program = graphcomb.capture(Branch(), torch.randn(2, 4))
    with pytest.raises(Refused, match=r"to_source: cond \(.*cannot be written"):
        program.to_source(tmp_path / "model.py")
    cumulative = graphcomb.capture(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None)), torch.randn(2, 3, 4, 4)
    )
    with pytest.raises(Refused, match=r"to_source: batch_norm.*momentum None"):
        cumulative.to_source(tmp_path / "model.py")
    assert not [*Path(tmp_path).iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "convnext_tiny", "swin_t", "vit_b_32", "densenet121", "shufflenet_v2_x0_5"]
)
def test_torchvision(name, tmp_path):
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    size = 224 if name.startswith("vit") else 64
    program = graphcomb.capture(model, torch.randn(2, 3, size, size), dynamic_shapes="batch", prove=False)
    module, _ = written(program, tmp_path)
    x = torch.randn(3, 3, size, size)
    torch.testing.assert_close(module.load()(x), program.module()(x), rtol=1e-3, atol=1e-4)
