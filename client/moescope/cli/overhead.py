"""``moescope overhead``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options


def overhead(
    vllm_args: Annotated[
        list[str] | None,
        typer.Argument(help="After --: flags of vLLM for all servers.", show_default=False),
    ] = None,
    *,
    run_dir: _options.RunDirOption,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts, one per line; RUN_DIR/prompts.txt by default."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="A server to compare: stock, stock-again, moescope, counts, paused, installed, "
            "routed-experts, NAME=COMMAND with {port} in it, or NAME=http://…; repeatable. The "
            "first is the baseline; by default the first three.",
            show_default=False,
        ),
    ] = None,
    placement: Annotated[
        str, typer.Option(help="Run the servers together or in-turn; auto chooses by free memory.")
    ] = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="Model that the servers are started with; the bundled one by default."),
    ] = None,
    api_key: _options.ApiKeyOption = None,
    max_tokens: _options.MaxTokensOption = 128,
    temperature: _options.TemperatureOption = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the arms' order, 0 by default; if given, of the sampling too."),
    ] = None,
    concurrency: _options.ConcurrencyOption = 8,
    rounds: _options.RoundsOption = 12,
    start_timeout_s: _options.StartTimeoutOption = 1800.0,
    force: _options.ForceOption = False,
) -> None:
    """Compare servers under the same load: stock vLLM, the same again, moescope, others."""
    from moescope import earlier_run, report, servers, stages
    from moescope import prompts as prompts_file
    from moescope.errors import CommandError
    from moescope.overhead import hosting
    from moescope.overhead.arms import DEFAULT, parse_all
    from moescope.replay import ReplayOptions
    from moescope.run_dir import RunDir

    if placement not in {"auto", "together", "in-turn"}:
        raise CommandError(f"invalid --placement {placement!r}: expected auto, together or in-turn")
    arms = parse_all(arm or DEFAULT)
    run, console = RunDir(run_dir), _options.console()
    texts = prompts_file.read(prompts or run.prompts)
    run.check()
    if not force:
        earlier_run.require_no_comparison(run)
        earlier_run.require_prompts(run, texts)
    run.create()
    servers.end_servers_on_signals()
    launcher = stages.launcher(
        run,
        arms,
        model=model,
        args=vllm_args or [],
        timeout_s=start_timeout_s,
        console=console,
    )
    with hosting.start_arms(launcher, arms, placement) as started:  # type: ignore[arg-type]
        prompts_file.write(run.prompts, texts)
        stages.measure_overhead(
            run,
            texts,
            started,
            options=ReplayOptions(
                max_tokens=max_tokens, temperature=temperature, seed=seed, concurrency=concurrency
            ),
            rounds=rounds,
            api_key=api_key,
            console=console,
        )
    report.write(run)
