"""What `Sparsify` leaves dense or refuses, with the reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.passes import Distill, Sparsify
from graphcomb.recipe import parse_passes

from .toys import METHODS, batches, weights


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.logits, self.boxes = nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return {"logits": self.logits(self.a(x).relu()), "boxes": self.boxes(self.b(x).relu())}


@pytest.mark.parametrize("method", ["cap", "woodfisher", "fastcap"])
def test_weights_that_the_loss_does_not_see_are_refused(method):
    torch.manual_seed(0)
    program = g.capture(TwoHeads(), torch.randn(7, 16), dynamic_shapes="batch")
    data = [(torch.randn(8, 16), torch.randint(5, (8,))) for _ in range(4)]
    result = Sparsify(sparsity=0.75, method=method, gradients=32, block=32)(program, data=data)
    why = {r["what"]: r["why"] for r in result.record["refused"]}
    assert why["b.weight"].startswith("no gradient of the loss reaches it")
    assert set(result.record["sparse"]) == {"a.weight"}
    assert int((weights(result.program)["a.weight"] == 0).sum()) == 192

    def both(out, labels):
        return F.cross_entropy(out["logits"], labels) + out["boxes"].square().mean()

    result = Sparsify(sparsity=0.75, method=method, gradients=32, block=32)(program, data=data, loss=both)
    assert set(result.record["sparse"]) == {"a.weight", "b.weight"}
    with pytest.raises(BadInput, match=r"all gradients of .* are zero; check the loss"):
        Sparsify(method=method, include="a*")(program, data=data, loss=lambda out, y: out["boxes"].square().mean())
    with pytest.raises(BadInput, match="loss: has no gradient"):
        Sparsify(method=method)(program, data=data, loss=lambda out, y: (out["logits"].argmax(1) != y).float().mean())


def test_what_stays_dense_and_why(program):
    result = Sparsify(method="magnitude")(program)
    why = {r["what"]: r["why"] for r in result.record["refused"]}
    assert why == {
        "stem.weight": "the first layer",
        "deep.weight": "depthwise, too few weights each",
        "head.weight": "the last layer",
    }
    everything = Sparsify(method="magnitude", include="*", exclude=["head*"])(program)
    assert set(everything.record["sparse"]) == {f"{n}.weight" for n in ("stem", "conv", "deep", "qkv", "proj")}
    assert not any(c["accelerated"] for c in result.record["changed"])
    assert "outside the 2:4 pattern" in result.record["changed"][0]["why_not"]


def test_transposed_and_computed_weights_are_refused():
    class Standardised(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.first = nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 1)
            self.weight, self.last = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.up(self.first(x))
            return self.last(F.conv2d(x, self.weight - self.weight.mean(1, keepdim=True)))

    result = Sparsify(method="magnitude")(g.capture(Standardised(), torch.randn(2, 4, 5, 5)))
    why = {r["what"]: r["why"] for r in result.record["refused"]}
    assert "the other way round" in why["up.weight"]
    assert "computed" in why["conv2d_1"]
    assert result.record["changed"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "Sparsify.sparsity: a share above 0 and under 1, not 1.0"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "give one of sparsity, pattern and schedule"),
        ({"pattern": "4:2"}, 'Sparsify.pattern: "N:M" with N less than M'),
        ({"pattern": "half"}, 'Sparsify.pattern: "N:M" with N less than M'),
        ({"pattern": "2:4", "block": 30}, "Sparsify.block: a multiple of the pattern's 4, not 30"),
        ({"pattern": "4:8", "permute": True}, "Sparsify.permute: false for groups of more than 4"),
        ({"method": "best"}, "Sparsify.method: cap, fastcap"),
        ({"method": "wanda", "scope": "global"}, "Sparsify.scope: uniform"),
        ({"block": 0}, "Sparsify.block: a whole number"),
        ({"damping": 0.0}, "Sparsify.damping: a number above 0"),
        ({"schedule": ((5, 0.5),)}, "Sparsify.train: a gradual run needs one with more than 5 epochs"),
        ({"schedule": ((5, 0.5), (3, 0.6)), "train": Distill(epochs=9)}, "Sparsify.schedule: rising epochs"),
        ({"schedule": ((1, 0.5), (3, 0.4)), "train": Distill(epochs=9)}, "Sparsify.schedule: rising sparsities"),
        ({"train": Distill()}, "only a gradual run trains"),
        ({"sparsity": "a"}, "Sparsify.sparsity: a number, not 'a'"),
        ({"sparsity": float("nan")}, "Sparsify.sparsity: a finite number, not nan"),
        ({"pattern": 24}, "Sparsify.pattern: text, not 24"),
        ({"pattern": "2:4", "block": "8"}, "Sparsify.block: a whole number, not '8'"),
        ({"block": True}, "Sparsify.block: a whole number, not True"),
        ({"gradients": 1.5}, "Sparsify.gradients: a whole number"),
        ({"damping": "low"}, "Sparsify.damping: a number, not 'low'"),
        ({"memory": None}, "Sparsify.memory: a number, not None"),
        ({"memory": 1e5}, "Sparsify.memory: bytes"),
        ({"permute": "yes"}, "Sparsify.permute: true or false, not 'yes'"),
        ({"include": 3}, "Sparsify.include: a list of texts, not 3"),
        ({"exclude": (None,)}, "Sparsify.exclude: a list of texts, not (None,)"),
        ({"schedule": 0.5}, "Sparsify.schedule: a list, each [a whole number, a number], not 0.5"),
        ({"schedule": (1, 0.5)}, "Sparsify.schedule: a list, each [a whole number, a number], not (1, 0.5)"),
        ({"schedule": ((1, 0.5, 2),)}, "Sparsify.schedule: a list, each [a whole number, a number]"),
        ({"schedule": ((0, "x"),), "train": Distill()}, "Sparsify.schedule: a list, each [a whole number, a number]"),
        ({"schedule": ((0, 1.5),), "train": Distill()}, "Sparsify.schedule: shares above 0 and under 1"),
        (
            {"schedule": ((True, 0.5),), "train": Distill()},
            "Sparsify.schedule: a list, each [a whole number, a number]",
        ),
        ({"schedule": ((-1, 0.5),), "train": Distill()}, "Sparsify.schedule: whole epochs, from 0"),
        ({"schedule": ((0, 0.5),), "train": {}}, "Sparsify.train: a Distill, not {}"),
        ({"schedule": ((0, 0.5),), "train": Distill(), "snapshots": 3}, "Sparsify.snapshots: text, not 3"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(BadInput) as error:
        Sparsify(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["allocation", "by_increments"])
def test_ablations_are_no_options(name):
    with pytest.raises(BadInput, match=rf"Sparsify\.{name}: unknown option"):
        parse_passes([{"Sparsify": {name: "cumulated"}}])


def test_patterns_that_match_nothing_are_named(program):
    with pytest.raises(BadInput, match=r'Sparsify.include: "porj\*" matches no weight; there are stem.weight, conv'):
        Sparsify(method="magnitude", include=("qkv*", "porj*"))(program)


def test_missing_data_and_labels_are_named(program):
    for method in ("cap", "sparsegpt"):
        with pytest.raises(BadInput, match="needs data"):
            Sparsify(method=method)(program)
    with pytest.raises(BadInput, match='set it to "teacher"'):
        Sparsify()(program, data=batches(labels=False))
    bad = [(torch.full((4, 1, 16, 16), torch.nan), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(BadInput, match="not finite"):
        Sparsify(block=32)(program, data=bad)


class Once:
    """An iterable that yields its batches once, as one around a generator does."""

    def __init__(self, items):
        self.items = iter(items)

    def __iter__(self):
        return self.items


@pytest.mark.parametrize("method", [m for m in METHODS if m != "magnitude"])
def test_data_without_batches_is_refused(program, method):
    pass_ = Sparsify(method=method, block=32)
    with pytest.raises(BadInput, match="data: yields no batch; it must be iterable again"):
        pass_(program, data=[])
    with pytest.raises(BadInput, match="data: an iterator yields its batches once"):
        pass_(program, data=iter(batches()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recomputations": 2}, "yields no batch"),
        ({"recomputations": 2, "method": "fastcap"}, "yields no batch"),
        ({"recomputations": 2, "gradients": 24, "method": "sparsegpt"}, "yields 8 samples, and 24 the time before"),
        ({"recomputations": 2, "gradients": 24, "method": "wanda"}, "yields 8 samples, and 24 the time before"),
        ({"recomputations": 2, "gradients": 24}, "yields 8 samples, and 24 the time before"),
        ({"memory": 1e6, "gradients": 24, "dtype": "fp64"}, "yields 8 samples, and 24 the time before"),
    ],
)
def test_data_that_is_gone_the_second_time_is_refused(program, options, message):
    with pytest.raises(BadInput, match=f"data: {message}; it must be iterable again"):
        Sparsify(block=32, **options)(program, data=Once(batches()))


@pytest.mark.parametrize("value", [torch.nan, 1e30])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "magnitude"])
def test_statistics_that_are_not_finite_are_refused(program, method, value):
    data = batches()
    data[1][0][3, 0, 7, 7] = value
    with pytest.raises(BadInput, match=r"Sparsify: .* of \w+\.weight (is|are) not finite; check the data and the loss"):
        Sparsify(method=method, include="*", gradients=32, block=32)(program, data=data)
