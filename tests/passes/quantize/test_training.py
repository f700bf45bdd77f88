"""Training after quantisation (QAT): gradients are those of the straight-through estimator, and files hold the grid."""

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import graphcomb as g
from graphcomb.graph.nodes import op_name
from graphcomb.passes import Distill, Quantize
from graphcomb.runtime import export_onnx

from ..toys import draws


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.depthwise(self.conv(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def quantised():
    torch.manual_seed(0)
    program = g.capture(Net(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")
    calibration = [0.5 * x for x, _ in draws(2, (8, 3, 8, 8), 5)]  # values of the data saturate, too
    return program, Quantize(include="*", samples=16)(program, data=calibration)


class Step(torch.autograd.Function):
    """s clamp(round(x / s)), with gradient 1 where x / s rounds to a step within the range, else 0. By hand."""

    @staticmethod
    def forward(ctx, x, s):
        steps = (x / s).round()
        ctx.save_for_backward((steps >= -128) & (steps <= 127))
        return steps.clamp(-128, 127) * s

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside, None


def reference(state, scales, x):
    """The quantised network, written by hand."""
    f = torch.nn.functional

    def weight(name):
        w = state[f"{name}.weight"]
        return Step.apply(w, state[f"{name}.weight_scale"].to(w).view(-1, *[1] * (w.dim() - 1)))

    x = f.conv2d(Step.apply(x, scales["conv"]), weight("conv"), state["conv.bias"], padding=1).relu()
    x = f.conv2d(Step.apply(x, scales["depthwise"]), weight("depthwise"), state["depthwise.bias"], groups=8).relu()
    return f.linear(Step.apply(x.mean((2, 3)), scales["head"]), weight("head"), state["head.bias"])


def with_exact_scales(program):
    """The module in float64, and its scales by layer, rounded to powers of two: the operator multiplies in float32."""
    module = program.copy().module().double()
    for name, buffer in module.named_buffers():
        if name.endswith("_scale"):
            buffer.data = 2 ** buffer.float().log2().round()
    scales = []
    for node in module.graph.nodes:
        if op_name(node) == "fake_quantize_per_tensor_affine":
            scales.append(2.0 ** round(math.log2(node.args[1])))
            node.update_arg(1, scales[-1])
    module.recompile()
    return module, dict(zip(("conv", "depthwise", "head"), scales, strict=True))


def test_gradients_are_those_of_a_straight_through_estimator_written_by_hand(quantised):
    module, scales = with_exact_scales(quantised[1].program)
    with torch.no_grad():
        module.get_parameter("conv.weight")[0, 0] *= 1.3  # past the largest step, as training may leave a weight
    state = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in module.state_dict().items()}
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    out = reference(state, scales, inputs[0])
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (out * weights).sum().backward()
    found = module(inputs[1])
    (found * weights).sum().backward()
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=1e-12)
    assert (inputs[0].grad == 0).any(), "some inputs saturate"
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-12, atol=1e-12)
    assert (state["conv.weight"].grad == 0).any(), "some weights saturate"


def test_trained_weights_are_on_their_grid_in_the_file(quantised, tmp_path):
    program, result = quantised
    trained = Distill(epochs=2, lr=3e-3)(result.program, data=draws(4, (8, 3, 8, 8), 5), teacher=program).program
    module = trained.module()
    path = export_onnx(trained, tmp_path / "q.onnx").path
    graph = onnx.load(path).graph
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    quantisers = [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in values]
    for name in ("conv", "depthwise", "head"):
        weight, scale = module.get_parameter(f"{name}.weight").detach(), module.get_buffer(f"{name}.weight_scale")
        assert not torch.equal(weight, result.program.module().get_parameter(f"{name}.weight"))
        shape = (-1, *[1] * (weight.dim() - 1))
        wanted = (weight / scale.view(shape)).round().clamp(-128, 127).numpy()
        (node,) = (n for n in quantisers if values[n.input[0]].shape in (weight.shape, weight.shape[::-1]))
        stored, steps = values[node.input[0]], values[node.input[1]]
        axis = next(a.i for a in node.attribute if a.name == "axis") % stored.ndim
        steps = steps.reshape([-1 if d == axis else 1 for d in range(stored.ndim)])
        grid = np.clip(np.rint(stored / steps), -128, 127)
        np.testing.assert_array_equal(grid if grid.shape == wanted.shape else grid.T, wanted)
