"""``moescope overhead``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options


def overhead(
    vllm_args: Annotated[
        list[str] | None,
        typer.Argument(help="After --: vLLM's flags for all servers.", show_default=False),
    ] = None,
    *,
    run_dir: _options.RunDirOption,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, one a line; RUN_DIR/prompts.txt by default.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="stock, stock-again, moescope, counts, paused, installed, routed-experts, "
            "NAME=COMMAND with {port} in it, or NAME=http://…; repeat. By default the first three; "
            "the first is what the others are compared with.",
            show_default=False,
        ),
    ] = None,
    placement: Annotated[
        str, typer.Option(help="together, in-turn, or auto: by the memory there is.")
    ] = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="Start the servers with this model; the bundled one by default."),
    ] = None,
    api_key: _options.ApiKeyOption = None,
    max_tokens: _options.MaxTokensOption = 128,
    temperature: _options.TemperatureOption = 0.0,
    seed: _options.SeedOption = 1234,
    concurrency: _options.ConcurrencyOption = 8,
    rounds: _options.RoundsOption = 12,
    start_timeout_s: _options.StartTimeoutOption = 1800.0,
) -> None:
    """Compare servers under the same load: stock vLLM, the same again, moescope, others."""
    from moescope import prompts as prompts_file
    from moescope import report, steps
    from moescope.errors import CommandError
    from moescope.overhead.arms import DEFAULT, parse_all
    from moescope.replay import Options
    from moescope.run_dir import RunDir

    if placement not in {"auto", "together", "in-turn"}:
        raise CommandError(f"{placement!r} is no placement: take auto, together or in-turn")
    arms = parse_all(arm or DEFAULT)
    run, console = RunDir(run_dir), _options.console()
    texts = prompts_file.read(prompts or run.prompts)
    run.create()
    prompts_file.write(run.prompts, texts)
    _options.end_servers_on_signals()
    with steps.hosted(
        run,
        arms,
        model=model,
        args=vllm_args or [],
        placement=placement,  # type: ignore[arg-type]
        timeout_s=start_timeout_s,
        console=console,
    ) as ready:
        steps.measure_overhead(
            run,
            texts,
            ready,
            options=Options(
                max_tokens=max_tokens, temperature=temperature, seed=seed, concurrency=concurrency
            ),
            rounds=rounds,
            api_key=api_key,
            console=console,
        )
    report.write(run)
