"""Scores from gradients against real gates: multiplications in the network that autograd differentiates."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import graphcomb as g
from graphcomb.graph.comb import axes as ax
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.comb.surgery import remove
from graphcomb.graph.nodes import arguments, op_name, spelled_out
from graphcomb.passes.channels.importance.gates import Gates

from ...graph.toys import CASES

TOLERANCE = 1e-9


class Gated(fx.Interpreter):
    """Runs a graph with a real gate for every index: of every product that is added up over an axis one operand is
    multiplied by the axis's gates, and moments are weighted by them. Written a second time, without `passes.gates`."""

    def __init__(self, comb: Comb, gates: dict[ax.Factor, torch.Tensor]):
        super().__init__(comb.module)
        self.comb, self.gates = comb, gates

    def gate(self, axis: ax.Axis, without: ax.Axis = ()) -> torch.Tensor:
        passed = ax.atoms([list(without)])
        result = torch.ones(1, dtype=torch.float64)
        for factor in ax.normal(axis):
            if factor.segments is not None:
                own = torch.cat([self.gate(part, without) for part in factor.segments])
            else:
                gated = factor in self.gates and factor not in passed
                own = self.gates[factor] if gated else torch.ones(factor.size, dtype=torch.float64)
            result = torch.outer(result, own).reshape(-1)
        return result

    def times(self, value, node, d, without=()):
        gate = self.gate(self.comb.axes[node][d], without)
        return value * gate.reshape([-1 if k == d % value.dim() else 1 for k in range(value.dim())])

    def ones(self, value, node, dims):
        result = torch.ones_like(value)
        for d in dims:
            result = self.times(result, node, d)
        return result

    def run_node(self, n: fx.Node):
        if n.op != "call_function" or not hasattr(n.target, "_schema"):
            return super().run_node(n)
        nodes, name = arguments(n), op_name(n)
        a = dict(fx.node.map_arg(nodes, lambda x: self.env[x]))
        key = "self" if "self" in a else "input"
        if name.startswith("conv_transpose"):
            a["input"] = self.times(a["input"], nodes["input"], 1, self.comb.axes[n][1] if a["groups"] > 1 else ())
        elif name.startswith("conv") or name == "torchvision::deform_conv2d":
            a["weight"] = self.times(a["weight"], nodes["weight"], 1)
        elif "params" in a or "w_hh" in a:  # recurrences
            keys = [key for key in ("w_ih", "w_hh") if key in a]
            a |= {key: self.times(a[key], nodes[key], 1) for key in keys}
            pairs = zip(a.get("params", ()), nodes.get("params", ()), strict=True)
            a["params"] = [self.times(w, n, 1) if w.dim() == 2 else w for w, n in pairs]
        elif name == "linear":
            a["input"] = self.times(a["input"], nodes["input"], -1)
        elif name in ("matmul", "bmm", "mm"):
            a["self"] = self.times(a["self"], nodes["self"], -1)
        elif name in ("addmm", "baddbmm"):
            left = "mat1" if name == "addmm" else "batch1"
            a[left] = self.times(a[left], nodes[left], -1)
        elif name == "einsum":
            terms, result = spelled_out(a["equation"], [t.dim() for t in a["tensors"]])
            tensors, seen = list(a["tensors"]), set(result)
            for i, term in enumerate(terms):
                for d, letter in enumerate(term):
                    if letter not in seen and tensors[i].shape[d] > 1:
                        seen.add(letter)
                        tensors[i] = self.times(tensors[i], nodes["tensors"][i], d)
            a["tensors"] = tensors
        elif name == "scaled_dot_product_attention":
            q, k, v = a["query"], self.times(a["key"], nodes["key"], -1), a["value"]
            if a["enable_gqa"]:
                k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
            logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if a["scale"] is None else a["scale"])
            if a["is_causal"]:
                logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -np.inf)
            mask = a["attn_mask"]
            if mask is not None:
                logits = logits + (
                    torch.zeros(mask.shape).masked_fill(~mask, -np.inf) if mask.dtype == torch.bool else mask
                )
            weights = logits.softmax(-1) * self.gate(self.comb.axes[nodes["key"]][-2])
            return weights / weights.sum(-1, keepdim=True) @ v
        elif name in ("layer_norm", "rms_norm"):
            x, k = a["input"], len(a["normalized_shape"])
            dims = list(range(x.dim() - k, x.dim()))
            w = self.ones(x, nodes["input"], dims)
            share = w / w.sum(dims, keepdim=True)
            if name == "layer_norm":
                x = x - (share * x).sum(dims, keepdim=True)
            eps = torch.finfo(x.dtype).eps if a["eps"] is None else a["eps"]
            y = x / ((share * x**2).sum(dims, keepdim=True) + eps).sqrt()
            y = y if a["weight"] is None else y * a["weight"]
            return y if a.get("bias") is None else y + a["bias"]
        elif name in ("group_norm", "instance_norm") or (name == "batch_norm" and a["running_mean"] is None):
            x, groups = a["input"], a.get("num_groups", a["input"].shape[1])
            dims = [2] if name != "batch_norm" else [0, 2]
            w = self.ones(x, nodes["input"], list(range(1 if name == "group_norm" else 2, x.dim())))
            rows, w = (t.reshape(len(x), groups, -1) for t in (x, w))
            share = w / w.sum(dims, keepdim=True).clamp_min(1e-9)
            rows = rows - (share * rows).sum(dims, keepdim=True)
            y = (rows / ((share * rows**2).sum(dims, keepdim=True) + a["eps"]).sqrt()).reshape(x.shape)
            form = [1, -1] + [1] * (x.dim() - 2)
            y = y if a["weight"] is None else y * a["weight"].reshape(form)
            return y if a["bias"] is None else y + a["bias"].reshape(form)
        elif name in ("mean", "sum", "var", "var_mean"):
            x = a["self"]
            dims = [d % x.dim() for d in a["dim"] or range(x.dim())]
            w = self.ones(x, nodes["self"], dims)
            total, count = (x * w).sum(dims, keepdim=True), w.sum(dims, keepdim=True)
            mean, correction = total / count, a.get("correction", a.get("unbiased", 1))
            spread = ((x - mean) ** 2 * w).sum(dims, keepdim=True) / (
                count - (1 if correction is None else int(correction))
            )
            found = {"mean": (mean,), "sum": (total,), "var": (spread,), "var_mean": (spread, mean)}[name]
            found = [f if a["keepdim"] else f.squeeze(dims) for f in found]
            return tuple(found) if name == "var_mean" else found[0]
        elif name == "softmax":
            x = a[key]
            e = (x - x.amax(a["dim"], keepdim=True).detach()).exp()
            return e / self.times(e, nodes[key], a["dim"]).sum(a["dim"], keepdim=True)
        elif name == "linalg_vector_norm":
            x = a["self"]
            return (self.ones(x, nodes["self"], a["dim"]) * x**2).sum(a["dim"], keepdim=a["keepdim"]).sqrt()
        elif name in ("max", "amax") and a.get("dim") is not None:
            a["self"] = a["self"] * self.ones(a["self"], nodes["self"], [a["dim"]] if name == "max" else a["dim"])
        args = [a[s.name] for s in n.target._schema.arguments if not s.kwarg_only]
        return n.target(*args, **{s.name: a[s.name] for s in n.target._schema.arguments if s.kwarg_only})

    def __call__(self, x):
        return self.run(x, enable_io_processing=False)


