"""The closed form, against torch's own least squares on stacked rows."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcomb.passes.repair.least_squares import (
    BLOCK,
    DECIDE,
    RIDGES,
    WORTH,
    Fit,
    Stack,
    Sums,
    _best,
    fit,
    solve,
)  # fmt: skip
from graphcomb.passes.repair.problems import ROUNDED


def sums_of(x: torch.Tensor, y: torch.Tensor) -> Sums:
    sums = Sums.zeros(1, x.shape[1], y.shape[1], x.device)
    sums.add(x[None], y[None])
    return sums


def rows(seed: int, n: int = 60, u: int = 7, o: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, u, generator=generator, dtype=torch.float64) @ torch.randn(u, u, generator=generator).double()
    y = torch.randn(n, o, generator=generator, dtype=torch.float64) + x[:, :1] + 3
    return x + 2, y


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_without_a_ridge_it_is_least_squares_on_the_stacked_rows(seed: int, bias: bool) -> None:
    x, y = rows(seed)
    old = torch.zeros(1, 4, 7, dtype=torch.float64)
    weight, constant = solve(sums_of(x, y), old, torch.zeros(1, 4, dtype=torch.float64) if bias else None, 0.0)
    full = torch.cat([x, torch.ones(len(x), 1)], 1) if bias else x
    expected = torch.linalg.lstsq(full, y).solution.T
    torch.testing.assert_close(weight[0], expected[:, :7], rtol=1e-9, atol=1e-9)
    if bias:
        torch.testing.assert_close(constant[0], expected[:, 7], rtol=1e-9, atol=1e-9)


def test_the_ridge_holds_weights_where_they_are() -> None:
    x, y = rows(1)
    old = torch.randn(1, 4, 7, dtype=torch.float64)
    diagonal = (x - x.mean(0)).square().sum(0)
    weight, _ = solve(sums_of(x, y), old, torch.zeros(1, 4, dtype=torch.float64), 0.3)
    wide = torch.cat([x - x.mean(0), (0.3 * diagonal).sqrt().diag()])
    goal = torch.cat([y - y.mean(0) - (x - x.mean(0)) @ old[0].T, torch.zeros(7, 4)])
    expected = old[0] + torch.linalg.lstsq(wide, goal).solution.T
    torch.testing.assert_close(weight[0], expected, rtol=1e-9, atol=1e-9)
    far, _ = solve(sums_of(x, y), old, torch.zeros(1, 4, dtype=torch.float64), 1e12)
    torch.testing.assert_close(far, old, rtol=0, atol=1e-9)


def squared_error(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    constant = 0 if bias is None else bias[0]
    return float((y - x @ weight[0].T - constant).square().sum())


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=10, deadline=None)
def test_losses_are_the_squared_errors_of_the_rows(seed: int, centred: bool) -> None:
    x, y = rows(seed)
    old, bias = torch.randn(1, 4, 7, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64) if centred else None
    found = fit((sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2])), old, bias, 0.1)
    assert found.before == pytest.approx(squared_error(x, y, old, bias), rel=1e-10)
    assert found.predicted == pytest.approx(squared_error(x, y, found.weight, found.bias), rel=1e-10)
    assert found.total == pytest.approx(float((y - (y.mean(0) if centred else 0)).square().sum()), rel=1e-10)
    assert found.rows == len(x)


@given(st.integers(0, 10_000), st.integers(0, 60), st.booleans())
@settings(max_examples=20, deadline=None)
def test_problems_of_two_parts_add_up_to_that_of_all_rows(seed: int, first: int, centred: bool) -> None:
    x, y = rows(seed)
    old, bias = torch.randn(1, 4, 7, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64) if centred else None
    parts = [sums_of(x[part], y[part]).problem(old, bias) for part in (slice(first), slice(first, None))]
    both, expected = parts[0].add(parts[1], False), sums_of(x, y).problem(old, bias)
    for name in ("count", "x", "y", "a", "wanted", "before", "total"):
        ours, exact = getattr(both, name), getattr(expected, name)
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10 * float(exact.abs().max()), msg=name)


def stack_of(x: torch.Tensor, y: torch.Tensor) -> Stack:
    stack = Stack(1, x.shape[1], y.shape[1], x.device)
    for part in (slice(0, 5), slice(5, None)):
        stack.add(x[None, part], y[None, part])
    return stack


@given(st.integers(0, 10_000), st.integers(1, 19), st.booleans(), st.sampled_from([1e-3, 1e-1, 1.0, 100.0]))
@settings(max_examples=40, deadline=None)
def test_few_rows_say_the_same_as_their_sums(seed: int, first: int, centred: bool, ridge: float) -> None:
    """Whatever is asked of them: alone and joined, for some outputs, without some inputs."""
    x, y = rows(seed, 20, 30, 6)
    x[:, 4], x[:, 5] = 3.0, x[:, 6]  # one is constant, two are the same
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(1, 6, 30, generator=generator, dtype=torch.float64)
    bias = torch.randn(1, 6, generator=generator, dtype=torch.float64) if centred else None
    kinds = [
        [make(x[part], y[part]).problem(old, bias) for part in (slice(first), slice(first, None))]
        for make in (sums_of, stack_of)
    ]
    (a, b), (c, d) = kinds
    some, lost = torch.randperm(6, generator=generator)[None, :3], torch.rand(1, 30, generator=generator) < 0.2
    for ours, wanted, other, same in (
        (c, a, d, b),
        (c.add(d, False), a.add(b, False), d, b),
        (c.without(lost), a.without(lost), d, b),
        tuple(p.outputs(some) for p in (c, a, d, b)),
    ):
        change = wanted.change(ridge)
        torch.testing.assert_close(ours.change(ridge), change, rtol=1e-6, atol=1e-9)
        assert ours.loss(other, change) == pytest.approx(wanted.loss(same, change), rel=1e-8, abs=1e-8)
        assert ours.loss_with(bias if ours.y.shape[1] == 6 else None) == pytest.approx(
            wanted.loss_with(bias if ours.y.shape[1] == 6 else None), rel=1e-8
        )
        torch.testing.assert_close(ours.constant(old[:, : ours.y.shape[1]]), wanted.constant(old[:, : ours.y.shape[1]]))
        torch.testing.assert_close(ours.unproven(change), wanted.unproven(change))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("ridge", [None, 0.1])
def test_the_fit_of_few_rows_is_that_of_their_sums(kind: torch.dtype, ridge: float | None) -> None:
    x, y = (t.to(kind) for t in rows(3, 40, 60, 300))
    old = 0.1 * torch.randn(1, 300, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros(1, 300, dtype=torch.float64)
    ours, wanted = (fit((of(x[::2], y[::2]), of(x[1::2], y[1::2])), old, zero, ridge) for of in (stack_of, sums_of))
    assert ours.ridge == wanted.ridge
    torch.testing.assert_close(ours.weight, wanted.weight, rtol=1e-3, atol=1e-4 if kind == torch.float32 else 1e-9)
    for name in ("before", "predicted", "held_before", "held", "total", "rows"):
        assert getattr(ours, name) == pytest.approx(getattr(wanted, name), rel=1e-4), name


def test_zeros_that_must_stay_stay_and_the_other_entries_solve_for_them() -> None:
    x, y = rows(3)
    old = torch.randn(1, 4, 7, dtype=torch.float64)
    fixed = torch.rand(1, 4, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    old[fixed] = 0
    weight, _ = solve(sums_of(x, y), old, None, 0.0, fixed)
    assert not weight[fixed].any()
    for row in range(4):
        free = ~fixed[0, row]
        expected = torch.linalg.lstsq(x[:, free], y[:, row]).solution
        torch.testing.assert_close(weight[0, row, free], expected, rtol=1e-8, atol=1e-8)


def test_what_the_rows_say_nothing_of_stays_as_it_is() -> None:
    """A constant input, one that is always zero, and two that are the same."""
    x, y = rows(4)
    x = torch.cat([x, torch.zeros(len(x), 1), torch.full((len(x), 1), 5.0), x[:, :1]], 1)
    old = torch.randn(1, 4, 10, dtype=torch.float64)
    found = fit((sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2])), old, torch.zeros(1, 4, dtype=torch.float64), None)
    torch.testing.assert_close(found.weight[..., 7:9], old[..., 7:9], rtol=0, atol=1e-6)
    assert found.weight.isfinite().all()
    assert found.predicted <= found.before


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_an_input_of_few_rows_gets_no_weight_that_would_drown_the_layer(kind: torch.dtype) -> None:
    """Of 2000 rows one has a little of input 6, and an output that differs by chance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 7, generator=generator).to(kind)
    x[:, 6] = 0
    old = torch.randn(1, 4, 7, generator=generator, dtype=torch.float64)
    y = x @ old[0].to(kind).T + x[:, :1] + 0.1 * torch.randn(2000, 4, generator=generator).to(kind)
    x[100, 6], y[100] = 1e-3, y[100] + 0.3
    zero = torch.zeros(1, 4, dtype=torch.float64)
    halves = (sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2]))
    found = fit(halves, old, zero, None)
    assert found.unproven == 1
    assert found.helps
    torch.testing.assert_close(found.weight[..., 6], old[..., 6], rtol=0, atol=1e-12)
    fixed = torch.zeros_like(old, dtype=torch.bool)
    fixed[..., 6] = True
    without, _ = solve(halves[0], old, zero, 0.0, fixed)
    torch.testing.assert_close(found.weight[..., :6], without[..., :6], rtol=0, atol=0.1)  # the others are fitted
    rest = y.double() - x.double() @ found.weight[0].T
    assert float((rest - rest.mean(0)).square().sum()) == pytest.approx(found.predicted, rel=1e-3)
    asked = fit(halves, old, zero, 1e-4)  # a ridge of the user's is that of the formula
    assert asked.unproven == 0
    assert float((asked.weight - old)[..., 6].abs().max()) > 100


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_an_input_that_varies_little_is_solved_for_where_it_matters(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    x[:, 6] *= 1e-4
    truth = torch.randn(1, 4, 7, generator=generator, dtype=torch.float64)
    truth[..., 6] *= 1e4
    y = x @ truth[0].T + noise * torch.randn(200, 4, generator=generator, dtype=torch.float64)
    zero = torch.zeros(1, 4, dtype=torch.float64)
    found = fit((sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2])), torch.zeros_like(truth), zero, None)
    assert found.unproven == 0
    torch.testing.assert_close(found.weight, truth, rtol=noise or 1e-8, atol=noise or 1e-8)


