"""The command line. A user's mistake gives one line on stderr and exit code 2, Ctrl-C one line and exit code 130."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..graph.errors import GraphcombError
from .bench import bench, bundle
from .build import build
from .export import export
from .machine import check, targets
from .plan import comb, plan
from .predict import predict
from .report import report
from .run import demo, run
from .shared.output import BAD_INPUT, INTERRUPTED, UNEXPECTED, Interrupted, complain, show_warnings
from .source import source
from .tune import sensitivity, tune


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


app = typer.Typer(cls=_Group, add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False) -> None:
    """Compress vision models: capture, comb, prune, distill, lower to ONNX and TensorRT, measure."""
    if not debug:
        show_warnings()
        logging.getLogger("torch").setLevel(logging.ERROR)


for command in (
    run, plan, tune, sensitivity, comb, export, build, bench, predict, bundle, report, source, targets, check, demo,
):  # fmt: skip
    app.command()(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = arguments[:1] == ["--debug"]
    try:
        code = app(arguments, prog_name="graphcomb", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Interrupted:
        return _fail("interrupted; run the same command again to continue", INTERRUPTED, debug)
    except GraphcombError as error:
        return _fail(str(error), BAD_INPUT, debug)
    except Exception as error:
        if hasattr(error, "format_message"):  # usage errors of the command-line library
            return _fail(error.format_message(), BAD_INPUT, debug)
        again = f"graphcomb --debug {' '.join(arguments)} shows the traceback"
        return _fail(f"unexpected {type(error).__name__}: {error} ({again})", UNEXPECTED, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    complain("error", message)
    return code
