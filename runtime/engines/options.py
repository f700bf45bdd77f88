"""What may be asked of a library when it builds an engine: one dataclass for all libraries, recipes and commands."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...graph.errors import BadInput
from ...graph.hints import check_fields

DEFAULT_BATCH = 1, 1, 8  # smallest, the one to optimise for (a vehicle's camera gives one image at a time), largest


@dataclass(frozen=True)
class EngineOptions:
    """Options of one build, checked against their type hints and ranges. Each backend's `TAKES` names those it knows; None
    leaves the choice to the library.

    - batch: number of images, of a model with a dynamic batch: one number, or all that the engine is to run at as
      [smallest, the one to optimise for, largest], so that [1, 8, 16] is an engine for 1 to 16 images that is fastest at 8.
      By default [1, 1, 8].
    - shapes: the same three as full shapes, by name of an input with other dynamic axes.
    - sparse: whether kernels for 2:4 sparse weights may be used; a recipe's default is yes where the weights have that
      pattern, otherwise it is no.
    - dla: number of the DLA core to run on, with the GPU as fallback.
    - workspace: limit of the kernels' scratch memory, MiB.
    - optimization_level: how long the library searches for kernels, 0 to 5.
    - tf32: whether layers in fp32 may multiply in TF32.
    - refit: whether the engine's weights can be replaced later.
    - version_compatible: whether later versions of the library can run the engine.
    - hardware_compatibility: other GPUs that can run the engine: those from Ampere on, or of the same compute capability.
    - timing_cache: file from which measurements of kernels are reused, and in which they are kept.
    - plugins: shared libraries with operators that the library lacks; their code runs here, and the engine needs them
      wherever it runs.
    - log: file for the library's verbose log.
    - progress: whether to show the library's build phases.
    - threads: of the engine that is built to see its kernels, on a CPU.

    Raises BadInput (`option workspace: ...`).
    """

    batch: int | Sequence[int] | None = None
    shapes: Mapping[str, Sequence[Sequence[int]]] | None = None
    sparse: bool | None = None
    dla: int | None = None
    workspace: int | None = None
    optimization_level: int | None = None
    tf32: bool | None = None
    refit: bool | None = None
    version_compatible: bool | None = None
    hardware_compatibility: Literal["ampere_plus", "same_compute_capability"] | None = None
    timing_cache: str | os.PathLike[str] | None = None
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

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
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
    """Smallest, best and largest of what is one number or all three. Raises BadInput for another count."""
    values = (bounds,) * 3 if isinstance(bounds, int) else tuple(bounds)
    if len(values) != 3:
        raise BadInput(f"{name}: three are needed (smallest, the one to optimise for, largest), got {len(values)}")
    return values[0], values[1], values[2]
