"""What the commands print with, warnings included, and how they leave."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from typing import Any
from unicodedata import category

from rich.console import Console
from rich.text import Text

BAD_INPUT, UNEXPECTED, WORSE, NO_FIGURE, INTERRUPTED = 2, 1, 1, 1, 130  # exit codes
# Warnings for developers of the code that warns.
HIDDEN = DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning, SyntaxWarning
LIBRARIES = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))


class Interrupted(Exception):
    """Ctrl-C, under a name that the command-line library does not handle itself."""


def printable(text: str) -> str:
    """Return a text without the control characters, which a terminal would obey."""
    return "".join("\ufffd" if category(c)[0] == "C" and c not in "\n\t" else c for c in text)


class Terminal(Console):
    """A console that prints no control characters of files and devices, in lines and in cells of tables alike."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return what is printed of a string."""
        return super().render_str(printable(text), **options)


console = Terminal(markup=False, emoji=False)  # names and lines of source code may look like markup


def complain(kind: str, text: object) -> None:
    """Write one line to stderr."""
    print(f"{kind}: {printable(' '.join(str(text).split()))}", file=sys.stderr)


def between(ratio: dict[str, float]) -> str:
    """Write a ratio and the interval in which its median lies, where there is one."""
    between = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if "low" in ratio else ""
    return f"{ratio['median']:.2f}{between}"


def show_warnings() -> None:
    """Show graphcomb's warnings and those of the user's own code, one line each and each text once; the libraries' stay
    silent."""
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
    """Whether a file is a module of graphcomb's, wherever that is installed, or no library's."""
    ours = (module for name, module in list(sys.modules.items()) if name.split(".")[0] == "graphcomb")
    users = not filename.startswith("<") and not any(part in filename for part in LIBRARIES)
    return users or any(getattr(module, "__file__", None) == filename for module in ours)
