"""Choose the plots that the report shows of a summary, and describe each in words for readers who cannot see it."""

from collections.abc import Callable, Iterable, Mapping

from markupsafe import Markup, escape

from ...summary import Record, Summary
from ..reading import costs, timings
from ..text import count, milliseconds, number, plain_score, si, tick_format
from . import charts
from .devices import device_name, median
from .layers import LayerRow

Plot = tuple[str, str, str]  # caption, SVG, description in words
Point = tuple[float, float, str]  # cost, accuracy, stage


def plots(summary: Summary, layers: list[LayerRow]) -> list[tuple[str, Markup]]:
    """Return the caption and the SVG of every plot for which the summary has the numbers."""
    drawn = [
        *_trade_offs(summary, _trajectory(summary)),
        *_profiles(layers),
        *_latencies(timings(summary)),
        *_training(_epochs(summary.passes), summary.metric),
    ]
    return [(caption, _described(svg, f"{caption}. {words}")) for caption, svg, words in drawn]


def _described(svg: str, words: str) -> Markup:
    """Add a description in words to an SVG, for screen readers."""
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1))


def _trade_offs(summary: Summary, path: list[Point]) -> Iterable[Plot]:
    """Yield plots of accuracy over multiply-accumulates, and over each latency that was measured before and after."""
    if len(path) < 2:
        return
    metric = summary.metric
    ticks = tick_format((accuracy for _, accuracy, _ in path), metric)

    def plot(name: str, points: list[Point], what: str, label: str, text: Callable[[float], str]) -> Plot:
        words = "; ".join(f"{stage}: {text(cost)}, {ticks(accuracy)}" for cost, accuracy, stage in points)
        svg = charts.trade_off(name, points, label, text, metric, ticks)
        return f"{metric.capitalize()} against {what}", svg, words

    def latency(name: str, first: float, last: float, what: str) -> Plot:
        points = [(first, path[0][1], "dense"), (last, path[-1][1], "compressed")]
        return plot(name, points, what, "median latency", milliseconds)

    yield plot("macs", path, "multiply-accumulates", "multiply-accumulates", si)
    medians = [row["median"] for row in timings(summary).values()]
    if len(medians) == 2:
        yield latency("latency", medians[0], medians[1], "latency")
    for i, results in enumerate(summary.devices):
        medians = [number(median(model)) or 0.0 for model in results.models.values()]
        if len(medians) > 1 and medians[0] and medians[-1]:
            yield latency(f"device-{i}", medians[0], medians[-1], f"latency on {device_name(results, 'a device')}")


def _profiles(layers: list[LayerRow]) -> Iterable[Plot]:
    """Yield plots of multiply-accumulates, output channels and predicted time of each layer."""

    def plot(caption: str, name: str, pairs: list[tuple[float, float]], text: Callable[[float], str]) -> Plot:
        values = [(number(first) or 0.0, number(last) or 0.0) for first, last in pairs]
        before, after = [pair[0] for pair in values], [pair[1] for pair in values]
        most = before.index(max(before))
        words = (
            f"{len(values)} layers in the order of the network, {text(sum(before))} before and {text(sum(after))} after; "
            f"the largest is layer {most + 1}, {text(before[most])} before and {text(after[most])} after"
        )
        return caption, charts.profile(name, before, after, "", text), words

    if any(layer.macs[0] for layer in layers):
        yield plot("Multiply-accumulates of each layer", "work", [row.macs for row in layers if any(row.macs)], si)
    if channels := [layer.channels for layer in layers if layer.channels]:
        yield plot("Output channels of each layer", "channels", channels, count)
    if ms := [layer.ms for layer in layers if layer.ms]:
        yield plot("Predicted time of each layer", "times", ms, milliseconds)


def _latencies(percentiles: Mapping[str, Mapping[str, float]]) -> Iterable[Plot]:
    if percentiles:
        words = "; ".join(
            f"{name}: median {milliseconds(row['median'])}, nine of ten from {milliseconds(row['p5'])} to "
            f"{milliseconds(row['p95'])}"
            for name, row in percentiles.items()
        )
        yield "Latency of single calls", charts.ranges("calls", percentiles, "", milliseconds), words


def _training(series: Mapping[str, list[tuple[float, float]]], metric: str) -> Iterable[Plot]:
    if series:
        texts = {"loss": plain_score, "accuracy": tick_format((y for _, y in series.get("accuracy", [])), metric)}
        words = "; ".join(
            f"{name}: {texts[name](points[0][1])} in epoch {points[0][0]:g}, {texts[name](points[-1][1])} in epoch "
            f"{points[-1][0]:g}"
            for name, points in series.items()
        )
        yield "Training", charts.curves("training", series, texts), words


def _trajectory(summary: Summary) -> list[Point]:
    """Return (MACs, accuracy, name) of the dense program and of every stage with a known accuracy. Stages with equal values
    are one point."""
    first, last, _ = costs(summary, "macs")
    points = [(first, summary.accuracy_before, "dense")]
    for record in summary.passes:
        points.append((record.cost.after.macs, record.accuracy.after if record.accuracy else None, record.pass_))
    points.append((last, summary.accuracy_after, "compressed"))
    known: list[Point] = []
    for cost, score, name in points:
        macs, accuracy = number(cost), number(score)
        if macs is not None and accuracy is not None and (macs, accuracy) not in [p[:2] for p in known]:
            known.append((macs, accuracy, name))
    return known


def _epochs(records: list[Record]) -> dict[str, list[tuple[float, float]]]:
    """Return (epoch, value) of loss and accuracy over the epochs of all passes, for the epochs that recorded them."""
    series: dict[str, list[tuple[float, float]]] = {}
    for i, epoch in enumerate((epoch for record in records for epoch in record.epochs), 1):
        for name, value in (("loss", number(epoch.loss)), ("accuracy", number(epoch.val))):
            if value is not None:
                series.setdefault(name, []).append((i, value))
    return series
