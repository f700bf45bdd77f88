"""Q/DQ nodes as a calibration cache, against ONNX Runtime: a model without them, rounded at the tensors of the cache, gives
bit for bit what the model with them gives."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphcomb.graph.errors import Refused
from graphcomb.runtime.devices.table import get_target
from graphcomb.runtime.engines.options import EngineOptions
from graphcomb.runtime.engines.trt import build as tensorrt
from graphcomb.runtime.engines.trt.implicit import implicit, read_cache
from graphcomb.runtime.kit.calibrate import calibration_cache

SHAPE = (2, 4, 8, 8)


def run(model, x):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


def constant(name, value, kind=np.float32):
    return numpy_helper.from_array(np.asarray(value, kind), name)


def model_of(nodes, weights, output=SHAPE):
    sides = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", SHAPE), ("y", output))]
    graph = helper.make_graph(nodes, "net", sides[:1], sides[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def rounded(name, to, scale="s", zero="z", **attributes):
    return [
        helper.make_node("QuantizeLinear", [name, scale, zero], [f"{to}_q"], name=f"{to}_q", **attributes),
        helper.make_node("DequantizeLinear", [f"{to}_q", scale, zero], [to], name=f"{to}_dq", **attributes),
    ]


def network(seed=0, zero=0, full=True):
    """A convolution, ReLU and pooling, whose result is rounded, and a second convolution and a sum."""
    generator = np.random.default_rng(seed)
    weights = generator.integers(-126, 127, (4, 4, 3, 3)).astype(np.int8)
    if full:
        weights[:, 0, 0, 0] = 127
    conv = {"pads": [1, 1, 1, 1]}
    nodes = [
        *rounded("x", "xr"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], name="wf", axis=0),
        helper.make_node("Conv", ["xr", "wf"], ["a"], name="first", **conv),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MaxPool", ["b"], ["c"], name="pool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        *rounded("c", "cr", "t"),
        helper.make_node("Conv", ["cr", "wf"], ["d"], name="second", **conv),
        helper.make_node("Sigmoid", ["d"], ["e"], name="sigmoid"),
        helper.make_node("Add", ["e", "cr"], ["y"], name="add"),
    ]
    tensors = [
        constant("s", 0.03), constant("t", 0.11), constant("z", zero, np.int8), constant("wz", np.zeros(4), np.int8),
        constant("ws", generator.uniform(0.001, 0.01, 4)), numpy_helper.from_array(weights, "w"),
    ]  # fmt: skip
    return model_of(nodes, tensors)


def round_at(model, scales):
    """The model with every tensor of the cache rounded where it is made: what implicit quantisation computes."""
    model, made = onnx.ModelProto.FromString(model.SerializeToString()), []
    for node in model.graph.node:
        node.input[:] = [f"{name}_round" if name in scales else name for name in node.input]
    for name, scale in scales.items():
        model.graph.initializer.extend([constant(f"{name}_s", scale), constant(f"{name}_z", 0, np.int8)])
        made += rounded(name, f"{name}_round", f"{name}_s", f"{name}_z")
    nodes, done = [*made, *model.graph.node], {"x", *(t.name for t in model.graph.initializer)}
    del model.graph.node[:]
    while nodes:
        ready = next(node for node in nodes if set(node.input) <= done)
        nodes.remove(ready)
        model.graph.node.append(ready)
        done.update(ready.output)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_the_cache_rounds_as_the_nodes_did(seed):
    model = network(seed)
    found = implicit(model)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in found.model.graph.node}
    assert found.scales.keys() == {"x", "a", "b", "c"}  # ReLU and pooling are exchanged with the rounding
    assert found.int8 == ("first", "second")
    assert found.notes == ()
    x = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
    assert np.array_equal(run(round_at(found.model, found.scales), x), run(model, x))
    assert not np.array_equal(run(found.model, x), run(model, x))  # without the cache something else


def test_weights_whose_scale_tensorrt_does_not_derive_are_noted():
    (note,) = implicit(network(full=False)).notes
    assert note == "w: 4 scales of 4 are not those that TensorRT derives from the weights"


def test_a_cache_is_the_text_that_tensorrt_writes():
    """The scale of 1/127 and of 0.5 as big-endian hexadecimal digits of a float of 32 bits (IEEE 754)."""
    text = calibration_cache({"x": 0.5, "conv1 (Unnamed)": 1 / 127}, "8.6.1")
    assert text == "TRT-8601-EntropyCalibration2\nx: 3f000000\nconv1 (Unnamed): 3c010204\n"
    assert calibration_cache({}, "10.3.0") == "TRT-100300-EntropyCalibration2\n"
    assert read_cache(text) == {"x": 0.5, "conv1 (Unnamed)": float(np.float32(1 / 127))}


def test_what_a_cache_cannot_say_is_refused():
    with pytest.raises(Refused, match=r"node xr_dq: its zero point is not 0"):
        implicit(network(zero=3))
    channels = [constant("s", [0.1, 0.2, 0.3, 0.4]), constant("z", np.zeros(4), np.int8)]
    with pytest.raises(Refused, match=r"a calibration cache has one scale per tensor, x has several"):
        implicit(model_of([*rounded("x", "r", axis=1), helper.make_node("Relu", ["r"], ["y"])], channels))
    unsigned = [constant("s", 0.1), constant("z", 0, np.uint8)]
    with pytest.raises(Refused, match=r"it rounds to uint8, and a DLA computes in INT8"):
        implicit(model_of([*rounded("x", "r"), helper.make_node("Relu", ["r"], ["y"])], unsigned))
    twice = [*rounded("x", "r"), *rounded("x", "q", "t"), helper.make_node("Add", ["r", "q"], ["y"])]
    with pytest.raises(Refused, match=r"x is rounded in two ways"):
        implicit(model_of(twice, [constant("s", 0.1), constant("t", 0.2), constant("z", 0, np.int8)]))


def test_a_tensor_that_is_also_read_as_it_is_is_noted():
    nodes = [*rounded("x", "r"), helper.make_node("Add", ["r", "x"], ["y"], name="add")]
    found = implicit(model_of(nodes, [constant("s", 0.1), constant("z", 0, np.int8)]))
    assert found.notes == ("x: some nodes read it as it is, and a DLA may store it in INT8 for all of them",)


def test_a_build_for_the_dla_takes_the_cache_up_to_10_and_the_nodes_later(classic, tmp_path):
    classic.kernels = [("first", "CONVOLUTION"), ("relu", "ACTIVATION"), ("second", "CONVOLUTION")]
    onnx.save(network(full=False), tmp_path / "net.onnx")
    options = EngineOptions(dla=0)
    report = tensorrt.build(tmp_path / "net.onnx", get_target("agx-orin"), None, options, backend="tensorrt")
    flags = classic.module.NetworkDefinitionCreationFlag
    if classic.module.__version__.startswith("11"):
        assert classic.network_flags == 1 << int(flags.STRONGLY_TYPED)
        assert "INT8" not in classic.flags
        return
    assert classic.network_flags == 1 << int(flags.EXPLICIT_BATCH)
    assert {"INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS", "GPU_FALLBACK"} <= set(classic.flags)
    cache = classic.config.int8_calibrator.read_calibration_cache().decode()
    assert read_cache(cache).keys() == {"x", "a", "b", "c"}
    assert (classic.config.int8_calibrator.get_batch_size(), classic.config.int8_calibrator.get_batch(["x"])) == (
        1,
        None,
    )
    kinds = [classic.network.get_layer(index).precision.name for index in range(3)]
    assert kinds == ["INT8", "HALF", "INT8"]
    assert any("TensorRT derives from the weights" in note for note in report.warnings)
