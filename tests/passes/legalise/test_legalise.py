"""What a DLA lacks, rewritten: each step in float64 against the network before it, and the pass's order and gate."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb
from graphcomb.graph.errors import BadInput, GraphcombError
from graphcomb.graph.nodes import op_name
from graphcomb.graph.verify import TOLERANCE, equivalence
from graphcomb.passes import Distill, Legalise
from graphcomb.passes.base import Context
from graphcomb.passes.legalise.steps import STEPS, applied
from graphcomb.runtime import dla_placement, get_target

ORIN = get_target("orin-nx")
EXACT = [name for name, step in STEPS.items() if not step.instead]
rules = ORIN.dla


class Call(nn.Module):
    """A function behind a convolution, in float64."""

    def __init__(self, function, *layers, channels=4):
        super().__init__()
        self.first, self.layers, self.function = nn.Conv2d(3, channels, 1), nn.ModuleList(layers), function

    def forward(self, x):
        return self.function(self.first(x), *self.layers)


def captured(function, *layers, size=(12, 9), **options):
    torch.manual_seed(0)
    model = Call(function, *layers, **options).double().eval()
    return graphcomb.capture(model, (torch.randn(2, 3, *size, dtype=torch.float64),))


def done(program, name, count=1, of=rules):
    """The program after one step, which must have changed this many nodes and left none of them with a reason."""
    before = {n: t.clone() for n, t in program.module().state_dict().items()}
    new, changed, refused = applied(program, name, of)
    assert (len(changed), refused) == (count, {})
    assert all(torch.equal(t, before[n]) for n, t in program.module().state_dict().items())
    return new


def operators(program):
    return [op_name(node) for node in program.graph.nodes if node.op == "call_function"]


# --------------------------------------------------------------------------------------------------------- exact steps
@pytest.mark.parametrize("function", [F.hardswish, F.hardsigmoid])
def test_hard_swish_by_its_definition(function):
    program = captured(function)
    new = done(program, "hard-swish")
    assert equivalence(program, new) <= TOLERANCE
    assert set(operators(new)) == {"conv2d", "add", "clamp", "mul"}


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (lambda x: x.mean((2, 3)), (7, 7)),
        (lambda x: x.mean((-1, -2), keepdim=True), (56, 5)),
        (lambda x: F.adaptive_avg_pool2d(x, 1), (1, 24)),
        (lambda x: F.adaptive_avg_pool2d(x, 1), (1, 1)),
    ],
)
def test_a_mean_is_pooling_in_stages(function, size):
    program = captured(function, size=size)
    new = done(program, "mean")
    assert equivalence(program, new) <= TOLERANCE
    assert set(operators(new)) <= {"conv2d", "avg_pool2d", "flatten"}


@pytest.mark.parametrize(
    ("function", "size", "why"),
    [
        (lambda x: x.mean((2, 3)), (22, 4), "22 x 4 has a prime factor above 8"),
        (lambda x: x.mean((1, 2)), (4, 4), "it is no mean over height and width"),
        (lambda x: x.mean(), (4, 4), "it is no mean over height and width"),
        (lambda x: x.flatten(2).mean(2), (4, 4), "it is no mean over images"),
        (lambda x: F.adaptive_avg_pool2d(x, 2), (4, 4), "it pools to more than one entry"),
    ],
)
def test_other_means_stay(function, size, why):
    _, changed, refused = applied(captured(function, size=size), "mean", rules)
    assert changed == []
    assert [text.startswith(why) for text in refused.values()] == [True]


def test_linear_layers_over_an_image_are_convolutions():
    layers = nn.Linear(4 * 5 * 3, 6), nn.Linear(6, 5)
    program = captured(lambda x, a, b: b(F.relu(a(x.flatten(1)) * 0.5)), *layers, size=(5, 3))
    new = done(program, "linear", 2)
    assert equivalence(program, new) <= TOLERANCE
    assert operators(new) == ["conv2d", "conv2d", "mul", "relu", "conv2d", "flatten"]  # nothing is flat in between


@pytest.mark.parametrize("pointwise", [False, True])
def test_a_linear_layer_over_a_mean_takes_the_mean_along(pointwise):
    program = captured(lambda x, a: a(F.relu(x.mean((2, 3))) if pointwise else x.mean((2, 3))), nn.Linear(4, 6))
    new = done(program, "linear")
    assert equivalence(program, new) <= TOLERANCE
    assert operators(new) == ["conv2d", *["avg_pool2d"] * 2, *["relu"] * pointwise, "conv2d", "flatten"]


def test_linear_layers_over_something_else_stay():
    program = captured(lambda x, a: a(x.transpose(1, 3)), nn.Linear(4, 6))
    _, changed, refused = applied(program, "linear", rules)
    assert (changed, list(refused.values())) == ([], ["its input is no flattened image"])


KINDS = [
    dict(zip(("groups", "stride", "padding", "output_padding", "dilation", "kernel_size"), row, strict=True))
    for row in itertools.product((1, 2, 4), (1, 3), (0, 1, (2, 1)), (0, 1), (1, (2, 1)), (3, (4, 2)))
    if not (row[3] and (row[1] == 1 or not row[2]))
]


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_deconvolution_without_groups_padding_and_dilation(part):
    changed = 0
    for index, kind in enumerate(KINDS[part::3]):
        layer = nn.ConvTranspose2d(4, 8, bias=index % 2 == 0, **kind)
        program = captured(lambda x, a: a(x), layer, size=(5, 4))
        needed = kind["groups"] > 1 or kind["padding"] or kind["dilation"] != 1
        new = done(program, "deconvolution", int(bool(needed)))
        assert equivalence(program, new) <= TOLERANCE, kind
        node = next(n for n in new.graph.nodes if op_name(n) == "conv_transpose2d")
        assert not needed or list(node.args[4:7]) == [[0, 0], [0, 0], 1]
        changed += bool(needed)
    assert changed > 15


def test_deconvolutions_keep_what_the_rules_allow():
    program = captured(lambda x, a: a(x), nn.ConvTranspose2d(4, 8, 3, groups=2, dilation=2))
    new = done(program, "deconvolution", of=replace(rules, deconvolution_groups=True))
    assert equivalence(program, new) <= TOLERANCE
    assert next(n for n in new.graph.nodes if op_name(n) == "conv_transpose2d").args[6] == 2


@pytest.mark.parametrize("of", [rules, replace(rules, deconvolution_groups=True)], ids=["dense", "depthwise"])
@pytest.mark.parametrize("scale", [2, (1, 3)])
def test_resizing_is_a_deconvolution(of, scale):
    program = captured(lambda x: F.interpolate(x, scale_factor=scale))
    new = done(program, "resize", of=of)
    assert equivalence(program, new) <= TOLERANCE
    assert operators(new) == ["conv2d", "conv_transpose2d"]


def test_resizing_by_other_numbers_stays():
    _, changed, refused = applied(captured(lambda x: F.interpolate(x, size=(18, 9))), "resize", rules)
    assert (changed, list(refused.values())) == ([], ["it resizes by other than whole numbers"])


# ------------------------------------------------------------------------------------------------------ inexact steps
@pytest.mark.parametrize(("name", "function", "error"), [("silu", F.silu, 0.15), ("gelu", F.gelu, 0.021)])
def test_the_errors_of_inexact_steps_are_those_that_are_stated(name, function, error):
    program = captured(function)
    x = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    like = {"silu": F.hardswish, "gelu": lambda x: x * torch.sigmoid(1.702 * x)}[name]
    assert 0.9 * error < (like(x) - function(x)).abs().max() <= error
    assert equivalence(captured(like), done(program, name)) <= TOLERANCE


# ------------------------------------------------------------------------------------------------------------ the pass
class Network(nn.Module):
    """A stem with SiLU, hard-swish behind a padded deconvolution in groups, GELU behind a resize, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.silu(self.stem(x))
        x = F.hardswish(self.up(x)) + F.gelu(self.body(F.interpolate(x, scale_factor=2)))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return graphcomb.capture(Network().eval(), (torch.randn(2, 3, 16, 16),))


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    return [(torch.randn(2, 3, 16, 16), torch.randint(5, (2,))) for _ in range(4)]


