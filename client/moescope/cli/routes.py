"""``moescope routes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options


def routes(
    run_dir: Annotated[
        Path, typer.Argument(help="Directory of a replay.", metavar="RUN_DIR", show_default=False)
    ],
    *,
    base_url: _options.BaseUrlOption = _options.DEFAULT_BASE_URL,
    api_key: _options.ApiKeyOption = None,
    ca_cert: _options.CaCertOption = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers whose routes are fetched, such as 0,5-7; by default those of "
            "the routes that are there, or all."
        ),
    ] = None,
    tokens: _options.TokensOption = False,
) -> None:
    """Fetch the routes of a replay's answers that have none; keep those that are there."""
    from moescope import report, routes_stage
    from moescope.run_dir import RunDir

    run = RunDir(run_dir)
    run.check()
    done = routes_stage.fetch_missing(
        run,
        base_url=base_url,
        api_key=api_key,
        verify=ca_cert or True,
        layers=layers,
        tokens=tokens,
        console=_options.console(),
    )
    report.write(run, done.routes)
    done.require_whole()
