"""``moescope demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options


def demo(
    *,
    run_dir: _options.RunDirOption = Path("runs/demo"),
    limit: Annotated[
        int, typer.Option(min=1, help="How many questions of the bundled sample to replay.")
    ] = 25,
    rounds: _options.RoundsOption = 40,
    start_timeout_s: _options.StartTimeoutOption = 600.0,
    force: _options.ForceOption = False,
) -> None:
    """Run all stages with the bundled model: serve, replay, fetch, draw, measure, report."""
    from moescope import demo as demonstration
    from moescope import servers
    from moescope.run_dir import RunDir

    servers.end_servers_on_signals()
    demonstration.run(
        RunDir(run_dir),
        limit=limit,
        rounds=rounds,
        start_timeout_s=start_timeout_s,
        force=force,
        console=_options.console(),
    )
