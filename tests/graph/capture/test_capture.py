"""From eager model to program: modes, inputs and outputs, dynamic shapes, errors, files."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

import graphcomb as g
from graphcomb.graph.errors import BadInput, CaptureError

from .toys import Net, a_view_of_strided_memory, functional, same


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


class LooksInTraining(nn.Module):
    """Branches on its data in train mode alone, which `torch.export` refuses."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x = self.layer(x)
        return x.clamp(-1, 1) if self.training and not x.isfinite().all() else x


def test_a_trace_that_fails_prints_nothing(capfd):
    with pytest.warns(UserWarning, match="train mode does not export"):
        g.capture(LooksInTraining(), torch.randn(2, 4))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["graph", "code", "become"])
def test_a_name_that_the_live_module_uses_is_refused(name):
    model = nn.Sequential(nn.Linear(4, 4))
    model._modules[name] = nn.Linear(4, 4)
    with pytest.raises(CaptureError, match=f"name of {name}.weight cannot begin with {name}.*rename it"):
        g.capture(model, torch.randn(2, 4))
