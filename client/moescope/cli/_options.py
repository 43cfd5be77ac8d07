"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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


def console() -> Console:
    """Return a console that prints brackets in paths unchanged and does not wrap lines."""
    return Console(markup=False, soft_wrap=True)
