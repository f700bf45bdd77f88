"""The absence oracle: what a pruned program must compute, read off the original graph. Source: ours.

It knows which indices of which parameters and buffers are gone, nothing else, and shares no code with the comb, its rules
or slicing. The original graph runs on its original sizes; every tensor carries the presence of its axes (see `presence`).
Contractions count absent entries as 0, reductions and normalisations run over present entries, softmax drops absent keys,
everything else passes presence on. Operands must agree on what is absent. Absent values are NaN, so an operator that reads
one by mistake shows. What has no meaning here (an ordering along an axis that lost indices, a window over one, an unknown
operator) raises `Disagreement`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ..compat import pytree
from ..nodes import is_operator, op_name, source
from ..program import Program
from .evaluate import Evaluator, evaluated, invoke
from .presence import (
    ABSENT,
    FREE,
    Disagreement,
    Held,
    State,
    States,
    along,
    broadcast,
    factor,
    fill,
    full,
    join,
    lost,
    moved,
    outer,
    poison,
    put,
    regroup,
    take,
    tidy,
)
from .removal import Removed

Rule = Callable[["Call"], Any]
RULES: dict[str, Rule] = {}


def means(*names: str) -> Callable[[Rule], Rule]:
    """Register what absent entries mean to operators, by name ("space::name" for custom ones; blanks separate several).

    The rule takes a `Call` and returns the result as `Held`, or a list of them; `entrywise` serves operators that treat
    each entry by itself. Raise `Disagreement` where absence has no meaning.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(" ".join(names).split(), rule))
        return rule

    return register


class Call:
    """One operator application: arguments by schema name (tensors as `Held`), and ways to run it."""

    def __init__(self, node: fx.Node, arguments: dict[str, Any]):
        self.node, self.a = node, arguments
        self.name = op_name(node)

    @property
    def x(self) -> Held:
        """The operand a one-operand operator works on."""
        found = self.a.get("self")
        return found if isinstance(found, Held) else self.a["input"]

    def held(self, *names: str) -> list[Held]:
        """All tensor operands (or those named), absent optional ones left out."""
        given = [self.a.get(n) for n in names] if names else list(self.a.values())
        return [h for h in pytree.tree_leaves(given, is_leaf=_is_held) if isinstance(h, Held)]

    def run(self, /, **override: Any) -> Any:
        """The operator's result on plain tensors, some arguments replaced."""
        return invoke(self.node, pytree.tree_map(_value, {**self.a, **override}, is_leaf=_is_held))

    def key(self, tensor: Held) -> str:
        return next(name for name, value in self.a.items() if value is tensor)


def _is_held(x: Any) -> bool:
    return isinstance(x, Held)


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Held) else x


def hold(result: Any) -> Any:
    """Wrap the tensors of a result of which nothing is absent."""
    return pytree.tree_map_only(torch.Tensor, lambda t: Held(t, (None,) * t.dim()), result)


class Absence(Evaluator):
    """Runs the original program with some indices of its parameters and buffers absent.

    weights: float64 tensors by name, original sizes. removed: {name: {dim: indices}}. `run` returns the outputs;
    `observe` sees `Held` tensors. Raises `Disagreement` with one line that names the node.
    """

    def __init__(self, program: Program, weights: dict[str, torch.Tensor], removed: Removed):
        super().__init__(program, weights)
        self.removed = removed

    def run(self, inputs: Any, observe: Callable[[fx.Node, Any], None] | None = None) -> Any:
        outputs = super().run(inputs, observe)
        for i, held in enumerate(pytree.tree_leaves(outputs, is_leaf=_is_held)):
            if _lost(held):
                raise Disagreement(f"output {i} has absent entries, in shape {tuple(held.value.shape)}")
        return pytree.tree_map(_value, outputs, is_leaf=_is_held)

    def enter(self, value: Any) -> Any:
        return hold(super().enter(value))

    def fetch(self, name: str) -> Any:
        value = super().fetch(name)
        if not isinstance(value, torch.Tensor):
            return value
        states: list[State] = [None] * value.dim()
        for d, gone in self.removed.get(name, {}).items():
            state = full(None, value.shape[d])
            state[list(gone)] = ABSENT
            states[d] = tidy(state)
        return poison(value, states)

    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        try:
            return self._call(node, env)
        except Disagreement as error:
            raise Disagreement(f"{source(node)}: {op_name(node)}: {error}") from None
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise RuntimeError(f"{source(node)}: {op_name(node)}: {error}") from error

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node.target is operator.getitem:
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        if not is_operator(node):
            plain = {n: pytree.tree_map(_value, env[n], is_leaf=_is_held) for n in node.all_input_nodes}
            return hold(super().call(node, plain)) if not _lost([env[n] for n in plain]) else _unknown()
        call = Call(node, evaluated(node, env))
        if call.name.startswith("sym_"):
            return call.run()
        touched = [h for h in call.held() if h.touched]
        if not touched and call.name not in SPARE:
            return hold(call.run())
        rule = RULES.get(call.name)
        if rule is not None:
            return rule(call)
        if torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return pointwise(call)
        return _unknown() if _lost(touched) else hold(call.run())


