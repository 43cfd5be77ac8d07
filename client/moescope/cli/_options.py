"""Options that several commands share."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

RunDirOption = Annotated[Path, typer.Option(help="Directory for the files of the run.")]
ApiKeyOption = Annotated[
    str | None, typer.Option(envvar="VLLM_API_KEY", help="The server's API key.")
]
ModelNameOption = Annotated[
    str | None, typer.Option(help="Served model name; the server's first model by default.")
]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Output tokens at most.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
SeedOption = Annotated[int, typer.Option(help="Sampling seed.")]
ConcurrencyOption = Annotated[int, typer.Option(min=1, help="Requests in flight at most.")]
RoundsOption = Annotated[int, typer.Option(min=3, help="Rounds that count.")]
StartTimeoutOption = Annotated[
    float, typer.Option(min=1.0, help="Seconds to wait until the servers are ready.")
]
NumExpertsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Experts a layer, for a route log whose meta line lacks it."),
]


def console() -> Console:
    """Return a console that takes brackets in paths for what they are, and breaks no line."""
    return Console(markup=False, soft_wrap=True)


def end_servers_on_signals() -> None:
    """Make SIGTERM and SIGHUP unwind the stack, so that servers this process started end too."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
