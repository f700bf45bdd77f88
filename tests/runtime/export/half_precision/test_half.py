"""Half precision on graphs made by hand, one for each thing that must or must not become fp16."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from graphcomb.graph.errors import Refused
from graphcomb.runtime.export.half_precision.half import to_half

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def variable(name: str, dtype: type = np.float32, shape: list | None = None) -> gs.Variable:
    return gs.Variable(name, np.dtype(dtype), shape)


def constant(name: str, values: object, dtype: type = np.float32) -> gs.Constant:
    return gs.Constant(name, np.asarray(values, dtype))


def run(graph: gs.Graph, *inputs: np.ndarray) -> list[np.ndarray]:
    """Check the graph, and run it without the optimisations that rewrite fp16 on a CPU."""
    model = gs.export_onnx(graph)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {t.name: x for t, x in zip(graph.inputs, inputs, strict=True)})


def graph(nodes: list[gs.Node], inputs: list[gs.Variable], outputs: list[gs.Variable]) -> gs.Graph:
    return gs.Graph(nodes=nodes, inputs=inputs, outputs=outputs, opset=18, ir_version=10)


def test_everything_becomes_half() -> None:
    x, y, h = variable("x", shape=[2]), variable("y", shape=[2]), variable("h", shape=[2])
    nodes = [
        gs.Node("Mul", "mul", {}, [x, constant("c", [2, 3])], [h]),
        gs.Node("Cast", "cast", {"to": FLOAT}, [h], [y]),
    ]
    g = graph(nodes, [x], [y])
    assert to_half(g) == ({}, {})
    assert {t.dtype for t in g.tensors().values()} == {np.dtype(np.float16)}
    (found,) = run(g, np.array([1, 2], np.float16))
    np.testing.assert_array_equal(found, np.array([2, 6], np.float16))


def test_idle_casts_go() -> None:
    x, a, y = variable("x", shape=[2]), variable("a", shape=[2]), variable("y", shape=[2])
    nodes = [gs.Node("Cast", "cast", {"to": FLOAT}, [x], [a]), gs.Node("Relu", "relu", {}, [a], [y])]
    g = graph(nodes, [x], [y])
    to_half(g)
    assert [n.op for n in g.nodes] == ["Relu"]


def test_arithmetic_on_sizes_stays_exact() -> None:
    """A width of 3001 is no fp16 number; x is divided by it and repeated as often."""
    x, y = variable("x", shape=[1, "w"]), variable("y", shape=["r"])
    size, width, count, divided = (
        variable("size", np.int64, [2]),
        variable("width", np.int64, []),
        variable("count"),
        variable("divided", shape=[1, "w"]),
    )
    less, back, total, shape = (
        variable("less"),
        variable("back", np.int64, []),
        variable("total"),
        variable("shape", np.int64, [1]),
    )
    nodes = [
        gs.Node("Shape", "shape", {}, [x], [size]),
        gs.Node("Gather", "gather", {}, [size, constant("one", 1, np.int64)], [width]),
        gs.Node("Cast", "to_float", {"to": FLOAT}, [width], [count]),
        gs.Node("Div", "divide", {}, [x, count], [divided]),
        gs.Node("Sub", "subtract", {}, [count, constant("two", 2)], [less]),
        gs.Node("Cast", "to_int", {"to": onnx.TensorProto.INT64}, [less], [back]),
        gs.Node("ReduceSum", "sum", {"keepdims": 0}, [divided], [total]),
        gs.Node("Unsqueeze", "unsqueeze", {}, [back, constant("axis", [0], np.int64)], [shape]),
        gs.Node("Expand", "expand", {}, [total, shape], [y]),
    ]
    g = graph(nodes, [x], [y])
    float32, _ = to_half(g)
    assert set(float32) == {"to_float", "subtract", "to_int"}
    assert all("arithmetic on shapes" in reason for reason in float32.values())
    (found,) = run(g, np.ones((1, 3001), np.float16))
    assert found.shape == (2999,)
    np.testing.assert_allclose(found.astype(np.float32), 1.0, rtol=2e-2)


def test_a_weight_expanded_to_the_batch_is_no_arithmetic_on_sizes() -> None:
    x, y = variable("x", shape=["n", 2]), variable("y", shape=["n", 4])
    size, token = variable("size", np.int64, [2]), variable("token", shape=["n", 2])
    nodes = [
        gs.Node("Shape", "shape", {}, [x], [size]),
        gs.Node("Expand", "expand", {}, [constant("weight", [[7, 8]]), size], [token]),
        gs.Node("Concat", "concat", {"axis": 1}, [token, x], [y]),
    ]
    g = graph(nodes, [x], [y])
    assert to_half(g) == ({}, {})
    assert [n.op for n in g.nodes].count("Cast") == 0
    (found,) = run(g, np.ones((3, 2), np.float16))
    np.testing.assert_array_equal(found, [[7, 8, 1, 1]] * 3)


def test_operands_that_onnx_wants_in_fp32() -> None:
    """The scales of Resize are fp32; the same constant also multiplies the data."""
    x, big, y = (
        variable("x", shape=[1, 1, 2, 2]),
        variable("big", shape=[1, 1, 4, 4]),
        variable("y", shape=[1, 1, 4, 4]),
    )
    scales = constant("scales", [1, 1, 2, 2])
    shaped = constant("shaped", np.ones((1, 1, 4, 4)))
    nodes = [
        gs.Node("Resize", "resize", {"mode": "nearest"}, [x, gs.Variable.empty(), scales], [big]),
        gs.Node("Mul", "mul", {}, [big, shaped], [y]),
    ]
    g = graph(nodes, [x], [y])
    to_half(g)
    assert g.nodes[0].inputs[2].dtype == np.float32
    assert g.nodes[1].inputs[1].dtype == np.float16
    (found,) = run(g, np.arange(4, dtype=np.float16).reshape(1, 1, 2, 2))
    np.testing.assert_array_equal(found[0, 0, ::2, ::2], [[0, 1], [2, 3]])


def test_operators_without_fp16_get_casts_around_them() -> None:
    boxes, scores = variable("boxes", shape=[1, 3, 4]), variable("scores", shape=[1, 1, 3])
    doubled, found = variable("doubled", shape=[1, 3, 4]), variable("found", np.int64, ["k", 3])
    limits = [constant("most", [3], np.int64), constant("overlap", [0.5]), constant("least", [0.1])]
    nodes = [
        gs.Node("Mul", "mul", {}, [boxes, constant("c", 2)], [doubled]),
        gs.Node("NonMaxSuppression", "nms", {}, [doubled, scores, *limits], [found]),
    ]
    g = graph(nodes, [boxes, scores], [found])
    float32, _ = to_half(g)
    assert list(float32) == ["nms"]
    assert [n.op for n in g.nodes].count("Cast") == 2
    box = np.array([[[0, 0, 1, 1], [0, 0, 1, 1.01], [2, 2, 3, 3]]], np.float16)
    (kept,) = run(g, box, np.array([[[0.9, 0.8, 0.7]]], np.float16))
    np.testing.assert_array_equal(kept[:, 2], [0, 2])


def test_one_constant_in_both_types() -> None:
    x, half, count, y = (
        variable("x", shape=["n"]),
        variable("half", shape=["n"]),
        variable("count"),
        variable("y", shape=["n"]),
    )
    size, scaled, back = variable("size", np.int64, []), variable("scaled"), variable("back", np.int64, [])
    shared = constant("shared", 3)
    nodes = [
        gs.Node("Mul", "mul", {}, [x, shared], [half]),
        gs.Node("Size", "size", {}, [x], [size]),
        gs.Node("Cast", "to_float", {"to": FLOAT}, [size], [count]),
        gs.Node("Mul", "scale", {}, [count, shared], [scaled]),
        gs.Node("Cast", "to_int", {"to": onnx.TensorProto.INT64}, [scaled], [back]),
        gs.Node("Relu", "relu", {}, [half], [y]),
    ]
    g = graph(nodes, [x], [y, back])
    to_half(g)
    found, threefold = run(g, np.array([1, -1], np.float16))
    np.testing.assert_array_equal(found, [3, 0])
    assert threefold == 6


@pytest.mark.parametrize(
    ("value", "kept"),
    [(1e-12, 6e-8), (-1e-9, -6e-8), (1e9, 65504), (-3e38, -65504), (-np.inf, -np.inf), (0, 0), (1e-6, 1e-6)],
)
def test_constants_beyond_fp16(value: float, kept: float) -> None:
    x, y = variable("x", shape=[1]), variable("y", shape=[1])
    g = graph([gs.Node("Add", "add", {}, [x, constant("c", [value])], [y])], [x], [y])
    _, clamped = to_half(g)
    (constant_,) = [t for t in g.tensors().values() if isinstance(t, gs.Constant)]
    np.testing.assert_allclose(constant_.values.astype(np.float64), [kept], rtol=0.05)
    assert ("c" in clamped) == ((abs(value) < 6e-8 and value != 0) or 65504 < abs(value) < np.inf)


def test_small_values_of_a_larger_weight_may_vanish() -> None:
    x, y = variable("x", shape=[2]), variable("y", shape=[2])
    g = graph([gs.Node("Add", "add", {}, [x, constant("c", [1e-12, 1])], [y])], [x], [y])
    assert to_half(g) == ({}, {})
    np.testing.assert_array_equal(run(g, np.zeros(2, np.float16))[0], [0, 1])


def test_control_flow_is_refused() -> None:
    x, y = variable("x", np.bool_, []), variable("y", shape=[1])
    inner = graph([gs.Node("Identity", "i", {}, [constant("c", [1])], [variable("z", shape=[1])])], [], [])
    g = graph([gs.Node("If", "branch", {"then_branch": inner, "else_branch": inner}, [x], [y])], [x], [y])
    with pytest.raises(Refused, match=r"branch \(If\): no fp16"):
        to_half(g)
