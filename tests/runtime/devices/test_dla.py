"""The DLA's rules over ONNX files."""

import dataclasses

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphcomb
from graphcomb.graph.errors import BadInput
from graphcomb.runtime import get_target
from graphcomb.runtime.devices.dla import dla_report
from graphcomb.runtime.export.to_onnx import export_onnx
from graphcomb.runtime.onnx_file import check_model

ORIN = get_target("agx-orin")
HALF = TensorProto.FLOAT16


def one(op, shape=(1, 8, 16, 16), weights=(), out=None, kind=HALF, count=1, **attributes):
    """A model of one node on inputs of a shape."""
    names = [f"x{i}" for i in range(count)]
    inputs = [helper.make_tensor_value_info(n, kind, shape) for n in names]
    # A weight that nothing reads makes a model of a node without any an fp16 one.
    arrays = {"unused": np.zeros(9, np.float16)} | {f"w{i}": w for i, w in enumerate(weights)}
    node = helper.make_node(op, names + [n for n in arrays if n != "unused"], ["y"], name="layer", **attributes)
    output = helper.make_tensor_value_info("y", kind, out)
    tensors = [numpy_helper.from_array(w, n) for n, w in arrays.items()]
    graph = helper.make_graph([node], "g", inputs, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def half(*shape):
    return np.ones(shape, np.float16)


def scales(*values):
    return [np.zeros(0, np.float32), np.array(values, np.float32)]


CASES = [
    (one("Relu"), ""),
    (one("Erf"), "it has no Erf"),
    (one("Relu", (1, 8)), "x0 is not a tensor of 4 known sizes"),
    (one("Relu", (1, 8193, 4, 4)), "x0 has a size of 8193, above 8192"),
    (one("Relu", (4097, 8, 4, 4)), "x0 has a batch of 4097, above 4096"),
    (one("Relu", kind=TensorProto.FLOAT), "it computes in fp16 and int8, not fp32"),
    (one("Add", weights=[half(1, 8, 1, 1)]), ""),
    (one("MatMul", weights=[half(16, 4)]), "it has no matrix products; a 1x1 convolution"),
    (one("GlobalAveragePool"), "it has no mean; average pooling with a window up to 8"),
    (one("Conv", weights=[half(4, 8, 3, 3)], pads=[1, 1, 1, 1]), ""),
    (one("Conv", (1, 8, 40, 40), [half(4, 8, 33, 3)]), "kernel 33 is above 32"),
    (one("Conv", weights=[half(4, 8, 3, 3)], strides=[9, 9]), "stride 9 is above 8"),
    (one("ConvTranspose", weights=[half(8, 4, 2, 2)], strides=[2, 2]), ""),
    (one("ConvTranspose", weights=[half(8, 4, 2, 2)], group=2), "its deconvolutions have no groups"),
    (one("ConvTranspose", weights=[half(8, 4, 3, 3)], pads=[1, 1, 1, 1]), "its deconvolutions have no padding"),
    (one("ConvTranspose", weights=[half(8, 4, 3, 3)], auto_pad="SAME_UPPER"), "its deconvolutions have no padding"),
    (one("ConvTranspose", weights=[half(8, 4, 3, 3)], dilations=[2, 2]), "dilation 2 is above 1"),
    (one("Clip", weights=[np.array(0, np.float16), np.array(6, np.float16)]), ""),
    (
        one("Clip", weights=[np.array(-1, np.float16), np.array(1, np.float16)]),
        "it clips from 0 to a value of 1 to 127 only",
    ),
    (one("Clip", weights=[np.array(0, np.float16)]), "it clips from 0 to a value of 1 to 127 only"),
    (one("Concat", count=2, axis=1), ""),
    (one("Concat", count=2, axis=-3), ""),
    (one("Concat", count=2, axis=2), "it joins along the channels only, not along axis 2"),
    (one("MaxPool", kernel_shape=[3, 3], strides=[2, 2]), ""),
    (one("AveragePool", kernel_shape=[9, 9]), "window 9 is above 8"),
    (one("Resize", weights=scales(1, 1, 2, 2), mode="linear"), ""),
    (one("Resize", weights=scales(1, 1, 1.5, 2)), "it resizes by whole numbers only"),
    (one("Resize", weights=scales(1, 1, 8, 8), mode="linear"), "scale 8 is above 4"),
    (one("Resize", weights=scales(1, 1, 2, 2), mode="cubic"), "it resizes to the nearest or linearly only"),
]


@pytest.mark.parametrize(("model", "why"), CASES, ids=[f"{m.graph.node[0].op_type}-{w[:20]}" for m, w in CASES])
def test_a_layer_goes_where_the_rules_put_it(model, why):
    (found,) = dla_report(model, ORIN)
    assert (found.node, found.op) == ("layer", model.graph.node[0].op_type)
    assert found.why.startswith(why)
    assert bool(found.why) == bool(why)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"group": 2}, {"deconvolution_groups": True}),
        ({"pads": [1, 1, 1, 1]}, {"deconvolution_padding": True}),
    ],
)
def test_the_rules_are_the_targets(options, changed):
    model = one("ConvTranspose", weights=[half(8, 4, 3, 3)], **options)
    target = dataclasses.replace(ORIN, dla=dataclasses.replace(ORIN.dla, **changed))
    assert [p.why for p in dla_report(model, target)] == [""]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (one("Relu"), {"target": "agx-thor"}, "option dla: agx-thor has no DLA"),
        (one("Relu"), {"core": 2}, "option dla: a core of agx-orin, 0 to 1, not 2"),
        (one("Relu"), {"core": "abc"}, "option dla: a core of agx-orin, 0 to 1, not 'abc'"),
        (one("Relu", ("n", 8, 4, 4)), {}, r"input x0: axes \[0\] are dynamic, a DLA's are not; give one batch size"),
        (one("Relu", ("n", 8, 4, 4)), {"batch": [1, 2, 4]}, "give one batch size"),
        (one("Relu", (1, 8, "h", "w")), {"batch": 1}, r"axes \[2, 3\] are dynamic.*; export it with fixed shapes"),
    ],
)
def test_what_a_dla_does_not_take_is_refused(model, options, message):
    target = get_target(options.pop("target", "agx-orin"))
    with pytest.raises(BadInput, match=message):
        dla_report(model, target, **options)
    assert dla_report(one("Relu", ("n", 8, 4, 4)), ORIN, batch=4)


def test_quantised_nodes_are_no_layers():
    model = one("Relu", (1, 8, 4, 4))
    model.graph.node.append(helper.make_node("QuantizeLinear", ["y", "s"], ["q"]))
    assert [placement.op for placement in dla_report(model, ORIN)] == ["Relu"]


def test_a_whole_network(tmp_path):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.SiLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(8, 8, 3), torch.nn.GELU(), torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(8, 4),
    )  # fmt: skip
    program = graphcomb.capture(net.eval(), (torch.randn(2, 3, 14, 14),))
    for precision in ("fp32", "fp16"):
        export_onnx(program, tmp_path / f"{precision}.onnx", precision)
    with pytest.raises(BadInput, match="the DLA of agx-orin computes in fp16 and int8, not fp32; export it so"):
        dla_report(check_model(tmp_path / "fp32.onnx"), ORIN)
    report = dla_report(check_model(tmp_path / "fp16.onnx"), ORIN)
    left = {p.op for p in report if p.why}
    assert {"Gemm", "Reshape"} <= left <= {"Gemm", "Reshape", "Erf", "Gelu"}
    assert {p.op for p in report if not p.why} >= {"Conv", "Sigmoid", "Mul", "MaxPool", "AveragePool"}