@pytest.mark.slow
def test_what_the_rules_say_is_done(network):
    result = Legalise()(network, target=ORIN, placement=dla_placement(ORIN))
    record = result.record
    assert record["placement"] == {"before": {"changes": 7, "on_gpu": 5}, "after": {"changes": 3, "on_gpu": 2}}
    assert {row["step"] for row in record["steps"]} == {"hard-swish", "linear", "deconvolution"}
    assert all(row["exact"] and row["error"] <= TOLERANCE for row in record["steps"])
    assert equivalence(network, result.program) <= TOLERANCE
    refused = {row["step"]: row["why"] for row in record["refused"]}
    assert refused == {
        "gelu": "it would become x sigmoid(1.702 x), and there is no validation data to see what that costs"
    }
    assert {"silu", "upsample_nearest2d"} < set(operators(result.program))  # by the rules a DLA has them


def by_name(program):
    """A placement from the names of operators, which needs no export."""
    lacking = ("hardswish", "gelu", "mean", "linear", "flatten")
    return [(name, "lacks it" if name in lacking else "") for name in operators(program)]


def test_steps_are_taken_in_the_order_of_what_they_save(network):
    record = Legalise()(network, target=ORIN, placement=by_name).record
    assert [row["step"] for row in record["steps"]] == ["hard-swish", "linear"]
    chain = [row["placement"] for row in record["steps"]]
    assert all(tuple(row["after"].values()) < tuple(row["before"].values()) for row in chain)
    assert chain[0]["before"] == record["placement"]["before"] == {"changes": 5, "on_gpu": 4}
    assert all(a["after"] == b["before"] for a, b in itertools.pairwise(chain))
    assert chain[-1]["after"] == record["placement"]["after"]
    assert [row["step"] for row in record["changed"]] == ["hard-swish", "linear"]


