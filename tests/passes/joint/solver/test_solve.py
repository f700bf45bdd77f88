"""The solver against brute force: random problems with coupled sizes, blocks that take groups along, decisions by hand."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from graphcomb.passes.joint.solver.problem import Axis, Choice, Problem, Removal, Term
from graphcomb.passes.joint.solver.solve import solve


def random_problem(seed: int) -> Problem:
    """Up to five groups of up to four sizes, up to three blocks; every third group is inside a block."""
    draw = np.random.default_rng(seed)
    blocks = tuple(Removal(f"b{i}", float(draw.exponential()), None) for i in range(draw.integers(0, 4)))
    axes = []
    for i in range(draw.integers(1, 6)):
        count = int(draw.integers(1, 5))
        losses = np.sort(draw.exponential(size=count))[::-1] * (np.arange(count) < count - 1)
        inner = int(draw.integers(len(blocks))) if blocks and i % 3 == 1 else None
        allowed = (int(draw.integers(count)),) if draw.random() < 0.1 else None
        axes.append(Axis(f"g{i}", tuple(range(1, count + 1)), tuple(losses), inner, allowed, allowed is not None))
    terms = []
    for _ in range(draw.integers(1, 8)):
        chosen = tuple(int(a) for a in draw.permutation(len(axes))[: draw.integers(0, 4)])
        inner = {axes[a].block for a in chosen} - {None}
        if len(inner) > 1:
            continue  # no layer lies inside two blocks
        block = inner.pop() if inner else (int(draw.integers(len(blocks))) if blocks and draw.random() < 0.4 else None)
        gone = block is not None and all(axes[a].block is None for a in chosen) and bool(draw.random() < 0.5)
        # Not monotone, as measured times are not.
        terms.append(Term(chosen, draw.exponential(size=[len(axes[a].sizes) for a in chosen]), block, gone))
    return Problem(tuple(axes), blocks, tuple(terms), float(draw.random()))


def every_choice(problem: Problem):
    for gone in itertools.product((False, True), repeat=len(problem.blocks)):
        if any(b.goes not in (None, z) for b, z in zip(problem.blocks, gone, strict=True)):
            continue
        places = [[-1] if a.block is not None and gone[a.block] else a.choices for a in problem.axes]
        for sizes in itertools.product(*places):
            yield Choice(tuple(sizes), gone)


@pytest.mark.parametrize("part", range(4))
def test_the_answer_is_the_best_of_all_choices_of_200_random_problems(part):
    infeasible = 0
    for seed in range(50 * part, 50 * part + 50):
        problem = random_problem(seed)
        rated = [(problem.seconds(c), problem.loss(c)) for c in every_choice(problem)]
        fastest, slowest = min(t for t, _ in rated), max(t for t, _ in rated)
        answer = solve(problem)
        assert answer is not None
        assert answer.seconds == pytest.approx(fastest, abs=1e-6)
        for share in (0.15, 0.5, 0.9):
            budget = fastest + share * (slowest - fastest)
            answer = solve(problem, seconds=budget)
            assert answer is not None
            assert answer.seconds <= budget * (1 + 1e-5)
            assert answer.loss == pytest.approx(min(loss for t, loss in rated if t <= budget), abs=1e-6), seed
        if solve(problem, seconds=fastest - 1e-3) is None:
            infeasible += 1
        bound = float(np.median([loss for _, loss in rated])) + 1e-9
        answer = solve(problem, loss=bound)
        assert answer is not None
        assert answer.seconds == pytest.approx(min(t for t, loss in rated if loss <= bound), abs=1e-6), seed
    assert infeasible == 50


def test_the_network_stays_connected():
    """Both blocks together would be the fastest; they may not both go."""
    blocks = (Removal("a", 0.1), Removal("b", 0.2))
    problem = Problem((), blocks, (Term((), np.array(1.0), 0), Term((), np.array(1.0), 1)), 1.0)
    assert solve(problem, seconds=1.5).choice.gone == (True, True)
    answer = solve(problem, seconds=2.5, connects=lambda gone: len(gone) < 2)
    assert answer.choice.gone == (True, False)
    assert solve(problem, seconds=1.5, connects=lambda gone: len(gone) < 2) is None


def test_single_methods_are_never_better():
    for seed in range(20):
        problem = random_problem(seed)
        whole = problem.seconds(problem.whole())
        for share in (0.5, 0.8):
            joint = solve(problem, seconds=share * whole)
            for single in (problem.only("widths"), problem.only("blocks")):
                alone = solve(single, seconds=share * whole)
                assert alone is None or (joint is not None and joint.loss <= alone.loss + 1e-6)


def residual_network(blocks: int, inner: int, stages: int, seed: int = 0, sizes: int = 6) -> Problem:
    """The shape of a large network's problem: trunks, blocks with inner groups in a row, six sizes each."""
    draw = np.random.default_rng(seed)
    axes, terms, removals = [], [], []
    width = np.arange(1, sizes + 1) / sizes

    def losses() -> tuple[float, ...]:
        curve = draw.exponential() * (1 - width) ** draw.uniform(1.2, 3)
        return tuple(float(c) for c in curve)

    for stage in range(stages):
        axes.append(Axis(f"trunk{stage}", tuple(range(1, sizes + 1)), losses()))
    for b in range(blocks):
        trunk, removable = b * stages // blocks, b % max(blocks // stages, 1) != 0 or stages == 1
        block = len(removals) if removable else None
        if removable:
            removals.append(Removal(f"b{b}", float(draw.exponential())))
        run = [trunk]
        for _ in range(inner):
            run.append(len(axes))
            axes.append(Axis(f"g{len(axes)}", tuple(range(1, sizes + 1)), losses(), block))
        for left, right in itertools.pairwise([*run, trunk]):
            rough = draw.uniform(0.9, 1.1, (sizes, sizes))  # measured tables are not smooth
            terms.append(Term((left, right), draw.uniform(0.5, 2) * rough * np.outer(width, width) + 0.05, block))
        if removable:
            terms.append(Term((trunk,), 0.1 + 0.2 * width**2, block, gone=True))
    return Problem(tuple(axes), tuple(removals), tuple(terms), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "inner", "stages"), [(16, 2, 5), (24, 1, 1)], ids=["resnet50", "vit_b"])
