"""Warnings on the command line: one line each on stderr, for what a user can act on."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from typing import Any, TextIO

# For developers of the code that warns.
HIDDEN = DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning, SyntaxWarning
LIBRARIES = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))


def show_warnings() -> None:
    """Show graphcomb's warnings and those of the user's own code, each text once; the libraries' stay silent."""
    seen: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = " ".join(str(message).split())
        if text not in seen and not issubclass(category, HIDDEN) and (_ours(filename) or _users(filename)):
            seen.add(text)
            print(f"warning: {text}", file=sys.stderr)

    warnings.simplefilter("always")
    warnings.showwarning = show


def _ours(filename: str) -> bool:
    """Whether the file is a module of graphcomb's, wherever that is installed."""
    modules: list[Any] = [m for name, m in sys.modules.items() if name.split(".")[0] == "graphcomb"]
    return any(getattr(module, "__file__", None) == filename for module in modules)


def _users(filename: str) -> bool:
    return not filename.startswith("<") and not any(part in filename for part in LIBRARIES)
