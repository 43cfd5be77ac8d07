"""Options that several commands share."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moescope.filters import Filter

RunDirOption = Annotated[
    Path, typer.Option(help="Directory of the run: its files are read from and written to it.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace what an earlier run left in the directory.")
]
DEFAULT_BASE_URL = "http://localhost:8000"
BaseUrlOption = Annotated[
    str, typer.Option("--base-url", help="The server's address, with or without /v1.")
]
ApiKeyOption = Annotated[
    str | None, typer.Option(envvar="VLLM_API_KEY", help="API key that is sent to the server.")
]
CaCertOption = Annotated[
    Path | None,
    typer.Option(
        help="For https: PEM file, or directory, of the authorities to trust; SSL_CERT_FILE, "
        "SSL_CERT_DIR or certifi's list by default."
    ),
]
ModelNameOption = Annotated[
    str | None,
    typer.Option(help="Name of the served model; the first that the server lists by default."),
]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Most output tokens of a request.")]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")
]
TokensOption = Annotated[
    bool,
    typer.Option("--tokens", help="Fetch the text of every token too."),
]
ConcurrencyOption = Annotated[int, typer.Option(min=1, help="Most requests in flight at a time.")]
RoundsOption = Annotated[
    int, typer.Option(min=3, help="Rounds that are measured, after the warm-up.")
]
StartTimeoutOption = Annotated[
    float, typer.Option(min=1.0, help="Seconds to wait until a server is ready.")
]
NumExpertsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Routed experts per layer, for a route log that does not say it."),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k", min=1, help="Experts per token and layer, for a route log that does not say it."
    ),
]

_MINUTE, _SECOND = "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"
_TIMES = ["%Y-%m-%d", _MINUTE, f"{_MINUTE}%z", _SECOND, f"{_SECOND}%z"]
SINCE = typer.Option(
    formats=_TIMES,
    metavar="TIME",
    help="Of an archive: traces that finished then or later; a date, or 2026-11-30T10:00 with "
    "seconds and offset (+02:00, Z) or without. In UTC without an offset.",
)
UNTIL = typer.Option(
    formats=_TIMES, metavar="TIME", help="Of an archive: traces that finished before, likewise."
)
MODEL = typer.Option(help="Of an archive: traces of the served model of this name.")
LORA = typer.Option(help='Of an archive: traces with the adapter of this name; "": without one.')
SinceOption = Annotated[dt.datetime | None, SINCE]
UntilOption = Annotated[dt.datetime | None, UNTIL]
OfModelOption = Annotated[str | None, MODEL]
LoraOption = Annotated[str | None, LORA]


def filter_of(
    since: dt.datetime | None, until: dt.datetime | None, model: str | None, lora: str | None
) -> Filter:
    """Return what the options that choose from archives say.

    Raises:
        typer.BadParameter: No time is between the two.
    """
    begin_s, end_s = (
        None if time is None else (time if time.tzinfo else time.replace(tzinfo=dt.UTC)).timestamp()
        for time in (since, until)
    )
    if begin_s is not None and end_s is not None and begin_s >= end_s:
        raise typer.BadParameter(f"{since} is not before --until {until}", param_hint="--since")
    return Filter(since_s=begin_s, until_s=end_s, model=model, lora=lora)


def filters_of(
    num: int,
    since: Sequence[dt.datetime] | None,
    until: Sequence[dt.datetime] | None,
    model: Sequence[str] | None,
    lora: Sequence[str] | None,
) -> list[Filter]:
    """Return what the options say of each of several sides: given once for all, or once for each.

    Raises:
        typer.BadParameter: One is given another number of times; or as of `filter_of`.
    """
    options = {"--since": since, "--until": until, "--model": model, "--lora": lora}
    columns = []
    for name, values in options.items():
        given = [*(values or [None])]
        if len(given) not in (1, num):
            raise typer.BadParameter(
                f"given {len(given)} times for {num} sides: expected once for all, or once for "
                "each in their order",
                param_hint=name,
            )
        columns.append(given * (num // len(given)))
    return [filter_of(*one) for one in zip(*columns, strict=True)]


def console() -> Console:
    """Return a console that prints brackets in paths unchanged and does not wrap lines."""
    return Console(markup=False, soft_wrap=True)
