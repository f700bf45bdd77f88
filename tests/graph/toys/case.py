"""A toy network: one small model per structure that pruners get wrong, with what ratio 0.5 must leave of its parameters.

`CASES` maps a name to a `Case`. Sizes are deliberately odd or prime where that is nasty: 3 heads of width 5, 6 channels in
3 groups, 58 channels shuffled in 2 groups of 29.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """model: makes the module. shape: of the input, batch first. expected: parameter -> shape after ratio 0.5, round_to 1.

    frozen: parameter -> words its reason must hold, for parameters that must stay whole. static: does not export with a
    dynamic batch.
    """

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    expected: dict[str, tuple[int, ...]]
    frozen: dict[str, str] = field(default_factory=dict)
    static: bool = False


CASES: dict[str, Case] = {}


def case(
    shape: tuple[int, ...], frozen: dict[str, str] | None = None, static: bool = False, **expected: tuple[int, ...]
):
    """Register a module class; `a__weight` in keywords stands for the parameter a.weight."""

    def register(model: type[nn.Module]) -> type[nn.Module]:
        sizes = {k.replace("__", "."): v for k, v in expected.items()}
        CASES[model.__name__] = Case(model, shape, sizes, frozen or {}, static)
        return model

    return register


class Head(nn.Module):
    """Global mean over the spatial dimensions and a linear layer: lets every channel before it shrink."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(tuple(range(2, x.dim()))))


class TokenHead(nn.Module):
    """The same for tokens (B, N, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(1))
