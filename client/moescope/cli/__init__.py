"""The command line. Its functions parse and call; each module holds one command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from moescope import __version__
from moescope.cli import bench, demo, overhead, plot, prompts, replay, serve, verify
from moescope.errors import MoescopeError

app = typer.Typer(
    name="moescope",
    help="Serve mixture-of-experts models with vLLM, and see which experts every token took.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(
    cls=serve.PassThrough,
    add_help_option=False,
    help="Start vLLM's OpenAI-compatible server with capture; takes all of its flags.",
)(serve.serve)
app.command()(prompts.prompts)
app.command()(replay.replay)
app.command()(plot.plot)
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
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options that stand before the command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; the process's own where None.

    Returns:
        1 after an error, told in one line; otherwise typer exits itself.
    """
    try:
        app(None if argv is None else list(argv), prog_name="moescope")
    except MoescopeError as error:
        return _fail(str(error))
    except OSError as error:  # a file or directory that was named
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    return 0


def _fail(message: str) -> int:
    print(f"moescope: {message}", file=sys.stderr)
    return 1
