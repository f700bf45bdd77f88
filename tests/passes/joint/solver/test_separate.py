"""The front of sums against HiGHS, on random problems in which no two groups share a layer."""

from __future__ import annotations

import numpy as np
import pytest

from graphcomb.passes.joint.solver import solve as solving
from graphcomb.passes.joint.solver.problem import Axis, Problem, Removal, Term
from graphcomb.passes.joint.solver.separate import separate
from graphcomb.passes.joint.solver.solve import solve


def problem(draw: np.random.Generator) -> Problem:
    blocks = tuple(
        Removal(f"b{b}", float(draw.exponential()), draw.choice([None, None, None, True, False]))
        for b in range(draw.integers(0, 4))
    )
    axes, terms = [], []
    for i in range(draw.integers(1, 6)):
        block = int(draw.integers(len(blocks))) if blocks and draw.random() < 0.5 else None
        count = int(draw.integers(2, 6))
        losses = tuple(np.sort(draw.exponential(size=count))[::-1] - 0.0)
        axes.append(Axis(f"a{i}", tuple(range(1, count + 1)), losses, block))
        terms.append(Term((i,), np.sort(draw.random(count)) if draw.random() < 0.8 else draw.random(count), block))
    for b in range(len(blocks)):
        terms += [Term((), np.array(draw.random()), b), Term((), np.array(0.2 * draw.random()), b, True)]
    terms.append(Term((), np.array(0.3)))
    return Problem(tuple(axes), blocks, tuple(terms), 0.1)


def test_fronts_and_the_solver_agree(monkeypatch):
    draw = np.random.default_rng(0)
    for _ in range(60):
        p = problem(draw)
        assert separate(p.joined())
        whole = p.seconds(p.whole())
        limits = [{"seconds": whole * draw.uniform(0.2, 1.0)}, {"loss": float(draw.uniform(0, 3))}, {}]
        quick = [solve(p, **limit) for limit in limits]
        with monkeypatch.context() as patch:
            patch.setattr(solving, "separate", lambda joined: False)
            exact = [solve(p, **limit) for limit in limits]
        for limit, a, b in zip(limits, quick, exact, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                name = "loss" if "seconds" in limit else "seconds"
                assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-5, abs=1e-6)
                assert all(getattr(a, k) <= v * (1 + 1e-6) for k, v in limit.items())


def test_couplings_are_left_to_the_solver():
    table = np.ones((2, 2))
    axes = (Axis("a", (1, 2), (1.0, 0.0)), Axis("b", (1, 2), (1.0, 0.0)))
    assert not separate(Problem(axes, (), (Term((0, 1), table),)).joined())
    inner = (Axis("a", (1, 2), (1.0, 0.0), 0),)
    assert not separate(Problem(inner, (Removal("b", 1.0),), (Term((0,), np.ones(2)),)).joined())


def test_the_solver_prints_nothing(capfd):
    p = Problem((Axis("a", (1, 2), (1.0, 0.0)), Axis("b", (1, 2), (1.0, 0.0))), (), (Term((0, 1), np.eye(2)),))
    assert solve(p, seconds=0.5).seconds == 0
    assert capfd.readouterr().out == ""
