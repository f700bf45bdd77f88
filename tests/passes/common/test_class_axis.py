"""Which dimension of the class scores holds the classes: found with certainty, declared, or refused with what to give."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.passes import Distill, PruneDepth, Sparsify
from graphcomb.passes.common.class_axis import class_axis, other_outputs
from graphcomb.passes.common.losses import accuracy, default_loss
from graphcomb.passes.train.teaching import soft_kl

CLASSES, QUERIES = 5, 7


class Queries(nn.Module):
    """A head like DETR's: class scores `(N, queries, classes)`, put out in different ways."""

    def __init__(self, form="plain", seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.form, self.query = form, nn.Parameter(torch.randn(QUERIES, 16))
        self.body, self.classes, self.boxes = nn.Linear(3, 16), nn.Linear(16, CLASSES), nn.Linear(16, 4)

    def forward(self, x):
        memory = self.body(x.flatten(2).transpose(1, 2))
        found = self.query + (self.query @ memory.transpose(1, 2)).softmax(-1) @ memory
        scores, boxes = self.classes(found), self.boxes(found).sigmoid()
        if self.form == "named":
            return {"logits": scores, "pred_boxes": boxes}
        if self.form == "unnamed":
            return {"pred_logits": scores, "pred_boxes": boxes}
        if self.form == "joined":
            return torch.cat([scores, boxes], -1)
        if self.form == "turned":
            return scores.transpose(1, 2)
        if self.form == "layers":
            return torch.stack([scores + 1, scores])[-1]
        return scores


class First(nn.Module):
    """The first channels of its input."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x):
        return x[:, : self.count]


@functools.cache
def captured(form="plain", seed=0):
    return g.capture(Queries(form, seed), torch.randn(2, 3, 4, 4), dynamic_shapes="batch")


def images(count=3):
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 4, 4, generator=draw) for _ in range(count)]


@pytest.mark.parametrize(("form", "dim"), [("plain", 2), ("named", 2), ("turned", 1), ("layers", 2), ("joined", None)])
def test_the_graph_tells_where_the_classes_of_a_head_are(form, dim):
    assert class_axis(captured(form)) == dim


@pytest.mark.parametrize(
    ("head", "dim"),
    [
        (nn.Conv2d(3, 6, 1), 1),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Upsample(scale_factor=2)), 1),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 1),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(2)), 1),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout()), 3),
        (nn.Sequential(nn.Conv2d(3, 6, 1), First(4)), 1),
        (nn.Sequential(nn.Linear(4, 1), nn.Conv2d(3, 1, 1)), None),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(1)), None),
        (nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(1), nn.Unflatten(1, (2, 48))), None),
    ],
)
def test_the_classes_are_followed_through_what_only_moves_them(head, dim):
    assert class_axis(g.capture(head, torch.randn(2, 3, 4, 4), dynamic_shapes="batch")) == dim


@pytest.mark.parametrize("form", ["plain", "named", "turned"])
def test_queries_are_distilled_over_their_classes(form):
    student, teacher = captured(form, seed=1), captured(form)
    x = images()
    result = Distill(steps=1, labels=False, temperature=3.0)(student, data=x[:1], teacher=teacher)
    ours, theirs = (captured("plain", seed).module()(x[0]) / 3 for seed in (1, 0))
    pairs = zip(ours.reshape(-1, CLASSES), theirs.reshape(-1, CLASSES), strict=True)
    expected = 9 * sum((t.softmax(0) * (t.log_softmax(0) - s.log_softmax(0))).sum() for s, t in pairs) / (4 * QUERIES)
    assert result.record["epochs"][0]["kl"] == pytest.approx(expected.item(), rel=1e-5)
    rows = {row["what"] for row in result.record["refused"]}
    assert rows == ({"pred_boxes"} if form == "named" else set())
    assert other_outputs(student) == sorted(rows)


def test_scores_of_unknown_classes_are_refused_until_the_dimension_is_given():
    student, teacher, x = captured("joined", seed=1), captured("joined"), images()
    with pytest.raises(BadInput, match=r"\(4, 7, 9\) may be the classes; set Distill's class_dim .* or alpha to 0"):
        Distill(labels=False)(student, data=x, teacher=teacher)
    last, same = (Distill(steps=1, labels=False, class_dim=d)(student, data=x, teacher=teacher) for d in (2, -1))
    first = Distill(steps=1, labels=False, class_dim=1)(student, data=x, teacher=teacher)
    assert last.record["epochs"] == same.record["epochs"] != first.record["epochs"]
    with pytest.raises(BadInput, match="class_dim: 3 is no dimension"):
        Distill(labels=False, class_dim=3)(student, data=x, teacher=teacher)
    with pytest.raises(BadInput, match=r"Distill.class_dim: a dimension besides the batch's"):
        Distill(class_dim=0)
    with pytest.raises(BadInput, match="may be the classes"):
        soft_kl(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), 1.0)


def test_labels_tell_the_dimension_to_loss_and_metric():
    scores = torch.randn(3, QUERIES, CLASSES)
    labels = torch.randint(CLASSES, (3, QUERIES))
    expected = F.cross_entropy(scores.reshape(-1, CLASSES), labels.reshape(-1))
    for given in ((scores, labels), (scores.transpose(1, 2), labels)):
        torch.testing.assert_close(default_loss(*given), expected)
        hits = (scores.argmax(-1) == labels).float()
        assert torch.equal(accuracy(*given), hits[labels >= 0])
    with pytest.raises(BadInput, match=r"\(3, 5, 5\) may be the classes; give metric="):
        accuracy(torch.zeros(3, 5, 5), torch.zeros(3, 5, dtype=torch.int64))
    pixels = torch.randn(2, 4, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
    torch.testing.assert_close(default_loss(*pixels), F.cross_entropy(*pixels))
    with pytest.raises(ValueError, match=r"a class for each of \(3,\), the labels are \(1,\)"):
        accuracy(torch.zeros(3, 4), torch.zeros(1, dtype=torch.int64))


def test_several_outputs_without_names_are_refused_with_the_way_out():
    student, teacher, x = captured("unnamed", seed=1), captured("unnamed"), images()
    labelled = [(image, torch.randint(CLASSES, (4, QUERIES))) for image in x]
    with pytest.raises(BadInput, match=r"no single tensor of class scores .* set Distill's alpha to 0"):
        Distill(labels=False)(student, data=x, teacher=teacher)
    with pytest.raises(BadInput, match=r"no single tensor of class scores .* give loss="):
        Distill(alpha=0.0)(student, data=labelled, teacher=teacher)
    with pytest.raises(BadInput, match=r"no single tensor of class scores .* give metric="):
        Distill(alpha=0.0)(student, data=labelled, val=labelled, teacher=teacher)
    with pytest.raises(BadInput, match=r'no single tensor of class scores .* set against to "labels"'):
        Sparsify(include=("body.weight",), against="teacher", gradients=4, block=3)(student, data=x, teacher=teacher)

    def own(outputs, labels):
        return F.cross_entropy(outputs["pred_logits"].transpose(1, 2), labels) + outputs["pred_boxes"].mean()

    result = Distill(alpha=0.0)(student, data=labelled, teacher=teacher, loss=own)
    assert result.record["epochs"][0]["task"] > 0
    assert result.record["refused"] == []


def test_labels_drawn_from_a_teacher_are_classes_of_queries():
    student = captured(seed=1)
    pass_ = Sparsify(include=("body.weight",), against="teacher", gradients=8, block=3)
    turned = captured("turned", seed=1)
    results = [pass_(p, data=images(), teacher=p) for p in (student, turned)]
    assert torch.equal(*(r.program.module().get_parameter("body.weight") == 0 for r in results))


def test_a_supernet_says_what_else_to_do():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x):
            x = x + self.b(F.relu(self.a(x)))
            return self.head(x), x.mean((2, 3))

    program = g.capture(Blocks(), torch.randn(2, 3, 8, 8), dynamic_shapes="batch")
    with pytest.raises(BadInput, match=r"no single tensor of class scores .* set PruneDepth's supernet_steps to 0"):
        PruneDepth(blocks=1, supernet_steps=2)(program, data=[torch.randn(4, 3, 8, 8)] * 2)
