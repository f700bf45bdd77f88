"""The pipeline applies passes in order; it verifies, measures and records each, and can resume after an interruption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .graph import verify
from .graph.errors import BadInput, GraphcombError
from .graph.files import write_json
from .graph.nodes import op_name, writes
from .graph.program import Program
from .passes.base import Context, Pass, PassResult
from .passes.batch import Adapted
from .passes.common.repeat import Samples, run_code, seeded
from .passes.common.scoring import estimate
from .runtime.formats import read
from .runtime.summary import Record
from .store import Store, is_main

ACCURACY = ("accuracy", "training accuracy")  # metrics whose values are shares
EXACT_TOLERANCE = 1e-5  # merged weights are rounded to float32 when they are stored


@dataclass
class PipelineResult:
    """The result of a pipeline.

    - program: the compressed program.
    - records: the record of every pass (docs/formats.md, Record).
    - accuracy_before, accuracy_after: the metric of the first and the last program; None without labelled validation data.
    - accuracy_interval: 95 % interval of accuracy_after over the choice of samples; None where it is not known.
    - metric: name of the metric.
    """

    program: Program
    records: list[dict[str, Any]] = field(default_factory=list)
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    accuracy_interval: Sequence[float] | None = None
    metric: str = "accuracy"

    @property
    def surgery_error(self) -> float | None:
        """The largest relative error, in float64, of a pass that was verified against the absence oracle; None if no pass
        was."""
        checks = [record.get("verified") for record in self.records]
        errors = [check["error"] for check in checks if check and check["oracle"] == "absence oracle"]
        return max(errors) if errors else None


class Pipeline:
    """A list of passes to apply in order.

    `run` verifies the result of every pass and keeps its record. With a folder it stores every finished pass, so that an
    interrupted run continues after the last finished one. The constructor raises BadInput for an entry that is no pass, and
    for a pass that cannot be used by itself.
    """

    def __init__(self, passes: Sequence[Pass]):
        for i, pass_ in enumerate(passes):
            if not isinstance(pass_, Pass):
                raise BadInput(f"passes.{i}: expected a pass, got {type(pass_).__name__}")
            pass_.check_alone()
        self.passes = list(passes)

    def run(
        self, program: Program, context: Context | None = None, *, key: Any = None, resume: bool = True, **fields: Any
    ) -> PipelineResult:
        """Apply all passes in a context and return the last program with the records.

        - context: by default an empty one. fields: values of its fields, such as `data`. The teacher is by default the
          program itself; the plan is for the first pass that has one; the folder `out` keeps finished passes and
          record.json.
        - key: a JSON-able value on which the results depend, too.
        - resume: whether to reuse a finished pass in `out`. It is reused if nothing has changed of its options and those of
          the passes before it, the program, the data (judged by a sample), loss, metric, teacher, seed, target, plan, `key`
          and the code of the passes.

        Raises what a pass raises, and GraphcombError if a verification fails; the records so far remain in `out`.
        """
        context = (context or Context()).replaced("Pipeline.run", **fields)
        context.teacher, context.progress = context.teacher or program, context.progress and is_main()
        out, context.out = context.out, None
        store = None
        if out is not None:
            digest = run_code(program.module(), context, key)
            store = Store(Path(out) / "passes", digest, resume, Samples(context))
        say = Console(quiet=not context.progress, markup=False, emoji=False).print
        result = PipelineResult(program, metric=figure_name(context))
        if context.val is not None:
            accuracy, result.accuracy_interval = estimate(program, context.val, context.metric, context.progress)
            result.accuracy_before = result.accuracy_after = accuracy
        say(_dense(program, result))
        for i, pass_ in enumerate(self.passes):
            head = f"[{i + 1}/{len(self.passes)}] {type(pass_).__name__}"
            compressed = store.find(i, pass_, result.program) if store else None
            if compressed is None:
                say(f"{head} ...")
                if store:
                    context.out = store.path(i, pass_)
                with seeded(context.seed, context.data, context.val):
                    compressed = self._apply(pass_, result.program, context, result.accuracy_after)
                if store:
                    store.keep(i, pass_, compressed)
            if hasattr(pass_, "plan"):
                context.plan = None
            result.program = compressed
            result.records.append(compressed.history[-1])
            if "accuracy" in result.records[-1]:
                figures = result.records[-1]["accuracy"]
                result.accuracy_after, result.accuracy_interval = figures["after"], figures.get("interval")
            say(f"{head}: {_summary(result.records[-1])}")
            if out is not None and is_main():
                write_json(Path(out) / "record.json", result.records)
        return result

    def _apply(self, pass_: Pass, program: Program, context: Context, accuracy: float | None) -> Program:
        """Apply one pass, check its result, and add the verification and the metric to its record."""
        result: PassResult = pass_(program, context)
        check_invariants(result.program, type(pass_).__name__, program)
        read(Record, json.loads(json.dumps(result.record, default=str)), f"{type(pass_).__name__}: its record")
        if not result.record.get("changed"):
            return result.program
        if verified := result.record.get("verified") or verification(pass_, program, result, context.seed):
            result.record["verified"] = verified
            if not verified["error"] <= verified["tolerance"]:
                raise GraphcombError(
                    f"{type(pass_).__name__}: the result is {verified['error']:.1e} off the {verified['oracle']}, "
                    f"more than {verified['tolerance']:.0e}{verified.get('why', '')}; this is a bug of graphcomb, the "
                    "result is not kept"
                )
        if accuracy is not None and context.val is not None:
            after, interval = estimate(result.program, context.val, context.metric, context.progress)
            figures = {"before": accuracy, "after": after, "metric": figure_name(context)}
            result.record["accuracy"] = figures | ({"interval": interval} if interval else {})
        return result.program


def verification(pass_: Pass, program: Program, result: PassResult, seed: int) -> dict[str, Any] | None:
    """Verify the result of a pass: a removal against the absence oracle, an exact pass against its input program.

    Returns {"oracle", "error", "tolerance"} with the largest relative error in float64, and "why" if the oracle found a
    disagreement; None for a pass that is neither. Raises GraphcombError if something was removed without any effect on the
    outputs, since nothing is proven then.
    """
    if result.removed:
        verdict = verify.check(program, result, seed=seed)
        if verdict.vacuous:
            raise GraphcombError(
                f"{type(pass_).__name__}: something was removed and no output changed, so the surgery is not proven"
            )
        verified = {"oracle": "absence oracle", "error": verdict.error, "tolerance": verify.TOLERANCE}
        return verified | ({"why": f" ({verdict.disagreements[0]})"} if verdict.disagreements else {})
    if pass_.exact:
        error, tolerance = verify.equivalence(program, result.program, seed=seed), EXACT_TOLERANCE
        return {"oracle": "input program", "error": error, "tolerance": tolerance}
    return None


def check_invariants(program: Program, name: str, before: Program) -> None:
    """Check that a program after a pass is a well-formed graph of functional operators.

    In-place operators of the input program, which update buffers of the model, may remain. Raises GraphcombError, which
    names pass and node.
    """
    module = program.graph_module
    module.graph.lint()
    known = set(map(op_name, filter(writes, before.graph.nodes)))
    for node in module.graph.nodes:
        if writes(node) and op_name(node) not in known:
            raise GraphcombError(
                f"{name}: left the in-place operator {op_name(node)} at {node.name}; a bug of the pass"
            )
        if node.op == "call_module":
            raise GraphcombError(f"{name}: left a module call at {node.name}; a bug of the pass")


def figure_name(context: Context) -> str:
    """Return the name of a context's metric: "accuracy" or the name of the user's function, with "training" before it if the
    validation data is the training data."""
    metric = context.metric
    name = "accuracy"
    if metric is not None:
        name = str(getattr(metric, "__name__", type(metric).__name__)).replace("<lambda>", "metric")
    val, data = (d.data if isinstance(d, Adapted) else d for d in (context.val, context.data))
    return f"training {name}" if val is not None and val is data else name


def figure(name: str, value: float) -> str:
    """Format the mean of a metric: an accuracy in percent, another metric as a number."""
    return f"{value:.2%}" if name in ACCURACY else f"{value:.4g}"


def _dense(program: Program, result: PipelineResult) -> str:
    """Return one line about the program before any pass."""
    shapes = ", ".join("x".join(map(str, a.shape)) for a in program.args if isinstance(a, torch.Tensor))
    name, value = result.metric, result.accuracy_before
    score = f", {name} {figure(name, value)}" if value is not None else ""
    cost = program.cost()
    more = f" and those of what is not known ({'; '.join(cost['unknown'])})" if "unknown" in cost else ""
    return f"dense: {program.params:,} parameters, {cost['macs']:,} MACs{more} for inputs {shapes}{score}"


def _summary(record: dict[str, Any]) -> str:
    """Return one line about a finished pass."""
    before, after = record["cost"]["before"], record["cost"]["after"]
    parts = [f"{record['seconds']:.1f} s"]
    if after["macs"] != before["macs"]:
        ratio = "" if "unknown" in before else f" ({before['macs'] / max(after['macs'], 1):.2f}x fewer)"
        parts.append(f"{'known ' if not ratio else ''}MACs {before['macs']:,} -> {after['macs']:,}{ratio}")
    kernels = record.get("kernels")
    if kernels and kernels["after"] > kernels["before"]:
        parts.append(f"predicted kernels {kernels['before']} -> {kernels['after']}")
    if "verified" in record:
        parts.append(f"verified to {record['verified']['error']:.1e}")
    if "accuracy" in record:
        name = record["accuracy"].get("metric", "accuracy")
        before, after = (figure(name, record["accuracy"][when]) for when in ("before", "after"))
        parts.append(f"{name} {before} -> {after}")
    return ", ".join(parts)
