"""The user's class with the smaller weights of a program: exact, or refused with the line that fixes a size. Source: ours.

Tensors go where their names say. Attributes of PyTorch's own layers that repeat a size are set from the tensors. Whatever
else a forward reads (a number of heads, a width) is looked for among the whole numbers of the module whose forward fails:
those that equal a size which something below the module has lost are tried with what is left of it. Nothing of this needs to
be right: the module that comes out is run beside the program in float64, in eval mode.
"""

import copy
import itertools
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .compat import pytree
from .edit import like, tensor_at
from .errors import Refused, reason
from .nodes import arguments, op_name
from .program import Program
from .verify.evaluate import Evaluator, double_weights, random_inputs, relative_error, to_double

TOLERANCE = 1e-10
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
TRIES = 256  # combinations of attributes for one module

Sizes = dict[int, set[int]]


def transplant(program: Program, model: nn.Module) -> nn.Module:
    """A deep copy of the model with the tensors of a program that was made of it, proven to compute the same.

    Raises Refused where the class cannot hold them, naming the line of its forward, or computes something else.
    """
    new = copy.deepcopy(model)
    shrunk = _place(program, new)
    _set_layers(program, new)
    heads = _changed_counts(program)
    args, kwargs = program.args, program.kwargs
    modes = [m.training for m in new.modules()]
    new.eval()
    for _ in new.modules():  # each failure is of another module, or nothing helps
        failure = _failure(new, args, kwargs)
        if failure is None:
            break
        error, stack = failure
        if not any(_mended(module, inputs, shrunk, heads, name) for name, module, inputs in reversed(stack)):
            raise Refused(f"transplant: {_where(error)} fixes a size ({reason(error)})")
    _prove(program, new)
    for module, mode in zip(new.modules(), modes, strict=True):
        module.training = mode
    return new


def _place(program: Program, new: nn.Module) -> dict[str, Sizes]:
    """Put the program's tensors into the module, tied ones into all of their places; by the name of each, the sizes that
    changed."""
    places: dict[
        int, tuple[Any, list[tuple[dict[str, Any], str]]]
    ] = {}  # with the tensor, so that its id stays its own
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
            continue  # a constant of the graph
        if old.dim() != value.dim():
            raise Refused(
                f"transplant: {name} has {old.dim()} dimensions in the module and {value.dim()} in the program"
            )
        shrunk[name] = {}
        for a, b in zip(old.shape, value.shape, strict=True):
            if a != b:
                shrunk[name].setdefault(a, set()).add(b)
        tensor = like(old, value.detach().to(old).clone())
        _, known = places.get(id(old), (None, []))  # none where another name of it came before
        for table, key in known:
            table[key] = tensor
    return shrunk


def _set_layers(program: Program, new: nn.Module) -> None:
    """Bring the attributes of PyTorch's layers up to date with their tensors and with the program's nodes."""
    groups: dict[str, int] = {}
    for node in program.graph.nodes:
        if op_name(node).startswith("conv") or op_name(node) == "group_norm":
            a = arguments(node)
            weight = a.get("weight")
            if isinstance(weight, torch.fx.Node) and weight.op == "get_attr":
                groups[str(weight.target)] = a["groups"] if "groups" in a else a["num_groups"]
    for name, m in new.named_modules():
        weight = m._parameters.get("weight")
        if weight is None:
            continue
        if isinstance(m, CONVS):
            m.groups = groups.get(f"{name}.weight".lstrip("."), m.groups)
            ends = weight.shape[0], weight.shape[1] * m.groups
            m.in_channels, m.out_channels = (weight.shape[0], ends[1]) if m.transposed else (ends[1], ends[0])
        elif isinstance(m, nn.Linear):
            m.out_features, m.in_features = weight.shape
        elif isinstance(m, NORMS):
            m.num_features = len(weight)
        elif isinstance(m, nn.LayerNorm):
            m.normalized_shape = tuple(weight.shape)
        elif isinstance(m, nn.GroupNorm):
            m.num_groups, m.num_channels = groups.get(f"{name}.weight".lstrip("."), m.num_groups), len(weight)
        elif isinstance(m, nn.Embedding):
            m.num_embeddings, m.embedding_dim = weight.shape


def _changed_counts(program: Program) -> dict[str, Sizes]:
    """By the parameter that names a group, how many of its indices (heads, say) there were and are."""
    found: dict[str, Sizes] = {}
    for record in program.history:
        for row in record.get("changed", ()):
            if isinstance(row, dict) and "before" in row and "after" in row:
                found.setdefault(row["what"].split(":")[0], {}).setdefault(row["before"], set()).add(row["after"])
    return found


# ---------------------------------------------------------------------------------------------------- sizes in attributes
Call = tuple[str, nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]


def _failure(new: nn.Module, args: Any, kwargs: Any) -> tuple[Exception, list[Call]] | None:
    """What running the module raises, and the modules whose forward was running then, with what they were given."""
    stack: list[Call] = []
    with ExitStack() as hooks:
        for name, module in new.named_modules():

            def before(m: nn.Module, a: Any, k: Any, name: str = name) -> None:
                stack.append((name, m, (a, k)))

            def after(*_: Any) -> None:
                stack.pop()

            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        try:
            with torch.no_grad():
                new(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        except Exception as error:
            return error, stack
    return None


def _mended(module: nn.Module, inputs: Any, shrunk: dict[str, Sizes], counts: dict[str, Sizes], name: str) -> bool:
    """Change whole numbers of a module until its forward runs; False where nothing helps, and it is as it was."""
    under = f"{name}." if name else ""
    left: Sizes = {}
    for table in (shrunk, counts):
        for parameter, sizes in table.items():
            if parameter.startswith(under):
                for before, after in sizes.items():
                    left.setdefault(before, set()).update(after)
    held = {k: v for k, v in vars(module).items() if isinstance(v, int) and not isinstance(v, bool) and v in left}
    for choice in itertools.islice(_choices(held, left), TRIES):
        vars(module).update(choice)
        try:
            with torch.no_grad():
                module(*copy.deepcopy(inputs[0]), **copy.deepcopy(inputs[1]))
            return True
        except Exception:
            vars(module).update(held)
    return False


def _choices(held: dict[str, int], left: Sizes) -> Iterator[dict[str, int]]:
    """Other values for some of the attributes, the fewest first."""
    for count in range(1, len(held) + 1):
        for keys in itertools.combinations(held, count):
            for values in itertools.product(*(sorted(left[held[k]]) for k in keys)):
                yield dict(zip(keys, values, strict=True))


def _where(error: Exception) -> str:
    """The innermost line of the error that is not PyTorch's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frames = [f for f in frames if f.filename != __file__]
    if not frames:
        return "PyTorch"
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}"


def _prove(program: Program, new: nn.Module) -> None:
    """Refused where the module computes something else than the program, on inputs like the example's, in float64."""
    inputs = [to_double(value) for value in random_inputs(program, torch.Generator().manual_seed(0))]
    expected = Evaluator(program, double_weights(program)).run(inputs)
    structure = pytree.tree_structure((program.args, program.kwargs))
    args, kwargs = pytree.tree_unflatten([copy.deepcopy(value) for value in inputs], structure)
    with torch.no_grad():
        error = relative_error(copy.deepcopy(new).double()(*args, **kwargs), expected)
    if not error <= TOLERANCE:
        raise Refused(f"transplant: the module computes something else than the program (relative error {error:.1e})")
