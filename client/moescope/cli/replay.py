"""``moescope replay``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options


def replay(
    *,
    run_dir: _options.RunDirOption,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one a line; RUN_DIR/prompts.txt by default.")
    ] = None,
    base_url: Annotated[
        str, typer.Option(help="The server's address, without /v1.")
    ] = "http://localhost:8000",
    api_key: _options.ApiKeyOption = None,
    model: _options.ModelNameOption = None,
    max_tokens: _options.MaxTokensOption = 128,
    temperature: _options.TemperatureOption = 0.0,
    seed: _options.SeedOption = 1234,
    concurrency: _options.ConcurrencyOption = 8,
    layers: Annotated[
        str | None, typer.Option(help="Layers to fetch, such as 0,5-7; all by default.")
    ] = None,
    routes: Annotated[
        bool, typer.Option(help="Fetch the routes; --no-routes for a server without moescope.")
    ] = True,
) -> None:
    """Send every prompt to a server, then fetch the routes of all answers."""
    from moescope import prompts as prompts_file
    from moescope import replay as replaying
    from moescope import report, steps
    from moescope.run_dir import RunDir

    run = RunDir(run_dir)
    texts = prompts_file.read(prompts or run.prompts)
    run.create()
    run.clear_replay()
    prompts_file.write(run.prompts, texts)
    options = replaying.Options(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        concurrency=concurrency,
    )
    console = _options.console()
    responses = steps.replay_prompts(
        run, texts, base_url=base_url, api_key=api_key, options=options, console=console
    )
    if routes:
        steps.fetch_routes(
            run, responses, base_url=base_url, api_key=api_key, layers=layers, console=console
        )
    report.write(run)
    replaying.require_all(responses)
