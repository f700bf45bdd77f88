"""The command line: `app` has the commands and exit codes, each other file one command or two."""

from .app import main

__all__ = ["main"]
