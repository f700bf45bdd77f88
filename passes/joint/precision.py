"""The choice of a precision for each region: INT8 (or FP8) where it saves time and costs little, else floating point.

What a region saves is the time of the network less that of the network in which this region alone is INT8, so conversions
at its borders count. What it costs is the divergence of that network from the dense one. Regions are independent in time
(`quantize.regions`) and nearly so in divergence, so the best ones per nat come first, as many as the allowed divergence
permits; the divergence of the chosen network is measured, not added up. A choice that is not faster than the network in
floating point is none. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ...graph.comb.solve import Comb
from ...graph.errors import Refused
from ...graph.facts import FAKE_PER_TENSOR, FAKE_QUANTISATION
from ...graph.nodes import op_name
from ...graph.program import Program
from ...graph.workload.layer import Latency, Layer, rules_of
from ...graph.workload.layers import Layers
from ..base import Context
from ..common.divergence import Divergence
from ..common.weights import layers as find_layers
from ..quantize.choose_layers import Precision, named
from ..quantize.placement import passed_on, producer
from ..quantize.quantize import Quantize
from ..quantize.regions import quantised_alone, quantised_layers, regions
from .losses import take
from .ranges import overflows, ranges

Seconds = Callable[[Sequence[Program]], Sequence[float]]


@dataclass(frozen=True)
class Option:
    """A region by itself. weights: of its layers. gain: seconds that it saves in INT8, conversions included; negative if it
    loses some. loss: divergence in nats. chosen: whether it becomes INT8."""

    weights: tuple[str, ...]
    gain: float
    loss: float
    chosen: bool = False


@dataclass(frozen=True)
class PrecisionChoice:
    """The chosen precisions.

    - layers: for `Quantize(layers=)`: "int8" (or "fp8"), "fp16", or "fp32" where values may leave the range of fp16.
    - program: the program quantised so. loss: its divergence in nats.
    - seconds: by name, those of the programs "plain" (floating point), "all" (every region in INT8) and "chosen".
    - options: all regions.
    - note: why no region is INT8; empty if some are.
    """

    layers: dict[str, Precision]
    program: Program
    loss: float
    seconds: dict[str, float]
    options: tuple[Option, ...]
    note: str = ""


def choose_precisions(
    program: Program,
    context: Context,
    seconds: Seconds,
    loss: float,
    quantize: Quantize | None = None,
    samples: int = 64,
) -> PrecisionChoice:
    """Choose INT8 (or FP8), fp16 or fp32 for each region of a program with folded normalisations.

    - context: with data, whose labels are not needed. Half of the samples calibrate, half judge.
    - seconds: the seconds of several programs, measured in turns or predicted (`predicted_seconds`).
    - loss: the largest divergence from the dense program, in nats (see `losses`).
    - quantize: options of the quantisation, such as `precision="fp8"`. Its `layers` and `exclude` stay fixed, and by
      default so do the first and the last layers, in floating point.
    - samples: number of samples that judge, and as many calibrate.

    Raises Refused for times that are not finite; BadInput without data, or for data that gives the same outputs for all
    samples.
    """
    quantize = quantize or Quantize(samples=samples)
    images = take(program, context, samples)
    inner = replace(context, data=images.repair)
    divergence = Divergence(program, images.judge, images.repair)
    everything = replace(quantize, bias_correction=False)(program, inner).program
    free = {name for _, name in quantised_layers(everything)}
    groups = [
        [layer.name for layer in region] for region in regions([k for k in find_layers(program)[0] if k.name in free])
    ]
    alone = [quantised_alone(everything, group) for group in groups]
    plain, whole, *times = seconds([program, everything, *alone])
    if not all(map(math.isfinite, (plain, whole, *times))):
        raise Refused(
            "choose_precisions: some times could not be measured; measure again when the machine is less busy"
        )
    options = [
        Option(tuple(group), plain - t, divergence(one)) for group, t, one in zip(groups, times, alone, strict=True)
    ]
    order = sorted((o for o in options if o.gain > 0), key=lambda o: o.loss / o.gain)
    fixed = {k.name for k in find_layers(program)[0] if any(named(k.names, pattern) for pattern in quantize.layers)}
    kept: dict[str, Precision] = dict.fromkeys(free - fixed, "fp16")
    wide = {name for name, largest in ranges(program, divergence).items() if overflows(largest)} - fixed
    order = [option for option in order if not wide.intersection(option.weights)]
    kept |= dict.fromkeys(sorted(wide), "fp32")

    def made(count: int) -> tuple[dict[str, Precision], Program, float]:
        chosen: dict[str, Precision] = {name: quantize.precision for option in order[:count] for name in option.weights}
        asked: dict[str, Precision] = {**quantize.layers, **kept, **chosen}
        mixed = replace(quantize, layers=asked)(program, inner).program
        return asked, mixed, divergence(mixed)

    low, best = 0, (made(0) if kept or fixed else ({}, program, 0.0))
    high = len(order)
    while low < high:  # the most options whose network diverges at most so far
        middle = (low + high + 1) // 2
        tried = made(middle)
        if tried[2] <= loss:
            low, best = middle, tried
        else:
            high = middle - 1
    names = {name for option in order[:low] for name in option.weights}
    decided = [replace(o, chosen=set(o.weights) <= names) for o in options]
    took = {"plain": plain, "all": whole, "chosen": plain}
    note = "" if low else _why(options, loss, quantize.precision.upper())
    if low:
        before, took["chosen"] = seconds([program, best[1]])
        if took["chosen"] >= before:
            note = (
                f"the chosen regions together take {1e3 * took['chosen']:.3g} ms, in floating point {1e3 * before:.3g}"
            )
            best, decided = made(0), [replace(o, chosen=False) for o in options]
            took["chosen"] = before
    return PrecisionChoice(best[0], best[1], best[2], took, tuple(decided), note)


def _why(options: Sequence[Option], loss: float, precision: str) -> str:
    """Why no region is INT8 or FP8."""
    if not any(option.gain > 0 for option in options):
        return f"no region is faster in {precision} with its conversions"
    return f"every region that is faster in {precision} diverges by more than {loss:g}, or leaves the range of fp16"


# ------------------------------------------------------------------------------------------------------------ predictions
def predicted_seconds(latencies: Mapping[str, Latency], plain: str = "fp16", quantised: str = "int8") -> Seconds:
    """Predict the seconds of partly quantised programs from a latency model per precision, `quantised` ("int8" or "fp8") and
    `plain` among them.

    A layer with a quantised weight takes its time in INT8. A value is converted by a kernel that copies it where a layer in
    INT8 reads what no other one made, and where anything but such a layer reads what one made.
    """

    def one(program: Program) -> float:
        layers = Layers(Comb(program), rules=rules_of(latencies[plain]))
        integer = {node for node, _ in quantised_layers(program)}
        total = latencies[plain].per_run
        for node, layer in layers.at({}):
            total += latencies[quantised if node in integer else plain].seconds(layer)
        size = layers.sizer({})
        for node in program.graph.nodes:
            if op_name(node) in FAKE_PER_TENSOR:
                value, precision = node.args[0], quantised
                converted = producer(value) not in integer
            else:
                value, precision = node, plain
                converted = producer(node) in integer and any(_leaves(user, node) for user in node.users)
            if converted:
                copy = Layer("copy", (("entries", layers.entries(value, size)),))
                total += latencies[precision].seconds(copy)
        return total

    return lambda programs: [one(program) for program in programs]


def _leaves(user: fx.Node, value: fx.Node) -> bool:
    """Whether a node reads a value in floating point, and not only to quantise it or to pass it on."""
    return op_name(user) not in FAKE_QUANTISATION and passed_on(user) is not value