def loss_of(outputs, seed=7):
    """A fixed function of all outputs that is not linear in them."""
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for t in torch.utils._pytree.tree_leaves(outputs):
        total = total + (torch.randn(t.shape, generator=generator, dtype=t.dtype) * t + 0.1 * t**2).sum()
    return total


def randomised(model, seed=0):
    """The model in double precision with no weight, scale or bias at a special value."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for p in [*model.parameters(), *model.buffers()]:
            if p.is_floating_point() and p.numel():
                noise = torch.rand(p.shape, generator=generator, dtype=p.dtype)
                p.add_(0.3 * noise if (p >= 0).all() else 0.3 * (noise - 0.5))
    return model


def exact_scores(program, comb, groups, x):
    module = program.copy().module().eval().requires_grad_()
    found = Gates(comb, [group.atom for group in groups], None, module)
    with found.tapped():
        loss_of(module(x)).backward()
        return found.totals()


def compare(found, expected, tolerance=TOLERANCE):
    scale = max(float(e.abs().max()) for e in expected.values())
    for atom, own in expected.items():
        np.testing.assert_allclose(found[atom], own.numpy(), rtol=tolerance, atol=tolerance * scale)


def solved(name):
    """A micro-model with random weights, captured and combed, its groups that can shrink, and an input."""
    torch.manual_seed(0)
    case = CASES[name]
    x = torch.randn(case.shape, dtype=torch.float64)
    program = g.capture(randomised(case.model()), x)
    comb = Comb(program)
    return program, comb, [group for group in comb.groups if group.frozen is None and group.size > group.least], x


@pytest.mark.parametrize("name", [name for name in CASES if name != "ShuffleIntoItself"])  # where all is frozen
def test_the_derivative_is_that_of_real_gates(name):
    """And with one gate at 0, the gated network is the one that surgery leaves: the reference is what it claims to be."""
    program, comb, groups, x = solved(name)
    assert groups
    gates = {group.atom: torch.ones(group.size, dtype=torch.float64, requires_grad=True) for group in groups}
    out = Gated(comb, gates)(x)
    torch.testing.assert_close(out, list(torch.utils._pytree.tree_leaves(program.module()(x))), rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(loss_of(out), list(gates.values()), allow_unused=True)
    assert all(e is not None for e in expected)
    compare(exact_scores(program, comb, groups, x), dict(zip(gates, expected, strict=True)))
    for group in groups if name != "SpatialAttention" else ():  # a maximum over 0 is not one over what is left
        keep = np.arange(group.size) != group.size // 2
        small, _ = remove(comb, {group.atom: keep})
        closed = {group.atom: torch.from_numpy(keep.astype(np.float64))}
        with torch.no_grad():
            torch.testing.assert_close(
                Gated(comb, closed)(x), torch.utils._pytree.tree_leaves(small.module()(x)), rtol=1e-9, atol=1e-9
            )


# --------------------------------------------------------------------------------------------- gates written by hand
class Residual(nn.Module):
    """A trunk that several blocks read, in each an inner layer, a squeeze-and-excitation, and a normalised head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(2, 6, 3, 1, 1), nn.BatchNorm2d(6)
        self.up = nn.ModuleList(nn.Conv2d(6, 5, 1) for _ in range(3))
        self.deep = nn.ModuleList(nn.Conv2d(5, 5, 3, 1, 1, groups=5) for _ in range(3))
        self.down = nn.ModuleList(nn.Conv2d(5, 6, 1) for _ in range(3))
        self.squeeze, self.excite = nn.Linear(6, 4), nn.Linear(4, 6)
        self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x, trunk=1.0, inner=(1.0, 1.0, 1.0)):
        def on(gate):
            return gate if isinstance(gate, float) else gate.view(-1, 1, 1)

        x = F.relu(self.norm(self.stem(x)))
        for up, deep, down, gate in zip(self.up, self.deep, self.down, inner, strict=True):
            x = x + down(on(gate) * F.gelu(deep(up(on(trunk) * x))))
        x = x * self.excite(F.relu(self.squeeze(trunk * x.mean((2, 3))))).sigmoid()[..., None, None]
        x, gate = x.mean((2, 3)), trunk if isinstance(trunk, torch.Tensor) else torch.ones(6, dtype=x.dtype)
        mean = (gate * x).sum(1, keepdim=True) / gate.sum()
        spread = (gate * (x - mean) ** 2).sum(1, keepdim=True) / gate.sum()
        x = (x - mean) / (spread + self.last.eps).sqrt() * self.last.weight + self.last.bias
        return self.head(trunk * x)


