"""From eager model to functional graph: the same outputs, bit for bit, whatever the model writes in place."""

from __future__ import annotations

import copy
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import graphcomb as g
from graphcomb.graph.errors import BadInput, CaptureError
from graphcomb.graph.nodes import op_name


class Net(nn.Module):
    """A function of two linear layers and an input (B, 4, 6)."""

    def __init__(self, function):
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def same(model, *args, dynamic=None, **kwargs):
    """Capture; the program gives exactly what the model gives, on the example and on other numbers.

    The proof inside `capture` has tests of its own; here it is off, as some of these models have gradients of their own.
    """
    program = g.capture(model, tuple(copy.deepcopy(args)), copy.deepcopy(kwargs), dynamic_shapes=dynamic, prove=False)
    for shift in (0.0, 0.7):
        moved = [a + shift if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        with torch.no_grad():
            expected = copy.deepcopy(model).eval()(*copy.deepcopy(moved), **copy.deepcopy(kwargs))
            found = program.module()(*copy.deepcopy(moved), **copy.deepcopy(kwargs))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    return program


def names(program):
    return [op_name(n) for n in program.graph.nodes if n.op == "call_function"]


def functional(program):
    return not any(n.target._schema.is_mutable for n in program.graph.nodes if hasattr(n.target, "_schema"))


# ------------------------------------------------------------------------------------------------- writing in place
def relu_of_a_slice(y):
    y[:, 1:3].relu_()
    return y


def add_to_a_view(y):
    z = y.view(y.shape[0], 4, 2, 4)
    z.add_(1.5)
    return y


def read_another_view_later(y):
    z = y.transpose(1, 2)
    w = y.reshape(y.shape[0], -1)
    z.mul_(2)
    return y + w.view(y.shape) + z.transpose(1, 2)


def a_copy_is_not_a_view(y):
    """Reshaping a transposed tensor copies when rows are merged: it keeps the old values."""
    old = y.transpose(1, 2).reshape(y.shape[0], -1)
    y.mul_(3)
    return y + old.view(y.shape[0], 8, 4).transpose(1, 2)


def a_view_of_strided_memory(y):
    """Reshaping a transposed tensor does not copy when it only splits: writing to it reaches the base."""
    y.transpose(1, 2).reshape(y.shape[0], 2, 4, 4)[:, 0].relu_()
    return y


def assign_to_a_slice(y):
    y = y.clone()
    y[:, 0] = 0.5
    y[..., 2:4] = y[..., 4:6] * 2
    return y


def copy_into_a_row(y):
    z = torch.zeros_like(y)
    z[:, 1].copy_(y[:, 2])
    z[:, 3:].copy_(y[:, :1])
    return z


def fill_and_zero(y):
    y[:, 0].fill_(0.25)
    y[:, :, 1].zero_()
    return y


def chains_of_views(y):
    y.unsqueeze(1).permute(0, 2, 3, 1).squeeze(-1)[:, ::2].narrow(2, 1, 3).sigmoid_()
    return y


def views_of_views_read_after(y):
    rows = y[:, 1:]
    row = rows[:, 0]
    flat = y.flatten(1)
    row.exp_()
    return y + rows.mean(1, keepdim=True) + flat.view(y.shape) + row.unsqueeze(1)


def pieces(y):
    left, right = y.chunk(2, -1)
    left.relu_()
    right.add_(left)
    return y


def pieces_taken_before_and_after(y):
    parts = y.split([3, 5], -1)
    first = parts[0]
    y.mul_(2)
    first.add_(1)
    return torch.cat([parts[1] * 2, first], -1) + y


def unbound_rows(y):
    for row in y.unbind(1)[1:3]:
        row.tanh_()
    return y


def moved_dimensions(y):
    y.movedim(2, 0)[1:3].neg_()
    y.swapaxes(0, 2).mT[2].abs_()
    return y


def values_of_a_maximum_are_their_own_memory(y):
    top, _ = y.max(1, keepdim=True)
    top.mul_(10)
    return y + top


def dropout_is_the_identity(y):
    F.dropout(y, 0.5, False).add_(1)
    return y


def a_cast_that_does_nothing(y):
    y.to(torch.float32).contiguous().add_(1)
    y.to(torch.float32, copy=True).add_(100)
    return y


def twice(y):
    y += 1
    z = y[:, 0]
    z *= 2
    y -= 3
    return y * z.unsqueeze(1)


def masked(y):
    y.masked_fill_(y < 0, 0.1)
    y.clamp_(max=0.8)
    return y


def divided_without_a_rest(y):
    y *= 10
    y //= 3  # its in-place overload has another name
    return y


def a_copy_is_written_to(y):
    """The copy has memory of its own: what is written to it does not reach the source."""
    z = torch.zeros_like(y)
    z.copy_(y)
    z.add_(1)
    return z * 2 + y


def written_through_detach(y):
    z = y.detach()
    z.add_(1)
    z.mul_(2)
    return z + y


WRITES = [
    relu_of_a_slice, add_to_a_view, read_another_view_later, a_copy_is_not_a_view, a_view_of_strided_memory,
    assign_to_a_slice, copy_into_a_row, fill_and_zero, chains_of_views, views_of_views_read_after, pieces,
    pieces_taken_before_and_after, unbound_rows, moved_dimensions, values_of_a_maximum_are_their_own_memory,
    divided_without_a_rest, a_copy_is_written_to, written_through_detach,
    dropout_is_the_identity, a_cast_that_does_nothing, twice, masked,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_in_place_operators_become_functional(write):
    program = same(Net(write), torch.randn(3, 4, 6))
    assert functional(program)


@pytest.mark.parametrize("write", [pieces, views_of_views_read_after, moved_dimensions], ids=lambda f: f.__name__)
def test_in_place_operators_with_a_dynamic_batch(write):
    program = same(Net(write), torch.randn(3, 4, 6), dynamic="batch")
    assert program.module()(torch.randn(5, 4, 6)).shape == (5, 4, 3)


VIEWS = [
    lambda t: t.transpose(1, 2), lambda t: t[:, 1:], lambda t: t[:, ::2], lambda t: t.detach(),
    lambda t: t.contiguous(), lambda t: t.reshape(t.shape[0], -1, t.shape[1]), lambda t: t.chunk(2, 1)[0],
    lambda t: t.unbind(1)[0].unsqueeze(1), lambda t: t.to(torch.float32), lambda t: t.permute(0, 2, 1),
    lambda t: t.unsqueeze(1).squeeze(1), lambda t: t.movedim(1, 2),
    lambda t: t.flatten(1).unflatten(1, (t.shape[1], t.shape[2])), lambda t: t * 0.5 + 1,
]  # fmt: skip
IN_PLACE = [
    lambda t, u: t.add_(0.5), lambda t, u: t.mul_(1.25), lambda t, u: t.relu_(), lambda t, u: t.zero_(),
    lambda t, u: t.add_(0.3 * u), lambda t, u: t.copy_(u),
]  # fmt: skip


class RandomWrites(nn.Module):
    """Takes random views of two tensors and of their views, writes to some, and reads all of them at the end."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def forward(self, x):
        draw = random.Random(self.seed)
        tensors = [(x * 1.5, 0), (x + 0.25, 1)]  # with which of the two they share memory
        for _ in range(draw.randint(2, 9)):
            t, memory = draw.choice(tensors)
            if draw.random() < 0.5:
                tensors.append((draw.choice(VIEWS)(t), memory))
            else:
                others = [u for u, its in tensors if u.shape == t.shape and its != memory]
                draw.choice(IN_PLACE)(t, draw.choice(others or [t + 1]))
        return sum((i + 1) * t.flatten(1).sin().sum(1) for i, (t, _) in enumerate(tensors))


@pytest.mark.parametrize("seed", range(40))
def test_random_writes_through_random_views(seed):
    assert functional(same(RandomWrites(seed), torch.randn(3, 2, 4)))


def test_modules_with_inplace_flags():
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.Hardswish(inplace=True))
    assert functional(same(body, torch.randn(2, 3, 6, 6)))


def test_buffers_the_model_updates_stay_and_are_frozen():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("seen", torch.zeros(8))

        def forward(self, x):
            y = self.a(x)
            self.seen.add_(y.detach().mean((0, 1)))
            return self.b(y) + self.seen.sum()

    model, x = Counts(), torch.randn(2, 4, 6)
    program = g.capture(model, x)
    assert torch.equal(model.seen, torch.zeros(8))  # capturing does not run the update on the model's own buffer
    for _ in range(2):
        torch.testing.assert_close(program.module()(x), model(x))
    torch.testing.assert_close(program.module().seen, model.seen)


# ---------------------------------------------------------------------------------------------------------- constants
def test_input_independent_subgraphs_fold():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8)

        def forward(self, x):
            n = x.shape[1]
            angle = torch.arange(n).float()[:, None] / 10 ** torch.linspace(0, 1, 4)
            table = torch.cat([angle.sin(), angle.cos()], 1)
            return self.a(x) + table.unsqueeze(0) + torch.ones_like(x[:, :, :1]) + x.new_zeros(n, 8)

    program = same(Positions(), torch.randn(2, 4, 6))
    assert not {"arange", "linspace", "sin", "cos", "cat", "new_zeros"} & set(names(program))
    folded = {n for n, _ in program.module().named_buffers()}
    assert folded
    assert all(n.startswith("_folded_") for n in folded)


def test_random_constants_are_drawn_in_every_call():
    class Noise(nn.Module):
        def forward(self, x):
            return (
                x + torch.empty(3).uniform_() + torch.empty(3).exponential_() + torch.randn(3) + torch.rand_like(x[:1])
            )

    module, x = g.capture(Noise(), torch.zeros(2, 3)).module(), torch.zeros(2, 3)
    assert not torch.equal(module(x), module(x))
    assert not any(buffer.any() for buffer in module.buffers())  # memory that nobody has written yet is zeros


def test_an_expanded_constant_is_stored_once():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.randn(1, 1, 16, 16))
            self.a = nn.Linear(16, 16)

        def forward(self, x):
            return self.a(x) + self.mask.expand(8, 12, 16, 16)

    program = same(Masked(), torch.randn(8, 12, 16, 16))
    assert sum(b.numel() for b in program.module().buffers()) == 16 * 16


def test_constants_lie_where_the_model_lies():
    class Shift(nn.Module):
        def forward(self, x):
            return x + torch.ones_like(x[:, :1]) + x.new_zeros(6) + torch.arange(x.shape[0], device=x.device)[:, None]

    module = g.capture(Shift(), torch.randn(2, 6, device="meta")).module()
    assert module(torch.randn(2, 6, device="meta")).device.type == "meta"
    module = g.capture(Shift(), torch.randn(3, 6), dynamic_shapes="batch").module().to("meta")
    assert module(torch.randn(2, 6, device="meta")).device.type == "meta"
    assert "device(type='cpu')" not in module.code


def test_constants_that_depend_on_a_dynamic_size_do_not_fold():
    class Steps(nn.Module):
        def forward(self, x):
            return x * torch.arange(x.shape[0]).view(-1, 1, 1)

    program = same(Steps(), torch.randn(3, 4, 6), dynamic="batch")
    assert "arange" in names(program)
    x = torch.randn(5, 4, 6)
    torch.testing.assert_close(program.module()(x), Steps()(x))


def test_parameters_never_fold():
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return x + self.table.softmax(0).unsqueeze(0)

    program = same(Tables(), torch.randn(2, 4, 6))
    assert "softmax" in names(program)
    assert [n for n, _ in program.module().named_parameters()] == ["table"]


# ------------------------------------------------------------------------------------------------- regions and modes
def test_regions_are_inlined():
    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8)

        def forward(self, x):
            with torch.no_grad():
                mean = x.mean(-1, keepdim=True)
            with torch.autocast("cpu", enabled=False):
                y = self.a(x.float())
            return y - mean

    program = same(Regions(), torch.randn(2, 4, 6))
    assert all(n.op != "call_module" for n in program.graph.nodes)
    assert not any(name.startswith("wrap_with") for name in names(program))


def test_an_enabled_autocast_region_becomes_casts():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = torch.einsum("bi,oi->bo", x, self.a.weight).softmax(-1)
                with torch.autocast("cpu", enabled=False):
                    z = self.a.weight @ self.a.weight.t()
                return self.b(y), z

    model, x = Half(), torch.randn(4, 6)
    program = g.capture(model, x)
    for found, expected in zip(program.module()(x), model(x), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert not any(name.startswith("wrap_with") for name in names(program))


def test_modes_are_restored_and_weights_are_copied():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, 3))
    model.train()
    model[1].eval()
    program = g.capture(model, torch.randn(2, 3, 6, 6))
    assert [m.training for m in model] == [True, False, True, True, True]
    assert not program.module().training
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        program.module().get_parameter("0.weight").zero_()
    assert torch.equal(model[0].weight, before)


def test_train_and_eval_of_the_captured_module():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), torch.randn(16, 6)
    module = g.capture(model, x).module()
    torch.manual_seed(0)
    found = module.train()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, model.train()(x))
    torch.testing.assert_close(module.get_buffer("1.running_mean"), model[1].running_mean)
    torch.testing.assert_close(module.eval()(x), model.eval()(x))


def test_tied_weights_stay_tied():
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    program = same(nn.Sequential(a, nn.ReLU(), b), torch.randn(2, 6))
    module = program.module()
    assert module.get_parameter("0.weight") is module.get_parameter("2.weight")
    assert program.params == 36 + 6 + 6
    copied = program.copy().module()
    assert copied.get_parameter("0.weight") is copied.get_parameter("2.weight")
    assert copied.get_parameter("0.weight") is not module.get_parameter("0.weight")


# --------------------------------------------------------------------------------------------- inputs, outputs, shapes
class Forms(nn.Module):
    """Keyword inputs, a plain number, nested inputs, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)

    def forward(self, x, pair, scale=2, *, mask=None):
        y = self.a(x) * scale + self.a(pair["left"]) - pair["rest"][0]
        if mask is not None:
            y = y * mask
        return {"y": y, "all": (y.mean(-1), [y.amax(-1)])}


def test_keyword_nested_and_plain_inputs_and_dict_outputs():
    pair = {"left": torch.randn(3, 6), "rest": [torch.randn(3, 8)]}
    same(Forms(), torch.randn(3, 6), pair, mask=torch.randn(3, 8))
    program = same(Forms(), torch.randn(3, 6), pair, 3, mask=torch.randn(3, 8), dynamic="batch")
    other = {"left": torch.randn(5, 6), "rest": [torch.randn(5, 8)]}
    assert program.module()(torch.randn(5, 6), other, 3, mask=torch.randn(5, 8))["y"].shape == (5, 8)


def test_a_single_tensor_is_a_tuple_of_one():
    assert g.capture(nn.Linear(6, 3), torch.randn(2, 6)).args[0].shape == (2, 6)


def test_dynamic_batch_doubles_a_single_example():
    program = g.capture(nn.Linear(6, 3), torch.randn(1, 6), dynamic_shapes="batch")
    assert program.args[0].shape == (2, 6)
    assert program.module()(torch.randn(7, 6)).shape == (7, 3)


def test_dynamic_batch_of_a_model_with_any_number_of_inputs():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, *xs, **more):
            return self.a(sum(xs) + sum(more.values()))

    program = same(Sums(), torch.randn(3, 6), torch.randn(3, 6), z=torch.randn(3, 6), dynamic="batch")
    assert program.module()(torch.randn(5, 6), torch.randn(5, 6), z=torch.randn(5, 6)).shape == (5, 3)


