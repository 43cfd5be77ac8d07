"""The command line. Its functions parse and call; each module holds one command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core

from moescope import __version__
from moescope.cli import (
    analyze,
    bench,
    convert,
    demo,
    diff,
    overhead,
    plot,
    prompts,
    replay,
    routes,
    serve,
    verify,
    view,
)
from moescope.errors import MoescopeError, StoppedError
from moescope.received import escaped

_LAYOUT = "\n\t"  # the end of a server's log has lines


class _Commands(typer.core.TyperGroup):
    """Turns Ctrl-C into an error of ours before typer turns it into a silent exit."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise StoppedError("stopped by Ctrl-C") from error


app = typer.Typer(
    name="moescope",
    cls=_Commands,
    help="Serve mixture-of-experts models with vLLM, and see which experts every token used.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(
    cls=serve.PassThrough,
    add_help_option=False,
    help="Start vLLM's OpenAI-compatible server with capture; accepts all of its flags.",
)(serve.serve)
app.command()(prompts.prompts)
app.command()(replay.replay)
app.command()(routes.routes)
app.command()(plot.plot)
app.command()(analyze.analyze)
app.command()(convert.convert)
app.command()(diff.diff)
app.command()(view.view)
app.command()(bench.bench)
app.command()(overhead.overhead)
app.command()(demo.demo)
app.command()(verify.verify)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moescope {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-v",  # as vLLM's
            callback=_print_version,
            is_eager=True,
            help="Print moescope's version and exit.",
        ),
    ] = False,
) -> None:
    """Options that precede the command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; the process's own where None.

    Returns:
        1 after an error, printed in one line, and 128 and the signal's number after a signal (130
        after Ctrl-C); otherwise typer exits itself.
    """
    try:
        app(None if argv is None else list(argv), prog_name="moescope")
    except StoppedError as error:
        _fail(str(error))
        return error.exit_status
    except MoescopeError as error:
        return _fail(str(error))
    except OSError as error:  # a file or directory that was named
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    return 0


def _fail(message: str) -> int:
    print(f"moescope: {escaped(message, keep=_LAYOUT)}", file=sys.stderr)
    return 1