def test_an_inexact_step_is_gated_by_the_metric(network, batches):
    def near(outputs, labels):
        return -(outputs - network.module()(*[x for x, y in batches if torch.equal(y, labels)][:1])).abs().amax(1)

    context = Context(target=ORIN, placement=by_name, val=batches, metric=near)
    kept = Legalise(steps=("gelu",), tolerance=0.5)(network, context)
    (row,) = kept.record["steps"]
    assert (row["exact"], row["instead"]) == (False, "x sigmoid(1.702 x)")
    assert -0.5 < row["metric"]["after"] < row["metric"]["before"] == 0
    undone = Legalise(steps=("gelu",), tolerance=0.0)(network, context)
    assert undone.record["steps"] == []
    assert undone.record["refused"][0]["why"].startswith("as x sigmoid(1.702 x) the metric falls from 0 to -")
    assert operators(undone.program) == operators(network)


def test_what_saves_nothing_is_done_if_it_is_asked_for_and_then_trained(network, batches):
    context = Context(target=ORIN, placement=by_name, val=batches, data=batches)
    step = Legalise(steps=(), always=("silu", "resize"), tolerance=1.0, train=Distill(epochs=2, lr=1e-3))
    result = step(network, context)
    assert {row["step"] for row in result.record["steps"]} == {"silu", "resize"}
    assert not {"silu", "upsample_nearest2d"} & set(operators(result.program))
    head = [dict(p.module().named_parameters())["head.weight"] for p in (network, result.program)]
    assert not torch.equal(*head)


def test_a_step_that_is_wrong_is_a_bug(network, monkeypatch):
    monkeypatch.setitem(STEPS, "hard-swish", replace(STEPS["silu"], instead=""))
    with pytest.raises(GraphcombError, match=r"hard-swish is .* off the program before it; a bug"):
        Legalise(steps=(), always=("hard-swish",))(network, target=ORIN, placement=by_name)


def test_what_it_needs_is_said(network):
    for context in (Context(), Context(target=ORIN), Context(target=get_target("agx-thor"), placement=lambda p: [])):
        with pytest.raises(BadInput, match="needs a target with a DLA"):
            Legalise()(network, context)
    for options in ({"steps": ("mish",)}, {"always": ("mish",)}, {"tolerance": -1.0}):
        with pytest.raises(BadInput, match=r"^Legalise\."):
            Legalise(**options)
    with pytest.raises(BadInput, match="agx-thor has no DLA"):
        dla_placement("agx-thor")
