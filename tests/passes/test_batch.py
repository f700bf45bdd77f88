"""Batches of unusual form: split by functions of the user, or refused with what to give; inputs that are lists or named
like labels."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import graphcomb as g
from graphcomb import Pipeline
from graphcomb.graph.errors import BadInput
from graphcomb.passes import Distill, Quantize, Sparsify
from graphcomb.passes.base import Context
from graphcomb.passes.batch import Adapted, adapted, split_batch
from graphcomb.passes.common.feed import Feed
from graphcomb.passes.common.loaders import generators, length, shard
from graphcomb.passes.common.scoring import evaluate


def program(batch="batch"):
    torch.manual_seed(0)
    return g.capture(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6), dynamic_shapes=batch
    )


def plain(count=4):
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 6, generator=draw), torch.randint(3, (4,), generator=draw)) for _ in range(count)]


def weights(result):
    return result.program.module().state_dict()


class Sized(dict):
    pass


FORMS = {
    "with a path": (lambda x, y: (x, y, ["a.png"] * len(x)), lambda b: b[0], lambda b: b[1]),
    "dict": (lambda x, y: {"image": x, "target": y, "path": ["a.png"] * len(x)}, lambda b: b["image"],
             lambda b: b["target"]),
    "list of dicts": (lambda x, y: [{"image": i, "class": int(c)} for i, c in zip(x, y, strict=True)],
                      lambda b: torch.stack([s["image"] for s in b]), lambda b: torch.tensor([s["class"] for s in b])),
    "object": (lambda x, y: Sized(a=[x], b=(y, 0)), lambda b: {"input": b["a"][0]}, lambda b: b["b"][0]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_functions_split_batches_of_any_form(form):
    make, inputs, labels = FORMS[form]
    odd, split = [make(x, y) for x, y in plain()], {"inputs": inputs, "labels": labels}
    train = Distill(epochs=2, lr=1e-2)
    expected = train(program(), data=plain(), val=plain())
    found = train(program(), data=odd, val=odd, **split)
    assert found.record["epochs"] == expected.record["epochs"]
    assert all(torch.equal(v, weights(expected)[k]) for k, v in weights(found).items())
    whole = Pipeline([train]).run(program(), data=odd, val=odd, **split)
    assert whole.accuracy_after == expected.record["epochs"][-1]["val"]
    with pytest.raises(BadInput, match=r"data: .* for others give inputs= and labels=") as caught:
        train(program(), data=odd)
    assert "\n" not in str(caught.value)


def test_other_passes_take_the_functions_too():
    odd = [(x, y, "a.png") for x, y in plain()]
    split = {"inputs": lambda b: b[0], "labels": lambda b: b[1]}
    sparsify = Sparsify(gradients=8, block=6, include=("0.weight",))
    expected, found = sparsify(program(), data=plain()), sparsify(program(), data=odd, **split)
    assert all(torch.equal(v, weights(expected)[k]) for k, v in weights(found).items())
    context = Context(data=odd, **split)
    assert evaluate(program(), context.data) == evaluate(program(), plain())


def test_data_with_functions_is_still_a_loader():
    loader = DataLoader(list(range(10)), 2, shuffle=True, generator=torch.Generator().manual_seed(1))
    both = adapted(loader, lambda b: b.float(), lambda b: b)
    assert length(both) == 5
    assert generators(both) == generators(loader)
    assert adapted(both, abs, abs) is both
    parts = [shard(both, i, 2) for i in range(2)]
    assert [len(p) for p in parts] == [2, 2]
    assert isinstance(parts[0], Adapted)
    assert all(split_batch(b)[2].dtype == torch.int64 for b in parts[1])
    with pytest.raises(TypeError):
        len(adapted(iter([1]), lambda b: b, None))
    once = adapted(iter(plain()), lambda b: b[0], None)
    assert next(once).labels is not None
    short = adapted([*plain(2), (torch.zeros(2, 6), torch.zeros(2))], lambda b: b[0], lambda b: b[1])
    assert Feed(program(None)).leaves(short)


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ({"inputs": lambda b: b[0]}, r"which part of a tuple of 3 .* are the labels\? Give labels="),
        ({"labels": lambda b: b[1]}, "a tuple of 3 .* give inputs="),
        ({"inputs": lambda b: b["x"], "labels": lambda b: b[1]}, "inputs: fails on a tuple of 3 .*TypeError"),
        ({"inputs": lambda b: b[2], "labels": lambda b: b[1]}, "yields a str for inputs"),
        ({"inputs": "x", "labels": lambda b: b[1]}, "inputs: takes a function of a batch, not a str"),
        ({"inputs": lambda b: b[0], "labels": lambda b: b[3]}, "labels: fails on a tuple of 3 .*IndexError"),
    ],
)
def test_functions_that_do_not_do_are_named(split, says):
    with pytest.raises(BadInput, match=says) as caught:
        Distill()(program(), data=[(x, y, "a.png") for x, y in plain()], **split)
    assert "\n" not in str(caught.value)


def test_an_input_named_labels_is_fed_and_still_the_label():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x, labels):
            scores = self.head(x)
            return {"logits": scores, "hits": (scores.argmax(1) == labels).to(torch.int64)}

    torch.manual_seed(0)
    x, y = plain()[0]
    captured = g.capture(Own(), (x, y), dynamic_shapes="batch")
    batch = Feed(captured).fit({"x": x, "labels": y})
    assert torch.equal(batch.args[1], y)
    assert torch.equal(batch.labels, y)
    data = [{"x": x, "labels": y} for x, y in plain()]
    by_pairs = [((x, y), y) for x, y in plain()]
    results = [Distill(epochs=1)(captured, data=d, val=d) for d in (data, by_pairs)]
    assert results[0].record["epochs"] == results[1].record["epochs"]


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_inputs_that_are_lists_or_mappings_are_trained_and_calibrated(kind):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, views):
            one, two = views.values() if isinstance(views, dict) else views
            return self.a(one) + self.b(two)

    def given(x, as_kind):
        return {"one": x, "two": -x} if as_kind is dict else as_kind([x, -x])

    torch.manual_seed(0)
    captured = g.capture(Many(), (given(plain()[0][0], kind),), dynamic_shapes="batch")
    forms = [dict] if kind is dict else [list, tuple]
    losses = []
    for form in forms:
        for data in ([(given(x, form), y) for x, y in plain()], [([given(x, form)], y) for x, y in plain()]):
            result = Distill(epochs=2, lr=0.1, warmup=0.0)(captured, data=data, val=data)
            losses.append([e["loss"] for e in result.record["epochs"]])
    assert all(run == losses[0] for run in losses)
    assert losses[0][1] < losses[0][0]
    x, y = plain()[0]
    expected = F.cross_entropy(captured.module()(given(x, kind)), y)
    fitted = Feed(captured).fit((given(x, forms[-1]), y))
    torch.testing.assert_close(F.cross_entropy(captured.module()(*fitted.args), y), expected)
    assert evaluate(captured, [(given(x, forms[0]), y)]) >= 0
    with pytest.raises(BadInput, match="data: "):
        Feed(captured).fit(([x], y))


def test_quantisation_takes_a_list_input():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, views):
            return self.a(views[0] + views[1])

    x, y = plain()[0]
    captured = g.capture(Two(), ([x, x],), dynamic_shapes="batch")
    assert len(Quantize(include="*", samples=4)(captured, data=[([x, x], y)]).record["changed"]) == 1
