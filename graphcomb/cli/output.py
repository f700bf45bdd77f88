"""What the commands print with, warnings included, and how they leave."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from typing import Any
from unicodedata import category

from rich.console import Console

BAD_INPUT, UNEXPECTED, WORSE, NO_FIGURE, INTERRUPTED = 2, 1, 1, 1, 130  # exit codes
# Warnings for developers of the code that warns.
HIDDEN = DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning, SyntaxWarning
LIBRARIES = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))
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


def show_warnings() -> None:
    """Show graphcomb's warnings and those of the user's own code, one line each and each text once; the libraries' stay
    silent."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        text = " ".join(str(message).split())
        if text not in seen and not issubclass(category, HIDDEN) and _is_ours_or_users(filename):
            seen.add(text)
            print(f"warning: {text}", file=sys.stderr)

    warnings.simplefilter("always")
    warnings.showwarning = show


def _is_ours_or_users(filename: str) -> bool:
    """Whether a file is a module of graphcomb's, wherever that is installed, or no library's."""
    ours = (module for name, module in list(sys.modules.items()) if name.split(".")[0] == "graphcomb")
    users = not filename.startswith("<") and not any(part in filename for part in LIBRARIES)
    return users or any(getattr(module, "__file__", None) == filename for module in ours)
