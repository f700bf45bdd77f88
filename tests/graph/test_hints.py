"""Values against type hints: what is taken, what is converted, and the words for the rest."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from graphcomb.graph.errors import BadInput
from graphcomb.graph.hints import checked, field_hints


@pytest.mark.parametrize(
    ("hint", "value", "result"),
    [
        (float, 1, 1.0), (float, np.float32(0.5), 0.5), (float | None, None, None), (int, np.int64(3), 3),
        (int, torch.tensor(3), 3), (bool, np.bool_(True), True), (tuple[str, ...], "a", ("a",)),
        (tuple[str, ...], ["a", "b"], ("a", "b")), (tuple[tuple[int, float], ...], [[1, 0.5]], ((1, 0.5),)),
        (float | str | None, "3 ms", "3 ms"), (Any, {1}, {1}), (Literal["a", "b"], "a", "a"),
        (int | Sequence[int] | None, (1, 2), (1, 2)), (str | os.PathLike[str], Path("x"), Path("x")),
        (Mapping[str, Sequence[int]], {"x": [1]}, {"x": [1]}), (torch.Size, torch.Size([1]), torch.Size([1])),
    ],
)  # fmt: skip
def test_values_that_fit_are_taken(hint: Any, value: Any, result: Any) -> None:
    found = checked(hint, value, "name")
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (float, "0.5", "name: a number, not '0.5'"), (float, True, "name: a number, not True"),
        (float, float("inf"), "name: a finite number, not inf"), (int, 2.0, "name: a whole number, not 2.0"),
        (bool, 1, "name: true or false, not 1"), (str, None, "name: text, not None"),
        (tuple[str, ...], [3], r"name: a list of texts, not \[3\]"),
        (float | str, [1], r"name: a number or text, not \[1\]"),
        (int | Sequence[int] | None, "12", "name: a whole number or a list, not '12'"),
        (Literal["a", "b", "c"], "d", "name: a, b or c, not 'd'"), (torch.Size, 3, "name: a Size, not 3"),
        (tuple[tuple[int, float], ...], 1, r"name: a list, each \[a whole number, a number\], not 1"),
    ],
)  # fmt: skip
def test_others_are_refused_in_plain_words(hint: Any, value: Any, message: str) -> None:
    with pytest.raises(BadInput, match=f"^{message}$"):
        checked(hint, value, "name")


def test_hints_that_cannot_be_read_are_not_checked() -> None:
    class Odd:
        field: "NotDefinedAnywhere"  # noqa: F821

    assert field_hints(Odd) == {}