def _lost(values: Any) -> bool:
    """Whether any tensor in a nest of values has absent entries."""
    held = [h for h in pytree.tree_leaves(values, is_leaf=_is_held) if isinstance(h, Held)]
    return any(lost(s) for h in held for s in h.states)


def _unknown() -> Any:
    raise Disagreement("what absent entries mean to it is not known; say so with graphcomb.verify.means")


# ------------------------------------------------------------------------------------------------------------ entrywise
HEALING = frozenset(
    "where masked_fill nan_to_num pow fmax fmin sign sgn xlogy heaviside fill zero copy threshold".split()
)


@means(
    """relu relu6 sigmoid tanh gelu silu hardswish hardsigmoid hardtanh clamp clamp_min clamp_max clip exp exp2 log log2
    log10 log1p expm1 sqrt rsqrt neg abs dropout feature_dropout alpha_dropout feature_alpha_dropout clone contiguous alias
    detach lift_fresh_copy leaky_relu elu selu celu softplus mish erf erfc erfinv sin cos tan asin acos atan sinh cosh
    asinh acosh logical_not bitwise_not reciprocal square log_sigmoid softsign threshold hardshrink softshrink tanhshrink
    floor ceil
    round trunc frac sign sgn isnan isinf isfinite nan_to_num positive logit rrelu fill zero double half float bool int conj
    real imag angle special_expit digamma lgamma rad2deg deg2rad add sub rsub mul div true_divide floor_divide remainder
    fmod pow maximum minimum fmax fmin atan2 hypot where eq ne lt gt le ge logical_and logical_or logical_xor bitwise_and
    bitwise_or bitwise_xor masked_fill addcmul addcdiv lerp copy greater less greater_equal less_equal not_equal subtract
    multiply divide xlogy logaddexp heaviside __and__ __or__ __xor__ complex polar copysign nextafter native_dropout
    absolute negative fix arccos arccosh arcsin arcsinh arctan arctanh arctan2 special_exp2 special_expm1 special_log1p
    special_erf special_erfc special_erfinv special_sinc special_logit special_round special_xlogy"""
)
def entrywise(call: Call) -> Any:
    result = call.run()
    if not isinstance(result, torch.Tensor):
        states = broadcast(call.held(), result[0].shape)
        return [Held(r, states) for r in result]
    states = broadcast(call.held(), result.shape)
    return poison(result, states) if call.name in HEALING else Held(result, states)


def pointwise(call: Call) -> Held:
    """An operator that PyTorch tags as taking each entry by itself; whether it makes a number of a NaN is not known."""
    result = call.run()
    if not isinstance(result, torch.Tensor):
        return _unknown()
    return poison(result, broadcast(call.held(), result.shape))


@means("to _to_copy type_as")
def cast(call: Call) -> Held:
    return poison(call.run(), call.x.states)


@means("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty zeros ones full empty")
def filled(call: Call) -> Held:
    """Every entry repeats the same number, so any of them may be absent."""
    value = call.run()
    return Held(value, tuple(spare(None, n) for n in value.shape))


def spare(state: State, n: int) -> State:
    """The state with what is present made free."""
    grid = full(state, n).copy()
    grid[grid != ABSENT] = FREE
    return tidy(grid)


@means("prelu")
def prelu(call: Call) -> Held:
    x, weight = call.x, call.a["weight"]
    states = list(x.states)
    if weight.value.numel() > 1:
        d = min(1, len(states) - 1)
        states[d] = join([states[d], weight.states[0]])
    return poison(call.run(), states)


@means("tril triu")
def triangle(call: Call) -> Held:
    _need_all(call, call.x, [-2, -1], "it depends on positions along the axis")
    return poison(call.run(), call.x.states)


# ------------------------------------------------------------------------------------------------------------- movement
@means("view reshape _unsafe_view flatten unflatten ravel unsqueeze squeeze view_as reshape_as")
def reshape(call: Call) -> Held:
    value = call.run()
    if value.dtype != call.x.value.dtype:
        raise Disagreement("a view as another dtype")
    states = regroup(call.x.states, call.x.value.shape, value.shape)
    if not isinstance(call.a.get("other"), Held):
        return Held(value, states)
    return poison(value, tuple(map(join, zip(states, call.a["other"].states, strict=True))))


