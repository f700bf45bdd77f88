"""Layers describe what nodes compute at any sizes: same MACs as the cost model, same layers as the sliced program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphcomb import Program, capture
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.comb.surgery import remove
from graphcomb.graph.errors import Refused
from graphcomb.graph.workload.layer import Layer
from graphcomb.graph.workload.layers import Layers
from graphcomb.graph.workload.libraries import ONNXRUNTIME, TENSORRT


class Convolutional(nn.Module):
    """A stem, a residual block, a depthwise and a grouped convolution, an up-convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding="same")
        self.deep, self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 1, groups=4)
        self.up, self.last = nn.ConvTranspose2d(12, 6, 2, 2), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.last(self.up(self.grouped(self.deep(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 16))
        attention = (x @ x.transpose(1, 2)).softmax(-1)
        x = x + attention @ x
        return self.head((x + self.fc2(F.gelu(self.fc1(x)))).mean(1))


class Recurrent(nn.Module):
    """Convolutions, a recurrence over their columns, and one step of another."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, cell: type[nn.RNNCellBase] = nn.GRUCell, **options) -> None:
        super().__init__()
        self.stem, self.conv, self.sequence = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 16, 3), kind(16, 6, **options)
        width = (self.sequence.proj_size or 6) * (1 + self.sequence.bidirectional)
        self.cell, self.head = cell(width, 8), nn.Linear(8, 3)

    def forward(self, x):
        columns = F.relu(self.conv(F.relu(self.stem(x))))
        moved = columns.transpose(1, 2) if self.sequence.batch_first else columns.permute(2, 0, 1)
        steps = self.sequence(moved)[0]
        state = self.cell(steps[:, -1] if self.sequence.batch_first else steps[-1])
        return self.head(state[0] if isinstance(state, tuple) else state)


CASES = {
    "cnn": (Convolutional, (2, 3, 12, 12)), "transformer": (Transformer, (2, 7, 5)), "recurrent": (Recurrent, (2, 4, 12)),
}  # fmt: skip


def combed(name: str, dynamic: bool = True) -> Comb:
    make, shape = CASES[name]
    return Comb(capture(make(), torch.zeros(shape), dynamic_shapes="batch" if dynamic else None))


def halved(comb: Comb) -> dict:
    draw = np.random.default_rng(0)
    masks = {}
    for g in comb.groups:
        if g.frozen is None and g.kind != "head width":
            masks[g.atom] = np.zeros(g.size, dtype=bool)
            masks[g.atom][draw.permutation(g.size)[: g.size // 2]] = True
    return masks


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("smaller", [False, True])
def test_macs_are_those_of_the_cost_model(name: str, smaller: bool) -> None:
    comb = combed(name)
    sizes = {a: int(m.sum()) for a, m in halved(comb).items()} if smaller else {}
    batch = CASES[name][1][0]
    assert sum(layer.macs() for _, layer in Layers(comb, batch).at(sizes)) == comb.macs(sizes)


@pytest.mark.parametrize("name", CASES)
def test_layers_at_sizes_are_the_layers_of_the_sliced_program(name: str) -> None:
    comb = combed(name)
    masks = halved(comb)
    smaller: Program = remove(comb, masks)[0]
    expected = [str(layer) for _, layer in Layers(Comb(smaller)).at({})]
    found = [str(layer) for _, layer in Layers(comb).at({a: int(m.sum()) for a, m in masks.items()})]
    assert found == expected
    assert found != [str(layer) for _, layer in Layers(comb).at({})]


def test_a_dynamic_batch_counts_as_asked() -> None:
    comb = combed("cnn")
    one, four = ([layer.macs() for _, layer in Layers(comb, batch).at({})] for batch in (1, 4))
    assert four == [4 * m for m in one]
    fixed = combed("cnn", dynamic=False)
    assert [layer.macs() for _, layer in Layers(fixed, 7).at({})] == [2 * m for m in one]


@pytest.mark.parametrize("batched", [False, True])
def test_dynamic_height_and_width_count_as_in_the_example(batched: bool) -> None:
    spatial = {2: torch.export.Dim("height", min=8, max=64), 3: torch.export.Dim("width", min=8, max=64)}
    spec = ({0: torch.export.Dim("batch"), **spatial} if batched else spatial,)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(2))
    dynamic = Comb(capture(model, torch.zeros(2, 3, 12, 20), dynamic_shapes=spec))
    static = Comb(capture(model, torch.zeros(4 if batched else 2, 3, 12, 20)))
    found, expected = ([str(layer) for _, layer in Layers(c, batch=4).at({})] for c in (dynamic, static))
    assert found == expected
    assert "image=12x20" in found[0]


def test_sizes_that_are_made_of_the_batch_grow_with_it() -> None:
    class Folded(nn.Module):
        """Frames of several clips, batched together and apart again."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x, y):
            n, t = x.shape[:2]
            features = self.first(x.flatten(0, 1)).mean((2, 3)).reshape(n, t, 4)
            return self.second(torch.cat([features, y])), self.second(torch.cat([y, y]))

    def combed(n: int, dynamic: bool) -> Comb:
        inputs = torch.zeros(n, 6, 3, 8, 8), torch.zeros(n, 6, 4)
        return Comb(capture(Folded(), inputs, dynamic_shapes="batch" if dynamic else None))

    for batch in (3, 7):
        found, expected = (
            [str(layer) for _, layer in Layers(c, batch).at({})] for c in (combed(2, True), combed(batch, False))
        )
        assert found == expected


def test_what_engines_merge_into_a_convolution_is_no_layer() -> None:
    names = [n.name for n in Layers(combed("cnn")).nodes]
    assert names == ["conv2d", "conv2d_1", "conv2d_2", "conv2d_3", "conv2d_4", "conv_transpose2d", "conv2d_5"]


def test_an_addition_that_follows_no_convolution_is_a_layer() -> None:
    found = [(n.name, layer.op) for n, layer in Layers(combed("transformer")).at({})]
    wanted = [
        ("add", "copy"),
        ("gelu", "activation"),
        ("scaled_dot_product_attention", "attention"),
        ("layer_norm", "norm"),
    ]
    assert set(wanted) <= set(found)


def test_a_pair_of_activations_multiplies_batch_wise() -> None:
    found = [
        layer for _, layer in Layers(combed("transformer"), 3).at({}) if layer.op == "matmul" and not layer["shared"]
    ]
    assert [(m["batch"], m["rows"], m["inputs"], m["outputs"]) for m in found] == [(3, 7, 16, 7), (3, 7, 7, 16)]


def test_padding_counts_channels_as_the_hardware_does() -> None:
    options = (
        ("batch", 1), ("image", (4, 4)), ("kernel", (3, 3)), ("stride", (1, 1)), ("padding", (1, 1)), ("dilation", (1, 1)),
        ("transposed", 0),
    )  # fmt: skip

    def conv(inputs: int, outputs: int, groups: int) -> Layer:
        return Layer("conv", (("inputs", inputs), ("outputs", outputs), ("groups", groups)), options)

    assert conv(5, 9, 1).macs() == 16 * 9 * 45
    assert conv(5, 9, 1).macs(8) == conv(8, 16, 1).macs()
    assert conv(10, 10, 10).macs(8) == 16 * 9 * 16  # depthwise: channels are lanes
    assert conv(8, 8, 2).macs(8) == 2 * 16 * 9 * 64  # every group by itself
    assert conv(5, 9, 1).entries() == 16 * 5 + 16 * 9 + 45 * 9


CONTRACTIONS = {
    "einsum": lambda x, w: torch.einsum("bhqc,oc->bhqo", x, w),
    "weight first": lambda x, w: torch.einsum("oc,bhqc->bhoq", w, x),
    "ellipsis": lambda x, w: torch.einsum("...qc,oc->...oq", x, w),
    "batch": lambda x, w: torch.einsum("bhqc,bhkc->bhqk", x, x.relu()),
    "summed before": lambda x, w: torch.einsum("bhqc,oc->bho", x, w),
    "inner": lambda x, w: torch.inner(x, w),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([3], [1])),
    "matrix and vector": lambda x, w: torch.mv(x[0, 0], w[0]),
    "vectors": lambda x, w: torch.matmul(x[0, 0, 0], w[0]),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_contractions_of_every_spelling_are_products(name: str) -> None:
    class Contracts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(7, 5))

        def forward(self, x):
            return CONTRACTIONS[name](x, self.w)

    comb = Comb(capture(Contracts(), torch.randn(2, 3, 4, 5)))
    (found,) = [layer for _, layer in Layers(comb).at({}) if layer.op == "matmul"]
    assert found.macs() == comb.macs() > 0


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_padding_counts_dilation(kernel: int, dilation: int) -> None:
    net = nn.Conv2d(3, 4, (kernel, 5), padding="same", dilation=(dilation, 1))
    comb = Comb(capture(net, torch.randn(2, 3, 13, 11)))
    (layer,) = [layer for _, layer in Layers(comb).at({})]
    assert layer.result_image() == (13, 11)
    assert layer.macs() == comb.macs()


@pytest.mark.parametrize("rules", [ONNXRUNTIME, TENSORRT], ids=str)
@pytest.mark.parametrize(
    ("kind", "cell", "options", "gates"),
    [
        (nn.LSTM, nn.LSTMCell, {"batch_first": True, "bidirectional": True, "num_layers": 2}, (4, 4)),
        (nn.GRU, nn.GRUCell, {}, (3, 3)),
        (nn.RNN, nn.RNNCell, {"bias": False, "batch_first": True, "num_layers": 3}, (1, 1)),
        (nn.RNN, nn.RNNCell, {"nonlinearity": "relu", "bidirectional": True}, (1, 1)),
    ],
)
def test_recurrent_layers_are_layers(kind, cell, options, gates, rules) -> None:
    program = capture(Recurrent(kind, cell, **options), torch.zeros(2, 4, 12), dynamic_shapes="batch")
    layers = [layer for _, layer in Layers(Comb(program), 5, rules).at({})]
    found = [layer for layer in layers if layer.op == "recurrent"]
    assert [layer["gates"] for layer in found] == list(gates)
    depth = options.get("num_layers", 1)
    assert [(layer["batch"], layer["steps"], layer["layers"]) for layer in found] == [(5, 10, depth), (5, 1, 1)]
    assert [layer.launches for layer in found] == [10 * depth, 1]  # each step waits for the one before
    assert sum(layer.macs() for layer in layers) == Comb(program).macs({}) // 2 * 5
    weights = sum(p.numel() for n, p in program.module().named_parameters() if n.startswith("sequence.weight"))
    assert found[0].macs() == 5 * 10 * weights
    assert found[0].entries() > weights


def test_a_recurrence_with_a_projection_has_no_known_time() -> None:
    program = capture(Recurrent(proj_size=5), torch.zeros(2, 4, 12))
    with pytest.raises(Refused, match="how long lstm takes is not known"):
        Layers(Comb(program))
