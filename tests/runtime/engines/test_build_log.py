"""Reading build logs: real ones from TensorRT-RTX, which builds here without a GPU, and texts of other versions."""

import importlib.util

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from graphcomb.runtime.engine_summary import Pad
from graphcomb.runtime.engines.trt.kernels import advice
from graphcomb.runtime.engines.trt.log import parse_build_log

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
HALF = TensorProto.FLOAT16


class Net:
    """A small fp16 ONNX model, node by node; the last node's output is the model's."""

    def __init__(self, shape, out):
        self.nodes, self.weights, self.last = [], [], "x"
        self.inputs = [helper.make_tensor_value_info("x", HALF, shape)]
        self.outputs = [helper.make_tensor_value_info("y", HALF, out)]

    def add(self, op, name, *weights, inputs=None, **attributes):
        names = []
        for i, weight in enumerate(weights):
            if isinstance(weight, tuple):
                weight = np.random.default_rng(len(self.weights)).standard_normal(weight).astype(np.float16)
            self.weights.append(numpy_helper.from_array(np.asarray(weight), f"{name}.w{i}"))
            names.append(f"{name}.w{i}")
        self.nodes.append(helper.make_node(op, [*(inputs or [self.last]), *names], [name], name=name, **attributes))
        self.last = name
        return self

    def conv(self, name, out, ins, k, op="Conv", **options):
        return self.add(op, name, (out, ins, k, k), kernel_shape=[k, k], pads=[k // 2] * 4, **options)

    def log(self, tmp_path, target="rtx-sm86"):
        from graphcomb.runtime.engines.build import build_engine

        self.nodes[-1].output[0] = "y"
        graph = helper.make_graph(self.nodes, "net", self.inputs, self.outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        save(model, tmp_path / "net.onnx")
        build_engine(tmp_path / "net.onnx", target, log=tmp_path / "net.log")
        return parse_build_log((tmp_path / "net.log").read_text())


def fp16(dtype):
    return {"fp16": 8}[dtype]


def found(log):
    return [(p.how, p.nodes[-1], p.axis, p.before, p.after, p.alignment) for p in log.pads(fp16)]


@needs_rtx
@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (61, [("kernel", "second", 1, 61, 62, 2)]),
        (63, [("kernel", "second", 1, 63, 64, 8)]),
        (62, []),
        (64, []),
    ],
)
def test_a_width_between_convolutions_is_padded_or_not(tmp_path, width, expected):
    net = Net([2, 32, 12, 12], [2, 32, 12, 12]).conv("first", width, 32, 3).add("Relu", "relu")
    log = net.conv("second", 32, width, 3).log(tmp_path)
    assert found(log) == expected
    assert [k.name for k in log.kernels() if k.padding] == [p.kernel for p in log.pads() if p.how == "kernel"]
    # The advice is sound: the width rounded up to it builds without padding.
    for _, _, _, before, _, alignment in expected:
        wide = -(-before // alignment) * alignment
        net = Net([2, 32, 12, 12], [2, 32, 12, 12]).conv("first", wide, 32, 3).add("Relu", "relu")
        assert found(net.conv("second", 32, wide, 3).log(tmp_path)) == []


@needs_rtx
def test_fused_kernels_name_their_nodes_shapes_types_and_formats(tmp_path):
    net = Net([2, 32, 12, 12], [2, 64, 12, 12]).conv("first", 64, 32, 3).add("Relu", "relu")
    log = net.conv("second", 64, 64, 1).log(tmp_path)
    (kernel,) = [k for k in log.kernels() if "relu" in k.nodes]
    assert kernel.nodes == ("first", "relu")
    assert kernel.kind == "correlation"
    assert kernel.inputs == ("fp16[2,32,12,12] NHWC",)
    assert kernel.outputs == ("fp16[2,64,12,12] NHWC",)
    assert log.nodes["second"].op == "Conv"
    assert dict(log.nodes["second"].inputs)["second.w0"] == (64, 64, 1, 1)
    weights = 2 * (64 * 32 * 9 + 64 * 64)
    assert weights <= log.memory["weights"] < 1.1 * weights
    assert log.memory["activations"] > 0


@needs_rtx
def test_older_gpus_pad_inside_the_weights(tmp_path):
    net = Net([2, 32, 12, 12], [2, 32, 12, 12]).conv("first", 61, 32, 3).add("Relu", "relu")
    log = net.conv("second", 32, 61, 3).log(tmp_path, "rtx-sm75")
    assert found(log) == [("weights", "first", 0, 61, 64, 8), ("weights", "second", 1, 61, 64, 8)]


@needs_rtx
def test_the_input_channels_are_padded_in_passing(tmp_path):
    log = Net([2, 3, 12, 12], [2, 32, 12, 12]).conv("first", 32, 3, 3).log(tmp_path)
    assert found(log) == [("fused", "first", 1, 3, 4, 4)]
    assert not any(k.padding for k in log.kernels())


@needs_rtx
def test_grouped_and_transposed_convolutions(tmp_path):
    net = Net([2, 32, 12, 12], [2, 33, 12, 12]).conv("first", 21, 32, 3)
    assert ("kernel", "second", 1, 21, 24, 24) in found(net.conv("second", 33, 7, 3, group=3).log(tmp_path))
    net = Net([2, 32, 12, 12], [2, 33, 12, 12]).conv("first", 21, 32, 3)
    pads = found(net.conv("second", 21, 33, 3, op="ConvTranspose").log(tmp_path))
    assert ("kernel", "second", 1, 21, 24, 8) in pads
    assert any(p[1:5] == ("second", 1, 33, 40) for p in pads)


@needs_rtx
@pytest.mark.parametrize(("width", "groups", "alignment"), [(33, 11, 44), (22, 2, 8), (104, 8, 16)])
def test_groups_are_padded_inside_and_the_advice_is_a_width_they_can_have(tmp_path, width, groups, alignment):
    def grouped(width):
        net = Net([2, 32, 12, 12], [2, width, 12, 12]).conv("first", width, 32, 3).add("Relu", "relu")
        weight = (width, width // groups, 3, 3)
        net.add("Conv", "second", weight, kernel_shape=[3, 3], pads=[1] * 4, group=groups)
        return [p for p in net.log(tmp_path).pads(fp16) if "second" in p.nodes]

    pads = grouped(width)
    assert {(p.how, p.before, p.alignment) for p in pads if p.how == "kernel"} == {("kernel", width, alignment)}
    assert str(groups) in next(p.note for p in pads if p.how == "kernel")
    assert grouped(-(-width // alignment) * alignment) == []


@needs_rtx
def test_no_width_is_advised_where_each_channel_of_several_is_a_group(tmp_path):
    net = Net([2, 32, 12, 12], [2, 128, 12, 12]).conv("first", 64, 32, 3).add("Relu", "relu")
    net.add("Conv", "second", (128, 1, 3, 3), kernel_shape=[3, 3], pads=[1] * 4, group=64)
    (pad,) = net.log(tmp_path).pads(fp16)
    assert (pad.before, pad.after, pad.alignment) == (64, 128, None)
    assert str(pad) == (
        "second: axis 1 is padded from 64 to 128; no width avoids it "
        "(each of its 64 groups has 1, which the engine pads to 2)"
    )


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((512, 1024, 8, 512), None),  # a multiplier: one channel in each group
        ((96, 128, 8, 32), 128),
        ((21, 24, 8, 3), 24),
        ((7, 8, 8, 3, True), 8),
        ((1, 2, 8, 64, True), None),
        ((66, 72, 8, 33), 8),  # not inside the groups: 36 of them
        ((3, 8, 8), None),  # would be more than twice as wide
        ((3, 4, 8), 4),
        ((4, 8, 8), 8),
        ((61, 62, 8), 2),
        ((61, 64, 8), 8),
        ((122, 128, 8, 61), 8),
    ],
)
def test_advice_is_never_above_twice_the_width_and_fits_the_groups(case, expected):
    found, note = advice(*case)
    assert found == expected
    assert note or len(case) == 3 or case[0] in (66, 122)
    if found is not None:
        assert -(-case[0] // found) * found <= 2 * case[0]


@needs_rtx
def test_matmuls_are_padded_at_both_ends(tmp_path):
    net = Net([16, 61], [16, 61]).add("Gemm", "first", (61, 63)).add("Relu", "relu").add("Gemm", "second", (63, 61))
    pads = found(net.log(tmp_path))
    assert ("kernel", "relu", 1, 61, 62, 2) in pads  # the input
    assert ("kernel", "second", 1, 61, 62, 2) in pads  # cut off again at the output
    assert ("weights", "first", 1, 63, 64, 8) in pads


@needs_rtx
@pytest.mark.parametrize(("widths", "pads"), [((8, 8), 0), ((9, 12), 1)])
def test_concatenation_is_no_padding(tmp_path, widths, pads):
    net = Net([2, 32, 12, 12], [2, 32, 12, 12]).conv("left", widths[0], 32, 3)
    net.conv("right", widths[1], 32, 3, inputs=["x"])
    net.add("Concat", "cat", inputs=["left", "right"], axis=1).add("Relu", "relu")
    log = net.conv("last", 32, sum(widths), 3).log(tmp_path)
    assert len(found(log)) == pads
    assert any("Conc" in layer.steps for layer in log.layers)


@needs_rtx
def test_the_models_own_pads_and_slices_are_no_padding(tmp_path):
    net = Net([2, 32, 12, 12], [2, 32, 11, 11]).add("Pad", "pad", np.array([0, 0, 1, 1, 0, 0, 2, 2]))
    net.add("Conv", "first", (16, 32, 3, 3)).add("Slice", "slice", np.array([2]), np.array([14]), np.array([1]))
    assert found(net.add("Conv", "second", (32, 12, 3, 3)).log(tmp_path)) == []


def test_alignment_of_the_target_is_the_advice_only_where_it_explains_the_padding():
    lines = [
        "conv [Conv] inputs: [x -> (1, %d, 8, 8)[HALF]], [w -> (8, %d, 1, 1)[HALF]], ",
        "conv [Conv] outputs: [y -> (1, 8, 8, 8)[HALF]], ",
        "Name: __myl_Conc_myl0_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [1,%d,8,8], Datatype: Half }], "
        "Outputs: [ { Name: p, Dimensions: [1,%d,8,8], Datatype: Half }], Metadata: [ONNX Layer: conv]",
        "Name: conv, LayerType: correlation, Inputs: [ { Name: p, Dimensions: [1,%d,8,8], Datatype: Half }], "
        "Outputs: [ { Name: y, Dimensions: [1,8,8,8], Datatype: Half }], Metadata: [ONNX Layer: conv]",
    ]

    def pad(before, after):
        text = "\n".join(lines) % (before, before, before, after, after)
        return parse_build_log(text).pads(fp16)

    assert pad(5, 8) == [
        Pad(kernel="__myl_Conc_myl0_0", how="kernel", nodes=("conv",), axis=1, before=5, after=8, alignment=8)
    ]
    assert pad(9, 16)[0].alignment == 8
    assert pad(9, 10)[0].alignment == 2
    assert pad(9, 12)[0].alignment == 4
    assert str(pad(9, 12)[0]) == "conv: axis 1 is padded from 9 to 12; multiples of 4 are not"


def test_a_convolution_that_became_a_matrix_product():
    """From the log of a ResNet-50 with 543 channels, trimmed: the compiler merges the spatial axes, and pads in a kernel
    whose name also says "Move" although the order in memory stays."""

    def text(order):
        return "\n".join(
            [
                "l4/conv [Conv] inputs: [x -> (-1, 543, 14, 14)[HALF]], [w -> (271, 543, 1, 1)[HALF]], ",
                "l4/conv [Conv] outputs: [c -> (-1, 271, 14, 14)[HALF]], ",
                "l4/relu [Relu] inputs: [c -> (-1, 271, 14, 14)[HALF]], ",
                "l4/relu [Relu] outputs: [r -> (-1, 271, 14, 14)[HALF]], ",
                "Name: __myl_MoveReplConc_myl0_51, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,543,196], "
                f"StrideOrder: {order}, Datatype: Half, Format: (NHWC) Channel major format }}], Constants: [], "
                "Outputs: [ { Name: p, Dimensions: [-1,544,196], StrideOrder: [2,0,1], Datatype: Half }], "
                "TacticName: t, Metadata: [ONNX Layer: l4/conv][ONNX Layer: l4/relu]__gemm_from_conv1x1",
                "Name: __myl_FcRelu_myl0_52, LayerType: runtime_fusion, Inputs: [ { Name: p, Dimensions: [-1,544,196], "
                "Datatype: Half }], Constants: [ { Name: k, Dimensions: [1,272,544], Datatype: Half }], "
                "Outputs: [ { Name: r, Dimensions: [-1,272,196], Datatype: Half }], "
                "TacticName: , Metadata: [ONNX Layer: l4/conv][ONNX Layer: l4/relu]__gemm_from_conv1x1",
            ]
        )

    log = parse_build_log(text("[2,0,1]"))
    assert all(kernel.nodes == ("l4/conv", "l4/relu") for kernel in log.kernels())
    assert found(log) == [("kernel", "l4/relu", 1, 543, 544, 8), ("weights", "l4/conv", 0, 271, 272, 8)]
    assert found(parse_build_log(text("[2,1,0]")))[0][0] == "fused"  # it changes the order as well


def test_engine_layer_information_of_classic_tensorrt():
    """The form that TensorRT 8.6 to 10 print; the package does not run here, so this is a written sample."""
    text = "\n".join(
        [
            "[07/01/2024-10:00:00] [V] [TRT] /c1/Conv [Conv] inputs: [x -> (1, 3, 32, 32)[HALF]], "
            "[w -> (72, 3, 3, 3)[HALF]], ",
            "[07/01/2024-10:00:00] [V] [TRT] Engine Layer Information:",
            "Layer(Reformat): Reformatting CopyNode for Input Tensor 0 to /c1/Conv + /r1/Relu, "
            "Tactic: 0x00000000000003ea, x (Half[1,3,32,32]) -> Reformatted Input Tensor 0 to /c1/Conv + /r1/Relu "
            "(Half[1,3:8,32,32])",
            "Layer(CaskConvolution): /c1/Conv + /r1/Relu, Tactic: 0x1, "
            "Reformatted Input Tensor 0 to /c1/Conv + /r1/Relu (Half[1,3:8,32,32]) -> r1 (Half[1,72:8,32,32])",
            "Layer(CaskConvolution): /c2/Conv, Tactic: 0x1, r1[Int8(1,72,32,32)], s[Half(1,8,32,32)] "
            "-> y[Float(1,8,32,32)]",
            "[07/01/2024-10:00:00] [I] [TRT] Total Activation Memory: 24064",
            "[07/01/2024-10:00:00] [I] [TRT] Total Weights Memory: 1024 bytes",
        ]
    )
    log = parse_build_log(text)
    copy, first, second = log.kernels()
    assert (copy.kind, copy.nodes, copy.inputs) == ("Reformat", (), ("fp16[1,3,32,32]",))
    assert first.nodes == ("/c1/Conv", "/r1/Relu")
    assert (first.inputs, first.outputs) == (("fp16[1,3,32,32] C/8",), ("fp16[1,72,32,32] C/8",))
    assert second.inputs == ("int8[1,72,32,32]", "fp16[1,8,32,32]")
    assert second.outputs == ("fp32[1,8,32,32]",)
    assert log.memory == {"activations": 24064, "weights": 1024}
    assert log.nodes["/c1/Conv"].inputs[1] == ("w", (72, 3, 3, 3))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no log at all",
        "Layers:\nName: a, LayerType: kgen",
        "Name: __myl_Conc_myl0_0, LayerType: kgen, Outputs: [ { Name: o, Dimensions: [1,8,4,4] }], Metadata: ",
        "Name: a, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [] }], Metadata: [ONNX Layer: unseen]",
        "Total Weights Memory: unknown",
    ],
)
def test_missing_parts_stay_empty(text):
    log = parse_build_log(text)
    assert log.pads(fp16) == []
    assert all(kernel.nodes in ((), ("unseen",)) for kernel in log.kernels())
    assert log.memory == {}


def test_node_names_with_brackets_and_separators():
    line = "Name: k, LayerType: gemm, Inputs: [], Outputs: [], Metadata: [ONNX Layer: a[0]/b]\x1e[ONNX Layer: c (d)]"
    assert parse_build_log(line).kernels()[0].nodes == ("a[0]/b", "c (d)")


# --------------------------------------------------------------------------------------------------------- quantisation
KERNEL = (
    "Name: {name}, LayerType: {kind}, Inputs: [ {inputs} ], Outputs: [ {outputs} ], TacticName: t, Metadata: {meta}"
)
OPERAND = "{{ Name: {}, Dimensions: [{}], Strides: [1], StrideOrder: [0], Datatype: {}, Format: (Linear) }}"
# Two quantised products in a row, and the tensors between their nodes as the parser prints them.
QDQ_NODES = [
    ("q0", "QuantizeLinear", ["x", "s"], ["x8"]),
    ("dq0", "DequantizeLinear", ["x8", "s"], ["xr"]),
    ("dqw", "DequantizeLinear", ["w8", "s"], ["wr"]),
    ("conv", "Conv", ["xr", "wr"], ["y"]),
    ("q1", "QuantizeLinear", ["y", "s"], ["y8"]),
    ("dq1", "DequantizeLinear", ["y8", "s"], ["yr"]),
    ("gemm", "MatMul", ["yr", "wr"], ["z"]),
]


def quantised(*kernels):
    """The log of QDQ_NODES compiled into kernels: (name, nodes, type of the input, type of the output)."""
    lines = []
    for name, op, inputs, outputs in QDQ_NODES:
        for side, names in (("inputs", inputs), ("outputs", outputs)):
            lines.append(f"{name} [{op}] {side}: " + ", ".join(f"[{n} -> (4, 4)[FLOAT]]" for n in names))
    lines.append("Layers:")
    for i, (name, nodes, before, after) in enumerate(kernels):
        ends = OPERAND.format(f"t{i}", "4,4", before), OPERAND.format(f"t{i + 1}", "4,4", after)
        meta = "".join(f"[ONNX Layer: {n}]" for n in nodes)
        lines.append(KERNEL.format(name=name, kind="gemm", inputs=ends[0], outputs=ends[1], meta=meta))
    return parse_build_log("\n".join(lines))


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        # Every quantisation is fused: the first kernel takes the network's input.
        (
            [
                ("a", ["q0"], "Float", "Int8"),
                ("b", ["dq0", "dqw", "conv", "q1"], "Int8", "Int8"),
                ("c", ["dq1", "gemm"], "Int8", "Float"),
            ],
            [],
        ),
        # A product's scale and bias are a kernel of their own, in floats: the product alone is in few bits.
        ([("a", ["dq1", "gemm"], "Int8", "Float"), ("b", ["gemm"], "Float", "Float")], [("wide", ("gemm",))]),
        ([("a", ["dq0", "dqw", "conv", "q1", "dq1"], "Int8", "Int8"), ("b", ["gemm"], "Int8", "Float")], []),
        (
            [
                ("a", ["dq0", "dqw", "conv"], "Int8", "Float"),
                ("b", ["q1"], "Float", "Int8"),
                ("c", ["gemm"], "Int8", "Float"),
            ],
            [("kernel", ("q1",))],
        ),
        ([("a", ["conv"], "Float", "Float"), ("b", ["gemm"], "Int8", "Float")], [("float", ("conv",))]),
        ([("a", ["conv", "q1", "dq1"], "Int8", "Float")], [("idle", ("q1", "dq1"))]),
    ],
)
def test_quantisation_that_buys_nothing_is_named(kernels, expected):
    assert [(u.how, u.nodes) for u in quantised(*kernels).unfused()] == expected


