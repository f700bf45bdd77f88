"""Reproducibility: seeds, random states, and hashes of everything that decides a result. Source: ours."""

import dataclasses
import functools
import hashlib
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from ... import graph
from ...graph.program import Program
from ...graph.trainable import TrainableModule
from ..base import Context, Options
from ..batch import Adapted
from .loaders import generators, length

OWN = ("graphcomb",)  # packages whose code is hashed by `sources`
CONSTANTS = (
    types.FunctionType, types.ModuleType, functools.partial, type, torch.Tensor, np.ndarray, tuple, frozenset, str, bytes,
    int, float, complex, Path, type(None),
)  # fmt: skip  # types of global variables that are hashed; others may be state
DEPTH = 12  # levels of attributes and elements that a hash follows


# ------------------------------------------------------------------------------------------------------- random states
@contextmanager
def seeded(seed: int, *data: Iterable[Any] | None) -> Iterator[None]:
    """A context that runs under a seed (for Python, NumPy, torch and the generators of the given data loaders); all
    random states are restored afterwards.
    """
    state = rng_state()
    states = [(generator, generator.get_state()) for loader in data for generator in generators(loader)]
    set_seed(seed)
    for generator, _ in states:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(state)
        for generator, before in states:
            generator.set_state(before)


def rng_state() -> dict[str, Any]:
    """States of the global random generators, as tensors and plain values."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": numpy | {"state": {"key": numpy["state"]["key"].tolist(), "pos": numpy["state"]["pos"]}},
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states that `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


# ------------------------------------------------------------------------------------------------------- fingerprints
def run_code(module: TrainableModule, context: Context, *parts: Any) -> str:
    """A hash of everything that a stored result depends on, except the contents of batches: the program (graph and
    weights), the context's loss, metric, teacher, seed, target, precision, plan and latency model, the source of
    graphcomb's passes, and `parts`, such as a pass's options.

    Its limits are those of `code_of`. Of the data it holds the number of batches and the functions that split them; the
    first batches themselves are compared by `sample`.
    """
    teacher = None if context.teacher is None else fingerprint(context.teacher.module())
    lengths = [None if d is None else length(d) for d in (context.data, context.val)]
    splits = [(d.inputs, d.labels) for d in (context.data, context.val) if isinstance(d, Adapted)]
    latency = None if context.latency is None else str(context.latency)
    functions = code_of((context.loss, context.metric, context.target, context.dtype, latency, context.plan, *splits))
    return fingerprint(module, teacher, lengths, functions, context.seed, sources(), *parts)


def fingerprint(module: TrainableModule, *parts: Any) -> str:
    """A hash of a graph, its weights, which of them are frozen, and the `repr` of `parts`."""
    digest = hashlib.blake2b(repr((str(module.graph), parts)).encode(), digest_size=6)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} ".encode())
        _add_tensor(digest, tensor)
    frozen = sorted(name for name, p in module.named_parameters() if not p.requires_grad)
    digest.update(repr(frozen).encode() if frozen else b"")
    return digest.hexdigest()


@functools.lru_cache
def sources() -> str:
    """A hash of the source of graphcomb's passes and of its graph package."""
    digest = hashlib.blake2b(digest_size=6)
    for folder in (Path(__file__).parents[1], Path(str(graph.__file__)).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def code_of(value: Any) -> str:
    """A hash of a value. A function is hashed by its bytecode, defaults, the values that it closes over, and the
    functions, classes and constants of the user's code that it names; an object by its class and attributes.

    Not seen: lists, mappings and objects in global variables, which may be state; the code of installed packages (but
    their version); files and environment variables that are read; the state of iterators and of extension types that do
    not pickle; attributes more than a dozen levels deep.
    """
    digest = hashlib.blake2b(digest_size=8)
    _add(digest, value, {}, 0)
    return digest.hexdigest()


def functions_code(options: Options) -> list[Any]:
    """Hashes of the functions among options and among option groups inside them; `Options.options` holds only their
    names.
    """
    values = vars(options).values()
    inner = [code for value in values if isinstance(value, Options) for code in functions_code(value)]
    return [code_of(value) for value in values if callable(value) and not isinstance(value, Options)] + inner


def _add_tensor(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.layout == torch.strided and tensor.device.type != "meta":
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update((raw.resolve_conj().resolve_neg()).view(torch.uint8).numpy())


def _add(digest: Any, value: Any, seen: dict[int, Any], depth: int) -> None:
    """Add a value to the digest. `seen` holds, by id, the containers that are being hashed and the functions, classes
    and objects that were hashed; it keeps them alive, so that no id is used twice.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Path)):
        digest.update(f"{type(value).__name__} {value!r};".encode())
        return
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if id(value) in seen or depth > DEPTH:
        digest.update(f"again {name};".encode())
        return
    seen[id(value)] = value
    digest.update(f"{type(value).__module__}.{name}(".encode())

    def add(*parts: Any) -> None:
        for part in parts:
            _add(digest, part, seen, depth + 1)

    try:
        _add_parts(digest, value, add)
    except Exception:  # an object whose parts cannot be read
        digest.update(b"unseen")
    if isinstance(value, (list, tuple, torch.Tensor)):  # two equal ones and one that occurs twice hash alike
        del seen[id(value)]
    digest.update(b")")


def _add_parts(digest: Any, value: Any, add: Callable[..., Any]) -> None:
    if isinstance(value, TrainableModule):
        add(fingerprint(value))
    elif isinstance(value, Program):
        add(value.module())
    elif isinstance(value, torch.Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        add(*(part for item in value.items() for part in item))
    elif isinstance(value, (list, tuple)):
        add(*value)
    elif isinstance(value, (set, frozenset)):
        add(*sorted(code_of(v) for v in value))
    elif isinstance(value, types.FunctionType):
        _add_function(value, add)
    elif isinstance(value, types.CodeType):
        add(value.co_code, value.co_names, value.co_varnames, value.co_consts)
    elif isinstance(value, types.MethodType):
        add(value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        add(value.func, value.args, value.keywords)
    elif isinstance(value, types.ModuleType):
        add(value.__name__, getattr(value, "__version__", None))
    elif isinstance(value, type):
        _add_class(value, add)
    else:
        _add_object(value, add)


def _add_function(function: types.FunctionType, add: Callable[..., Any]) -> None:
    if not _followed(function.__module__):
        add(function.__module__, function.__qualname__, _version(function.__module__))
        return
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # a closed-over name that has no value yet
            cells.append(None)
    named = [function.__globals__[n] for n in _names(function.__code__) if n in function.__globals__]
    named = [value for value in named if isinstance(value, CONSTANTS)]
    add(function.__code__, function.__defaults__, function.__kwdefaults__, cells, named)


def _names(code: types.CodeType) -> list[str]:
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return [*code.co_names, *inner]


def _add_class(kind: type, add: Callable[..., Any]) -> None:
    add(kind.__module__, kind.__qualname__)
    if not _followed(kind.__module__):
        add(_version(kind.__module__))
        return
    add(*(base for base in kind.__bases__ if base is not object))
    for name, value in vars(kind).items():
        if name not in ("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__static_attributes__"):
            plain = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            add(name, [plain.fget, plain.fset] if isinstance(plain, property) else plain)


def _add_object(value: Any, add: Callable[..., Any]) -> None:
    add(type(value))
    if isinstance(value, (Iterator, torch.Generator)):
        return  # its state changes from run to run
    if dataclasses.is_dataclass(value):
        add([[f.name, getattr(value, f.name, None)] for f in dataclasses.fields(value)])
    elif hasattr(value, "__dict__"):
        add(vars(value))
    else:
        try:
            reduced = value.__reduce_ex__(2)
        except Exception:  # it does not pickle
            return
        add(*(reduced if isinstance(reduced, tuple) else (reduced,))[:3])


def _followed(module: str | None) -> bool:
    """Whether to hash the code of a module: the user's modules, not installed libraries."""
    top = (module or "").partition(".")[0]
    if top in OWN or top in sys.stdlib_module_names - {"__main__"} or top in ("torch", "numpy"):
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return "site-packages" not in file


def _version(module: str | None) -> Any:
    return getattr(sys.modules.get((module or "").partition(".")[0]), "__version__", None)


# --------------------------------------------------------------------------------------------------------------- data
def sample(data: Iterable[Any] | None, seed: int) -> list[str]:
    """Hashes of what the data yields under a seed: one of the first batch and, for a list or tuple, one of the other
    batches.

    Empty without data, and for an iterator, which would lose a batch.
    """
    if data is None or isinstance(data, Iterator):
        return []
    if isinstance(data, Adapted):
        data = data.data  # `run_code` hashes the functions that split it
    with seeded(seed, data):
        if type(data) in (list, tuple):
            return [code_of(part) for part in (list(data[:1]), list(data[1:])) if part]  # type: ignore[index]
        return [code_of([batch]) for batch in islice(data, 1)]


def is_other(stored: list[str], now: list[str]) -> bool:
    """Whether two samples are of different data: whether they differ in a hash that both have."""
    return any(a != b for a, b in zip(stored, now, strict=False))


class Samples:
    """The `sample`s of a context's data and validation data, made once, on demand."""

    def __init__(self, context: Context):
        self.context = context

    @functools.cached_property
    def codes(self) -> list[list[str]]:
        """The samples of the data and of the validation data."""
        return self._again()

    def differ(self, stored: list[list[str]]) -> bool:
        """Whether the data is other than the data that `stored` was sampled from. Data that yields something else at
        every try, whatever the seed, cannot be judged and counts as the same.
        """
        for i, (before, now) in enumerate(zip(stored, self.codes, strict=True)):
            if is_other(before, now) and not is_other(now, self._again()[i]):
                return True
        return False

    def _again(self) -> list[list[str]]:
        return [sample(data, self.context.seed) for data in (self.context.data, self.context.val)]


def says_anew(folder: Path, name: str) -> None:
    """Warn that the stored results of another run in a folder are not used."""
    warnings.warn(
        f"{folder}: {name} starts anew, what is stored there belongs to another run (other program, options, data, loss, "
        "metric, teacher, seed, target or version of graphcomb)",
        stacklevel=2,
    )
