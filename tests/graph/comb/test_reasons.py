"""Reasons that a user can act on: they name the line, survive the terminal, and say what can be done."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from graphcomb import capture
from graphcomb.cli import plan as cli
from graphcomb.graph.comb.solve import Comb


class Brackets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        v, ratio = self.a(x), {"[/v]": 2}
        y = torch.cat([v, v * ratio["[/v]"]],1)  # fmt: skip
        return self.b(y.flip(1) + y.sort(1)[0][:, :])  # [/v] :smile:


@pytest.fixture
def screen(monkeypatch) -> io.StringIO:
    """What the command line prints, on a terminal as wide as any line."""
    out, old = io.StringIO(), cli.console
    new = Console(file=out, width=1000, markup=old._markup, emoji=old._emoji)
    monkeypatch.setattr(cli, "console", new)
    return out


def test_lines_of_source_code_are_printed_as_they_are(screen) -> None:
    comb = Comb(capture(Brackets(), torch.randn(2, 3, 4, 4)))
    cli.show_groups([vars(g) | {"frozen": g.frozen} for g in comb.groups])
    assert "return self.b(y.flip(1) + y.sort(1)[0][:, :])  # [/v] :smile:" in screen.getvalue()


def test_positions_of_a_window_say_what_can_go_instead() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos, self.a = nn.Parameter(torch.randn(1, 3, 6, 6)), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.a(x + self.pos).mean((2, 3))

    found = Comb(capture(Positions(), torch.randn(2, 3, 6, 6))).why("pos")
    assert "an input of the program" in found

    class Pools(Positions):
        def forward(self, x):
            y = F.interpolate(x, (8, 8)) if x.shape[-1] != 8 else x
            return self.a(F.max_pool2d(self.pos, 2).mean() + y).mean((2, 3))

    found = Comb(capture(Pools(), torch.randn(2, 3, 6, 6))).why("pos")
    assert "a window slides along the axis, so positions on it stay; channels are what can go" in found


def test_constants_are_named_after_what_they_meet_and_where_they_are_made() -> None:
    class Ramps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            ramp = torch.linspace(0, 1, 6) * torch.arange(8.0)[:, None, None]
            y = self.a(x) + ramp * x.new_ones(())
            return self.b(F.max_pool2d(y, 2))

    groups = Comb(capture(Ramps(), torch.randn(2, 3, 6, 6))).groups
    assert not any(g.name.startswith("_folded_") for g in groups if len({n for n, _ in g.members}) > 1)
    own = [g for g in groups if g.name.startswith("_folded_")]
    assert own
    assert all(g.frozen.startswith("a constant that ") and "test_reasons.py" in g.frozen for g in own)
