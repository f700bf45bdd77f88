"""The plots of the report as inline SVG in the colours of the page, light or dark.

All functions return the text of an `svg` element. name: a prefix of the ids in it, unique in the page. xtext, ytext: format
a value on an axis.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..reading import BOX

# The plots are drawn in these colours, which are then replaced by the page's CSS variables.
INK, MUTED, GRID, BEFORE, AFTER, SECOND = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", BEFORE: "before", AFTER: "after", SECOND: "second"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text remains text, in the page's font
    "svg.hashsalt": "graphcomb",  # constant ids, so that the same report gives the same file
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
}
WIDTH = 5.0  # inches: small enough that the text stays readable when the plot shrinks to a phone's width
STEPS = [1, 2, 2.5, 5, 10]
Text = Callable[[float], str]


def trade_off(
    name: str, points: Sequence[tuple[float, float, str]], xlabel: str, xtext: Text, ylabel: str, ytext: Text
) -> str:
    """Plot accuracy over a cost. points: (cost, accuracy, label) of every stage from dense to compressed."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.7)
        costs, values = [p[0] for p in points], [p[1] for p in points]
        width = max(costs) or 1.0
        spread = max(max(values) - min(values), 1e-3 * max(abs(v) for v in values), 1e-9)
        axes.plot(costs, values, color=AFTER, linewidth=1.2, alpha=0.6)
        axes.scatter(costs[:1], values[:1], color=BEFORE, s=48, zorder=3)
        axes.scatter(costs[1:], values[1:], color=AFTER, s=48, zorder=3)
        groups: list[tuple[float, float, list[str]]] = []  # points close to each other share a label
        for cost, value, label in points:
            near = (g for g in groups if abs(g[0] - cost) < 0.08 * width and abs(g[1] - value) < 0.12 * spread)
            if neighbour := next(near, None):
                neighbour[2].append(label)
            else:
                groups.append((cost, value, [label]))
        for cost, value, labels in groups:
            # The label points away from the edges of the plot, so that it is not cut off.
            side = "right" if cost > 0.7 * width else "left" if cost < 0.3 * width else "center"
            offset = (0, -16 if value < min(values) + 0.2 * spread else 9)
            text = ", ".join(labels)
            axes.annotate(text, (cost, value), offset, textcoords="offset points", ha=side, parse_math=False)
        axes.set_ylim(min(values) - 0.35 * spread, max(values) + 0.35 * spread)
        axes.set_xlim(0, 1.05 * width)
        _axis(axes, xlabel, xtext, ylabel, ytext)
        return _svg(figure, name)


def profile(name: str, before: Sequence[float], after: Sequence[float], ylabel: str, ytext: Text) -> str:
    """Plot one value per layer, before and after, in the order of the network. Any number of layers fits."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(2.5)
        edges = np.arange(len(before) + 1)
        for values, color, label in ((before, BEFORE, "before"), (after, AFTER, "after")):
            axes.stairs(values, edges, color=color, fill=True, alpha=0.35 if color == BEFORE else 0.85, label=label)
            axes.stairs(values, edges, color=color, linewidth=0.9)
        axes.set_xlim(0, len(before))
        axes.set_ylim(0, max([*before, *after, 1e-9]) * 1.18)
        axes.grid(False, axis="x")
        _axis(axes, "layer, in the order of the network", lambda x: f"{x:.0f}", ylabel, ytext)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
        axes.legend(loc="upper right", ncols=2)
        return _svg(figure, name)


def ranges(name: str, rows: Mapping[str, Mapping[str, float]], xlabel: str, xtext: Text) -> str:
    """Plot the distribution of measurements, one row each: p25 to p75 as a box, p5 to p95 as a line, and the median.

    rows: percentiles by label of the row, with at least the keys of `BOX`; the first row is the reference.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(max(2.3, 0.9 + 0.5 * len(rows)))
        for y, (color, row) in enumerate(zip((BEFORE, *[AFTER] * len(rows)), rows.values(), strict=False)):
            low, left, middle, right, high = (row[key] for key in BOX)
            axes.hlines(y, low, high, color=color, linewidth=1.6)
            axes.barh(y, right - left, left=left, height=0.42, color=color)
            axes.vlines(middle, y - 0.3, y + 0.3, color=INK, linewidth=1.4)
            axes.annotate(xtext(middle), (middle, y - 0.3), (0, 2), textcoords="offset points", ha="center")
        axes.set_xlim(0, 1.1 * max(row[BOX[-1]] for row in rows.values()))
        axes.set_ylim(len(rows) - 0.5, -0.75)
        _axis(axes, xlabel, xtext, "", lambda y: "")
        axes.set_yticks(range(len(rows)), list(rows), parse_math=False)
        axes.grid(False, axis="y")
        return _svg(figure, name)


def curves(name: str, series: Mapping[str, Sequence[tuple[float, float]]], texts: Mapping[str, Text]) -> str:
    """Plot training curves side by side. series: (epoch, value) by label. texts: by label, formats a value."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        for i, (label, points) in enumerate(series.items()):
            axes = figure.add_subplot(1, len(series), i + 1)
            marker = "o" if len(points) < 25 else None
            axes.plot(*zip(*points, strict=True), color=AFTER, linewidth=1.4, marker=marker, markersize=3)
            axes.set_title(label, loc="left", color=MUTED)
            _axis(axes, "epoch", lambda x: f"{x:g}", "", texts[label])
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=STEPS))
        return _svg(figure, name)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _axis(axes: Axes, xlabel: str, xtext: Text, ylabel: str, ytext: Text) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: xtext(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: ytext(value)))


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as an `svg` element for a page with other such elements: without global style and size, with ids that
    begin with `name`, in the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg
