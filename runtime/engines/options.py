"""The options of an engine build: one dataclass for all libraries, recipes and commands."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...graph.errors import BadInput
from ...graph.hints import check_fields

DEFAULT_BATCH = 1, 1, 8  # smallest, the one to optimise for (a vehicle's camera delivers single images), largest


@dataclass(frozen=True)
class EngineOptions:
    """The options of one build. Each backend's `TAKES` names those that it supports; None leaves a choice to the library.

    - batch: batch size of a model with a dynamic batch: one number, or [smallest, the one to optimise for, largest]:
      [1, 8, 16] gives an engine for 1 to 16 images that is fastest at 8. The default is [1, 1, 8].
    - shapes: by name of an input with further dynamic axes, the same three as full shapes.
    - profiles: several batch ranges instead of `batch`, each [smallest, the one to optimise for, largest], for one
      optimisation profile each: [[1, 1, 1], [8, 16, 32]]. The engine is fast at each of them and takes no other batch.
    - sparse: whether kernels for 2:4 sparse weights may be used. In a recipe the default is true if the weights have that
      pattern, else false.
    - dla: index of the DLA core that runs the layers it supports; the GPU runs the others.
    - workspace: limit of the kernels' scratch memory in MiB.
    - optimization_level: how thoroughly the library searches for kernels, from 0 to 5.
    - tf32: whether layers in fp32 may multiply in TF32.
    - refit: whether the engine's weights can be replaced later.
    - version_compatible: whether later versions of the library can run the engine.
    - hardware_compatibility: which other GPUs can run the engine: Ampere and later, or those of the same compute
      capability.
    - timing_cache: file from which measurements of kernels are reused and to which new ones are added. Its SHA-256 is in
      the report.
    - editable_timing_cache: whether entries of the cache can be replaced later, so that a chosen kernel is always used. The
      cache is written beside the engine, as ENGINE.timing, unless `timing_cache` names a file.
    - direct_io: whether inputs and outputs must be read and written in the formats of the network, without a kernel that
      changes their layout.
    - engine_capability: "standard"; "safety" for TensorRT's safety runtime; or "dla_standalone" for a file that the DLA
      runs without TensorRT: every layer must then run on the DLA.
    - plugins: paths of shared libraries with operators that the library lacks. Their code is executed here, and is needed
      on every machine that runs the engine.
    - log: file for the library's verbose log.
    - progress: whether to show the phases of the build.
    - threads: number of threads of an engine on the CPU that is compiled to report its kernels.

    Raises BadInput, which names the option, for a value of the wrong type or out of range.
    """

    batch: int | Sequence[int] | None = None
    shapes: Mapping[str, Sequence[Sequence[int]]] | None = None
    profiles: Sequence[Sequence[int]] | None = None
    sparse: bool | None = None
    dla: int | None = None
    workspace: int | None = None
    optimization_level: int | None = None
    tf32: bool | None = None
    refit: bool | None = None
    version_compatible: bool | None = None
    hardware_compatibility: Literal["ampere_plus", "same_compute_capability"] | None = None
    timing_cache: str | os.PathLike[str] | None = None
    editable_timing_cache: bool | None = None
    direct_io: bool | None = None
    engine_capability: Literal["standard", "safety", "dla_standalone"] | None = None
    plugins: Sequence[str] | None = None
    log: str | os.PathLike[str] | None = None
    progress: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        check_fields(self, "option ")
        self._check("workspace", 1, None, "a whole number of MiB, from 1 up")
        self._check("optimization_level", 0, 5, "a whole number from 0 to 5")
        self._check("dla", 0, None, "the number of a core, from 0 up")
        self._check("threads", 1, None, "a whole number, from 1 up")
        if self.batch is not None:
            three(self.batch, "option batch")
        if self.profiles is not None:
            if self.batch is not None or self.shapes is not None or not self.profiles:
                raise BadInput("option profiles: one or more ranges, in place of batch and shapes")
            for batches in self.profiles:
                three(batches, "option profiles")
        if self.engine_capability == "dla_standalone" and self.dla is None:
            raise BadInput("option engine_capability: dla_standalone needs dla, the number of a core")

    def given(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}

    @property
    def batches(self) -> tuple[int, int, int]:
        """Smallest batch, the one to optimise for, and largest."""
        return DEFAULT_BATCH if self.batch is None else three(self.batch, "option batch")

    def _check(self, name: str, least: int, most: int | None, what: str) -> None:
        value = getattr(self, name)
        if value is not None and not (least <= value and (most is None or value <= most)):
            raise BadInput(f"option {name}: {what}, not {value!r}")


NAMES = tuple(field.name for field in dataclasses.fields(EngineOptions))


def three(bounds: Any, name: str) -> tuple[Any, Any, Any]:
    """Return (smallest, the one to optimise for, largest) from one number, which is all three, or from three values.

    name: the option, for the message. Raises BadInput for another count.
    """
    values = (bounds,) * 3 if isinstance(bounds, int) else tuple(bounds)
    if len(values) != 3:
        raise BadInput(f"{name}: three are needed (smallest, the one to optimise for, largest), got {len(values)}")
    return values[0], values[1], values[2]
