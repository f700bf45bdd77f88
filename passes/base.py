"""The base of passes: a pass is a frozen dataclass whose fields are its recipe options; it maps a program to a new one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.export import ExportedProgram

from ..graph.errors import BadInput
from ..graph.hints import check_fields
from ..graph.program import Program
from ..graph.sparse import check_masks
from ..graph.transplant.transplant import transplant
from ..graph.workload.layer import Latency
from .batch import adapted


@dataclass
class Context:
    """What passes may use besides the program itself. Every field is optional; a pass that needs one that is missing
    raises BadInput.

    - data, val: iterables of batches that can be iterated again, such as a `DataLoader`. A batch is `(inputs, labels)`, a
      tensor, or a dict of keyword inputs with an optional "labels" entry. inputs, labels: functions of any other batch that
      return what the model takes, and what loss and metric take as labels.
    - loss: `loss(outputs, labels)`, a scalar tensor; by default cross-entropy. metric: `metric(outputs, labels)`, a score
      for each sample or pixel, higher is better, averaged over `val`; by default accuracy.
    - target: a device with `alignment(dtype) -> int` (see `runtime.Target`). dtype: the precision of the engine.
    - latency: predicts the seconds of layers (`graph.workload.layer.Latency`), for latency targets.
    - teacher: the dense program, for distillation. plan: sizes of groups, as `RemoveChannels.plan` proposes them.
    - placement: where an accelerator of the target runs the layers of a program: a name for each layer, in order, and the
      reason why it falls back to the GPU, "" if it does not (`runtime.dla_placement`).
    - seed: the seed of everything random. out: a folder for checkpoints and stages. progress: whether to show progress bars.
    """

    data: Iterable[Any] | None = None
    val: Iterable[Any] | None = None
    loss: Callable[..., Any] | None = None
    metric: Callable[..., Any] | None = None
    target: Any = None
    dtype: str = "fp16"
    latency: Latency | None = None
    placement: Callable[[Program], Sequence[tuple[str, str]]] | None = None
    teacher: Program | None = None
    seed: int = 0
    out: str | Path | None = None
    progress: bool = False
    plan: dict[str, Any] | None = None
    inputs: Callable[[Any], Any] | None = None
    labels: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        self.data, self.val = (adapted(d, self.inputs, self.labels) for d in (self.data, self.val))
        self.out = None if self.out is None else Path(self.out)
        if isinstance(self.teacher, Program):
            self.teacher = self.teacher.on_cpu()

    def replaced(self, caller: str, **fields: Any) -> Context:
        """Return a copy with some fields set anew. Raises BadInput, which names `caller`, for an unknown field."""
        try:
            return dataclasses.replace(self, **fields)
        except TypeError as error:
            raise BadInput(f"{caller}: {error}") from None

    @property
    def batches(self) -> Iterable[Any]:
        """The data, or an empty tuple without data. (A loader without a length cannot be tested with `or`.)"""
        return () if self.data is None else self.data


@dataclass(frozen=True)
class Change:
    """Something that a pass changed: its name in the program, and further entries of its row in the record."""

    what: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The row of the record's `changed`, JSON-able."""
        return {"what": self.what, **self.details}


@dataclass(frozen=True)
class Refusal:
    """Something that a pass left as it was: its name in the program, the reason, and further entries of its row in the
    record.
    """

    what: str
    why: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The row of the record's `refused`, JSON-able."""
        return {"what": self.what, **self.details, "why": self.why}


