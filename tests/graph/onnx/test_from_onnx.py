"""From a file to a program: parity with ONNX Runtime, names, batches, training, pruning and back to ONNX."""

import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb
from graphcomb import BadInput, CaptureError, from_onnx
from graphcomb.graph.onnx.table import OPERATORS
from graphcomb.passes import RemoveChannels
from graphcomb.runtime import export_onnx

from .toys import draw, export, from_text, small


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The toy network, and the program of its file."""
    path = export(small(), torch.randn(2, 3, 16, 16), tmp_path_factory.mktemp("onnx") / "small.onnx", 13)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return small(), from_onnx(path)


def test_the_program_is_the_network_under_its_own_names(network) -> None:
    model, program = network
    record = program.history[0]
    assert record["parity"]["error"] <= 1e-5
    assert (record["pass"], record["opset"], record["outputs"]) == ("from_onnx", 13, ["scores"])
    assert set(dict(model.named_parameters())) <= set(dict(program.module().named_parameters()))
    x = torch.randn(5, 3, 16, 16)  # another batch
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_batch_norm_takes_the_statistics_of_the_batch_in_training(network) -> None:
    _, program = network
    ours, theirs = program.copy().module().train(), small().train()
    x = torch.randn(6, 3, 16, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    for name in ("stem.1.running_mean", "stem.1.running_var"):
        torch.testing.assert_close(dict(ours.named_buffers())[name], theirs.get_buffer(name), rtol=1e-4, atol=1e-5)


def test_it_is_pruned_exactly_trains_and_goes_back_to_onnx(network, tmp_path) -> None:
    _, program = network
    result = RemoveChannels(macs=0.6, round_to=1)(program)
    assert result.program.macs <= 0.6 * program.macs
    assert graphcomb.verify.surgery(program, result) <= 1e-10
    module = result.program.module().train()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    x, y, losses = torch.randn(16, 3, 16, 16), torch.arange(16) % 5, []
    for _ in range(20):
        losses.append(F.cross_entropy(module(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    report = export_onnx(result.program, tmp_path / "pruned.onnx")
    assert report.parity <= 1e-4
    engine = ort.InferenceSession(str(tmp_path / "pruned.onnx"))
    assert [i.name for i in engine.get_inputs()] == ["image"]
    assert [o.name for o in engine.get_outputs()] == ["scores"]
    assert graphcomb.load(program.save(tmp_path / "m.pt2")).history == program.history


@pytest.mark.parametrize("opset", [11, 17])
def test_files_of_other_opsets(opset, tmp_path) -> None:
    program = from_onnx(export(small(), torch.randn(2, 3, 16, 16), tmp_path / "m.onnx", opset))
    assert program.history[0]["parity"]["error"] <= 1e-5
    assert program.dynamic_shapes is not None


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 20, 22])
def test_files_of_the_new_exporter(opset, tmp_path) -> None:
    program = from_onnx(export(small(), torch.randn(2, 3, 16, 16), tmp_path / "m.onnx", opset, dynamo=True))
    assert program.history[0]["parity"]["error"] <= 1e-5
    result = RemoveChannels(ratio=0.4, round_to=1)(program)
    assert graphcomb.verify.surgery(program, result) <= 1e-10


FIXED = """
g (float[1,6] x) => (float[1,8] y) {
    a = MatMul(x, w)
    shape = Constant <value = int64[3] {1, 4, 2}> ()
    b = Reshape(a, shape)
    c = Concat <axis = 1> (token, b)
    d = Softmax <axis = -1> (c)
    e = Flatten(d)
    y = MatMul(e, v)
}"""


def test_a_file_with_a_fixed_batch_takes_any(tmp_path) -> None:
    path = from_text(tmp_path / "m.onnx", FIXED, w=draw(6, 8), v=draw(10, 8), token=draw(1, 1, 2))
    assert from_onnx(path).dynamic_shapes is None
    program = from_onnx(path, dynamic_shapes="batch")
    assert program.module()(torch.randn(7, 6)).shape == (7, 8)
    assert program.history[0]["parity"]["cases"] == 3


def test_several_outputs_keep_their_names_and_a_matrix_is_a_linear_layer(tmp_path) -> None:
    text = "g (float[N,6] x) => (float[N,8] first, float[N,8] last) { a = MatMul(x, w) first = Add(b, a) last = Relu(first)}"
    program = from_onnx(from_text(tmp_path / "m.onnx", text, w=draw(6, 8), b=draw(8)))
    assert list(program.module()(torch.randn(3, 6))) == ["first", "last"]
    assert {n: tuple(p.shape) for n, p in program.module().named_parameters()} == {"w": (8, 6), "b": (8,)}
    export_onnx(program, tmp_path / "again.onnx")
    assert [o.name for o in onnx.load(tmp_path / "again.onnx").graph.output] == ["first", "last"]


def test_the_part_before_what_cannot_be_imported(tmp_path) -> None:
    text = """g (float[N,6] x) => (int64[a,b] where) {
        a = MatMul(x, w)
        b = Relu(a)
        where = NonZero(b)
    }"""
    path = from_text(tmp_path / "m.onnx", text, w=draw(6, 8))
    program = from_onnx(path, outputs=["b"])
    assert program.history[0]["outputs"] == ["b"]
    assert program.module()(torch.randn(3, 6)).shape == (3, 8)
    with pytest.raises(BadInput, match="outputs: no node computes c; known: a, b, where"):
        from_onnx(path, outputs=["c"])


def test_tokens_that_index_a_table(tmp_path) -> None:
    text = "g (int64[N,5] ids) => (float[N,5,4] y) { e = Gather(table, ids)  y = MatMul(e, w) }"
    program = from_onnx(from_text(tmp_path / "m.onnx", text, table=draw(30, 6), w=draw(6, 4)))
    assert int(program.args[0].max()) > 1
    assert sorted(n for n, _ in program.module().named_parameters()) == ["table", "w"]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_recurrent_layers(op, direction, tmp_path) -> None:
    d, gates = 1 + (direction == "bidirectional"), {"LSTM": 4, "GRU": 3}[op]
    reset = ", linear_before_reset = 1" if op == "GRU" else ""
    text = f"""g (float[7,N,6] x) => (float[7,{d},N,5] y) {{
        y = {op} <hidden_size = 5, direction = "{direction}"{reset}> (x, w, r, b) }}"""
    weights = {"w": draw(d, gates * 5, 6), "r": draw(d, gates * 5, 5), "b": draw(d, gates * 10)}
    program = from_onnx(from_text(tmp_path / "m.onnx", text, **weights), torch.randn(7, 2, 6), dynamic_shapes=None)
    assert program.history[0]["parity"]["error"] <= 1e-5
    assert len(list(program.module().parameters())) == 4 * d


def test_the_first_node_that_differs_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(OPERATORS, "Tanh", lambda c: torch.tanh(c.tensor()) * 1.001)
    text = """g (float[N,6] x) => (float[N,8] y) {
        a = MatMul(x, w)
        [bend] b = Tanh(a)
        y = Relu(b)
    }"""
    with pytest.raises(CaptureError, match=r"the output y is off by .* first at (bend|b) \(Tanh\), off by 1\.0e-03"):
        from_onnx(from_text(tmp_path / "m.onnx", text.replace("[bend] ", ""), w=draw(6, 8)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (None, r'the input image \(N x 3 x height x \?\): give its sizes, as in shapes=\{"image"'),
        ({"images": (1, 3, 8, 8)}, r"shapes: the file has no input images; did you mean image\?"),
        ({"image": (1, 4, 8, 8)}, r"the input image .* does not take 1 x 4 x 8 x 8"),
    ],
)
def test_sizes_that_the_file_leaves_open(shapes, message, tmp_path) -> None:
    path = from_text(tmp_path / "m.onnx", "g (float[N,3,height,?] image) => (float[N,3,a,b] y) { y = Relu(image) }")
    with pytest.raises(BadInput, match=message):
        from_onnx(path, shapes=shapes)


def test_a_batch_that_the_graph_fixes_is_said(tmp_path) -> None:
    text = """g (float[N,6] x) => (float[a,b] y) {
        shape = Constant <value = int64[2] {3, 4}> ()
        y = Reshape(x, shape)
    }"""
    with pytest.warns(UserWarning, match="the batch is fixed at 2"):
        program = from_onnx(from_text(tmp_path / "m.onnx", text))
    assert program.dynamic_shapes is None


def test_what_prepares_the_image_is_no_weight(tmp_path) -> None:
    """A constant behind the first layer is one."""
    text = """g (float[N,3,8,8] image) => (float[N,4,8,8] y) {
        a = Sub(image, mean)
        b = Conv(a, w)
        y = Mul(b, scale)
    }"""
    weights = {"mean": draw(3, 1, 1), "w": draw(4, 3, 1, 1), "scale": draw(4, 1, 1)}
    program = from_onnx(from_text(tmp_path / "m.onnx", text, **weights))
    assert {n for n, _ in program.module().named_parameters()} == {"w", "scale"}
    assert isinstance(program.module(), nn.Module)
    assert np.isclose(program.macs, 2 * 8 * 8 * 3 * 4)


def test_equal_constants_that_the_file_stores_once_are_trained_apart(tmp_path) -> None:
    """Untrained norms have equal weights and statistics, which exporters store once."""

    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
            self.first, self.second, self.head = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Conv2d(6, 1, 1)
            for layer in (self.a, self.b, self.c):
                nn.init.zeros_(layer.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.second(self.b(self.first(self.a(x)).relu()))
            return (self.head(x) + self.head(self.c(self.c(x.relu())))).mean((2, 3))  # two layers that are called twice

    torch.manual_seed(0)
    model = Norms().eval()
    path = export(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", 17)
    file, kept = onnx.load(path), {}
    for tensor in list(file.graph.initializer):  # as newer exporters do
        same = kept.setdefault((tuple(tensor.dims), tensor.raw_data), tensor.name)
        if same != tensor.name:
            file.graph.initializer.remove(tensor)
            for node in file.graph.node:
                node.input[:] = [same if name == tensor.name else name for name in node.input]
    assert len(file.graph.initializer) < len(model.state_dict()) - 4
    onnx.save(file, path)
    ours, theirs = from_onnx(path).module().train(), model.train()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(6, 3, 8, 8)
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_parts_of_the_model_may_have_any_name(tmp_path) -> None:
    """A name that torch.fx uses gets an underscore; those of the importer's own attributes stay."""
    names = ["layers", "steps", "inputs", "run", "last", "constant", "graph"]
    model = nn.Sequential()
    for name in names:
        model._modules[name] = nn.Conv2d(4, 4, 1)
    program = from_onnx(export(model.eval(), torch.randn(2, 4, 5, 5), tmp_path / "names.onnx", 13))
    found = {name.partition(".")[0] for name, _ in program.module().named_parameters()}
    assert found == {*names[:-1], "graph_"}
    smaller = RemoveChannels(macs=0.7, round_to=1)(program)
    assert graphcomb.verify.surgery(program, smaller) <= 1e-10


