"""The graph editor: what passes insert, replace and clean up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphcomb
from graphcomb.graph.edit import Editor, infer, origin, place_tensor, propagate, rebuild
from graphcomb.graph.nodes import arguments, op_name, shape, writes
from graphcomb.graph.program import Program

aten = torch.ops.aten


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    return graphcomb.capture(model.eval(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")


def named(program: Program, name: str):
    return next(n for n in program.graph.nodes if op_name(n) == name)


def test_inserted_operators_know_their_shapes_and_where_they_come_from(program):
    edit, relu = Editor(program.graph_module), named(program, "relu")
    with edit.after(relu):
        twice = edit.call(aten.mul.Scalar, (relu, 2.0), like=relu)
        flat = edit.call(aten.flatten.using_ints, (twice, 1), like=relu)
    assert shape(flat) == (2, 4 * 6 * 6)
    assert not isinstance(flat.meta["val"].shape[0], int)  # the batch stays dynamic
    assert origin(flat) == origin(relu)
    assert [op_name(n) for n in (relu.next, relu.next.next)] == ["mul", "flatten"]


def test_a_replaced_node_goes_with_all_that_only_it_needed(program):
    before = program.module()(*program.args)
    edit, conv = Editor(program.graph_module), named(program, "conv2d")
    a = arguments(conv)
    with edit.before(conv):
        weight = edit.store("merged.weight", torch.zeros(4, 3, 3, 3))
        new = edit.call(aten.conv2d.default, (a["input"], weight), like=conv)
    edit.replace(conv, new)
    edit.finish()
    names = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    assert names == {"merged.weight", "2.weight", "2.bias"}
    after = program.derive(rebuild(program.module()))
    assert set(after.module().state_dict()) == {"merged.weight", "2.weight", "2.bias"}
    assert not torch.equal(after.module()(*program.args), before)


def test_a_node_may_be_replaced_by_one_that_reads_it(program):
    expected = 3 * program.module()(*program.args)
    edit, output = Editor(program.graph_module), list(program.graph.nodes)[-2]
    with edit.after(output):
        edit.replace(output, edit.call(aten.mul.Scalar, (output, 3.0)))
    edit.finish()
    torch.testing.assert_close(program.module()(*program.args), expected)


def test_stored_tensors_get_free_names(program):
    edit = Editor(program.graph_module)
    assert edit.free_name("0.weight") == "0.weight_"
    assert edit.free_name("0.scale") == "0.scale"
    assert edit.free_name("new.scale") == "new.scale"


def test_cleaning_up_drops_what_no_output_needs_and_keeps_what_writes():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return x.relu()

    program = graphcomb.capture(Counts().eval(), torch.randn(2, 3))
    edit, relu = Editor(program.graph_module), named(program, "relu")
    with edit.after(relu):
        edit.call(aten.neg.default, (relu,))
        edit.store("unread", torch.ones(3))
    edit.finish()
    assert "neg" not in {op_name(n) for n in program.graph.nodes}
    assert "unread" not in {n.target for n in program.graph.nodes}
    assert any(writes(n) for n in program.graph.nodes)


def test_shapes_follow_tensors_of_another_size(program):
    place_tensor(program.module(), "2.weight", nn.Parameter(torch.zeros(7, 4, 3, 3)))
    place_tensor(program.module(), "2.bias", nn.Parameter(torch.zeros(7)))
    module = program.module()
    propagate(module)
    assert [shape(n) for n in module.graph.nodes if op_name(n) == "conv2d"] == [(2, 4, 6, 6), (2, 7, 4, 4)]


def test_a_stored_tensor_is_overwritten_with_its_shape(program):
    edit, conv = Editor(program.graph_module), named(program, "conv2d")
    stored = arguments(conv)["weight"]
    edit.overwrite(stored, nn.Parameter(torch.zeros(4, 3, 1, 1)))
    assert shape(stored) == (4, 3, 1, 1) == program.module().get_parameter(str(stored.target)).shape


def test_inferring_a_shape_leaves_the_batch_dynamic():
    """A composite operator that reads sizes would fix it on torch 2.11, in the program that the graph is a copy of, too."""
    program = graphcomb.capture(nn.Linear(6, 6), torch.randn(2, 3, 5, 6), dynamic_shapes="batch")
    copy = program.copy()
    (node,) = [n for n in copy.graph.nodes if n.op == "call_function"]
    with copy.graph.inserting_after(node):
        swapped = copy.graph.call_function(torch.ops.aten.transpose.int, (node, 2, 3))
        infer(swapped)
    with copy.graph.inserting_after(swapped):
        product = copy.graph.call_function(torch.ops.aten.matmul.default, (node, swapped))
    infer(product)
    assert product.meta["val"].shape[1:] == (3, 5, 5)
    for graph in (program.graph, copy.graph):
        (image,) = [n for n in graph.nodes if n.op == "placeholder"]
        assert not str(image.meta["val"].shape[0]).isdigit()