def test_explicit_dynamic_shapes():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Upsample(scale_factor=2))
    dims = ({0: Dim("b"), 2: Dim("h", min=4, max=64), 3: Dim("w", min=4, max=64)},)
    program = same(net, torch.randn(2, 3, 8, 7), dynamic=dims)
    assert program.module()(torch.randn(3, 3, 11, 5)).shape == (3, 4, 22, 10)
    again = program.exported().module()
    assert again(torch.randn(3, 3, 11, 5)).shape == (3, 4, 22, 10)


def test_a_program_with_a_dynamic_height_and_width_behind_strides_is_saved(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 4, 4), nn.AdaptiveAvgPool2d(1))
    program = same(net, torch.randn(2, 3, 32, 40), dynamic=({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},))
    program.save(tmp_path / "net.pt2")
    again = g.load(tmp_path / "net.pt2")
    again.save(tmp_path / "again.pt2")
    x = torch.randn(2, 3, 56, 24)
    assert torch.equal(g.load(tmp_path / "again.pt2").module()(x), program.module()(x))


def test_unknown_dynamic_shapes_name_what_is_allowed():
    with pytest.raises(BadInput, match=r'"batch" or a torch\.export specification, not "all"'):
        g.capture(nn.Linear(6, 3), torch.randn(2, 6), dynamic_shapes="all")


