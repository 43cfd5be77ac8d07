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
        Path | None,
        typer.Option(help="File of prompts, one per line; RUN_DIR/prompts.txt by default."),
    ] = None,
    base_url: _options.BaseUrlOption = _options.DEFAULT_BASE_URL,
    api_key: _options.ApiKeyOption = None,
    ca_cert: _options.CaCertOption = None,
    model: _options.ModelNameOption = None,
    max_tokens: _options.MaxTokensOption = 128,
    temperature: _options.TemperatureOption = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the sampling; the requests carry none by default."),
    ] = None,
    concurrency: _options.ConcurrencyOption = 8,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers whose routes are fetched, such as 0,5-7; all by default."),
    ] = None,
    routes: Annotated[
        bool,
        typer.Option(
            help="Whether to fetch routes; use --no-routes for a server without moescope."
        ),
    ] = True,
    tokens: _options.TokensOption = False,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="What the routes are stored as: jsonl, npz, arrow or parquet; jsonl by default.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Send only the prompts without an answer, and keep what is there."
        ),
    ] = False,
    force: _options.ForceOption = False,
) -> None:
    """Send every prompt to a server, and fetch the routes of the responses as they come."""
    from moescope import earlier_run, replay_stage, report
    from moescope import prompts as prompts_file
    from moescope import replay as replaying
    from moescope.errors import CommandError
    from moescope.run_dir import RunDir

    if resume and force:
        raise CommandError("--resume keeps what is there, --force replaces it: give one of them")
    run = RunDir(run_dir)
    texts = prompts_file.read(prompts or run.prompts)
    run.check()
    kept = earlier_run.answers(run, texts) if resume else []
    if not resume and not force:
        earlier_run.require_no_answers(run, "--resume goes on with them, ")
    if not kept and not force:
        earlier_run.require_prompts(run, texts)
    plan = replay_stage.Plan(
        prompts=texts,
        options=replaying.ReplayOptions(
            model=model,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            concurrency=concurrency,
        ),
        base_url=base_url,
        api_key=api_key,
        verify=ca_cert or True,
        routes=routes,
        layers=layers,
        tokens=tokens,
        form=form,
        kept=kept,
    )
    done = replay_stage.run(run, plan, _options.console())
    if run.responses.exists():
        report.write(run, done.routes)
    done.require_whole()
