"""What pruning does to the kernels of a network: more of them, and branches that decide nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from graphcomb import Pipeline, capture
from graphcomb.graph.workload.fusion import count
from graphcomb.graph.workload.libraries import library
from graphcomb.passes import Context, RemoveChannels

TENSORRT = SimpleNamespace(backend="tensorrt_rtx", alignment=lambda dtype: 8)
CPU = SimpleNamespace(backend="onnxruntime", alignment=lambda dtype: 8)


class Split(nn.Module):
    """Two branches that a softmax weighs by what is in both, as in split attention."""

    def __init__(self, branches: int = 2) -> None:
        super().__init__()
        self.branches = branches
        self.stem, self.radix = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8 * branches, 3, padding=1)
        self.fc1, self.fc2, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8 * branches, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        n = x.shape[0]
        x = self.radix(self.stem(x).relu()).relu()
        x = x.reshape(n, self.branches, 8, *x.shape[2:])
        gap = self.fc2(self.fc1(x.sum(1).mean((2, 3), keepdim=True)).relu())
        weights = gap.reshape(n, self.branches, 8, 1, 1).softmax(1)
        return self.last((x * weights).sum(1))


def pruned(model: nn.Module, **options):
    torch.manual_seed(0)
    context = Context(target=options.pop("target", TENSORRT))
    program = capture(model, torch.zeros(2, 3, 8, 8), dynamic_shapes="batch")
    return RemoveChannels(ratio=0.5, **options)(program, context).record


def test_a_softmax_over_a_single_branch_is_more_kernels_and_a_dead_branch() -> None:
    record = pruned(Split(), kinds=("group", "channel"), include=("radix*",), round_to=8)
    assert [(c["before"], c["after"]) for c in record["changed"]] == [(2, 1)]
    found = record["kernels"]
    assert found["after"] > found["before"]
    assert found["more"]
    assert all(" (" in name for name in found["more"])  # with the line of the model
    (node,) = found["dead"]
    assert node.startswith("softmax (")
    assert {n for n in found["dead"][node] if n.startswith("conv")} == {"conv2d_2", "conv2d_3"}


def test_fewer_channels_alone_are_no_more_kernels() -> None:
    record = pruned(Split(), include=("stem*",), round_to=2)
    assert record["changed"]
    assert record["kernels"]["after"] == record["kernels"]["before"]
    assert (record["kernels"]["more"], record["kernels"]["dead"]) == ([], {})


def test_widths_that_have_to_be_padded_are_more_kernels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    record = pruned(model, round_to=1, include=("0.*",))
    assert [(c["before"], c["after"]) for c in record["changed"]] == [(10, 5)]
    assert record["kernels"]["after"] == record["kernels"]["before"] + 1
    assert [name.split(" ")[0] for name in record["kernels"]["more"]] == ["relu"]
    assert pruned(model, round_to=1, include=("0.*",), target=CPU)["kernels"]["more"] == []


@pytest.mark.parametrize("target", [TENSORRT, CPU])
@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"ratio": 0.5, "kinds": ("group", "channel"), "round_to": 8}])
def test_kernels_counted_before_shapes_are_known_are_those_of_the_finished_program(options: dict, target) -> None:
    """The record is made from the sizes that the comb keeps; the program computes its shapes anew when they are read."""
    torch.manual_seed(0)
    program = capture(Split(), torch.zeros(2, 3, 8, 8), dynamic_shapes="batch")
    result = RemoveChannels(**options)(program, Context(target=target))
    rules = library(target.backend, "fp32")
    assert result.record["kernels"]["before"] == count(program.graph, rules)
    assert result.record["kernels"]["after"] == count(result.program.graph, rules)


def test_the_line_about_a_pass_says_that_there_are_more_kernels(capfd: pytest.CaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    program = capture(model, torch.zeros(2, 3, 8, 8), dynamic_shapes="batch")
    pass_ = RemoveChannels(ratio=0.5, round_to=1, include=("0.*",))
    found = Pipeline([pass_]).run(program, target=TENSORRT, dtype="fp16", progress=True).records[0]["kernels"]
    said = " ".join("".join(capfd.readouterr()).split())
    assert f"predicted kernels {found['before']} -> {found['after']}" in said