class AsWritten(Residual):
    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        for up, deep, down in zip(self.up, self.deep, self.down, strict=True):
            x = x + down(F.gelu(deep(up(x))))
        x = x * self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()[..., None, None]
        return self.head(self.last(x.mean((2, 3))))


def test_gates_written_into_the_eager_model_agree():
    model = randomised(AsWritten())
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    by_hand = Residual().double().eval()
    by_hand.load_state_dict(model.state_dict())
    trunk = torch.ones(6, dtype=torch.float64, requires_grad=True)
    inner = [torch.ones(5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.testing.assert_close(by_hand(x), model(x))
    expected = torch.autograd.grad(loss_of(by_hand(x, trunk, inner)), [trunk, *inner])
    program = g.capture(model, x)
    names = ["stem.weight:0", *(f"up.{i}.weight:0" for i in range(3))]
    comb = Comb(program)
    chosen = [next(group for group in comb.groups if group.name == name) for name in names]
    found = exact_scores(program, comb, chosen, x)
    compare(found, {group.atom: e for group, e in zip(chosen, expected, strict=True)})


class Shared(nn.Module):
    """One weight looked up and read, one read twice, one read by a frozen layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(7, 6))
        self.twice, self.frozen, self.head = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, tokens, x):
        x = F.linear(x, self.table.t()) + self.table[tokens]
        x = x + torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(self.frozen(x).relu()), x @ self.table.t()


def test_tied_and_frozen_weights_are_read_where_they_are_read():
    model = randomised(Shared())
    inputs = torch.randint(7, (4,)), torch.randn(4, 7, dtype=torch.float64)
    program = g.capture(model, inputs)
    comb = Comb(program)
    groups = [group for group in comb.groups if group.frozen is None]
    assert any(group.size == 6 for group in groups)
    gates = {group.atom: torch.ones(group.size, dtype=torch.float64, requires_grad=True) for group in groups}
    out = Gated(comb, gates).run(*inputs, enable_io_processing=False)
    expected = dict(zip(gates, torch.autograd.grad(loss_of(out), list(gates.values())), strict=True))
    for freeze in (False, True):
        module = program.copy().module().eval()
        for p in (module.frozen.weight, module.frozen.bias, module.twice.weight) if freeze else ():
            p.requires_grad_(False)
        found = Gates(comb, gates, None, module)
        before = str(module.graph)
        with found.tapped():
            loss_of(module(*inputs)).backward()
            compare(found.totals(), expected)
        assert str(module.graph) == before


@pytest.mark.parametrize("name", ["FusedQkv", "RmsNorm", "GroupedConv", "GroupedTransposedConv", "SqueezeExcite"])
def test_a_network_that_has_lost_some_is_scored_in_the_originals_numbering(name):
    _, comb, groups, x = solved(name)
    masks = {group.atom: np.arange(group.size) != group.size // 2 for group in groups}
    small, _ = remove(comb, masks)
    module = small.module().eval().requires_grad_()
    found = Gates(comb, masks, masks, module)
    with found.tapped():
        loss_of(module(x)).backward()
        totals = found.totals()
    gates = {a: torch.from_numpy(m.astype(np.float64)).requires_grad_() for a, m in masks.items()}
    gradients = torch.autograd.grad(loss_of(Gated(comb, gates)(x)), list(gates.values()))
    kept = {a: e * torch.from_numpy(masks[a]) for a, e in zip(gates, gradients, strict=True)}
    compare(totals, kept)


class Cast(nn.Module):
    """Weights that the forward casts to another precision, as autocast inside it does; one of them is read twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x):
        x = F.conv2d(x, self.first.weight.double(), self.first.bias.double()).relu()
        for _ in range(2):
            x = F.conv2d(x, self.second.weight.double(), self.second.bias.double(), padding=1).relu()
        return F.linear(x.mean((2, 3)), self.head.weight.double())


def test_weights_that_are_cast_say_it_in_their_gradients():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    program = g.capture(Cast(), x)
    comb = Comb(program)
    groups = [group for group in comb.groups if group.frozen is None]
    found = Gates(comb, [group.atom for group in groups], None, program.module())
    assert not found.reads
    gates = {group.atom: torch.ones(group.size, dtype=torch.float64, requires_grad=True) for group in groups}
    expected = torch.autograd.grad(loss_of(Gated(comb, gates)(x)), list(gates.values()))
    compare(
        exact_scores(program, comb, groups, x), dict(zip(gates, expected, strict=True)), 1e-5
    )  # float32's gradients
