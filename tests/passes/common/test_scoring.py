"""The mean of a metric, and its interval."""

import numpy as np
import pytest
import torch
from torch import nn

from graphcomb.passes.common.scoring import estimate, evaluate


def per_sample(outputs, values):
    return values


def over(values, metric=per_sample, size=10):
    return estimate(nn.Identity(), [(v, v) for v in values.split(size)], metric)


def shares(hits, count):
    return torch.arange(count).lt(hits).float()[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"), [(90, 100, 0.8256, 0.9448), (20, 20, 0.8389, 1.0), (0, 7, 0.0, 0.3543)]
)
def test_a_share_has_wilsons_interval(hits, count, low, high):
    found = over(shares(hits, count))
    assert found.mean == pytest.approx(hits / count)
    assert found.interval == pytest.approx((low, high), abs=1e-4)


def test_intervals_hold_in_95_percent_of_the_draws():
    generator, inside = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = over(torch.from_numpy(generator.gamma(2.0, 1.5, 40)).float()).interval
        inside += low <= 3.0 <= high
    assert 180 <= inside <= 199


def test_the_interval_does_not_depend_on_the_batches():
    values = torch.rand(60, generator=torch.Generator().manual_seed(0))
    assert over(values, size=7).interval == pytest.approx(over(values, size=60).interval, rel=1e-6)


def test_pixels_of_an_image_are_not_independent():
    """1,000 pixels that are right or wrong together are one sample."""
    images = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.5, 1.0])
    found = estimate(
        nn.Identity(), [(v.expand(1, 1000), v.expand(1, 1000)) for v in images], lambda outputs, values: values
    )
    assert found.mean == pytest.approx(0.75)
    assert found.interval == pytest.approx(over(images, size=1).interval, rel=1e-6)


def test_a_metric_that_is_no_mean_and_few_samples_have_none():
    class Whole:
        def reset(self):
            self.seen = 0

        def update(self, outputs, labels):
            self.seen += len(labels)

        def compute(self):
            return self.seen

    assert over(torch.rand(60), Whole) == (60, None)
    assert over(torch.tensor([0.2, 0.4])).interval is None
    assert over(torch.tensor([float("nan")] * 20)).interval is None
    assert evaluate(nn.Identity(), [(torch.ones(3), torch.ones(3))], per_sample) == 1
