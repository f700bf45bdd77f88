"""Every rule of the absence oracle: an operator on a tensor with absent channels is the operator on what is present."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphcomb as g
from graphcomb.graph.verify.absence import Absence
from graphcomb.graph.verify.evaluate import double_weights, relative_error
from graphcomb.graph.verify.meanings import RULES
from graphcomb.graph.verify.meanings.contraction import spell_out
from graphcomb.graph.verify.presence import Disagreement, Held

CHANNELS, GONE = 8, [1, 5]  # the same index of either half, so that halves and two groups stay balanced
KEPT = [c for c in range(CHANNELS) if c not in GONE]
TABLE = torch.randint(0, 5, (3, 3), generator=torch.Generator().manual_seed(1))


class Under(nn.Module):
    """An operator under test, on a tensor whose channels carry a parameter, with more parameters to its liking."""

    def __init__(self, function, channels, shapes=()):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.zeros(channels))
        self.more = nn.ParameterList([nn.Parameter(torch.zeros(s)) for s in shapes])

    def forward(self, x):
        return self.function(x * self.scale[:, None, None], *self.more)


def both(function, parameters=()):
    """(kept entries of the oracle's result, the operator on the kept entries), in float64.

    parameters: (shape, {dim: removed}) of extra arguments of the function.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(CHANNELS, generator=generator) + 2
    more = [torch.randn(shape, generator=generator) for shape, _ in parameters]
    removed = {"scale": {0: GONE}} | {f"more.{i}": lost for i, (_, lost) in enumerate(parameters)}
    x = torch.randn(2, 1, 4, 6, generator=generator)

    wide = Under(function, CHANNELS, [m.shape for m in more])
    fill_absent(wide, scale, more)
    program = g.capture(wide, x, dynamic_shapes="batch")
    seen: list[Held] = []
    try:
        Absence(program, double_weights(program), removed).run([x], lambda n, v: seen.append(v))
    except Disagreement as error:
        if "output" not in str(error):
            raise
    last = [n for n in program.graph.nodes if n.op != "output"]
    by_node = dict(zip(last, seen, strict=True))
    output = next(n for n in program.graph.nodes if n.op == "output").args[0]
    found = [by_node[n].kept() for n in torch.utils._pytree.tree_leaves(output)]

    small = [cut(m, lost) for m, (_, lost) in zip(more, parameters, strict=True)]
    narrow = Under(function, len(KEPT), [m.shape for m in small])
    fill_absent(narrow, scale[KEPT], small)
    expected = torch.utils._pytree.tree_leaves(narrow.double()(x.double()))
    return found, expected


def fill_absent(module, scale, more):
    with torch.no_grad():
        module.scale.copy_(scale)
        for p, m in zip(module.more, more, strict=True):
            p.copy_(m)


def cut(tensor, lost):
    for d, indices in lost.items():
        tensor = tensor[(slice(None),) * d + ([i for i in range(tensor.shape[d]) if i not in indices],)]
    return tensor


def heads(x, h=2):
    """(batch, head, token, width) of an image, width from the innermost half of the channels."""
    return x.flatten(2).unflatten(1, (h, -1)).transpose(2, 3)


def first(x):
    """How many of the first two channels there are."""
    return 2 if x.shape[1] == CHANNELS else 1


OUT = ((5, CHANNELS), {1: GONE})
CONV = ((5, CHANNELS, 3, 3), {1: GONE})
GROUPED = ((6, CHANNELS // 2, 3, 3), {1: [1]})
LEGAL = {
    "add": (lambda x, b: x + b[:, None, None], [((CHANNELS,), {0: GONE})]),
    "where": (lambda x: torch.where(x > 0, x, x.new_zeros(())), []),
    "masked_fill": (lambda x: x.masked_fill(x < 0, 3.0), []),
    "power of zero": (lambda x: x.pow(0.0), []),
    "to": (lambda x: x.to(torch.float64).type_as(x), []),
    "full_like": (lambda x: x * torch.full_like(x, 2.0), []),
    "new_zeros": (lambda x: x + x.new_ones(x.shape), []),
    "prelu": (lambda x, w: F.prelu(x, w), [((CHANNELS,), {0: GONE})]),
    "tril": (lambda x: x.tril(), []),
    "view": (lambda x: x.flatten(2).unflatten(1, (2, -1)).transpose(1, 2).flatten(1), []),
    "unflatten": (lambda x: x.unflatten(1, (2, -1)).squeeze(0).unsqueeze(-1), []),
    "reshape_as": (lambda x: x.flatten(1).reshape_as(x), []),
    "nhwc flatten": (lambda x: x.permute(0, 2, 3, 1).flatten(1), []),
    "movedim": (lambda x: x.movedim(1, -1).mT, []),
    "slice": (lambda x: x[:, : x.shape[1] // 2, 1:3, ::2], []),
    "select": (lambda x: x[:, :, 1], []),
    "flip": (lambda x: x.flip(1, 3), []),
    "chunk": (lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1], []),
    "split": (lambda x: x.split([1, 3], 2), []),
    "unbind": (lambda x: x.unbind(2), []),
    "diagonal": (lambda x: x.diagonal(dim1=2, dim2=3), []),
    "index_select": (lambda x: x.index_select(3, torch.tensor([0, 2, 2])), []),
    "cat": (lambda x: torch.cat([x, x * 2, x[:, : x.shape[1] // 2]], 1), []),
    "stack": (lambda x: torch.stack([x, -x], 2).flatten(1, 2), []),
    "expand": (lambda x: x.mean(1, keepdim=True).expand(-1, x.shape[1], -1, -1) * x, []),
    "expand_as": (lambda x: x.mean((2, 3), keepdim=True).expand_as(x) + x, []),
    "repeat": (lambda x: x.mean(1, keepdim=True).repeat(1, x.shape[1], 1, 1) * x.repeat(1, 1, 2, 1)[:, :, :4], []),
    "repeat channels": (lambda x: x.repeat(1, 2, 1, 1).relu(), []),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), []),
    "pad": (lambda x: F.pad(x, (1, 2), value=1.0), []),
    "pad channels": (lambda x: F.pad(x[:, first(x) :], (0, 0, 0, 0, first(x), 0)) + x, []),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), []),
    "slice_scatter": (lambda x: torch.slice_scatter(x, x[:, :, :2] * 2, 2, 1, 3), []),
    "select_scatter": (lambda x: torch.select_scatter(x, x[:, :, 0] * 2, 2, 3), []),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(torch.stack([x, x * 2, x * 3, x * 4], 2).flatten(1, 2), 2), []),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), []),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), []),
    "im2col": (lambda x: F.unfold(x, 3, padding=1), []),
    "col2im": (lambda x: F.fold(F.unfold(x, 3, padding=1), (4, 6), 3, padding=1), []),
    "unfold": (lambda x: x.unfold(3, 2, 2), []),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(3, (3, 2)).contiguous()) * 1j), []),
    "glu": (lambda x: F.glu(x, 1), []),
    "meshgrid": (lambda x: torch.meshgrid(x[0, :, 0, 0], x[0, 0, :, 0], indexing="ij"), []),
    "index": (lambda x: x[..., TABLE], []),
    "bias table": (lambda x, t: x[..., :3, :3] + t[TABLE].permute(2, 0, 1), [((5, CHANNELS), {1: GONE})]),
    "index channels": (lambda x, w: x + w[torch.arange(x.shape[1])][:, None, None], [((CHANNELS,), {0: GONE})]),
    "embedding": (lambda x, t: F.embedding(TABLE, t).permute(2, 0, 1) * x[..., :3, :3], [((5, CHANNELS), {1: GONE})]),
    "gather": (lambda x: x.gather(3, x.argsort(3)), []),
    "one_hot": (lambda x: F.one_hot(x.argmax(3), 6), []),
    "topk": (lambda x: x.topk(2, 3), []),
    "cumsum": (lambda x: x.cumsum(2), []),
    "roll": (lambda x: x.roll((1, 2), (2, 3)), []),
    "argmax": (lambda x: x.argmax(-1), []),
    "max_pool": (lambda x: F.max_pool2d(x, 2), []),
    "max_pool with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), []),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), []),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), []),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), []),
    "mean over channels": (lambda x: F.adaptive_avg_pool1d(x.flatten(2).transpose(1, 2), 1), []),
    "grid_sample": (lambda x: F.grid_sample(x, torch.full_like(x[:, 0], 0.3).unsqueeze(-1).expand(-1, -1, -1, 2)), []),
    "mean": (lambda x: x.mean((1, 3)), []),
    "sum of all": (lambda x: x.sum(), []),
    "var_mean": (lambda x: torch.var_mean(x, 1, keepdim=True), []),
    "norm": (lambda x: x / x.norm(dim=1, keepdim=True), []),
    "normalize": (lambda x: F.normalize(x, dim=1), []),
    "amax": (lambda x: x.amax(1) + x.max(dim=1).values + x.max(), []),
    "maximum": (lambda x: torch.max(x, -x), []),
    "logsumexp": (lambda x: x.logsumexp(1), []),
    "softmax": (lambda x: x.softmax(1), []),
    "log_softmax": (lambda x: x.log_softmax(1), []),
    "layer_norm": (
        lambda x, w, b: F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), w, b),
        [((CHANNELS,), {0: GONE}), ((CHANNELS,), {0: GONE})],
    ),
    "layer_norm of two": (lambda x: F.layer_norm(x.flatten(2), (x.shape[1], 24)), []),
    "rms_norm": (lambda x, w: F.rms_norm(x.mT.transpose(1, 3), (x.shape[1],), w, 1e-5), [((CHANNELS,), {0: GONE})]),
    "group_norm": (lambda x, w: F.group_norm(x, 2, w, w), [((CHANNELS,), {0: GONE})]),
    "weight_norm": (
        lambda x, v, g: F.conv2d(x, torch._weight_norm(v, g, 0)),
        [((5, CHANNELS, 1, 1), {0: [2], 1: GONE}), ((5, 1, 1, 1), {0: [2]})],
    ),
    "weight_norm of all": (lambda x, v, g: F.conv2d(x, torch._weight_norm(v, g.sum(), -1)), [CONV, ((3,), {})]),
    "group_norm of one": (lambda x: F.group_norm(x, 1), []),
    "instance_norm": (lambda x: F.instance_norm(x), []),
    "batch statistics": (lambda x: F.batch_norm(x.transpose(1, 2), None, None, training=True), []),
    "conv": (lambda x, w: F.conv2d(x, w, padding=1), [CONV]),
    "conv out": (
        lambda x, w, b: F.conv2d(x, w, b),
        [((5, CHANNELS, 1, 1), {0: [2], 1: GONE}), ((5,), {0: [2]})],
    ),
    "unbatched conv": (lambda x, w: F.conv2d(x[0], w), [CONV]),
    "pointwise conv of rows": (lambda x, w: F.conv1d(x.flatten(2).mT, w), [((5, 24, 1), {0: [0]})]),
    "grouped conv": (lambda x, w: F.conv2d(x, w, groups=2), [GROUPED]),
    "depthwise multiplier": (lambda x, w: F.conv2d(x, w, groups=x.shape[1]), [((16, 1, 3, 3), {0: [2, 3, 10, 11]})]),
    "transposed conv": (lambda x, w: F.conv_transpose2d(x, w, stride=2), [((CHANNELS, 5, 2, 2), {0: GONE, 1: [3]})]),
    "grouped transposed conv": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2),
        [((CHANNELS, 3, 2, 2), {0: GONE, 1: [1]}), ((6,), {0: [1, 4]})],
    ),
    "standardised weight": (
        lambda x, w: F.conv2d(x, F.batch_norm(w.reshape(1, 5, -1), None, None, training=True).reshape_as(w)),
        [CONV],
    ),
    "linear": (lambda x, w: F.linear(x.movedim(1, -1), w), [OUT]),
    "linear vector": (lambda x, w: F.linear(x.movedim(1, -1), w), [((CHANNELS,), {0: GONE})]),
    "matmul": (lambda x, w: w @ x.flatten(2), [OUT]),
    "gram": (lambda x: x.flatten(2) @ x.flatten(2).mT, []),
    "square": (lambda x: x[..., :4] @ x[..., :4], []),
    "mv": (lambda x, v: x.movedim(1, -1) @ v, [((CHANNELS,), {0: GONE})]),
    "bmm": (lambda x: torch.bmm(x.flatten(2).mT, x.flatten(2)), []),
    "addmm": (lambda x, w, b: torch.addmm(b, x[:, :, 0, 0], w.t()), [OUT, ((5,), {})]),
    "baddbmm": (lambda x: torch.baddbmm(x[:, :, :1, 0], x.flatten(2), x.flatten(2).mT), []),
    "outer": (lambda x: torch.outer(x[0, :, 0, 0], x[0, 0, :, 0]), []),
    "einsum": (lambda x, w: torch.einsum("oc,bchw->bohw", w, x), [OUT]),
    "einsum with ellipsis": (lambda x, w: torch.einsum("oc,bc...->bo...", w, x), [OUT]),
    "einsum without result": (lambda x: torch.einsum("ii", x[0, :, 0, 0, None] * x[0, :, 0, 0]), []),
    "attention": (lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), scale=0.3), []),
    "attention without a scale": (
        lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), scale=0.0),
        [],
    ),
    "attention over channels": (lambda x: F.scaled_dot_product_attention(x[..., 0], x[..., 1], x[..., 2]), []),
    "causal attention": (
        lambda x: F.scaled_dot_product_attention(x[..., 0], x[..., 1], x[..., 2], is_causal=True),
        [],
    ),
    "masked attention": (
        lambda x, m: F.scaled_dot_product_attention(x[..., 0], x[..., 1], x[..., 2], attn_mask=m),
        [((CHANNELS, CHANNELS), {0: GONE, 1: GONE})],
    ),
    "grouped queries": (
        lambda x: F.scaled_dot_product_attention(
            heads(x), heads(x)[:, :1], heads(x)[:, :1], enable_gqa=True, scale=0.3
        ),
        [],
    ),
    "cosine_similarity": (lambda x: F.cosine_similarity(x, x + 1, dim=1), []),
    "cdist": (lambda x: torch.cdist(x.flatten(2).mT, x.flatten(2).mT + 1), []),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_operator_on_absent_entries_is_operator_on_present_ones(name):
    found, expected = both(*LEGAL[name])
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < 1e-12


