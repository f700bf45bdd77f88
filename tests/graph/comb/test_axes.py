"""The algebra of axes against index arithmetic on plain arrays."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphcomb.graph.comb.axes as ax
from graphcomb.graph.comb.axes import Misaligned, Reason, cut, fresh, show, size, split_at, take_inner, total, unify

PROBLEM = Reason(None, "for a test")


def mask(axis, *lost):
    """Masks for a single atom that loses the given indices."""
    (atom,) = axis
    keep = np.ones(atom.size, dtype=bool)
    keep[list(lost)] = False
    return {ax.find(atom): keep}


def gone(axis, masks):
    return np.flatnonzero(~ax.kept_mask(axis, masks)).tolist()


# ------------------------------------------------------------------------------------------------------------ by hand
def test_size_one_is_the_empty_product():
    assert fresh(1) == []
    assert size([]) == 1
    assert show([]) == "1"
    assert ax.kept_mask([], {}).tolist() == [True]


def test_view_splits_an_atom_for_everyone_who_holds_it():
    whole = fresh(12)
    heads, width = take_inner(list(whole), 4)
    assert (show(heads), show(width), show(whole)) == ("3", "4", "3·4")
    assert gone(whole, mask(heads, 1)) == [4, 5, 6, 7]
    assert gone(whole, mask(width, 0, 3)) == [0, 3, 4, 7, 8, 11]


def test_a_sum_factors_when_every_segment_does():
    a, b = fresh(4), fresh(6)
    outer, inner = take_inner(total([a, b]), 2)
    assert show(outer) == "(2+3)"
    assert show(a) == "2·2"
    assert show(b) == "3·2"
    assert gone(a, mask(inner, 1)) == [1, 3]
    assert gone(b, mask(inner, 1)) == [1, 3, 5]


def test_a_sum_that_does_not_factor_is_cut_into_equal_pieces():
    a, b = fresh(3), fresh(5)
    outer, inner = take_inner(total([a, b]), 4)  # pieces of 4: three of a and one of b, the rest of b
    assert show(outer) == "(1+1)"
    assert show(inner) == "(3+1)"
    assert gone(b, {ax.normal(a)[0]: np.array([True, False, True])}) == [2]


def test_too_many_pieces_are_not_followed():
    with pytest.raises(Misaligned, match="does not factor by 2"):
        take_inner(total([fresh(201), fresh(1), fresh(202)]), 2)


def test_a_boundary_inside_a_product_isolates_one_index_of_the_outer_factor():
    groups, inner = fresh(29), fresh(4)
    left, right = split_at(groups + inner, 58)
    assert (size(left), size(right)) == (58, 58)
    assert show(left) == "(14·(2+2)+2)"
    assert show(right) == "(2+14·(2+2))"
    assert show(groups) == "(14+(1+14))"


def test_products_take_their_common_refinement():
    a, b = fresh(4) + fresh(6), fresh(8) + fresh(3)
    unify(a, b)
    assert show(a) == show(b) == "4·2·3"


def test_only_the_run_that_cannot_be_aligned_is_frozen():
    a, b = fresh(5) + fresh(8) + fresh(7) + fresh(2), fresh(5) + fresh(7) + fresh(8) + fresh(2)
    unify(a, b)
    assert [f.frozen is None for f in ax.normal(a)] == [True, False, False, True]
    assert show(a) == "5·8!·7!·2"
    assert "do not align (7 against 8)" in ax.normal(a)[1].frozen.text


def test_sums_align_their_segments():
    a, b = total([fresh(4), fresh(6)]), total([fresh(7), fresh(3)])
    unify(a, b)
    assert [show(p) for p in ax.segments(ax.normal(a)[0])] == ["4", "3", "3"]
    assert [ax.normal(p)[0] for p in ax.segments(ax.normal(a)[0])] == [
        ax.normal(p)[0] for p in ax.segments(ax.normal(b)[0])
    ]


def test_one_atom_takes_the_structure_of_what_it_meets():
    a, b = fresh(10), total([fresh(4), fresh(6)])
    unify(a, b)
    assert show(a) == "(4+6)"


@pytest.mark.parametrize(
    ("a", "b", "sizes"),
    [
        (lambda: fresh(4), lambda: fresh(4) + fresh(2), (4, 8)),
        (lambda: fresh(7), lambda: fresh(4), (7, 4)),
        (lambda: fresh(6), list, (6, 1)),
        (lambda: total([fresh(3), fresh(4)]), lambda: fresh(3) + fresh(5), (7, 15)),
    ],
)
def test_unify_refuses_sizes_that_differ_and_changes_nothing(a, b, sizes):
    a, b = a(), b()
    before = show(a), show(b)
    with pytest.raises(Misaligned, match=f"^an axis of size {sizes[0]} cannot be the same as one of size {sizes[1]}$"):
        unify(a, b)
    assert (show(a), show(b)) == before
    assert all(f.frozen is None for f in ax.atoms([a, b]))


def test_the_first_reason_stays_and_reaches_everyone():
    a, b = fresh(4), fresh(4)
    ax.freeze(a, PROBLEM)
    ax.freeze(a, Reason(None, "another"))
    unify(a, b)
    assert ax.normal(b)[0].frozen is PROBLEM
    left, right = split_at(b, 1)
    assert all(f.frozen is PROBLEM for f in left + right)
    assert all(f.frozen is PROBLEM for f in take_inner(fresh(3) + right, 3)[1])


def test_freezing_a_sum_freezes_its_segments():
    a, b = fresh(4), fresh(6)
    ax.freeze(total([a, b]), PROBLEM)
    assert a[0].frozen is PROBLEM
    assert b[0].frozen is PROBLEM


def test_regrouping_across_factors_freezes_the_smallest_run():
    keep, rows, columns = fresh(5), fresh(3), fresh(4)
    _, inner = take_inner(keep + rows + columns, 6)
    assert size(inner) == 6
    assert keep[0].frozen is None
    assert "cuts across factors [3, 4]" in rows[0].frozen.text


def test_a_boundary_inside_a_prime_factor_is_misaligned():
    with pytest.raises(Misaligned, match="a boundary of 2 falls inside a factor of 3"):
        take_inner(fresh(3), 2)


def test_cut_allows_empty_pieces():
    pieces = cut(fresh(6), [0, 2, 0, 4, 0])
    assert [size(p) for p in pieces] == [0, 2, 0, 4, 0]


def test_cat_of_a_tensor_with_itself_loses_the_same_indices_twice():
    a = fresh(3)
    assert gone(total([a, a]), mask(a, 1)) == [1, 4]


# ------------------------------------------------------------------------------------- random sequences of operations
class Tensor:
    """Axes, and how the presence of its entries follows from that of the sources: `move(presences) -> array`."""

    def __init__(self, axes, shape, move):
        self.axes, self.shape, self.move = axes, shape, move


def views(shape):
    """Other shapes with as many entries."""
    n, found = math.prod(shape), []
    for a in range(1, n + 1):
        if n % a == 0:
            found += [(a, n // a)] + [(a, b, n // a // b) for b in range(2, n // a) if n // a % b == 0]
    return found


def see(tensor, shape):
    flat, axes = [f for a in tensor.axes for f in a], [[] for _ in shape]
    for d in reversed(range(len(shape))):
        try:
            flat, axes[d] = take_inner(flat, shape[d])
        except Misaligned:
            for axis in [*tensor.axes, *axes]:
                ax.freeze(axis, PROBLEM)
            axes = [fresh(n, PROBLEM) for n in shape]
            break
    return Tensor(axes, shape, lambda p: tensor.move(p).reshape(shape))


def transpose(tensor, order):
    shape = tuple(tensor.shape[d] for d in order)
    return Tensor([tensor.axes[d] for d in order], shape, lambda p: tensor.move(p).transpose(order))


def piece(tensor, d, low, high):
    n = tensor.shape[d]
    _, part, _ = cut(tensor.axes[d], [low, high - low, n - high])
    axes = [part if k == d else a for k, a in enumerate(tensor.axes)]
    shape = tuple(high - low if k == d else m for k, m in enumerate(tensor.shape))
    return Tensor(axes, shape, lambda p: tensor.move(p).take(range(low, high), axis=d))


def join(x, y, d):
    for k, (a, b) in enumerate(zip(x.axes, y.axes, strict=True)):
        if k != d:
            unify(a, b)
    axes = [total([x.axes[d], y.axes[d]]) if k == d else a for k, a in enumerate(x.axes)]
    shape = tuple(x.shape[d] + y.shape[d] if k == d else n for k, n in enumerate(x.shape))
    return Tensor(axes, shape, lambda p: np.concatenate([x.move(p), y.move(p)], axis=d))


KINDS = ("view", "view", "transpose", "piece", "cat", "add")


def step(draw, pool, kinds):
    """One random operation on the pool; None where the draw does not fit."""
    x = pool[draw(st.integers(0, len(pool) - 1))]
    kind = draw(st.sampled_from(kinds))
    if kind == "view":
        return see(x, draw(st.sampled_from(views(x.shape))))
    if kind == "transpose":
        return transpose(x, draw(st.permutations(range(len(x.shape)))))
    d = draw(st.integers(0, len(x.shape) - 1))
    if kind == "piece":
        low = draw(st.integers(0, x.shape[d] - 1))
        return piece(x, d, low, draw(st.integers(low + 1, x.shape[d])))
    others = [y for y in pool if len(y.shape) == len(x.shape)]
    if kind == "cat":
        fits = [y for y in others if all(k == d or n == x.shape[k] for k, n in enumerate(y.shape))]
        y = draw(st.sampled_from(fits))
        return join(x, y, d) if math.prod(x.shape) + math.prod(y.shape) <= 400 else None
    y = draw(st.sampled_from([y for y in others if y.shape == x.shape]))
    for a, b in zip(x.axes, y.axes, strict=True):
        unify(a, b)
    return Tensor(x.axes, x.shape, lambda p: x.move(p) & y.move(p))


@st.composite
def histories(draw, kinds=KINDS):
    """Sources (lists of atoms) and a pool of tensors made of them."""
    sources, pool = [], []
    for i in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.sampled_from([2, 3, 4, 5, 6, 8, 12]), min_size=1, max_size=3).map(tuple))
        sources.append([fresh(n) for n in shape])
        pool.append(Tensor(sources[-1], shape, lambda p, i=i: p[i]))
    for _ in range(draw(st.integers(0, 8))):
        made = step(draw, pool, kinds)
        pool += [made] if made is not None else []
    return sources, pool


def outer(axes, masks):
    result = np.ones((), dtype=bool)
    for axis in axes:
        result = np.logical_and.outer(result, ax.kept_mask(axis, masks))
    return result


def random_masks(axes, seed):
    rng, masks = np.random.default_rng(seed), {}
    for atom in ax.atoms(axes):
        if atom.frozen is None and rng.random() < 0.7:
            masks[atom] = rng.permutation(atom.size) < rng.integers(1, atom.size + 1)
    return masks


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), st.integers(0, 10**6))
def test_masks_move_like_entries(history, seed):
    """Whatever was done to tensors, an entry is gone where the solved axes say so, and nowhere else."""
    sources, pool = history
    masks = random_masks([a for axes in sources for a in axes], seed)
    presences = [outer(axes, masks) for axes in sources]
    sizes = {atom: int(m.sum()) for atom, m in masks.items()}
    for tensor in pool:
        assert [size(a) for a in tensor.axes] == list(tensor.shape)
        np.testing.assert_array_equal(outer(tensor.axes, masks), tensor.move(presences))
        for axis in tensor.axes:
            kept = ax.kept_mask(axis, masks)
            assert ax.kept_size(axis, sizes) == kept.sum()
            assert ax.touches(axis, masks) == any(a in masks for a in ax.atoms([axis]))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), st.integers(0, 10**6))
def test_fold_and_monomials_agree_with_counting(history, seed):
    rng = np.random.default_rng(seed)
    for tensor in history[1]:
        for axis in tensor.axes:
            products = ax.monomials(axis)
            assert sum(math.prod(a.size for a in m) for m in products) == size(axis)
            sizes = {a: int(rng.integers(1, a.size + 1)) for a in ax.atoms([axis])}
            assert sum(math.prod(sizes[a] for a in m) for m in products) == ax.kept_size(axis, sizes)
            values, found = rng.integers(0, 9, size(axis)), {}
            ax.fold(axis, values, found)
            for atom in ax.atoms([axis]):
                if any(m.count(atom) > 1 for m in products):
                    continue
                for i in range(atom.size):
                    assert found[atom][i] == values[gone(axis, mask([atom], i))].sum()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(histories(("transpose", "piece", "cat")))
def test_reordering_cutting_and_joining_freeze_nothing(history):
    sources, _ = history
    # joining unifies the other axes, which aligns sums with sums and never fails
    assert all(atom.frozen is None for axes in sources for atom in ax.atoms(axes))
