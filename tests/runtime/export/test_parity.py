from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.graph.errors import BadInput, Refused
from graphcomb.graph.program import Program
from graphcomb.runtime.export.output_error import output_error, relative_error
from graphcomb.runtime.export.parity import input_sets, parity, random_like
from graphcomb.runtime.onnx_file import TensorSpec


class Fake:
    """An engine that computes a function of its first input; it remembers the inputs' shapes."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], dtype: str = "float32"):
        self.function, self.seen = function, []
        self.inputs, self.outputs = [TensorSpec("x", dtype, (None, 4))], [TensorSpec("y", dtype, (None, 4))]
        self.input_names = ["x"]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.seen.append((inputs[0].shape, str(inputs[0].dtype)))
        return [self.function(inputs[0])]

    def close(self) -> None:
        """Nothing to release."""


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.fixture(scope="module")
def program() -> Program:
    return g.capture(Double(), torch.ones(3, 4), dynamic_shapes="batch")


def test_an_equal_engine(program: Program) -> None:
    engine = Fake(lambda x: 2 * x, "float16")
    checks = parity(program, engine)
    assert [(c.inputs, c.batch) for c in checks] == [("example", 3), ("random", 1), ("random", 3), ("random", 4)]
    assert engine.seen == [((n, 4), "float16") for n in (3, 1, 3, 4)]
    assert 0 < max(c.error for c in checks) < 1e-3


def test_an_engine_that_is_right_on_the_example_only(program: Program) -> None:
    errors = [c.error for c in parity(program, Fake(lambda x: x + 1))]
    assert errors[0] == 0
    assert min(errors[1:]) > 0.1


def test_an_engine_that_is_wrong_at_batch_1_only(program: Program) -> None:
    checks = parity(program, Fake(lambda x: 2 * x + (len(x) == 1)))
    assert [c.batch for c in checks if c.error > 1e-3] == [1]


def test_engines_with_other_tensors(program: Program) -> None:
    with pytest.raises(Refused, match=r"y: the engine gives shape \(4, 3\), the program \(3, 4\)"):
        parity(program, Fake(lambda x: x.T))
    engine = Fake(lambda x: x)
    engine.inputs = engine.inputs * 2
    with pytest.raises(Refused, match="2 inputs, the program 1"):
        parity(program, engine)
    engine = Fake(lambda x: x)
    engine.run = lambda inputs: []  # type: ignore[method-assign]
    with pytest.raises(Refused, match="0 outputs, the program 1"):
        parity(program, engine)


def test_batch_sizes_that_the_program_does_not_take() -> None:
    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x.reshape(-1, 2, 4).flatten(0, 1)

    pairs = torch.export.Dim("pairs")
    program = g.capture(Pairs(), torch.ones(4, 4), dynamic_shapes=({0: 2 * pairs},))
    checks = parity(program, Fake(lambda x: 2 * x))
    assert [(c.inputs, c.batch) for c in checks] == [("example", 4), ("random", 4)]


def test_relative_error() -> None:
    wanted = np.array([1.0, -4.0, np.inf])
    assert relative_error(np.array([1.0, -4.0, np.inf]), wanted) == 0
    assert relative_error(np.array([1.5, -4.0, np.inf]), wanted) == 0.125
    assert relative_error(np.array([1.0, np.nan, np.inf]), wanted) == np.inf
    assert relative_error(np.array([1.0, -4.0, 5.0]), wanted) == np.inf
    assert relative_error(np.array([0.5]), np.array([0.0])) == 0.5


def test_random_inputs_look_like_the_example() -> None:
    generator = torch.Generator().manual_seed(0)
    image = random_like(5 + 3 * torch.randn(4, 100, generator=torch.Generator().manual_seed(1)), generator, batch=50)
    assert image.shape == (50, 100)
    assert abs(image.mean() - 5) < 0.3
    assert abs(image.std() - 3) < 0.3
    index = random_like(torch.tensor([2, 9, 4]), generator, batch=1000)
    assert (int(index.min()), int(index.max())) == (2, 9)
    assert random_like(torch.tensor([True, False]), generator).dtype == torch.bool
    assert random_like(torch.zeros(2, dtype=torch.float16), generator).abs().sum() > 0


def test_only_inputs_with_the_batch_change_size() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            return x @ table

    batch = torch.export.Dim("batch")
    program = g.capture(Two(), (torch.randn(3, 4), torch.randn(4, 4)), dynamic_shapes=({0: batch}, None))
    shapes = [tuple(tuple(a.shape) for a in args) for _, _, args, _ in input_sets(program)]
    assert shapes == [((n, 4), (4, 4)) for n in (3, 1, 3, 4)]


# ------------------------------------------------------------------------------------------------------------ channels
def detections(seed: int = 0) -> np.ndarray:
    """Boxes in pixels beside class scores, as one-stage detectors give them: (batch, 4 + classes, places)."""
    generator = np.random.default_rng(seed)
    boxes, scores = generator.uniform(0, 640, (1, 4, 300)), generator.beta(0.3, 3, (1, 20, 300))
    return np.concatenate([boxes, scores], 1)


@pytest.mark.parametrize("axis", [1, 2])
def test_shuffled_class_scores_beside_boxes_are_found(axis: int) -> None:
    wanted = detections() if axis == 1 else detections().swapaxes(1, 2)
    found = wanted.copy()
    scores = (slice(None),) * axis + (slice(4, None),)
    found[scores] = np.roll(found[scores], 1, axis)
    off = output_error(found, wanted)
    assert off.error < 2e-3, "next to the boxes they are nothing"
    assert off.channel > 0.5
    assert off.where.endswith(f"axis {axis}")
    assert off.correlation < 0.2
    assert "of the scale of channel" in off.wrong(0.1)


@pytest.mark.parametrize("scores", [1.0, 1e-2, 1e-4])
def test_rounding_to_fp16_is_within_the_limits_of_every_channel(scores: float) -> None:
    wanted = detections()
    wanted[:, 4:] *= scores
    off = output_error(wanted.astype(np.float16).astype(np.float32), wanted)
    assert off.wrong(0.1) == ""
    assert off.channel < 1e-2


def test_logits_that_are_small_by_chance_have_the_scale_of_others() -> None:
    generator = np.random.default_rng(0)
    wanted = generator.standard_normal((4, 1000))
    off = output_error(wanted + 1e-3 * generator.standard_normal(wanted.shape), wanted)
    assert off.wrong(0.1) == ""
    assert off.channel < 0.05


def test_indices_count_by_how_many_differ() -> None:
    wanted = np.arange(1000).reshape(10, 100)
    found = wanted.copy()
    found[0, :10] = 7000
    assert output_error(found, wanted).error == pytest.approx(0.01)
    assert output_error(wanted > 5, wanted > 5).error == 0


def test_decisions_that_differ_by_a_hair_are_the_same() -> None:
    wanted = np.array([[1.0, 0.999, -1.0], [3.0, 1.0, 0.0]])
    assert output_error(np.array([[0.999, 1.0, -1.0], [3.0, 1.0, 0.0]]), wanted).agreement == 1
    assert output_error(np.array([[0.9, 1.0, -1.0], [0.5, 1.0, 0.0]]), wanted).agreement == 0.5


TWO = torch.ones(2, 4)


@pytest.mark.parametrize(
    "batch",
    [TWO, (TWO, torch.zeros(2)), ((TWO,), {}), [TWO], {"x": TWO}],
    ids=["tensor", "with labels", "args and kwargs", "list", "by name"],
)  # fmt: skip
def test_real_samples_come_as_loaders_yield_them(program: Program, batch: object) -> None:
    checks = parity(program, Fake(lambda x: 2 * x), data=[batch])
    assert [(c.inputs, c.batch, c.error) for c in checks if c.real] == [("data", 2, 0.0)]


def test_samples_that_do_not_fit_are_one_line(program: Program) -> None:
    with pytest.raises(BadInput, match="data: a str is neither"):
        parity(program, Fake(lambda x: 2 * x), data=["image.png"])


def test_real_samples_count_by_what_is_decided(program: Program) -> None:
    batches = [((torch.randn(5, 4),), {}) for _ in range(9)]
    engine = Fake(lambda x: 2 * x)
    checks = parity(program, engine, data=batches)
    assert [(c.inputs, c.batch) for c in checks if c.real] == [("data", 5)] * 3 + [("data", 1)]
    assert {c.agreement for c in checks} == {1.0}
    assert [c.wrong(1e-4) for c in checks] == [""] * len(checks)
    turned = parity(program, Fake(lambda x: np.where(x == x.max(1, keepdims=True), x - 0.2, 2 * x)), data=batches)
    assert min(c.agreement for c in turned if c.agreement is not None) < 0.9


def test_differences_below_what_an_engine_can_resolve_count_as_none() -> None:
    wanted = np.full((2, 3, 10, 10), 1e-9)
    wanted[:, 0] = 0.5
    found = wanted + 1e-7
    assert output_error(found, wanted).channel > 1
    assert output_error(found, wanted, least=1e-6).worst == 0
    assert output_error(found * 1e-4, wanted * 1e-4, least=1e-6).channel > 1  # nothing of it could be seen
    found[:, 0] += 1e-3
    assert output_error(found, wanted, least=1e-6).error == pytest.approx(2e-3, rel=1e-3)
