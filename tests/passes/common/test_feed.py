"""Batches of data fitted to programs, shared by processes and scored."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.passes.batch import split_batch
from graphcomb.passes.common.feed import Feed
from graphcomb.passes.common.loaders import Every, shard
from graphcomb.passes.common.losses import accuracy, default_loss, logits_of
from graphcomb.passes.common.scoring import evaluate
from graphcomb.passes.train.distill import Distill

from ..train.toys import capture, loaders, network, small


def test_batches_of_every_form():
    x, y = torch.zeros(2, 1), torch.zeros(2)
    assert split_batch((x, y)) == ((x,), {}, y)
    assert split_batch([x, y]) == ((x,), {}, y)
    assert split_batch(x) == split_batch([x]) == split_batch((x,)) == ((x,), {}, None)
    assert split_batch({"a": x, "labels": y}) == ((), {"a": x}, y)
    assert split_batch(({"a": x}, y)) == ((), {"a": x}, y)
    assert split_batch(([x, y], y)) == ((x, y), {}, y)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ("text", "yields a str"), ((1, 2), "yields a int"), ((torch.ones(1),) * 3, r"a tuple of 3 \(Tensor\)"),
        ({"labels": torch.ones(1)}, "an empty dict"), ({"a": [1]}, '"a": list'), ([], "a list of 0"),
    ],
)  # fmt: skip
def test_other_batches_are_refused_by_what_they_are(batch, says):
    with pytest.raises(BadInput, match=says):
        split_batch(batch)


def test_keyword_inputs_are_put_in_the_programs_order():
    class Two(nn.Module):
        def forward(self, x, scale, *, shift):
            return x * scale + shift

    a, b, c = (torch.full((3, 2), float(i)) for i in (2, 3, 4))
    program = g.capture(Two(), (a, b), {"shift": c}, dynamic_shapes="batch")
    feed = Feed(program)
    for batch in ({"shift": c, "scale": b, "x": a}, ([a, b, c], None)):
        found = feed.fit(batch)
        assert torch.equal(program.module()(*found.args, **found.kwargs), torch.full((3, 2), 10.0))
    with pytest.raises(BadInput, match='lacks the input "scale"'):
        feed.fit({"x": a, "shift": c})
    with pytest.raises(BadInput, match=r'lacks the input "scale" \(what is second in it are the labels\): a batch is'):
        feed.fit((a, b))
    with pytest.raises(BadInput, match='no input "y" in the program; it takes x, scale, shift'):
        feed.fit({"x": a, "y": b})
    with pytest.raises(BadInput, match="a batch has 4 inputs"):
        feed.fit(([a, b, c, c], None))


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(4, 8, 8), r'input "input" has shape \(4, 8, 8\), the program takes \(batch, 1, 8, 8\)'),
        (torch.zeros(4, 3, 8, 8), r"has shape \(4, 3, 8, 8\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.float64), "is torch.float64, the program takes torch.float32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(x, says):
    with pytest.raises(BadInput, match=says):
        Distill()(small(4), data=[(x, torch.zeros(4).long())])


def test_filling_up_a_batch_leaves_alone_what_is_not_batched():
    """A table as long as the short batch, as an input and as an output."""

    class Anchored(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.head = nn.Linear(4, classes)

        def forward(self, x, table):
            return self.head(x) @ table, table * 2

    program = g.capture(Anchored(3), (torch.zeros(5, 4), torch.zeros(3, 3)))
    x, table = torch.randn(3, 4), torch.randn(3, 3)

    def metric(outputs, labels):
        assert outputs[0].shape == (3, 3)
        assert torch.equal(outputs[1], table * 2)
        return outputs[0].sum(1)

    expected = program.module()(torch.cat([x, x[-1:], x[-1:]]), table)[0][:3].sum(1).mean().item()
    assert evaluate(program, [((x, table), torch.zeros(3))], metric) == pytest.approx(expected)
    program = g.capture(Anchored(5), (torch.zeros(5, 4), torch.zeros(5, 5)))  # the table is complete already
    (batch,) = Feed(program).batches([((x, table := torch.randn(5, 5)), torch.zeros(3))], pad=True)
    assert batch.args[0].shape == (5, 4)
    assert torch.equal(batch.args[1], table)


def test_evaluate_restores_every_flag_and_takes_a_metric():
    _, val = loaders()
    model = network(6).train()
    model[3].eval()
    modes = [m.training for m in model.modules()]
    program = capture(model)
    code = program.module().train().code
    assert evaluate(model, val) == evaluate(program, val)
    assert [m.training for m in model.modules()] == modes
    assert program.module().training
    assert program.module().code == code
    margin = evaluate(program, val, lambda outputs, labels: outputs.max(1).values)
    assert margin == pytest.approx(torch.cat([program.module().eval()(x).max(1).values for x, _ in val]).mean().item())
    with pytest.raises(BadInput, match="val: the batches have no labels"):
        evaluate(program, [torch.zeros(3, 1, 8, 8)])
    with pytest.raises(BadInput, match="metric: does not take these outputs"):
        evaluate(program, [(torch.zeros(3, 1, 8, 8), torch.zeros(2))])
    with pytest.raises(BadInput, match="yields nothing"):
        evaluate(program, [])


def test_class_scores_are_found_or_asked_for():
    scores = torch.zeros(2, 3)
    assert logits_of(scores) is logits_of([scores]) is logits_of({"logits": scores, "h": scores}) is scores
    with pytest.raises(BadInput, match=r"no single tensor of class scores \(found \(2, 3\), \(2, 3\)\)"):
        logits_of((scores, scores))
    assert accuracy(torch.eye(3), torch.tensor([0, 2, -100])).tolist() == [1.0, 0.0]
    assert default_loss(torch.eye(3), torch.tensor([0, -100, -100])) < 0.6


def test_processes_share_the_batches():
    data = DataLoader(TensorDataset(torch.arange(22)), 4)
    whole = [b[0].tolist() for b in data]
    for even, count in itertools.product((True, False), (1, 2, 4)):
        parts = [shard(data, i, count, even) for i in range(count)]
        taken = [[b[0].tolist() for b in part] for part in parts]
        assert [len(p) for p in parts] == [len(t) for t in taken]
        merged = [b for group in itertools.zip_longest(*taken) for b in group if b is not None]
        assert merged == (whole[: len(whole) // count * count] if even else whole)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(6))

    assert [b.tolist() for b in shard(DataLoader(Stream(), 2), 1, 2)] == [[2, 3]]
    assert list(Every("abcde", 0, 2, even=False)) == ["a", "c", "e"]
