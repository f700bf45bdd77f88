"""The rewrites that `Legalise` chooses from. Each is tried on one node, and returns None, or why the node stays ("" for one
that needs no rewrite).

Exact ones compute the same numbers up to rounding; the others name what they compute instead.
Sources: TensorRT documentation, "DLA Supported Layers and Restrictions"; hard-swish, arXiv 1905.02244; the sigmoid form of
GELU, arXiv 1606.08415; the rest is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...graph.edit import Editor
from ...graph.facts import is_pointwise
from ...graph.nodes import arguments, fetch, op_name, per_dim, shape

aten = torch.ops.aten
WINDOW, KERNEL = 8, 32  # largest window of pooling, and largest kernel of a (de)convolution
FLAT = ("flatten", "view", "reshape", "squeeze")
Apply = Callable[[Editor, fx.Node, Any], str | None]  # (editor, node, rules of the accelerator)


@dataclass(frozen=True)
class Step:
    """One kind of rewrite. ops: operators that it replaces. instead: what it computes where it is not exact."""

    ops: tuple[str, ...]
    apply: Apply
    instead: str = ""


STEPS: dict[str, Step] = {}


def step(name: str, *ops: str, instead: str = "") -> Callable[[Apply], Apply]:
    def register(apply: Apply) -> Apply:
        STEPS[name] = Step(ops, apply, instead)
        return apply

    return register


# --------------------------------------------------------------------------------------------------------- activations
def _gate(edit: Editor, x: fx.Node, like: fx.Node) -> fx.Node:
    """clamp(x + 3, 0, 6) / 6, of operators that the accelerator has."""
    shifted = edit.call(aten.add.Tensor, (x, 3.0), like=like)
    clipped = edit.call(aten.clamp.default, (shifted, 0.0, 6.0), like=like)
    return edit.call(aten.mul.Tensor, (clipped, 1 / 6), like=like)


@step("hard-swish", "hardswish", "hardsigmoid")
def hard_swish(edit: Editor, node: fx.Node, rules: Any) -> str | None:
    """Hard-swish and hard-sigmoid by their definition."""
    x = arguments(node)["self"]
    with edit.after(node):
        gate = _gate(edit, x, node)
        new = edit.call(aten.mul.Tensor, (x, gate), like=node) if op_name(node) == "hardswish" else gate
    edit.replace(node, new)
    return None


@step("silu", "silu", instead="hard-swish")
def silu(edit: Editor, node: fx.Node, rules: Any) -> str | None:
    """Hard-swish in place of SiLU: off by at most 0.15."""
    x = arguments(node)["self"]
    with edit.after(node):
        new = edit.call(aten.mul.Tensor, (x, _gate(edit, x, node)), like=node)
    edit.replace(node, new)
    return None


@step("gelu", "gelu", instead="x sigmoid(1.702 x)")
def gelu(edit: Editor, node: fx.Node, rules: Any) -> str | None:
    """x sigmoid(1.702 x) in place of GELU: off by at most 0.021."""
    x = arguments(node)["self"]
    with edit.after(node):
        scaled = edit.call(aten.mul.Tensor, (x, 1.702), like=node)
        new = edit.call(aten.mul.Tensor, (x, edit.call(aten.sigmoid.default, (scaled,), like=node)), like=node)
    edit.replace(node, new)
    return None


# -------------------------------------------------------------------------------------------------- means and products
def _windows(size: int) -> list[int] | None:
    """Windows whose product is a size, each as large as allowed; None if a prime factor is too large."""
    windows = []
    while size > 1:
        window = next((w for w in range(WINDOW, 1, -1) if size % w == 0), None)
        if window is None:
            return None
        windows.append(window)
        size //= window
    return windows


@step("mean", "mean", "adaptive_avg_pool2d")
def mean(edit: Editor, node: fx.Node, rules: Any) -> str | None:
    """A mean over the whole image as average pooling, in several stages if the image is larger than a window."""
    a = arguments(node)
    x = a["self"]
    if len(shape(x)) != 4:
        return "it is no mean over images"
    pools = op_name(node) != "mean"
    if pools and tuple(a["output_size"]) != (1, 1):
        return "it pools to more than one entry"
    if not pools and sorted(d % 4 for d in a.get("dim") or ()) != [2, 3]:
        return "it is no mean over height and width"
    if not all(isinstance(n, int) for n in x.meta["val"].shape[2:]):
        return "the size of the image is dynamic"
    rows, columns = (_windows(n) for n in shape(x)[2:])
    if rows is None or columns is None:
        return f"{shape(x)[2]} x {shape(x)[3]} has a prime factor above {WINDOW}, the largest window"
    count = max(len(rows), len(columns), 1)
    with edit.after(node):
        new = x
        for window in zip(rows + [1] * (count - len(rows)), columns + [1] * (count - len(columns)), strict=True):
            new = edit.call(aten.avg_pool2d.default, (new, list(window), list(window)), like=node)
        if not (pools or a.get("keepdim")):
            new = edit.call(aten.flatten.using_ints, (new, 1), like=node)
    edit.replace(node, new)
    return None


@step("linear", "linear")
def linear(edit: Editor, node: fx.Node, rules: Any) -> str | None:
    """A linear layer over a flattened image, or its mean, as a convolution with a kernel of the image's size; pointwise
    operators between the two move before the flattening."""
    a = arguments(node)
    if a["weight"].op != "get_attr" or len(a["weight"].users) > 1:
        return "its weight is computed or shared"
    between, flat = [], a["input"]
    while is_pointwise(flat) and len(flat.all_input_nodes) == 1 and len(flat.users) == 1:
        between.append(flat)
        flat = flat.all_input_nodes[0]
    if op_name(flat) == "mean" and mean(edit, flat, rules) is None:
        flat = between[-1].all_input_nodes[0] if between else arguments(node)["input"]
    image = flat.all_input_nodes[0] if op_name(flat) in FLAT else None
    if image is None or len(shape(image)) != 4 or len(shape(flat)) != 2 or shape(flat)[0] != shape(image)[0]:
        return "its input is no flattened image"
    size = image.meta["val"].shape[1:]
    if not all(isinstance(n, int) for n in size) or max(size[1:]) > KERNEL:
        return f"the image is dynamic or larger than the largest kernel, {KERNEL}"
    weight = fetch(edit.module, str(a["weight"].target))
    edit.overwrite(a["weight"], _like(weight, weight.detach().reshape(-1, *size)))
    with edit.after(node):
        new = image
        for op in reversed(between):
            args = [new if value is op.all_input_nodes[0] else value for value in op.args]
            new = edit.call(op.target, args, dict(op.kwargs), like=op)
        new = edit.call(aten.conv2d.default, (new, a["weight"], a.get("bias")), like=node)
        new = edit.call(aten.flatten.using_ints, (new, 1), like=node)
    edit.replace(node, new)
    return None


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(new.clone(), old.requires_grad) if isinstance(old, torch.nn.Parameter) else new.clone()


# ---------------------------------------------------------------------------------------------- deconvolutions, resizing
@step("deconvolution", "conv_transpose2d")
def deconvolution(edit: Editor, node: fx.Node, rules: Any) -> str | None:
    """A deconvolution without groups, padding and dilation: its kernel gets zeros between the groups and its entries, and
    its result is cropped. Groups cost as many times more multiply-accumulates."""
    a = arguments(node)
    stride, padding, extra, dilation = (per_dim(a[k], 2) for k in ("stride", "padding", "output_padding", "dilation"))
    groups = 1 if rules.deconvolution_groups else a["groups"]
    pads = any(padding) and not rules.deconvolution_padding
    if groups == 1 and not pads and set(dilation) == {1} and not any(extra):
        return ""
    if a["weight"].op != "get_attr" or len(a["weight"].users) > 1:
        return "its weight is computed or shared"
    if any(e > p for e, p in zip(extra, padding, strict=True)):
        return "its output padding is larger than its padding"
    if not all(isinstance(n, int) for n in node.meta["val"].shape[2:]):
        return "the size of the image is dynamic"
    weight = fetch(edit.module, str(a["weight"].target)).detach()
    spread = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if max(spread) > KERNEL:
        return f"its kernel would be {max(spread)}, above {KERNEL}"
    whole = weight.new_zeros(weight.shape[0], weight.shape[1] * groups, *spread)
    for rows, columns in zip(whole.chunk(groups), range(groups), strict=True):  # the blocks on the diagonal
        block = rows[:, columns * weight.shape[1] : (columns + 1) * weight.shape[1]]
        block[:, :, :: dilation[0], :: dilation[1]] = weight.chunk(groups)[columns]
    edit.overwrite(a["weight"], _like(fetch(edit.module, str(a["weight"].target)), whole))
    bare = (a["input"], a["weight"], a.get("bias"), list(stride), [0, 0], [0, 0], a["groups"] // groups)
    with edit.after(node):
        new = edit.call(aten.conv_transpose2d.input, bare, like=node)
        for dim, (size, cut) in enumerate(zip(shape(node)[2:], padding, strict=True), 2):
            if shape(new)[dim] != size:
                new = edit.call(aten.slice.Tensor, (new, dim, cut, cut + size), like=node)
    edit.replace(node, new)
    return None


@step("resize", "upsample_nearest2d")
def resize(edit: Editor, node: fx.Node, rules: Any) -> str | None:
    """Resizing to the nearest by whole numbers as a deconvolution that repeats every entry: depthwise where the accelerator
    has groups, else with zeros between the channels."""
    x = arguments(node)["input"] if "input" in arguments(node) else arguments(node)["self"]
    before, after = x.meta["val"].shape, node.meta["val"].shape
    if not all(isinstance(n, int) for n in (*before[1:], *after[1:])):
        return "the size of the image is dynamic"
    scales = [b // a for a, b in zip(before[2:], after[2:], strict=True)]
    if any(a * s != b for a, b, s in zip(before[2:], after[2:], scales, strict=True)):
        return "it resizes by other than whole numbers"
    if max(scales) > KERNEL:
        return f"it resizes by {max(scales)}, above {KERNEL}"
    channels, value = before[1], x.meta["val"]
    grouped = rules.deconvolution_groups
    eye = torch.ones(channels, 1) if grouped else torch.eye(channels)
    weight = eye[:, :, None, None].repeat(1, 1, *scales).to(dtype=value.dtype, device=value.device)
    with edit.before(next(iter(edit.graph.nodes))):
        stored = edit.store(edit.free_name(f"{node.name}_repeats"), weight)
    with edit.after(node):
        options = (scales, [0, 0], [0, 0], channels if grouped else 1)
        new = edit.call(aten.conv_transpose2d.input, (x, stored, None, *options), like=node)
    edit.replace(node, new)
    return None


def applied(program: Any, name: str, rules: Any) -> tuple[Any, list[str], dict[str, str]]:
    """Return a copy of a program with one step done everywhere, the nodes that changed, and why others did not."""
    new, step = program.copy(), STEPS[name]
    edit = Editor(new.module())
    changed: list[str] = []
    refused: dict[str, str] = {}
    for node in [n for n in new.graph.nodes if n.op == "call_function" and op_name(n) in step.ops]:
        title = node.name
        why = step.apply(edit, node, rules)
        if why is None:
            changed.append(title)
        elif why:
            refused[title] = why
    if changed:
        edit.finish()
    return new, changed, refused
