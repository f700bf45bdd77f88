"""Which nodes become kernels: counts of engines that TensorRT-RTX built, and the rules one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphcomb import capture
from graphcomb.graph.workload.fusion import count, kernels
from graphcomb.graph.workload.libraries import ONNXRUNTIME, TENSORRT, classify, library


class Calls(nn.Module):
    """A network of a function and a few layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.layers, self.function = nn.ModuleDict(layers), function

    def forward(self, x):
        return self.function(self.layers, x)


def found(function, shape=(1, 16, 16, 16), rules=TENSORRT, **layers):
    """The kernels, each as the names of its nodes without numbers, and how many kernels only lay data out anew."""
    torch.manual_seed(0)
    graph = capture(Calls(function, **layers).eval(), (torch.randn(shape),)).graph
    made = kernels(graph, rules)
    return [" ".join(n.name.rstrip("_0123456789") for n in k.nodes) for k in made], count(graph, rules) - len(made)


def conv(inputs=16, outputs=16, kernel=3, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


@pytest.mark.parametrize("act", [F.relu, F.silu, F.gelu, F.hardswish, lambda y: y * torch.sigmoid(y), F.relu6])
def test_an_activation_after_a_convolution_is_no_kernel(act) -> None:
    names, laid_out = found(lambda m, x: m["b"](act(m["n"](m["a"](x)))), a=conv(), n=nn.BatchNorm2d(16), b=conv())
    assert len(names) == 2
    assert laid_out == 1  # the image


def test_a_depthwise_convolution_computes_clips_and_no_silu() -> None:
    layers = {"a": conv(groups=16), "b": conv(kernel=1)}
    assert len(found(lambda m, x: m["b"](F.relu6(m["a"](x))), **layers)[0]) == 2
    assert found(lambda m, x: m["b"](F.silu(m["a"](x))), **layers)[0] == ["conv2d", "silu", "conv2d"]


def test_a_residual_addition_is_the_later_convolutions() -> None:
    names, _ = found(lambda m, x: m["c"](F.relu(m["a"](x) + m["b"](x))), a=conv(), b=conv(), c=conv())
    assert names == ["conv2d", "conv2d add relu", "conv2d"]


def test_concatenated_convolutions_write_in_place_and_parts_do_not() -> None:
    layers = {"a": conv(), "b": conv(), "c": conv(32)}
    assert len(found(lambda m, x: m["c"](torch.cat([m["a"](x), m["b"](x)], 1)), **layers)[0]) == 3

    def split(m, x):  # the bottleneck of recent detectors
        left, right = m["c"](x).chunk(2, 1)
        return m["d"](torch.cat([left, right, m["a"](right)], 1))

    names, _ = found(split, c=conv(16, 32), a=conv(), d=conv(48))
    assert names == ["conv2d", "chunk", "conv2d", "cat", "conv2d"]


def test_a_chain_of_pointwise_operators_and_a_norm_is_one_kernel() -> None:
    names, _ = found(
        lambda m, x: m["l"](m["n"](torch.tanh(x) * 2 + x)), (1, 9, 16), l=nn.Linear(16, 16), n=nn.LayerNorm(16)
    )
    assert names == ["tanh mul add layer_norm", "linear"]


def test_an_attention_is_one_region_whether_called_or_written_out() -> None:
    def called(m, x):
        q, k, v = m["qkv"](x).view(1, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return m["out"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 9, 32))

    def written(m, x):
        q, k, v = m["qkv"](x).view(1, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return m["out"](((q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v).transpose(1, 2).reshape(1, 9, 32))

    layers = {"qkv": nn.Linear(32, 96), "out": nn.Linear(32, 32)}
    for function in (called, written):
        names, laid_out = found(function, (1, 9, 32), **layers)
        assert len(names) == 3  # linear, attention, linear
        assert laid_out == 3  # queries, keys, values


@pytest.mark.parametrize(("branches", "made"), [(2, 1), (1, 2)])
def test_nothing_joins_a_reduction_over_a_single_entry(branches: int, made: int) -> None:
    names, _ = found(lambda m, x: x * x.softmax(1), shape=(2, branches, 8, 8, 8))
    assert len(names) == made
    names, _ = found(lambda m, x: x.sum(1).mean((2, 3)), shape=(2, branches, 8, 8, 8))
    assert len(names) == made
    assert len(found(lambda m, x: x * x.softmax(1), (2, 1, 8, 8, 8), ONNXRUNTIME)[0]) == 2


def test_linears_of_the_same_input_are_one() -> None:
    names, _ = found(lambda m, x: (m["a"](x), m["b"](x)), (1, 9, 16), a=nn.Linear(16, 16), b=nn.Linear(16, 8))
    assert names == ["linear linear"]


def test_odd_widths_are_padded_by_kernels_of_their_own() -> None:
    assert found(lambda m, x: m["b"](m["a"](x)), a=conv(16, 16), b=conv(16, 16))[1] == 1
    assert found(lambda m, x: m["b"](m["a"](x)), a=conv(16, 15), b=conv(15, 16))[1] == 2
    assert found(lambda m, x: m["b"](m["a"](x)), a=conv(16, 14), b=conv(14, 16))[1] == 1


def test_nothing_is_joined_in_a_circle() -> None:
    """The gate of a squeeze-and-excitation waits for the convolutions behind the mean."""
    names, _ = found(
        lambda m, x: m["d"]((y := F.silu(m["a"](x))) * m["c"](F.relu(m["b"](y.mean((2, 3), keepdim=True)))).sigmoid()),
        a=conv(groups=16), b=conv(kernel=1), c=conv(kernel=1), d=conv(),
    )  # fmt: skip
    assert names == ["conv2d", "silu mean", "conv2d relu", "conv2d sigmoid", "mul", "conv2d"]


def test_what_depends_on_no_input_and_what_renames_indices_is_nothing() -> None:
    names, _ = found(
        lambda m, x: F.linear(x.flatten(1).unsqueeze(0), m["a"].weight.tanh()), (2, 16), a=nn.Linear(16, 16)
    )
    assert names == ["linear"]


def test_onnx_runtime_joins_clips_and_sums_to_convolutions_alone() -> None:
    layers = {"a": conv(), "b": conv(), "n": nn.BatchNorm2d(16)}
    assert len(found(lambda m, x: m["b"](F.relu(m["n"](m["a"](x)))) + x, rules=ONNXRUNTIME, **layers)[0]) == 2
    names, laid_out = found(lambda m, x: m["b"](F.silu(m["a"](x))), rules=ONNXRUNTIME, **layers)
    assert (names, laid_out) == (["conv2d", "silu", "conv2d"], 0)


@pytest.mark.parametrize(("name", "built"), [("resnet18", 24), ("squeezenet1_1", 32), ("mobilenet_v2", 56)])
def test_counts_of_engines_that_were_built(name: str, built: int) -> None:
    """At 128 x 128, fp16, with TensorRT-RTX 1.7 for SM 8.6; `benchmarks/kernels.py` has fifty."""
    models = pytest.importorskip("torchvision").models
    graph = capture(models.get_model(name, weights=None).eval(), (torch.randn(1, 3, 128, 128),)).graph
    assert count(graph, TENSORRT) == built


def test_every_class_of_operator_is_known() -> None:
    graph = capture(Calls(lambda m, x: F.hardswish(x).roll(1, 2).amax(1)).eval(), (torch.randn(1, 4, 8, 8),)).graph
    assert [classify(n) for n in graph.nodes if n.op == "call_function"] == ["pointwise", "move", "reduce"]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_tensorrt_rtx_quantises_in_a_kernel_after_each_product_of_eight_bits(precision: str) -> None:
    """Built engines show it: ResNet-18 has 24 kernels in fp16 and 42 in INT8, with 21 products."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1))
    graph = capture(net.eval(), torch.randn(1, 3, 8, 8)).graph
    plain, rtx, classic = (
        {kernel.nodes[0].name: kernel.launches(1) for kernel in kernels(graph, library(backend, kind))}
        for backend, kind in (("tensorrt_rtx", "fp16"), ("tensorrt_rtx", precision), ("tensorrt", precision))
    )
    assert len(plain) == 3
    assert rtx == {name: count + 1 for name, count in plain.items()}
    assert classic == plain
