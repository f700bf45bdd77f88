"""An ONNX node says which graph node, module and passes it comes from."""

import onnx
import torch

import graphcomb
from graphcomb.passes import RemoveChannels
from graphcomb.runtime.engines import origins
from graphcomb.runtime.export.to_onnx import export_onnx


def test_nodes_carry_module_and_passes(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.GroupNorm(2, 16), torch.nn.Conv2d(16, 4, 1))
    program = graphcomb.capture(net.eval(), (torch.randn(1, 3, 8, 8),))
    smaller = RemoveChannels(ratio=0.5, round_to=4)(program).program
    for source, passes in ((program, ()), (smaller, ("RemoveChannels",))):
        export_onnx(source, tmp_path / "net.onnx", "fp16")
        found = origins.read(onnx.load(tmp_path / "net.onnx"))
        assert found["0/conv2d"] == origins.Origin(node="conv2d", module="0", passes=passes)
        assert {o.module for o in found.values()} >= {"0", "1", "2"}
        nodes = {n.name for n in onnx.load(tmp_path / "net.onnx").graph.node}
        assert set(found) <= nodes
    assert str(found["0/conv2d"]) == "0/conv2d (changed by RemoveChannels)"


def test_a_pass_counts_where_it_changed_something(tmp_path):
    program = graphcomb.capture(torch.nn.Linear(2, 2).eval(), (torch.randn(1, 2),))
    same = {"before": [2, 2], "after": [2, 2]}
    program.history += [
        {"pass": "A", "changed": [{"into": "b.weight", "nodes": ["conv", "bn"]}], "layers": []},
        {"pass": "B", "changed": ["weights"], "layers": [{"name": "b.weight", "channels": same}]},
        {"pass": "C", "layers": [{"name": "b.weight", "channels": {"before": [2, 2], "after": [2, 1]}}]},
        {"pass": "A", "changed": [{"what": "b.weight"}]},
        *({"pass": f"D{i}", "changed": [{"what": f"{'e.weight' if i % 2 else 'conv'}"}]} for i in range(8)),
    ]
    found = origins.trace(program, {"b/x": ("b", "x"), "c/bn": ("c", "bn"), "d": ("", "d"), "e/conv": ("e", "conv")})
    assert [o.passes for o in found.values()][:3] == [("A", "C"), ("A",), ()]
    assert found["e/conv"].passes == ("A", *(f"D{i}" for i in range(8)))  # as they ran


def test_a_model_from_elsewhere_has_none():
    assert origins.read(onnx.ModelProto()) == {}