def test_width_keeps_its_scale():
    """The default scale of attention is that of the original width, not of what is left of it."""
    found, plain = both(lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x)))
    _, scaled = both(lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), scale=0.5))
    assert relative_error(found, scaled) < 1e-12
    assert relative_error(found, plain) > 1e-3


ILLEGAL = {
    "disagree": (lambda x, b: x + b[:, None, None], [((CHANNELS,), {0: [0, 5]})]),
    "kept on one side": (lambda x, b: x + b[:, None, None], [((CHANNELS,), {})]),
    "contraction": (lambda x, w: F.linear(x.movedim(1, -1), w), [((5, CHANNELS), {1: [1, 4]})]),
    "bias": (lambda x, w, b: F.conv2d(x, w, b), [CONV, ((5,), {0: [1]})]),
    "norm": (lambda x, w: F.group_norm(x, 2, w), [((CHANNELS,), {0: [1, 6]})]),
    "unbalanced heads": (lambda x: x.unflatten(1, (4, 2)), []),
    "unbalanced groups": (lambda x: F.group_norm(x, 4), []),
    "grouped weight": (lambda x, w: F.conv2d(x, w, groups=4), [((8, 2, 3, 3), {})]),
    "shuffle": (lambda x: F.pixel_shuffle(x, 2), []),
    "gate": (lambda x: torch.cat([x[:, 1:], x[:, :1]], 1).chunk(2, 1)[0] * x.chunk(2, 1)[0], []),
    "sort": (lambda x: x.sort(1).values, []),
    "topk": (lambda x: x.topk(2, 1).values, []),
    "argmax": (lambda x: x.argmax(1), []),
    "positions of a maximum": (lambda x: x.max(dim=1).indices, []),
    "cumsum": (lambda x: x.cumsum(1), []),
    "roll": (lambda x: x.roll(1, 1), []),
    "window": (lambda x: F.avg_pool2d(x.movedim(1, -1), 2), []),
    "conv window": (lambda x, w: F.conv1d(x[:, 0].new_ones(1) * x.flatten(2).mT, w), [((5, 24, 3), {})]),
    "reflection": (lambda x: F.pad(x.flatten(2).mT, (1, 1), mode="reflect"), []),
    "rows looked up": (lambda x, t: x + F.embedding(TABLE, t).sum(), [((5, 3), {0: [1]})]),
    "mask selects": (lambda x, m: x[:, m[:, None, None].expand(-1, 4, 6) > 0].sum(), [((CHANNELS,), {0: GONE})]),
    "view as another type": (lambda x: x.contiguous().view(torch.int32), []),
    "index absent": (lambda x: x[:, 1], []),
    "fft": (lambda x: torch.fft.rfft2(x.movedim(1, -1)).abs(), []),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_has_no_meaning_is_refused_and_named(name):
    with pytest.raises(Disagreement) as error:
        both(*ILLEGAL[name])
    assert "\n" not in str(error.value)
    assert "test_meanings" in str(error.value)  # the source line of the node


def test_absent_outputs_are_refused():
    program = g.capture(Under(lambda x: x, CHANNELS), torch.randn(2, 1, 4, 6))
    with pytest.raises(Disagreement, match="output 0 has absent entries"):
        Absence(program, double_weights(program), {"scale": {0: GONE}}).run(program.args)


def test_unknown_operators_pass_only_what_is_whole():
    program = g.capture(Under(lambda x: torch.fft.fft2(x).real.mean(1), CHANNELS), torch.randn(2, 1, 4, 6))
    weights = double_weights(program)
    assert "fft_fft2" not in RULES
    Absence(program, weights, {}).run(program.args)
    with pytest.raises(Disagreement, match="fft_fft2"):
        Absence(program, weights, {"scale": {0: GONE}}).run(program.args)


def test_einsum_equations_are_spelled_out():
    assert spell_out("b...c, oc -> b...o", [4, 2]) == (["bΓΔc", "oc"], "bΓΔo")
    assert spell_out("ij,jk", [2, 2]) == (["ij", "jk"], "ik")
    assert spell_out("...i,...i", [3, 2]) == (["ΓΔi", "Δi"], "ΓΔ")
