"""Each step from opset 18 to 17: valid ONNX with the same outputs, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch

from graphcomb import capture
from graphcomb.graph.errors import BadInput, Refused
from graphcomb.runtime import export_onnx
from graphcomb.runtime.export.opset import AXES_TO_ATTRIBUTE, lower_to_17


def graph(
    op: str, inputs: list[Any], outputs: int = 1, shape: tuple[int, ...] = (2, 4, 6), **attributes: Any
) -> gs.Graph:
    x = gs.Variable("x", np.float32, list(shape))
    given = [gs.Variable.empty() if i is None else gs.Constant(f"c{k}", np.asarray(i)) for k, i in enumerate(inputs)]
    results = [gs.Variable(f"y{k}", np.float32) for k in range(outputs)]
    node = gs.Node(op, "node", attributes, [x, *given], results)
    found = gs.Graph([node], [x], results, opset=18, ir_version=8)
    found.import_domains = [onnx.helper.make_opsetid("", 18)]
    return found


def run(g: gs.Graph) -> list[np.ndarray]:
    model = onnx.shape_inference.infer_shapes(gs.export_onnx(g), strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == g.opset
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shape = [int(s) for s in g.inputs[0].shape]
    return session.run(None, {"x": np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32)})


@pytest.mark.parametrize(
    "case",
    [
        *((op, [np.array([1, -1])], {"keepdims": 0}) for op in sorted(AXES_TO_ATTRIBUTE)),
        ("ReduceMean", [], {}),
        ("ReduceMax", [None], {"keepdims": 1}),
        ("ReduceSum", [np.array([1])], {}),
        ("Split", [], {"num_outputs": 2, "axis": 2}),
        ("Split", [np.array([1, 3])], {"axis": 1}),
        ("Pad", [np.array([0, 0, 1, 0, 0, 2]), np.float32(1)], {}),
        ("Relu", [], {}),
    ],
    ids=lambda c: c[0],
)
def test_same_outputs(case: tuple[str, list[Any], dict[str, Any]]) -> None:
    op, inputs, attributes = case
    before, after = (graph(op, inputs, 2 if op == "Split" else 1, **attributes) for _ in range(2))
    lower_to_17(after)
    assert after.opset == 17
    for a, b in zip(run(before), run(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_resize() -> None:
    scales = np.array([1, 1, 2, 2], np.float32)
    before, after = (graph("Resize", [None, scales], 1, (1, 2, 3, 3), mode="linear", antialias=0) for _ in range(2))
    lower_to_17(after)
    np.testing.assert_array_equal(run(before)[0], run(after)[0])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("Resize", [None, np.ones(4, np.float32)], {"antialias": 1}), "no Resize with antialias"),
        (("Pad", [np.array([0, 1]), np.float32(0), np.array([1])], {}), "no Pad with axes"),
        (("Split", [], {"num_outputs": 4, "axis": 2}), "equal pieces"),
        (("ReduceMax", [], {"noop_with_empty_axes": 1}), "over no axes"),
        (("Mish", [], {}), "node: opset 17 has no Mish"),
        (("Gelu", [], {}), "node: opset 17 has no Gelu"),
        (("ScatterND", [np.array([[0]]), np.ones((1, 4, 6), np.float32)], {"reduction": "max"}), "reduction max"),
    ],
    ids=lambda c: c[0] if isinstance(c, tuple) else "",
)
def test_what_opset_17_has_not(case: tuple[str, list[Any], dict[str, Any]], message: str) -> None:
    op, inputs, attributes = case
    with pytest.raises(Refused, match=message):
        lower_to_17(graph(op, inputs, **attributes))


class Deformable(torch.nn.Module):
    """A deformable convolution, which ONNX has from opset 19 on."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.weight = torch.nn.Conv2d(3, 18, 3), torch.nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pytest.importorskip("torchvision.ops").deform_conv2d(x, self.offset(x), self.weight)


@pytest.mark.parametrize("target", [None, "rtx-sm86"])
def test_an_operator_of_a_later_opset_brings_it(target: str | None, tmp_path: Path) -> None:
    report = export_onnx(capture(Deformable().eval(), torch.randn(1, 3, 6, 6)), tmp_path / "net.onnx", target=target)
    assert (report.opset, report.nodes["DeformConv"]) == (19, 1)
    assert report.parity < 1e-5


def test_an_operator_of_a_later_opset_than_the_target_parses_is_refused(tmp_path: Path) -> None:
    program = capture(Deformable().eval(), torch.randn(1, 3, 6, 6))
    with pytest.raises(Refused, match=r"deform_conv2d.*: it came with opset 19; the target parses up to 17"):
        export_onnx(program, tmp_path / "net.onnx", target="drive-orin")
    with pytest.raises(Refused, match=r"deform_conv2d.*: it came with opset 19; export it with opset=19"):
        export_onnx(program, tmp_path / "net.onnx", opset=18)
    with pytest.raises(BadInput, match="opset 19: target drive-orin parses up to 17"):
        export_onnx(program, tmp_path / "net.onnx", opset=19, target="drive-orin")