@means("permute transpose swapaxes swapdims movedim moveaxis t numpy_T mT matrix_H adjoint")
def permute(call: Call) -> Held:
    """Where every axis went is read off the strides of a probe."""
    x = call.x
    probe = torch.empty_strided([2] * x.value.dim(), list(range(1, x.value.dim() + 1)), device="meta")
    return Held(call.run(), tuple(x.states[s - 1] for s in call.run(**{call.key(x): probe}).stride()))


@means(
    "slice narrow flip select split chunk split_with_sizes unbind tensor_split unsafe_split unsafe_chunk index_select"
    " unsafe_split_with_sizes"
)
def cut(call: Call) -> Any:
    """Operators along given axes, applied to the presence of each of those axes alone."""
    x = call.x
    rank, key = x.value.dim(), "dims" if "dims" in call.a else "dim"
    dims = [d % rank for d in _as_list(call.a[key])]
    picks = call.a.get("index")  # of index_select: a position that is absent itself looks up nothing
    result = call.run()
    parts = [result] if isinstance(result, torch.Tensor) else result
    kept = parts[0].dim() == rank
    found = [[x.states[d] for d in range(rank) if kept or d not in dims] for _ in parts]
    for d in dims:
        if x.states[d] is None:
            continue
        probe = along(torch.from_numpy(x.states[d]), d, rank)
        override = {"dims": [d]} if key == "dims" else {}
        cuts = call.run(**{call.key(x): probe.to(x.value.device)}, **override)
        for states, piece in zip(found, [cuts] if isinstance(cuts, torch.Tensor) else cuts, strict=True):
            state = tidy(piece.cpu().numpy().reshape(-1))
            if kept:
                states[d] = state
    if isinstance(picks, Held) and picks.touched:
        d, n = dims[0], result.shape[dims[0]]
        found[0][d] = tidy(np.maximum(full(found[0][d], n), full(picks.states[0], n)))
    held = [poison(p, s) for p, s in zip(parts, found, strict=True)]
    return held[0] if isinstance(result, torch.Tensor) else held


@means("diagonal rot90 unfold_copy")
def rearrange(call: Call) -> Held:
    x = call.x
    states = moved(x.states, x.value.shape, lambda grid: call.run(**{call.key(x): grid}))
    return poison(call.run(), states)


@means("cat concat concatenate hstack vstack")
def cat(call: Call) -> Held:
    parts = [h for h in call.a["tensors"] if h.value.shape != (0,)]
    value = call.run()
    rank = value.dim()
    d = call.a["dim"] % rank if "dim" in call.a else min(1, rank - 1) if call.name == "hstack" else 0
    states = [None if k == d else join([h.states[k] for h in parts]) for k in range(value.dim())]
    if any(h.states[d] is not None for h in parts):
        grid = [torch.from_numpy(full(h.states[d], h.value.shape[d])) for h in parts]
        states[d] = tidy(torch.cat(grid).numpy())
    return poison(value, states)


@means("stack")
def stack(call: Call) -> Held:
    value = call.run()
    d = call.a["dim"] % value.dim()
    states = list(map(join, zip(*(h.states for h in call.a["tensors"]), strict=True)))
    return poison(value, [*states[:d], None, *states[d:]])


@means("expand expand_as broadcast_to")
def expand(call: Call) -> Held:
    x, value = call.x, call.run()
    states: list[State] = []
    for back in range(value.dim(), 0, -1):
        n = value.shape[-back]
        same = x.value.dim() >= back and x.value.shape[-back] == n
        states.append(x.states[-back] if same else spare(None, n))
    if isinstance(call.a.get("other"), Held):
        states = list(map(join, zip(states, call.a["other"].states, strict=True)))
    return poison(value, states)


@means("repeat tile")
def repeat(call: Call) -> Held:
    x, value = call.x, call.run()
    states: list[State] = []
    for back in range(value.dim(), 0, -1):
        own = x.value.shape[-back] if x.value.dim() >= back else 1
        state = x.states[-back] if x.value.dim() >= back else None
        times = value.shape[-back] // max(own, 1)
        grid = torch.from_numpy(full(state, own)).repeat(times).numpy()
        states.append(spare(grid, len(grid)) if times > 1 else state)
    return Held(value, tuple(states))


@means("repeat_interleave")
def repeat_interleave(call: Call) -> Held:
    x, times, d = call.x, call.a.get("repeats"), call.a.get("dim")
    if not isinstance(times, int) or d is None:
        if x.touched:
            raise Disagreement("counts that are data, or a flattened tensor")
        return hold(call.run())
    value, d = call.run(), d % x.value.dim()
    grid = full(x.states[d], x.value.shape[d]).repeat(times)
    state = spare(grid, len(grid)) if times > 1 else x.states[d]
    return Held(value, (*x.states[:d], state, *x.states[d + 1 :]))