def test_large_networks_take_less_than_a_minute(blocks, inner, stages):
    problem = residual_network(blocks, inner, stages)
    whole = problem.seconds(problem.whole())
    for share in (0.67, 0.5, 0.33):
        start = time.process_time()
        answer = solve(problem, seconds=share * whole)
        print(f"{share}: {time.process_time() - start:.1f} s, gap {answer.gap:.1e}, loss {answer.loss:.3f}")
        assert answer.gap <= 1e-6
        assert time.process_time() - start < 60


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [-0.5, 0.0, 0.4, 1.0, 2.0])
def test_variants_may_save_more_or_less(seed: int, factor: float) -> None:
    """Every choice takes what it takes without variants, less the factor times what they save."""
    draw = np.random.default_rng(seed)
    axes = (
        Axis("a", (1, 2, 3), (2.0, 1.0, 0.0)),
        Axis("int8", (0, 1), (0.1, 0.0), kind="precision"),
        Axis("int8 in the block", (0, 1), (0.1, 0.0), block=0, kind="precision"),
    )
    terms = (
        Term((0, 1), draw.random((3, 2))),
        Term((1,), np.array([draw.random(), 0.0])),
        Term((2,), draw.random(2), block=0),
        Term((0,), draw.random(3), block=0, gone=True),
    )
    problem = Problem(axes, (Removal("block", 1.0),), terms, 0.5)
    for choice in every_choice(problem):
        plain = problem.seconds(problem.plain(choice))
        wanted = plain - factor * (plain - problem.seconds(choice))
        assert problem.saving(factor).seconds(choice) == pytest.approx(wanted)
        assert problem.saving(factor).loss(choice) == problem.loss(choice)