def test_halves_choose_a_large_ridge_where_rows_are_few_and_none_where_the_answer_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 20, generator=generator, dtype=torch.float64)
    truth = torch.randn(1, 5, 20, generator=generator, dtype=torch.float64)
    noise = 3 * torch.randn(24, 5, generator=generator, dtype=torch.float64)
    zero = torch.zeros(1, 5, dtype=torch.float64)
    noisy = fit((sums_of(x[::2], noise[::2]), sums_of(x[1::2], noise[1::2])), torch.zeros_like(truth), zero, None)
    assert noisy.ridge >= 0.1
    x = torch.randn(400, 20, generator=generator, dtype=torch.float64)
    y = x @ truth[0].T
    exact = fit((sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2])), torch.zeros_like(truth), zero, None)
    torch.testing.assert_close(exact.weight, truth, rtol=0, atol=1e-10)
    assert exact.helps


@pytest.mark.parametrize("u", [5, 600])
def test_float32_rows_keep_their_digits_about_large_means(u: int) -> None:
    """In several blocks, and wide enough for a product by panels, next to the same rows in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, BLOCK + 100, u, generator=generator) + 300
    y = x[..., :3] - 500 + torch.randn(1, BLOCK + 100, 3, generator=generator)
    single, double = (Sums.zeros(1, u, 3, x.device) for _ in range(2))
    single.add(x, y)
    double.add(x.double(), y.double())
    assert single.rounded
    assert not double.rounded
    weight, bias = torch.zeros(1, 3, u, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    ours, exact = (sums.problem(weight, bias) for sums in (single, double))
    largest = exact.a.diagonal(dim1=1, dim2=2).max()
    assert (ours.a - exact.a).abs().max() < 1e-5 * largest
    assert (ours.wanted - exact.wanted).abs().max() < 1e-5 * largest
    torch.testing.assert_close(ours.total, exact.total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 123.4])
def test_a_constant_input_keeps_its_weight(kind: torch.dtype, value: float) -> None:
    """Its deviation is a rounding error, which must not be divided by; other values on the other half make it vary."""
    x, y = rows(0, n=9000, u=5)
    x[:, 0] = value
    x, y = x.to(kind), y.to(kind)
    old = torch.ones(1, 4, 5, dtype=torch.float64)
    zero = torch.zeros(1, 4, dtype=torch.float64)
    found = fit((sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2])), old, zero, None)
    assert (found.weight[..., 0] == 1).all()
    assert (found.weight[..., 1:] - 1).abs().max() > 1e-2
    x[::2, 0] += 1
    found = fit((sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2])), old, zero, None)
    assert (found.weight[..., 0] != 1).all()


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_float64_rows_keep_their_digits_about_large_means(offset: float) -> None:
    x, y = rows(2)
    old, zero = torch.zeros(1, 4, 7, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    far = x + offset
    expected, _ = solve(sums_of(far - offset, y), old, zero, 0.0)
    weight, _ = solve(sums_of(far, y), old, zero, 0.0)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-13 * offset)


def test_sums_of_processes_join_to_those_of_all_rows() -> None:
    x, y = rows(3, n=90)
    x[:30] += 100
    parts = [sums_of(*pair) for pair in zip(x.split(30), y.split(30), strict=True)]
    barrier, shared = threading.Barrier(3), [torch.zeros(())] * 3

    def join(k: int) -> None:
        def total(tensor: torch.Tensor) -> torch.Tensor:
            shared[k] = tensor.clone()
            barrier.wait()
            result = torch.stack(shared).sum(0)
            barrier.wait()
            return result

        parts[k].join(total)

    threads = [threading.Thread(target=join, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = sums_of(x, y)
    for part in parts:
        for name in ("count", "x", "y", "xx", "yx", "yy"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name), rtol=1e-12, atol=1e-9)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=10, deadline=None)
def test_what_is_held_out_is_the_error_of_one_half_s_answer_on_the_other(seed: int, bias: bool) -> None:
    x, y = rows(seed)
    halves = sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2])
    old = torch.ones(1, 4, 7, dtype=torch.float64)
    zero = torch.zeros(1, 4, dtype=torch.float64) if bias else None
    expected = 0.0
    for k in range(2):
        expected += squared_error(x[1 - k :: 2], y[1 - k :: 2], *solve(halves[k], old, zero, 0.1))
    assert fit(halves, old, zero, 0.1).held == pytest.approx(expected, rel=1e-8)


def test_of_many_outputs_those_that_lose_most_choose_the_ridge_and_all_are_judged() -> None:
    """The first outputs are noise, for which a large ridge is best; the last ones, with more at stake, are not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 30, generator=generator, dtype=torch.float64)
    goals = [torch.randn(200, DECIDE, generator=generator, dtype=torch.float64)]
    goals += [30 * x @ torch.randn(30, DECIDE, generator=generator, dtype=torch.float64)]
    goals[1] += torch.randn(200, DECIDE, generator=generator, dtype=torch.float64)
    old = torch.zeros(1, 2 * DECIDE, 30, dtype=torch.float64)

    def fitted(y: torch.Tensor) -> Fit:
        return fit((sums_of(x[::2], y[::2]), sums_of(x[1::2], y[1::2])), old[:, : y.shape[1]], None, None)

    every, noise, more = fitted(torch.cat(goals, 1)), fitted(goals[0]), fitted(goals[1])
    assert noise.ridge > every.ridge == more.ridge
    y, expected = torch.cat(goals, 1), 0.0
    for k in range(2):
        weight, _ = solve(sums_of(x[k::2], y[k::2]), old, None, every.ridge)
        expected += squared_error(x[1 - k :: 2], y[1 - k :: 2], weight, None)
    assert every.held == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("ridge", [ROUNDED, 1e-2, None])