@means(
    """pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d"""
)
def pad(call: Call) -> Held:
    """Constant padding repeats one number, so it is free; other padding copies entries, which must all be there."""
    x, value = call.x, call.run()
    amounts = call.a["pad" if "pad" in call.a else "padding"]
    constant = call.name in ("pad", "constant_pad_nd") and (call.a.get("mode") or "constant") == "constant"
    states, rank = list(x.states), x.value.dim()
    for j in range(len(amounts) // 2):
        d, low, high = rank - 1 - j, amounts[2 * j], amounts[2 * j + 1]
        if low == high == 0:
            continue
        if not constant:
            _need_all(call, x, [d], "it copies entries along the axis")
            continue
        probe = torch.from_numpy(full(x.states[d], x.value.shape[d]))
        states[d] = tidy(torch.nn.functional.pad(probe, (low, high), value=int(FREE)).numpy())
    return Held(value, tuple(states))


@means("slice_scatter select_scatter")
def scatter(call: Call) -> Held:
    x, src = call.a["self"], call.a["src"]
    d = call.a["dim"] % x.value.dim()
    mine = src.states
    if call.name == "select_scatter":
        mine = (*mine[:d], None, *mine[d:])
    probe = along(torch.from_numpy(full(x.states[d], x.value.shape[d])), d, x.value.dim())
    n = 1 if call.name == "select_scatter" else src.value.shape[d]
    written = torch.from_numpy(full(mine[d], n))
    patch = written[0] if call.name == "select_scatter" else written
    patch = along(patch, d, src.value.dim())
    mixed = tidy(call.run(self=probe, src=patch).numpy().reshape(-1))
    states = [mixed if k == d else join([x.states[k], mine[k]]) for k in range(x.value.dim())]
    return poison(call.run(), states)


@means("pixel_shuffle")
def pixel_shuffle(call: Call) -> Held:
    x, r = call.x, call.a["upscale_factor"]
    n, h, w = x.value.shape[-3:]
    channels, rows, columns = factor(x.states[-3], (n // (r * r), r, r))
    high, wide = outer((x.states[-2], rows), (h, r)), outer((x.states[-1], columns), (w, r))
    result = (*x.states[:-3], channels, high, wide)
    return Held(call.run(), result)


@means("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Held:
    x, r = call.x, call.a["downscale_factor"]
    *_, c, h, w = x.value.shape
    (high, rows), (wide, columns) = factor(x.states[-2], (h // r, r)), factor(x.states[-1], (w // r, r))
    return Held(call.run(), (*x.states[:-3], outer((x.states[-3], rows, columns), (c, r, r)), high, wide))


@means("channel_shuffle native_channel_shuffle")
def channel_shuffle(call: Call) -> Held:
    x, groups = call.x, call.a["groups"]
    n = x.value.shape[1] // groups
    group, inner = factor(x.states[1], (groups, n))
    return Held(call.run(), (x.states[0], outer((inner, group), (n, groups)), *x.states[2:]))


@means("im2col")
def im2col(call: Call) -> Held:
    x = call.x
    _need_all(call, x, [-2, -1], "a window along the axis")
    taps = math.prod(call.a["kernel_size"])
    channels = outer((x.states[-3], None), (x.value.shape[-3], taps))
    return Held(call.run(), (*x.states[:-3], channels, None))


@means("col2im")
def col2im(call: Call) -> Held:
    x = call.x
    _need_all(call, x, [-1], "a window along the axis")
    taps = math.prod(call.a["kernel_size"])
    channels, window = factor(x.states[-2], (x.value.shape[-2] // taps, taps))
    if lost(window):
        raise Disagreement("positions of a window are absent")
    return Held(call.run(), (*x.states[:-2], channels, None, None))


@means("unfold")
def unfold(call: Call) -> Held:
    x = call.x
    _need_all(call, x, [call.a["dimension"]], "a sliding window along the axis")
    d = call.a["dimension"] % x.value.dim()
    return Held(call.run(), (*x.states[:d], None, *x.states[d + 1 :], None))


@means("view_as_complex view_as_real")
def complex_view(call: Call) -> Held:
    x = call.x
    if call.name == "view_as_real":
        return Held(call.run(), (*x.states, None))
    _need_all(call, x, [-1], "real and imaginary parts")
    return Held(call.run(), x.states[:-1])


@means("one_hot")
def one_hot(call: Call) -> Held:
    return Held(call.run(), (*call.x.states, None))


@means("meshgrid")
def meshgrid(call: Call) -> list[Held]:
    result = call.run()
    order = list(range(len(result)))
    if call.a.get("indexing") == "xy" and len(order) > 1:
        order[:2] = 1, 0
    states = [t.states[0] if t.states else None for t in call.a["tensors"]]
    return [poison(r.clone(), [states[i] for i in order]) for r in result]


@means("glu")
def glu(call: Call) -> Held:
    x, d = call.x, call.a["dim"] % call.x.value.dim()
    state, n = x.states[d], x.value.shape[d] // 2
    half = None if state is None else join([state[:n], state[n:]])
    return poison(call.run(), [*x.states[:d], half, *x.states[d + 1 :]])


# -------------------------------------------------------------------------------------------------------------- look-ups
@means("index _unsafe_index")
def index(call: Call) -> Held:
    """x[..., i, j, ...]: presence of the looked-up axes is looked up the same way."""
    x, picks = call.a["self"], list(call.a["indices"])
    used = [d for d, i in enumerate(picks) if i is not None]
    value = call.run()
    if any(picks[d].value.dtype in (torch.bool, torch.uint8) for d in used):
        if any(lost(s) for h in call.held() for s in h.states):
            raise Disagreement("a mask selects entries by data")
        return hold(value)
    shape = torch.broadcast_shapes(*(picks[d].value.shape for d in used))
    states = list(broadcast([picks[d] for d in used], shape))
    for d in used:
        if x.states[d] is not None:
            looked = torch.from_numpy(x.states[d])[picks[d].value.cpu()].broadcast_to(shape).reshape(-1).numpy()
            pairs = zip(states, factor(looked, shape), shape, strict=True)
            states = [tidy(np.maximum(full(s, n), full(t, n))) for s, t, n in pairs]
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    rest = [s for d, s in enumerate(x.states) if d not in used]
    return poison(value, [*rest[:at], *states, *rest[at:]])


@means("embedding")
def embedding(call: Call) -> Held:
    table = call.a["weight"]
    _need_all(call, table, [0], "rows are looked up by number")
    return poison(call.run(), [*call.a["indices"].states, table.states[1]])


@means("gather take_along_dim")
def gather(call: Call) -> Held:
    x, picks = call.a["self"], call.a["index" if "index" in call.a else "indices"]
    d = call.a["dim"] % x.value.dim()
    _need_all(call, x, [d], "entries are picked by number")
    states = list(picks.states)
    for k in range(x.value.dim()):
        if k != d and x.value.shape[k] == picks.value.shape[k]:
            states[k] = join([states[k], x.states[k]])
        elif k != d and (lost(x.states[k]) or lost(picks.states[k])):
            raise Disagreement("absent entries beside the picked axis")
    return poison(call.run(), states)


# ------------------------------------------------------------------------------------------------- orderings and windows
@means("topk sort argsort argmax argmin cumsum cumprod cummax cummin logcumsumexp roll kthvalue msort")
def ordered(call: Call) -> Any:
    """Operators that depend on positions: nothing may be absent along their axis; the other axes pass through."""
    x, given = call.x, call.a.get("dims", call.a.get("dim"))
    dims = [d % x.value.dim() for d in _as_list(given)] if given not in (None, []) else list(range(x.value.dim()))
    _need_all(call, x, dims, "it depends on positions along the axis")
    result = call.run()
    parts = [result] if isinstance(result, torch.Tensor) else list(result)
    held = []
    for part in parts:
        same = part.dim() == x.value.dim()
        states = [None if d in dims else s for d, s in enumerate(x.states) if same or d not in dims]
        held.append(poison(part, states))
    return held[0] if isinstance(result, torch.Tensor) else held


@means(
    " ".join(
        name.format(n)
        for n in (1, 2, 3)
        for name in (
            "max_pool{}d", "avg_pool{}d", "lp_pool{}d", "adaptive_max_pool{}d", "max_pool{}d_with_indices",
            "upsample_nearest{}d", "_upsample_nearest_exact{}d", "fractional_max_pool{}d",
        )
    )
    + " upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa"
    " _upsample_bicubic2d_aa"
)  # fmt: skip
def window(call: Call) -> Any:
    x = call.x
    nd = int(re.search(r"([123])d", call.name).group(1))  # type: ignore[union-attr]
    _need_all(call, x, range(-nd, 0), "a window along the axis")
    result = call.run()
    states = [*x.states[:-nd], *[None] * nd]
    return pytree.tree_map_only(torch.Tensor, lambda t: poison(t, states), result)


@means("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d")
def adaptive_mean(call: Call) -> Held:
    """An output of size 1 is a mean over what is present; any other is a window."""
    x, sizes = call.x, call.a["output_size"]
    nd, value = len(sizes), call.x.value
    for d in range(value.dim() - nd, value.dim()):
        if sizes[d - value.dim()] == 1:
            value = take(value, d, x.states[d])
        else:
            _need_all(call, x, [d], "a window along the axis")
    lead = x.states[: value.dim() - nd]
    return poison(call.run(self=value), [*lead, *[None] * nd])


@means("grid_sampler grid_sampler_2d grid_sampler_3d")
def grid_sample(call: Call) -> Held:
    x, grid = call.a["input"], call.a["grid"]
    _need_all(call, x, range(2, x.value.dim()), "it is sampled along the axis")
    _need_all(call, grid, [-1], "coordinates of the sampling grid")
    value = call.run(grid=grid.value.nan_to_num(0.0))
    return poison(value, [join([x.states[0], grid.states[0]]), x.states[1], *grid.states[1:-1]])


@means("torchvision::roi_align torchvision::ps_roi_align torchvision::roi_pool")
def regions(call: Call) -> Any:
    x, boxes = call.a["input"], call.a["rois"]
    _need_all(call, boxes, [0, 1], "the boxes")
    _need_all(call, x, [0, 2, 3], "it is sampled along the axis")
    if call.name != "torchvision::roi_align":
        _need_all(call, x, [1], "it maps channels to positions")
    return pytree.tree_map_only(torch.Tensor, lambda t: poison(t, [None, x.states[1], None, None]), call.run())


def _need_all(call: Call, held: Held, dims: Any, why: str) -> None:
    for d in dims:
        if lost(held.states[d]):
            raise Disagreement(f"{why}, and entries along it are absent (dimension {d % held.value.dim()})")


def _as_list(dims: Any) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


# ------------------------------------------------------------------------------------------- reductions and normalisation
def _dims(call: Call, x: Held) -> list[int]:
    given = call.a.get("dim")
    return list(range(x.value.dim())) if given in (None, []) else [d % x.value.dim() for d in _as_list(given)]


@means(
    """mean sum nansum amax amin var std linalg_vector_norm norm logsumexp prod all any var_mean std_mean aminmax
    frobenius_norm count_nonzero"""
)
def reduce(call: Call) -> Any:
    """Over the entries that are present."""
    x = call.x
    dims, value = _dims(call, x), x.value
    for d in dims:
        value = take(value, d, x.states[d])
    keep = call.a.get("keepdim", False)
    states = [None if d in dims else s for d, s in enumerate(x.states) if keep or d not in dims]
    result = call.run(**{call.key(x): value})
    return pytree.tree_map_only(torch.Tensor, lambda t: poison(t, states), result)


@means("max min median mode")
def extremum(call: Call) -> Any:
    """Of two tensors: entrywise. Along an axis: over what is present, unless somebody reads the positions found."""
    if isinstance(call.a.get("other"), Held):
        return entrywise(call)
    if call.a.get("dim") is None:
        return reduce(call)
    positions = [u for u in call.node.users if u.target is operator.getitem and u.args[1] == 1 and u.users]
    return ordered(call) if positions else reduce(call)


@means("softmax log_softmax _softmax _log_softmax softmin _safe_softmax")
def softmax(call: Call) -> Held:
    x, d = call.x, call.a["dim"] % call.x.value.dim()
    value = call.run(**{call.key(x): take(x.value, d, x.states[d])})
    return poison(put(value, d, x.states[d]), x.states)


@means("layer_norm rms_norm _fused_rms_norm")
def layer_norm(call: Call) -> Any:
    x, k = call.x, len(call.a["normalized_shape"])
    lead = x.value.dim() - k
    states, override = list(x.states), {}
    for i in range(k):
        given = [p.states[i] for p in call.held("weight", "bias")]
        states[lead + i] = join([states[lead + i], *given])
    for name in ("input", "weight", "bias"):
        held = call.a.get(name)
        if isinstance(held, Held):
            part = held.value
            for i in range(k):
                part = take(part, part.dim() - k + i, states[lead + i])
            override[name] = part
    result = call.run(**override, normalized_shape=list(override["input"].shape[lead:]))
    value = result if isinstance(result, torch.Tensor) else result[0]
    for d in range(lead, x.value.dim()):
        value = put(value, d, states[d])
    if isinstance(result, torch.Tensor):
        return poison(value, states)
    return [poison(value, states), poison(result[1], [*states[:lead], *[None] * k])]


@means("group_norm")
def group_norm(call: Call) -> Held:
    x, groups = call.x, call.a["num_groups"]
    channels = join([x.states[1], *(p.states[0] for p in call.held("weight", "bias"))])
    group, _ = factor(channels, (groups, x.value.shape[1] // groups))
    override = {n: take(call.a[n].value, 0, channels) for n in ("weight", "bias") if isinstance(call.a.get(n), Held)}
    left = groups if group is None else int((group != ABSENT).sum())
    states, value = [x.states[0], channels, *x.states[2:]], x.value
    for d in range(1, value.dim()):
        value = take(value, d, states[d])
    value = call.run(**override, input=value, num_groups=left)
    for d in range(1, value.dim()):
        value = put(value, d, states[d])
    return poison(value, states)


@means("batch_norm instance_norm")
def batch_norm(call: Call) -> Held:
    """Per channel; with statistics of the batch, over the entries that are present."""
    x = call.x
    channels = join([x.states[1], *(p.states[0] for p in call.held("weight", "bias", "running_mean", "running_var"))])
    own = call.a["training"] if call.name == "batch_norm" else call.a["use_input_stats"]
    value, dims = x.value, [d for d in range(x.value.dim()) if d != 1]
    if call.name == "instance_norm":
        dims = dims[1:]
    for d in dims if own else []:
        value = take(value, d, x.states[d])
    value = call.run(input=value)
    for d in dims if own else []:
        value = put(value, d, x.states[d])
    return poison(value, [x.states[0], channels, *x.states[2:]])


# ---------------------------------------------------------------------------------------------------------- contractions
@means("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution torchvision::deform_conv2d")
def convolution(call: Call) -> Held:
    """Absent input channels count 0. A grouped weight serves every group alike, so channels are groups x rest."""
    x, w, bias = call.a["input"], call.a["weight"], call.a.get("bias")
    groups = call.a["groups"]
    swapped = call.name.startswith("conv_transpose") or call.a.get("transposed", False)
    nd = w.value.dim() - 2
    at = x.value.dim() - nd - 1
    _need_all(call, w, range(2, w.value.dim()), "kernel positions")
    for extra in call.held("offset", "mask"):
        _need_all(call, extra, range(extra.value.dim()), "sampling offsets")
    spatial: States = x.states[at + 1 :]
    if not _pointwise(call, w.value.shape[2:]):
        _need_all(call, x, range(at + 1, x.value.dim()), "a window along the axis")
        spatial = (None,) * nd
    taken = x.states[at]
    if swapped:
        taken = join([taken, w.states[0]])
        group, inner = factor(taken, (groups, w.value.shape[0] // groups))
        result = outer((group, w.states[1]), (groups, w.value.shape[1]))
        weight = fill(w.value, 0, taken, 0.0)
    else:
        group, outputs = factor(w.states[0], (groups, w.value.shape[0] // groups))
        given, inner = factor(taken, (groups, x.value.shape[at] // groups))
        group, inner = join([group, given]), join([inner, w.states[1]])
        taken = outer((group, inner), (groups, w.value.shape[1]))
        result = outer((group, outputs), (groups, w.value.shape[0] // groups))
        weight = fill(w.value, 1, inner, 0.0)
    if bias is not None:
        result = join([result, bias.states[0]])
    value = call.run(input=fill(x.value, at, taken, 0.0), weight=weight)
    return poison(value, [*x.states[:at], result, *spatial])


def _pointwise(call: Call, kernel: Sequence[int]) -> bool:
    padding = call.a.get("padding", "deformed")
    padded = isinstance(padding, str) or any(padding) or any(call.a.get("output_padding") or ())
    return not padded and all(k == 1 for k in kernel) and all(s == 1 for s in call.a["stride"])


@means("linear")
def linear(call: Call) -> Held:
    x, w, bias = call.a["input"], call.a["weight"], call.a["bias"]
    taken = join([x.states[-1], w.states[-1]])
    value = call.run(input=fill(x.value, -1, taken, 0.0), weight=fill(w.value, -1, taken, 0.0))
    made = w.states[:-1]
    if bias is not None and made:
        made = (join([made[0], bias.states[0]]),)
    return poison(value, [*x.states[:-1], *made])


@means("matmul bmm mm mv dot addmm baddbmm")
def matmul(call: Call) -> Held:
    a = call.a
    first = next(k for k in ("mat1", "batch1", "self") if k in a)
    second = next(k for k in ("mat2", "batch2", "other", "vec", "tensor") if k in a)
    left, right = a[first], a[second]
    at = -1 if right.value.dim() == 1 else -2
    taken = join([left.states[-1], right.states[at]])
    value = call.run(**{first: fill(left.value, -1, taken, 0.0), second: fill(right.value, at, taken, 0.0)})
    rows, columns = left.states[-2:-1], right.states[-1:] if at == -2 else ()
    batch = value.shape[: value.dim() - len(rows) - len(columns)]
    lead = broadcast([Held(h.value[..., 0, 0], h.states[:-2]) for h in (left, right) if h.value.dim() > 2], batch)
    states = (*lead, *rows, *columns)
    if call.name in ("addmm", "baddbmm"):
        states = broadcast([Held(value, states), a["self"]], value.shape)
    return poison(value, states)


@means("outer ger")
def outer_product(call: Call) -> Held:
    return Held(call.run(), (call.a["self"].states[0], call.a["vec2"].states[0]))


@means("einsum")
def einsum(call: Call) -> Held:
    """Letters that are summed over count 0 where absent; an ellipsis is spelled out with upper-case Greek letters."""
    operands = call.a["tensors"]
    terms, result = spell_out(call.a["equation"], [h.value.dim() for h in operands])
    found: dict[str, list[State]] = {}
    for term, held in zip(terms, operands, strict=True):
        for letter, state, n in zip(term, held.states, held.value.shape, strict=True):
            if n > 1:
                found.setdefault(letter, []).append(state)
    joint = {letter: join(states) for letter, states in found.items()}
    values = []
    for term, held in zip(terms, operands, strict=True):
        value = held.value
        for d, letter in enumerate(term):
            if letter not in result and value.shape[d] > 1:
                value = fill(value, d, joint.get(letter), 0.0)
        values.append(value)
    return poison(call.run(tensors=values), [joint.get(letter) for letter in result])


def spell_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """An einsum equation without blanks, ellipses or implicit output: the letters of each operand and of the result."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = "ΓΔΘΛΞΠΣΦΨΩ"
    extra = max(
        (rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True) if "..." in t), default=0
    )
    dots = spare[:extra]
    if not arrow:
        letters = "".join(terms).replace(".", "")
        right = ("..." if dots else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    spelled = []
    for term, rank in zip(terms, ranks, strict=True):
        own = rank - len(term.replace("...", ""))
        spelled.append(term.replace("...", dots[len(dots) - own :] if own else ""))
    return spelled, right.replace("...", dots)


@means("scaled_dot_product_attention")
def attention(call: Call) -> Held:
    """Spelled out: absent keys leave the softmax; the default scale is that of the original width."""
    a = call.a
    q, k, v, mask = a["query"], a["key"], a["value"], a.get("attn_mask")
    scale = a["scale"] if a.get("scale") is not None else 1 / math.sqrt(q.value.shape[-1])
    if a.get("enable_gqa"):
        k, v = _share_heads(q, k), _share_heads(q, v)
    width, keys = join([q.states[-1], k.states[-1]]), join([k.states[-2], v.states[-2]])
    tokens = q.states[-2]
    if a.get("is_causal"):
        keys = tokens = join([tokens, keys])
    batch = torch.broadcast_shapes(*(h.value.shape[:-2] for h in (q, k, v)))
    lead = broadcast([Held(h.value[..., 0, 0], h.states[:-2]) for h in (q, k, v)], batch)
    shape = (*batch, q.value.shape[-2], k.value.shape[-2])
    if mask is not None:
        scores_like = Held(torch.empty(shape, device="meta"), (*lead, tokens, keys))
        joint = broadcast([scores_like, mask], shape)
        lead, tokens, keys = joint[:-2], joint[-2], joint[-1]
    scores = fill(q.value, -1, width, 0.0) @ fill(fill(k.value, -1, width, 0.0), -2, keys, 0.0).mT * scale
    if a.get("is_causal"):
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        off = mask.value.dtype == torch.bool
        scores = scores.masked_fill(~mask.value, -math.inf) if off else scores + mask.value
    scores = fill(scores, -1, keys, -math.inf)
    weights = torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1))
    value = fill(weights, -1, keys, 0.0) @ fill(v.value, -2, keys, 0.0)
    return poison(value, [*lead, tokens, v.states[-1]])


def _share_heads(q: Held, x: Held) -> Held:
    """Grouped-query attention: heads of k or v repeated to those of q, which are groups x repeats."""
    heads, own = q.value.shape[-3], x.value.shape[-3]
    group, rest = factor(q.states[-3], (own, heads // own))
    state = outer((join([group, x.states[-3]]), rest), (own, heads // own))
    return Held(x.value.repeat_interleave(heads // own, dim=-3), (*x.states[:-3], state, *x.states[-2:]))


@means("cosine_similarity pairwise_distance")
def similarity(call: Call) -> Held:
    x, y = call.a["x1"], call.a["x2"]
    both = torch.broadcast_tensors(x.value, y.value)
    states = broadcast([x, y], both[0].shape)
    d = call.a.get("dim", -1) % both[0].dim()
    value = call.run(x1=take(both[0], d, states[d]), x2=take(both[1], d, states[d]))
    return poison(value, [s for k, s in enumerate(states) if k != d or call.a.get("keepdim")])


@means("cdist _euclidean_dist")
def cdist(call: Call) -> Held:
    x, y = call.a["x1"], call.a["x2"]
    width = join([x.states[-1], y.states[-1]])
    value = call.run(x1=take(x.value, -1, width), x2=take(y.value, -1, width))
    lead = broadcast([Held(h.value[..., 0, 0], h.states[:-2]) for h in (x, y)], value.shape[:-2])
    return poison(value, [*lead, x.states[-2], y.states[-2]])


SPARE = frozenset(name for name, rule in RULES.items() if rule in (filled, expand, repeat, repeat_interleave, pad))