@dataclass
class PassResult:
    """The new program and the JSON-able record of what changed, what was refused, and the cost before and after.

    record: its `changed` and `refused` may hold `Change`s and `Refusal`s, which become their rows. removed: `{parameter or
    buffer: {dim: indices}}`, in the input program's numbering. masked: for a pass that removes and also trains or repairs,
    a program of the input program's shapes with the new weights, of which `program` is the exact slice; else None.
    """

    program: Program
    record: dict[str, Any]
    removed: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    masked: Program | None = None

    def __post_init__(self) -> None:
        for key in {"changed", "refused"} & self.record.keys():
            self.record[key] = [r.row() if isinstance(r, (Change, Refusal)) else r for r in self.record[key]]

    def __repr__(self) -> str:
        """The program and the numbers of rows: a record in full fills screens."""
        rows = [f"{len(self.record[key])} {key}" for key in ("changed", "refused") if key in self.record]
        return f"PassResult({', '.join([repr(self.program), *rows])})"

    def transplant(self, model: nn.Module) -> nn.Module:
        """The user's class with smaller weights: a deep copy of the module that was captured, with the same parameter
        names, and with the attributes that hold sizes brought up to date.

        Proven in float64 to compute what the program computes. Raises Refused, which names the line of the forward that
        fixes a size, where it cannot be.
        """
        return transplant(self.program, model)


@dataclass(frozen=True)
class Options:
    """Base of passes and of option groups that they share. Every field is an option; it is checked against its type
    hint (`graph.hints`) before the class's own `__post_init__` checks its range.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Run the type check before the `__post_init__` of a subclass, so that the subclass need not call ours."""
        super().__init_subclass__(**keywords)
        if "__post_init__" in cls.__dict__:
            check_range = cls.__post_init__

            def check(self: Options) -> None:
                check_fields(self)
                check_range(self)

            cls.__post_init__ = check  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Tell pydantic to accept option groups as objects of their class, which checked themselves when they were
        made.
        """
        from pydantic_core import core_schema

        return core_schema.is_instance_schema(cls)

    def options(self) -> dict[str, Any]:
        """The recipe options by name, JSON-able."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def plain(value: Any) -> Any:
    """The JSON-able form of an option's value: an option group becomes a dict, a function its name "module:name"."""
    if isinstance(value, Options):
        return value.options()
    if callable(value):
        return f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value


@dataclass(frozen=True)
class Pass(Options):
    """Base of all passes. Subclasses define fields and `run(program, context) -> PassResult`, which must not change the
    input program.

    exact: whether the result computes what the input program computes, up to the rounding of stored weights; pipelines
    check it.
    """

    exact: ClassVar[bool] = False

    def __call__(self, program: Any, context: Context | None = None, **fields: Any) -> Any:
        """Apply the pass. An `ExportedProgram` in gives an `ExportedProgram` out; a `Program` gives a `PassResult`, whose
        program is on the same device.

        Keyword arguments set fields of a new `Context` (or override those of the one given). Raises BadInput for
        another type of program and for an unknown field.
        """
        if isinstance(program, ExportedProgram):
            return self(Program.from_exported(program), context, **fields).program.exported()
        if not isinstance(program, Program):
            raise BadInput(
                f"{type(self).__name__}: takes a Program or an ExportedProgram, got {type(program).__name__}"
            )
        context = (context or Context()).replaced(type(self).__name__, **fields)
        here = program.on_cpu()
        if here is not program:  # a pass starts on the processor and uses the process's device where it helps
            result = self(here, context)
            result.program = result.program.to(program.device)
            result.masked = result.masked and result.masked.to(program.device)
            return result
        self.check_alone()
        start = time.perf_counter()
        result = self.run(program, context)
        check_masks(program, result.program, result.removed, type(self).__name__, self.exact)
        head = {"pass": type(self).__name__, "options": self.options()}
        result.record = head | result.record | {"seconds": time.perf_counter() - start}
        if "cost" not in result.record:
            result.record["cost"] = {"before": program.cost(), "after": result.program.cost()}
        result.program.history = [*program.history, result.record]
        return result

    def check_alone(self) -> None:
        """Raise BadInput for options that make sense only in the user's own training loop (`graphcomb.attach`)."""

    def run(self, program: Program, context: Context) -> PassResult:
        """Do the pass's work and return its result; the input program stays unchanged."""
        raise TypeError(f"{type(self).__name__} does not define run()")


def check_field(of: Options, name: str, holds: bool, what: str) -> None:
    """Raise BadInput unless `holds`; it names the option, what the option takes, and what it got."""
    if not holds:
        raise BadInput(f"{type(of).__name__}.{name}: {what}, not {getattr(of, name)!r}")