def test_rows_in_float32_are_solved_about_as_well_as_in_float64(ridge: float | None) -> None:
    """Inputs of very unlike sizes that depend on each other, and outputs far from zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    x = x * torch.logspace(-2, 2, 40) + 5
    y = x @ torch.randn(40, 6, generator=generator) / 40 + torch.randn(3000, 6, generator=generator) + 100
    old, zero = torch.zeros(1, 6, 40, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.float64)
    single, double = (
        fit((sums_of(a[::2], b[::2]), sums_of(a[1::2], b[1::2])), old, zero, ridge)
        for a, b in ((x, y), (x.double(), y.double()))
    )
    assert single.ridge >= ROUNDED
    measured = squared_error(x.double(), y.double(), single.weight, single.bias)
    assert single.predicted == pytest.approx(measured, abs=1e-7 * single.total)
    assert measured == pytest.approx(double.predicted, rel=1e-4)


@given(st.integers(0, len(RIDGES) - 1), st.floats(0.01, 3), st.sampled_from(RIDGES))
def test_the_ridge_is_where_the_loss_ceases_to_fall(minimum: int, slope: float, start: float) -> None:
    losses = {share: 1 + slope * abs(i - minimum) for i, share in enumerate(RIDGES)}
    held: dict[float, float] = {}
    assert slope > WORTH
    assert _best(losses.__getitem__, held, 0.0, list(RIDGES), start) == RIDGES[minimum]
    assert len(held) <= abs(RIDGES.index(start) - minimum) + 3


def test_of_ridges_that_are_about_as_good_the_largest_is_taken_and_the_least_where_nothing_is_lost() -> None:
    losses = dict(zip(RIDGES, [2.0, 1.5, 1.0, 1.0005, 1.0009, 3.0, 4.0, 5.0, 6.0, 7.0], strict=True))
    assert _best(losses.__getitem__, {}, 0.0, list(RIDGES), 1e-2) == 1e-3
    assert _best(losses.__getitem__, {}, 1.2, list(RIDGES), 1e-2) == RIDGES[0]
