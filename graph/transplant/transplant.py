"""The user's class with the smaller weights of a program: exact, or refused with the line that fixes a size. Source: ours.

Tensors are placed by name. Attributes of PyTorch's own layers that repeat a size are set from the tensors; those of other
modules are found by `attribute_sizes`, which runs the module beside the program. None of this has to be trusted: the
resulting module is compared with the program in float64, in eval mode.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from ..capture.export import CPU, device_of
from ..comb.groups import FOLDED
from ..compat import pytree
from ..edit import like, tensor_at
from ..errors import GraphcombError, Refused, reason
from ..nodes import arguments, module_path, op_name
from ..outputs import named_outputs, only_outputs
from ..program import Program, capture
from ..verify.evaluate import Evaluator, double_weights, random_inputs, relative_error, to_double
from ..verify.removal import composed
from .attribute_sizes import Sizes, mend

TOLERANCE = 1e-10
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def transplant(program: Program, model: nn.Module) -> nn.Module:
    """A deep copy of the model with the tensors of a program that was made from it, proven to compute the same.

    Raises Refused if the class cannot hold them (naming the line of its forward) or computes something else.
    """
    try:
        new = copy.deepcopy(model)
    except Exception as error:  # such as of weights that a hook computes
        raise Refused(f"transplant: the model cannot be copied ({reason(error)})") from error
    modes, device, program = [m.training for m in new.modules()], device_of(new), program.on_cpu()
    if device is not None:
        new.to(CPU)
    shrunk = _place(program, new)
    _cut_folded(program, new, shrunk)
    _set_layers(program, new)
    new.eval()
    wrong = mend(program, new, [shrunk, _changed_counts(program)])
    with only_outputs(new, _outputs(program, new)):
        _prove(program, new, wrong)
    for module, mode in zip(new.modules(), modes, strict=True):
        module.training = mode
    return new if device is None else new.to(device)


def _place(program: Program, new: nn.Module) -> dict[str, Sizes]:
    """Put the program's tensors into the module, tied ones in all of their places; returns by name the sizes that
    changed."""
    # The tensors are kept alive, so that no id is used twice.
    places: dict[int, tuple[Any, list[tuple[dict[str, Any], str]]]] = {}
    for module in new.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for key, held in table.items():
                places.setdefault(id(held), (held, []))[1].append((table, key))
    shrunk: dict[str, Sizes] = {}
    for name, value in program.module().state_dict(keep_vars=True).items():
        old = tensor_at(new, name)
        if old is None:
            if isinstance(value, nn.Parameter):
                raise Refused(f"transplant: the module has no parameter {name}; was the program made of it?")
            continue  # a constant that only the graph has
        if old.dim() != value.dim():
            raise Refused(
                f"transplant: {name} has {old.dim()} dimensions in the module and {value.dim()} in the program"
            )
        shrunk[name] = {}
        for a, b in zip(old.shape, value.shape, strict=True):
            if a != b:
                shrunk[name].setdefault(a, set()).add(b)
        tensor = like(old, value.detach().to(old).clone())
        _, known = places.get(id(old), (None, []))  # none if another of its names came before
        for table, key in known:
            table[key] = tensor
    return shrunk


def _cut_folded(program: Program, new: nn.Module, shrunk: dict[str, Sizes]) -> None:
    """Cut the buffers that capture made constants of, such as the scale of a frozen BatchNorm, as these constants were cut.

    They are buffers of the module that computes the constant, are missing in the program, and have exactly one dimension of
    the constant's original size.
    """
    tensors = program.module().state_dict()
    for node in program.structure.nodes:
        if node.op != "get_attr" or not str(node.target).startswith(FOLDED):
            continue
        path = module_path(node)
        for dim, kept in _kept(program, str(node.target)).items():
            size = tensors[str(node.target)].shape[dim]
            for key, held in new.get_submodule(path)._buffers.items():
                name = f"{path}.{key}".removeprefix(".")
                if held is None or name in tensors or name in shrunk or list(held.shape).count(len(kept)) != 1:
                    continue
                stays = torch.from_numpy(kept.nonzero()[0]).to(held.device)
                new.get_submodule(path)._buffers[key] = held.index_select(list(held.shape).index(len(kept)), stays)
                shrunk[name] = {len(kept): {size}}


def _kept(program: Program, name: str) -> dict[int, np.ndarray]:
    """For each dimension of a tensor that lost indices in any pass, a mask of the original indices that are left."""
    tensor = program.module().state_dict()[name]
    removals = (record.get("removed") or {} for record in program.history)
    lost = composed({name: removed[name]} for removed in removals if name in removed).get(name, {})
    kept = {dim: np.ones(tensor.shape[dim] + len(indices), dtype=bool) for dim, indices in lost.items()}
    for dim, indices in lost.items():
        kept[dim][indices] = False
    return kept


def _set_layers(program: Program, new: nn.Module) -> None:
    """Bring the attributes of PyTorch's layers up to date with their tensors and with the program's nodes."""
    groups: dict[str, int] = {}
    for node in program.structure.nodes:
        if op_name(node).startswith("conv") or op_name(node) == "group_norm":
            a = arguments(node)
            groups[module_path(node)] = a["groups"] if "groups" in a else a["num_groups"]
    for name, m in new.named_modules():
        weight = m._parameters.get("weight")
        if isinstance(m, NORMS) and m.running_mean is not None:
            m.num_features = len(m.running_mean)
        if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None:
            m.embed_dim = m.kdim = m.vdim = m.in_proj_weight.shape[1]
        if weight is None:
            continue
        if isinstance(m, CONVS):
            m.groups = groups.get(name, m.groups)
            ends = weight.shape[0], weight.shape[1] * m.groups
            m.in_channels, m.out_channels = (weight.shape[0], ends[1]) if m.transposed else (ends[1], ends[0])
        elif isinstance(m, nn.Linear):
            m.out_features, m.in_features = weight.shape
        elif isinstance(m, NORMS):
            m.num_features = len(weight)
        elif isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
            m.normalized_shape = tuple(weight.shape)
        elif isinstance(m, nn.GroupNorm):
            m.num_groups, m.num_channels = groups.get(name, m.num_groups), len(weight)
        elif isinstance(m, nn.Embedding):
            m.num_embeddings, m.embedding_dim = weight.shape


def _changed_counts(program: Program) -> dict[str, Sizes]:
    """By the parameter that names a group, the numbers of its indices (such as heads) before and after."""
    changed: dict[str, Sizes] = {}
    for record in program.history:
        for row in record.get("changed", ()):
            if isinstance(row, dict) and "before" in row and "after" in row:
                changed.setdefault(row["what"].split(":")[0], {}).setdefault(row["before"], set()).add(row["after"])
    return changed


def _outputs(program: Program, new: nn.Module) -> list[str] | None:
    """The names of the module's outputs that the program has; None for all. If the program returns a single tensor, its
    name is unknown, and the output with the nearest values is taken."""
    args, kwargs = copy.deepcopy((program.args, program.kwargs))
    with torch.no_grad():
        ours = program.module().eval()(*args, **kwargs)
        try:
            named = named_outputs(copy.deepcopy(new)(*args, **kwargs))
        except Exception:
            return None  # `_prove` then says why
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    if isinstance(ours, torch.Tensor) and len(tensors) > 1:
        alike = [name for name, value in tensors.items() if value.shape == ours.shape]
        return [min(alike, key=lambda name: relative_error([tensors[name]], [ours]))] if alike else None
    names = list(ours) if isinstance(ours, dict) else []
    return names if names and set(names) < set(tensors) else None


def _prove(program: Program, new: nn.Module, wrong: str) -> None:
    """Raise Refused if the module computes something else than the program, in float64, on inputs like the example's.

    A module that does not run in float64, or differs, is captured again, and the two programs are compared. wrong: the end
    of the message.
    """
    inputs = [to_double(value) for value in random_inputs(program, torch.Generator().manual_seed(0))]
    expected = Evaluator(program, double_weights(program)).run(inputs)
    structure = pytree.tree_structure((program.args, program.kwargs))
    args, kwargs = pytree.tree_unflatten([copy.deepcopy(value) for value in inputs], structure)
    try:
        with torch.no_grad():
            error = relative_error(copy.deepcopy(new).double()(*args, **kwargs), expected)
    except Exception:
        error = float("nan")
    if not error <= TOLERANCE:
        try:
            again = capture(new, *copy.deepcopy((program.args, program.kwargs)), program.dynamic_shapes, prove=False)
            error = relative_error(Evaluator(again, double_weights(again)).run(inputs), expected)
        except GraphcombError as why:
            raise Refused(
                f"transplant: the module with the smaller weights cannot be captured ({reason(why)}){wrong}"
            ) from None
    if not error <= TOLERANCE:
        raise Refused(
            f"transplant: the module computes something else than the program (relative error {error:.1e}){wrong}"
        )
