"""Distillation of networks with several outputs."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb as g
from graphcomb.graph.errors import BadInput
from graphcomb.passes import Distill, RemoveChannels
from graphcomb.passes.common.scoring import evaluate
from graphcomb.passes.train.distill import channel_wise
from graphcomb.passes.train.teaching import binary_kl, soft_kl

from ..toys import Cut, Stop

SCORES, BOXES = (2, 6, 3), (2, 6, 4)


class Detector(nn.Module):
    """Scores of 3 classes and boxes at 16 positions, and values that nothing teaches; all by name."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, 2, 1)
        self.neck = nn.Conv2d(12, 16, 3, 1, 1)
        self.scores, self.boxes, self.other = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x = self.neck(self.stem(x).relu()).relu()
        return {"scores": self.scores(x), "found": [self.boxes(x).sigmoid()], "other": self.other(x)}


def detection_loss(outputs, targets):
    return sum(F.mse_loss(outputs["found"][0][i].mean((1, 2)), t["boxes"][0]) for i, t in enumerate(targets)) / len(
        targets
    )


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return g.capture(Detector().eval(), (torch.randn(2, 1, 8, 8),), dynamic_shapes="batch")


def batches(count=3):
    """Images, and targets as detection data sets have them: a list of dicts."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        targets = [{"boxes": torch.rand(1, 4, generator=generator), "labels": torch.tensor([1])} for _ in range(4)]
        yield torch.randn(4, 1, 8, 8, generator=generator), targets


def lesson(student, teacher, **options):
    return Distill(steps=1, **options).lesson(student, teacher)


def test_each_form_is_what_its_definition_says():
    torch.manual_seed(0)
    s, t = ({"scores": 3 * torch.randn(SCORES), "boxes": torch.rand(BOXES)} for _ in range(2))
    p, q = t["scores"].sigmoid(), s["scores"].sigmoid()
    bernoulli = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum() / p.sum()
    found = lesson(s, t, outputs={"scores": "binary"}, temperature=1.0)
    torch.testing.assert_close(found, bernoulli)
    sure = p.amax(2) >= 0.9
    assert 0 < sure.sum() < sure.numel()
    distance = (s["boxes"] - t["boxes"]).abs().mean(2)[sure].mean()
    found = lesson(
        s, t, outputs={"scores": "binary", "boxes": "boxes"}, temperature=1.0, weights={"boxes": 5}, confident=0.9
    )
    torch.testing.assert_close(found, bernoulli + 5 * distance)
    by_softmax = lesson(
        s, t, outputs={"scores": -1, "boxes": "boxes"}, weights={"scores": 0}, confident=0.8, background=2
    )
    sure = t["scores"].softmax(2)[..., :2].amax(2) >= 0.8
    torch.testing.assert_close(by_softmax, (s["boxes"] - t["boxes"]).abs().mean(2)[sure].mean())
    found = lesson(s, t, outputs={"scores": 2}, temperature=3.0)
    torch.testing.assert_close(found, soft_kl(s["scores"], t["scores"], 3.0, 2))
    found = lesson(s, t, outputs={"boxes": "values"})
    torch.testing.assert_close(found, (s["boxes"] - t["boxes"]).square().mean() / t["boxes"].square().mean())


def test_a_teacher_that_is_nowhere_sure_teaches_no_boxes():
    s, t = ({"scores": torch.full(SCORES, -9.0), "boxes": torch.rand(BOXES)} for _ in range(2))
    assert lesson(s, t, outputs={"scores": "binary", "boxes": "boxes"}, weights={"scores": 0}) == 0
    assert binary_kl(t["scores"], t["scores"], 2.0) == 0


def test_a_function_of_both_outputs():
    def matched(student, teacher):
        return (student["boxes"].sort(1).values - teacher["boxes"].sort(1).values).abs().mean()

    t = {"boxes": torch.rand(BOXES)}
    assert lesson({"boxes": t["boxes"].flip(1)}, t, outputs=matched) == 0
    with pytest.raises(BadInput, match=r"Distill\.outputs: must return a scalar tensor, got int"):
        lesson(t, t, outputs=lambda student, teacher: 1)


def test_a_checkpoint_of_another_function_is_not_taken(dense, tmp_path):
    def passes():
        for weight in (1.0, 2.0):
            yield Distill(
                checkpoint_every=1,
                labels=False,
                outputs=lambda s, t, w=weight: w * (s["scores"] - t["scores"]).abs().mean(),
            )

    data = [images for images, _ in batches()]
    first, second = passes()
    with pytest.raises(Stop):
        first(dense, data=Cut(data, 2), teacher=dense, out=tmp_path)
    assert "resumed_at" not in second(dense, data=data, teacher=dense, out=tmp_path).record
    assert first(dense, data=data, teacher=dense, out=tmp_path).record["resumed_at"] >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"outputs": {"scores": "softmax"}},
            r"outputs: .*the dimension of the classes or one of binary, boxes, values",
        ),
        ({"outputs": {}}, "names at least one output"),
        ({"weights": {"boxes": 2.0}}, "weights are for outputs by name"),
        ({"outputs": {"scores": 1}, "weights": {"boxes": 2.0}}, "the weight of boxes belongs to no output named"),
        ({"outputs": {"scores": 0}}, "the dimension of the classes"),
    ],
)
def test_odd_forms_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        Distill(**options)


def test_a_pruned_detector_learns_all_of_its_teachers_outputs(dense):
    pruned = RemoveChannels(macs=0.6)(dense).program
    forms = {"scores": "binary", "found.0": "boxes"}
    train = Distill(steps=60, lr=1e-2, alpha=1.0, outputs=forms, confident=0.3, labels=False)
    data = [images for images, _ in batches()]
    result = train(pruned, data=data, teacher=dense)

    def far(program):
        with torch.no_grad():
            return float(sum(train.lesson(program.module()(x), dense.module()(x)) for x in data))

    assert far(result.program) < 0.5 * far(pruned)
    assert result.record["refused"] == []


def test_a_loss_of_its_own_and_targets_as_lists_of_dicts(dense):
    result = Distill(steps=20, lr=1e-2, alpha=0.3, outputs={"scores": "binary"})(
        dense, data=list(batches()), teacher=dense, loss=detection_loss
    )
    before, after = (
        sum(float(detection_loss(p.module()(x), y).detach()) for x, y in batches()) for p in (dense, result.program)
    )
    assert after < before


def test_what_is_not_there_is_named(dense):
    with pytest.raises(BadInput, match=r"the model has no output found; .*found\.0"):
        Distill(steps=1, alpha=1.0, outputs={"found": "boxes"})(
            dense, data=list(batches()), teacher=dense, loss=detection_loss
        )


class Best:
    """A metric that is no mean: the largest score of all batches."""

    def reset(self):
        self.value = -math.inf

    def update(self, outputs, targets):
        assert len(targets) == len(outputs["scores"])
        self.value = max(self.value, float(outputs["scores"].max()))

    def compute(self):
        return torch.tensor(self.value)


def test_a_metric_that_is_no_mean(dense):
    expected = max(float(dense.module()(x)["scores"].detach().max()) for x, _ in batches())
    assert evaluate(dense, list(batches()), Best()) == pytest.approx(expected)
    assert evaluate(dense, list(batches()), Best) == pytest.approx(expected)

    class Whole(Best):
        def compute(self):
            return {"map": 1.0, "map_50": 2.0}

    with pytest.raises(BadInput, match="metric: has to give one number, not a mapping with map, map_50"):
        evaluate(dense, list(batches()), Whole())


def test_channel_wise_is_its_definition_and_knows_only_where():
    s, t = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 4, 3)
    p, q = (x.flatten(2).div(4).softmax(2) for x in (t, s))
    torch.testing.assert_close(channel_wise([s], [t]), 16 * (p * (p / q).log()).sum(2).mean())
    torch.testing.assert_close(
        channel_wise([s.flatten(2).transpose(1, 2)], [t.flatten(2).transpose(1, 2)]), channel_wise([s], [t])
    )
    assert float(channel_wise([t + torch.randn(2, 5, 1, 1)], [t])) < 1e-6


def test_the_neck_is_compared_on_the_channels_that_are_left(dense):
    """Where the neck alone is narrower, its channels are still what they were: nothing is left to learn."""
    student = RemoveChannels(ratio=0.5, importance="magnitude", keep={"stem*": 1.0})(dense).program
    assert student.module().neck.weight.shape[:2] == (8, 12)
    train = Distill(steps=1, alpha=0.0, channels=1.0, at=("neck",), labels=True)
    result = train(student, data=list(batches()), teacher=dense, loss=detection_loss)
    assert result.record["matched"] == ["conv2d_1"]
    assert result.record["epochs"][0]["channels"] < 1e-6


def test_the_neck_is_compared_while_it_shrinks(dense):
    train = Distill(steps=12, alpha=0.0, channels=1.0, at=("neck",), lr=1e-2)
    pass_ = RemoveChannels(macs=0.6, importance="magnitude", schedule="adaptive", interval=2, train=train)
    result = pass_(dense, data=list(batches()), teacher=dense, loss=detection_loss)
    assert result.program.module().neck.weight.shape[0] < 16
    assert result.record["matched"] == ["conv2d_1"]


def test_modules_that_are_not_there_are_named(dense):
    with pytest.raises(BadInput, match=r"Distill\.at: no module nek gives a map or a sequence; did you mean neck"):
        Distill(steps=1, alpha=0.0, channels=1.0, at=("nek",))(
            dense, data=list(batches()), teacher=dense, loss=detection_loss
        )
    with pytest.raises(BadInput, match="at: empty, unless features or channels is above 0"):
        Distill(at=("neck",))
