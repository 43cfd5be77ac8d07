"""``moescope overhead``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options


def overhead(
    vllm_args: Annotated[
        list[str] | None,
        typer.Argument(help="After --: vLLM's flags for both servers.", show_default=False),
    ] = None,
    *,
    run_dir: _options.RunDirOption,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one a line; RUN_DIR/prompts.txt by default.")
    ] = None,
    captured_url: Annotated[
        str | None, typer.Option(help="A running server with capture; with --stock-url.")
    ] = None,
    stock_url: Annotated[
        str | None, typer.Option(help="A running vLLM server without moescope.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Start both servers with this model; the bundled one by default."),
    ] = None,
    api_key: _options.ApiKeyOption = None,
    max_tokens: _options.MaxTokensOption = 128,
    temperature: _options.TemperatureOption = 0.0,
    seed: _options.SeedOption = 1234,
    concurrency: _options.ConcurrencyOption = 8,
    rounds: _options.RoundsOption = 6,
    start_timeout_s: _options.StartTimeoutOption = 1800.0,
) -> None:
    """Measure what the capture costs, against vLLM without it."""
    from moescope import prompts as prompts_file
    from moescope import replay, report, steps, timing
    from moescope.errors import CommandError
    from moescope.run_dir import RunDir

    running = captured_url is not None
    if running != (stock_url is not None) or (running and (model or vllm_args)):
        raise CommandError(
            "give --captured-url and --stock-url of two running servers, "
            "or --model and vLLM's flags after -- to start both"
        )
    run, console = RunDir(run_dir), _options.console()
    texts = prompts_file.read(prompts or run.prompts)
    run.create()
    prompts_file.write(run.prompts, texts)
    options = replay.Options(
        max_tokens=max_tokens, temperature=temperature, seed=seed, concurrency=concurrency
    )
    if captured_url and stock_url:
        arms = timing.Arms(captured_url=captured_url, stock_url=stock_url, api_key=api_key)
        steps.measure_overhead(
            run, texts, arms=arms, options=options, rounds=rounds, console=console
        )
    else:
        _options.end_servers_on_signals()
        with steps.started(
            run,
            model=model,
            args=vllm_args or [],
            api_key=api_key,
            timeout_s=start_timeout_s,
            console=console,
        ) as arms:
            steps.measure_overhead(
                run, texts, arms=arms, options=options, rounds=rounds, console=console
            )
    report.write(run)