def test_dynamic_batch_with_inputs_that_do_not_fit():
    with pytest.raises(CaptureError, match=r"do not fit Linear\.forward"):
        g.capture(nn.Linear(6, 3), (torch.randn(2, 6), torch.randn(2, 6)), dynamic_shapes="batch")


# ------------------------------------------------------------------------------------------------------------- refusal
def test_a_model_that_does_not_export_is_one_clear_line():
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    model = Branches().train()
    with pytest.raises(CaptureError, match=r"^torch.export refuses the model: ") as error:
        g.capture(model, torch.randn(2, 6))
    assert "\n" not in str(error.value)
    assert "what to try" in str(error.value)
    assert model.training


def test_a_dynamic_shape_the_model_breaks_is_named():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(3, 6)

    with pytest.raises(CaptureError, match="batch") as error:
        g.capture(Fixed(), torch.randn(3, 6), dynamic_shapes="batch")
    assert "\n" not in str(error.value)
    assert "3" in str(error.value)


# -------------------------------------------------------------------------------------------------------------- storage
def test_a_saved_program_comes_back_whole(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.drop, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(6)

        def forward(self, x):
            y = self.a(x)
            y[:, :2].relu_()
            return self.norm(self.drop(self.b(y)))

    x = torch.randn(4, 6)
    program = g.capture(Tied(), x, dynamic_shapes="batch")
    program.history.append({"pass": "Nothing", "options": {"ratio": 0.5}})
    path = program.save(tmp_path / "m.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]  # no half file beside it
    again = g.load(path)
    assert again.history == program.history
    assert torch.equal(again.module()(x), program.module()(x))
    assert again.module()(torch.randn(9, 6)).shape == (9, 6)
    named = [{n for n, _ in p.module().named_parameters(remove_duplicate=False)} for p in (again, program)]
    assert named[0] == named[1]
    assert again.module().get_parameter("a.weight") is again.module().get_parameter("b.weight")
    assert again.cost() == program.cost()
    torch.manual_seed(0)
    trained = again.module().train()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(trained, program.module().train()(x))


def test_a_plain_exported_file_with_writes_in_place_loads(tmp_path):
    model, x = Net(a_view_of_strided_memory), torch.randn(3, 4, 6)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "plain.pt2")
    program = g.load(tmp_path / "plain.pt2")
    assert functional(program)
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("content", [None, b"", b"no zip", b"PK\x05\x06" + bytes(18)])
def test_bad_files_are_one_clear_line(tmp_path, content):
    path = tmp_path / "bad.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=r"bad\.pt2: ") as error:
        g.load(path)
    assert "\n" not in str(error.value)


def test_importing_the_package_imports_no_torch():
    code = "import sys, graphcomb; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_tensor_given_for_two_inputs_stays_two_inputs():
    class Two(nn.Module):
        def forward(self, views, third):
            return views[0] - 2 * views[1] + 4 * third

    x, y, z = torch.randn(3, 2, 4).unbind()
    program = g.capture(Two(), ([x, x], x), dynamic_shapes="batch")
    torch.testing.assert_close(program.module()([x, y], z), x - 2 * y + 4 * z)
