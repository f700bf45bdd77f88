"""Functions with which the commands print, also warnings, and the exit codes."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import category

import typer
from rich.console import Console
from rich.text import Text

from ...graph.files import write_json

BAD_INPUT, UNEXPECTED, WORSE, NO_FIGURE, INTERRUPTED = 2, 1, 1, 1, 130  # exit codes
# Categories of warnings that are for developers, not for users.
HIDDEN = DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning, SyntaxWarning
LIBRARIES = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))


class Interrupted(Exception):
    """Ctrl-C was pressed. The command-line library would handle a KeyboardInterrupt itself."""


def printable(text: str) -> str:
    """Return a text in which control characters, which could control the terminal, are replaced."""
    return "".join("\ufffd" if category(c)[0] == "C" and c not in "\n\t" else c for c in text)


class Terminal(Console):
    """A console that prints no control characters from files and devices, in lines or in cells of tables."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text that is printed for a string."""
        return super().render_str(printable(text), **options)


console = Terminal(markup=False, emoji=False)  # names and lines of source code may look like markup


def complain(kind: str, text: object) -> None:
    """Write one line to stderr."""
    print(f"{kind}: {printable(' '.join(str(text).split()))}", file=sys.stderr)


def save(path: Path | None, value: Any) -> None:
    """Write a value as JSON, if the user named a file for it."""
    if path is not None:
        write_json(path, value, indent=2)


def pass_gate(worse: Sequence[object]) -> None:
    """Leave with exit code WORSE if anything got worse than in the baseline of --gate, after one line for each of it."""
    for text in worse:
        complain("gate", text)
    if worse:
        raise typer.Exit(WORSE)


def between(ratio: dict[str, float]) -> str:
    """Format the median of a ratio and its confidence interval, if it has one."""
    between = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if "low" in ratio else ""
    return f"{ratio['median']:.2f}{between}"


def show_warnings() -> None:
    """Show warnings of graphcomb and of the user's own code, each text once and in one line; hide those of libraries."""
    seen: set[str] = set()

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        text = " ".join(str(message).split())
        if text not in seen and not issubclass(category, HIDDEN) and _is_ours_or_users(filename):
            seen.add(text)
            complain("warning", text)

    warnings.simplefilter("always")
    warnings.showwarning = show


def _is_ours_or_users(filename: str) -> bool:
    """Return whether a file is a module of graphcomb, or belongs to no installed library."""
    ours = (module for name, module in list(sys.modules.items()) if name.split(".")[0] == "graphcomb")
    users = not filename.startswith("<") and not any(part in filename for part in LIBRARIES)
    return users or any(getattr(module, "__file__", None) == filename for module in ours)
