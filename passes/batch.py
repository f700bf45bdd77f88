"""One batch of a data loader, split into inputs and labels."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..graph.compat import pytree
from ..graph.errors import BadInput, first_line

FORMS = (
    "a batch is (inputs, labels), where inputs may be a tuple, a tensor, a one-element list, or a dict of keyword inputs "
    "with optional labels"
)
ADAPT = "for others give inputs= and labels=, functions of a batch (in a recipe, data: {inputs: module:function, …})"


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """`(args, kwargs, labels)` of one batch; labels is None when the batch has none.

    Accepted forms: `(inputs, labels)`; a tensor; a one-element list or tuple (as `TensorDataset` yields); a mapping of
    keyword inputs with an optional "labels" entry. In the first form, inputs is a tensor, a list or tuple of tensors
    (several positional inputs), or a mapping of keyword inputs. Raises BadInput for anything else, for which the user
    can give functions (`adapted`).
    """
    if isinstance(batch, Split):
        return batch.args, batch.kwargs, batch.labels
    if isinstance(batch, Mapping):
        args, kwargs = _inputs({k: v for k, v in batch.items() if k != "labels"})
        return args, kwargs, batch.get("labels")
    if isinstance(batch, (list, tuple)):
        if not 1 <= len(batch) <= 2:
            raise BadInput(f"data: the loader yields {describe(batch)}; {FORMS}; {ADAPT}")
        args, kwargs = _inputs(batch[0])
        return args, kwargs, batch[1] if len(batch) == 2 else None
    args, kwargs = _inputs(batch)
    return args, kwargs, None


def _inputs(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(value, torch.Tensor):
        return (value,), {}
    if isinstance(value, Mapping) and value and all(map(_is_input, value.values())):
        return (), dict(value)
    if isinstance(value, (list, tuple)) and value and all(map(_is_input, value)):
        return tuple(value), {}
    raise BadInput(f"data: the loader yields {describe(value)} for inputs; {FORMS}; {ADAPT}")


def _is_input(value: Any) -> bool:
    """Whether a model can take the value as one input: a tensor, or a list or mapping of tensors."""
    leaves = pytree.tree_leaves(value)
    return bool(leaves) and all(isinstance(leaf, torch.Tensor) for leaf in leaves)


@dataclass(frozen=True)
class Split:
    """A batch whose inputs and labels are already separated."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any


class Adapted:
    """A loader whose batches functions of the user split; every other attribute is the loader's own."""

    def __init__(self, data: Any, inputs: Callable[[Any], Any] | None, labels: Callable[[Any], Any] | None):
        self.data, self.inputs, self.labels = data, inputs, labels

    def __iter__(self) -> Iterator[Split]:
        return map(self.split, self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "data":
            raise AttributeError(name)
        return getattr(self.data, name)

    def split(self, raw: Any) -> Split:
        """Split one batch. Raises BadInput of one line where a function fails or gives something that is no input."""
        if self.inputs is None:
            args, kwargs, labels = split_batch(raw)
        else:
            args, kwargs = _inputs(_called("inputs", self.inputs, raw))
            labels = self._usual_labels(raw) if self.labels is None else None
        if self.labels is not None:
            labels = _called("labels", self.labels, raw)
        return Split(args, kwargs, labels)

    @staticmethod
    def _usual_labels(raw: Any) -> Any:
        try:
            return split_batch(raw)[2]
        except BadInput:
            raise BadInput(
                f"data: which part of {describe(raw)} are the labels? Give labels= besides inputs=, a function of a batch "
                "that returns None where there are none"
            ) from None


class AdaptedOnce(Adapted):
    """An `Adapted` iterator, which yields its batches once."""

    def __iter__(self) -> Iterator[Split]:
        return self

    def __next__(self) -> Split:
        return self.split(next(self.data))


def adapted(data: Any, inputs: Callable[[Any], Any] | None, labels: Callable[[Any], Any] | None) -> Any:
    """Data whose batches are split by functions of the user: `inputs(batch)` gives a tensor, a list or tuple of
    positional inputs, or a mapping of keyword inputs; `labels(batch)` gives the labels.

    Returns the data itself where there are no functions or the data has some already. Raises BadInput for data that
    cannot be iterated.
    """
    if data is None or isinstance(data, Adapted) or (inputs is None and labels is None):
        return data
    if not isinstance(data, Iterable):
        raise BadInput(f"data: a {type(data).__name__} cannot be iterated; give a DataLoader")
    return (AdaptedOnce if isinstance(data, Iterator) else Adapted)(data, inputs, labels)


def _called(field: str, function: Callable[[Any], Any], raw: Any) -> Any:
    if not callable(function):
        raise BadInput(f"{field}: takes a function of a batch, not a {type(function).__name__}")
    try:
        return function(raw)
    except Exception as error:
        text = first_line(error) or "no message"
        raise BadInput(f"{field}: fails on {describe(raw)} ({type(error).__name__}: {text[:200]})") from error


def describe(value: Any) -> str:
    """A few words about a value for error messages, such as "a tuple of 3 (Tensor)"."""
    if isinstance(value, Mapping):
        odd = next((f'"{k}": {type(v).__name__}' for k, v in value.items() if not isinstance(v, torch.Tensor)), "")
        return f"a dict with {odd}" if odd else "an empty dict"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(sorted({type(v).__name__ for v in value}))})"
    return f"a {type(value).__name__}"
