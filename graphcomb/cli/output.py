"""What the commands print with, and how they leave."""

from __future__ import annotations

from typing import Any
from unicodedata import category

from rich.console import Console

BAD_INPUT, UNEXPECTED, WORSE, NO_FIGURE, INTERRUPTED = 2, 1, 1, 1, 130  # exit codes
console = Console(markup=False, emoji=False)  # names and lines of source code may look like markup


class Interrupted(Exception):
    """Ctrl-C, under a name that the command-line library does not handle itself."""


def printable(value: Any) -> Any:
    """Return a value of a file or a device without the control characters, which a terminal would obey, in its texts."""
    if isinstance(value, str):
        return "".join("\ufffd" if category(c)[0] == "C" and c not in "\n\t" else c for c in value)
    if isinstance(value, dict):
        return {printable(k): printable(v) for k, v in value.items()}
    return [printable(v) for v in value] if isinstance(value, list) else value


def between(ratio: dict[str, float]) -> str:
    """Write a ratio and the interval in which its median lies, where there is one."""
    between = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if "low" in ratio else ""
    return f"{ratio['median']:.2f}{between}"