def test_weight_standardisation_is_folded(tmp_path) -> None:
    """torch exports it as a BatchNormalization in training mode, whose batch is a weight."""

    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True, eps=1e-6)
            return F.conv2d(x, flat.reshape_as(self.weight), self.bias, padding=1)

    torch.manual_seed(0)
    model = nn.Sequential(Standardised(3, 16, 3), nn.ReLU(), Standardised(16, 8, 3)).eval()
    program = from_onnx(
        export(model, torch.randn(2, 3, 6, 6), tmp_path / "standardised.onnx", 14, do_constant_folding=True)
    )
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    smaller = RemoveChannels(macs=0.6, round_to=1)(program)
    assert graphcomb.verify.surgery(program, smaller) <= 1e-10


def test_padding_computed_from_sizes_is_a_constant(tmp_path) -> None:
    """As TensorFlow pads: max((ceil(size / 2) - 1) * 2 + 2 - size, 0), with sizes that are odd, and any batch."""
    text = """same (float[batch, 2, 9, 10] image) => (float[batch, 2, h, w] scores) {
        shape = Shape(image)  sizes = Cast<to = 1>(shape)  size = Gather<axis = 0>(sizes, place)
        half = Div(size, two)  whole = Ceil(half)  less = Sub(whole, one)  steps = Mul(less, two)  span = Add(steps, two)
        lacks = Sub(span, size)  pad = Clip(lacks, zero)  pads = Cast<to = 7>(pad)
        all = Concat<axis = 0>(none, pads, none, none)  padded = Pad(image, all)
        scores = Conv<strides = [2, 2]>(padded, weight) }"""
    place, none = np.array([2, 3]), np.zeros(2, np.int64)
    numbers = {name: np.float32(value) for name, value in (("two", 2), ("one", 1), ("zero", 0))}
    path = from_text(tmp_path / "same.onnx", text, place=place, none=none, weight=draw(2, 2, 2, 2), **numbers)
    program = from_onnx(path)
    assert program.module()(torch.randn(3, 2, 9, 10)).shape == (3, 2, 5, 5)
