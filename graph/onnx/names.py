"""Names of the parameters: those of the initializers if these are meaningful, else those of the nodes that read them."""

from __future__ import annotations

import keyword
import re

from torch import nn

from ..trainable import reserved
from .table import LINEAR, Step

ANONYMOUS = re.compile(
    r"(onnx::)?([A-Za-z]+_)?\d+|val_\d+.*|.*Constant.*|/.*|.*_output_\d+.*|.*:\d+|ortshared.*|_.*_\d+"
)
ROLES = {
    "BatchNormalization": ("", "weight", "bias", "running_mean", "running_var"),
    "Add": ("bias", "bias"), "Sub": ("bias", "bias"), "Mul": ("scale", "scale"), "Div": ("scale", "scale"),
    **dict.fromkeys(("MatMul", "Einsum", "Gather"), ("weight", "weight")),
    **dict.fromkeys(("Concat", "Expand", "Where"), ("token",) * 8),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), ("",) * 8 + tuple(
        f"{part}_l0{side}" for side in ("", "_reverse") for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )),
}  # fmt: skip
TAKEN = set(dir(nn.Module()))


class Names:
    """Gives every constant that becomes a parameter or a buffer its own dotted path."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.folders: set[str] = set()

    def path(self, key: str, step: Step, index: int, number: int) -> str:
        """The path of the constant `key`, which is input `index` of a step, the graph's `number`-th."""
        if ANONYMOUS.fullmatch(key) or not re.search(r"[A-Za-z]", key):
            roles = ROLES.get(step.op, ("", "weight", "bias"))
            role = roles[index] if index < len(roles) and roles[index] else f"constant{index}"
            return self.unique(f"{scope(step, number)}.{role}")
        return self.unique(cleaned(key))

    def unique(self, path: str) -> str:
        """The path, made unique by underscores, or by ".value" if it is part of another path."""
        while path in self.paths or path in self.folders or any(f in self.paths for f in folders(path)):
            path += "_" if path in self.paths or path in self.folders else ".value"
            if any(f in self.paths for f in folders(path)):
                path = path.replace(".", "_")
        self.paths.add(path)
        self.folders.update(folders(path))
        return path


def folders(path: str) -> list[str]:
    """The modules around a path, outermost first."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def cleaned(name: str) -> str:
    """A name as a dotted path of identifiers or numbers."""
    parts = [re.sub(r"\W", "_", part) for part in re.split(r"[./:]+", name)]
    path = ".".join(f"{p}_" if p in TAKEN else p for p in parts if p) or "value"
    first, dot, rest = path.partition(".")
    return f"{first}_{dot}{rest}" if reserved(first) else path


def identifier(name: str) -> str:
    """A name as the name of a function's argument."""
    name = re.sub(r"\W", "_", name) or "x"
    name = f"x_{name}" if name[0].isdigit() else name
    return f"{name}_" if keyword.iskeyword(name) or name in ("self", "args", "kwargs") else name


def scope(step: Step, number: int) -> str:
    """The module that a node was exported from: "/layer1/layer1.0/conv1/Conv" is in layer1.0.conv1."""
    if not step.name:
        return f"{step.op.replace(LINEAR, 'linear').lower()}_{number}"
    parts: list[str] = []
    for part in [p for p in step.name.split("/") if p]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
    inner = parts[:-1] if len(parts) > 1 else parts
    return cleaned("/".join(inner))