def test_weights_that_the_builder_quantises_are_no_loss():
    lines = []
    for name, op, inputs, outputs in [
        ("q0", "QuantizeLinear", ["t0", "s"], ["x8"]), ("dq0", "DequantizeLinear", ["x8", "s"], ["xr"]),
        ("qw", "QuantizeLinear", ["w", "s"], ["w8"]), ("dqw", "DequantizeLinear", ["w8", "s"], ["wr"]),
        ("conv", "Conv", ["xr", "wr"], ["y"]),
    ]:  # fmt: skip
        for side, names in (("inputs", inputs), ("outputs", outputs)):
            lines.append(f"{name} [{op}] {side}: " + ", ".join(f"[{n} -> (4, 4)[FLOAT]]" for n in names))
    meta = "".join(f"[ONNX Layer: {n}]" for n in ("qw", "dqw", "dq0", "conv"))
    ends = OPERAND.format("t0", "4,4", "Float"), OPERAND.format("x8", "4,4", "Int8"), OPERAND.format("z", "4,4", "Half")
    first = KERNEL.format(name="a", kind="kgen", inputs=ends[0], outputs=ends[1], meta="[ONNX Layer: q0]" + meta)
    second = KERNEL.format(name="b", kind="correlation", inputs=ends[1], outputs=ends[2], meta=meta)
    assert parse_build_log("\n".join([*lines, "Layers:", first, second])).unfused() == []


def test_lines_about_kernels_that_cannot_be_read_are_kept():
    good = KERNEL.format(name="a", kind="gemm", inputs=OPERAND.format("x", "4", "Half"), outputs="", meta="")
    odd = good.replace("{ Name: x, Dimensions: [4]", "{ Name: x, Extents: <4>")
    log = parse_build_log(
        "\n".join(["Layers:", good, odd, "Name: b without anything", "[V] [TRT] Layer(Relu) relu", ""])
    )
    assert log.unread == [odd, "Name: b without anything", "[V] [TRT] Layer(Relu) relu"]
    assert log.layers[0].inputs[0].dtype == "fp16"
