"""``moescope bench``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options

_LOAD, _PACE, _REPORT = "What is asked", "When", "What is made of it"


def bench(
    *,
    base_url: Annotated[
        str, typer.Option(help="The server's address, without /v1.")
    ] = "http://localhost:8000",
    api_key: _options.ApiKeyOption = None,
    model: _options.ModelNameOption = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds a request may take.")] = 600.0,
    dataset_name: Annotated[
        str, typer.Option(help="sample, gsm8k or random.", rich_help_panel=_LOAD)
    ] = "sample",
    file: Annotated[
        Path | None,
        typer.Option(help="gsm8k's .jsonl; the hub by default.", rich_help_panel=_LOAD),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="chat or completions; by default random asks completions.", rich_help_panel=_LOAD
        ),
    ] = None,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Conversations that count.", rich_help_panel=_LOAD)
    ] = 100,
    num_warmups: Annotated[
        int, typer.Option(min=0, help="Conversations before them.", rich_help_panel=_LOAD)
    ] = 0,
    turns: Annotated[
        int,
        typer.Option(
            min=1, help="Turns of each; a turn sends all that was said.", rich_help_panel=_LOAD
        ),
    ] = 1,
    input_len: Annotated[
        int, typer.Option(min=1, help="random: tokens a turn adds.", rich_help_panel=_LOAD)
    ] = 128,
    output_len: Annotated[
        int, typer.Option(min=1, help="Output tokens at most.", rich_help_panel=_LOAD)
    ] = 128,
    range_ratio: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="random: lengths vary by this part.", rich_help_panel=_LOAD
        ),
    ] = 0.0,
    prefix_len: Annotated[
        int, typer.Option(min=0, help="random: tokens that all begin with.", rich_help_panel=_LOAD)
    ] = 0,
    token_range: Annotated[
        tuple[int, int],
        typer.Option(help="random: token ids, the second excluded.", rich_help_panel=_LOAD),
    ] = (50, 450),
    ignore_eos: Annotated[
        bool | None,
        typer.Option(
            help="Answers of exactly --output-len tokens (vLLM); random's default.",
            rich_help_panel=_LOAD,
            show_default=False,
        ),
    ] = None,
    temperature: _options.TemperatureOption = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts, times and sampling.")] = 0,
    extra_body: Annotated[
        str, typer.Option(help="Further fields, as a JSON object.", rich_help_panel=_LOAD)
    ] = "{}",
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, help="Closed loop: conversations in flight at most.", rich_help_panel=_PACE
        ),
    ] = None,
    request_rate: Annotated[
        float, typer.Option(help="Open loop: conversations begun a second.", rich_help_panel=_PACE)
    ] = math.inf,
    burstiness: Annotated[
        float,
        typer.Option(
            help="Shape of the gamma distributed gaps; 1: Poisson.", rich_help_panel=_PACE
        ),
    ] = 1.0,
    ramp_up_strategy: Annotated[
        str | None, typer.Option(help="linear or exponential.", rich_help_panel=_PACE)
    ] = None,
    ramp_up_start_rps: Annotated[
        float | None, typer.Option(help="Rate at the first.", rich_help_panel=_PACE)
    ] = None,
    ramp_up_end_rps: Annotated[
        float | None, typer.Option(help="Rate at the last.", rich_help_panel=_PACE)
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit in ms: ttft:500, tpot:50, e2el:3000; repeatable.",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Latencies.", rich_help_panel=_REPORT)
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[
        str, typer.Option(help="Percentiles.", rich_help_panel=_REPORT)
    ] = "50,90,99",
    result: Annotated[
        Path | None, typer.Option(help="JSON file to write.", rich_help_panel=_REPORT)
    ] = None,
    save_detailed: Annotated[
        bool, typer.Option(help="Every request in it.", rich_help_panel=_REPORT)
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="PNG file to draw.", rich_help_panel=_REPORT)
    ] = None,
) -> None:
    """Load-test any OpenAI-compatible server: latencies, throughput, goodput, errors."""
    from moescope.bench import plan
    from moescope.bench.connections import Target

    plan.run(
        plan.Plan(
            model=model,
            endpoint=endpoint,
            dataset_name=dataset_name,
            file=file,
            num_prompts=num_prompts,
            turns=turns,
            input_len=input_len,
            output_len=output_len,
            range_ratio=range_ratio,
            prefix_len=prefix_len,
            token_range=token_range,
            max_concurrency=max_concurrency,
            request_rate=request_rate,
            burstiness=burstiness,
            ramp_up_strategy=ramp_up_strategy,
            ramp_up_start_rps=ramp_up_start_rps,
            ramp_up_end_rps=ramp_up_end_rps,
            num_warmups=num_warmups,
            ignore_eos=ignore_eos,
            temperature=temperature,
            seed=seed,
            extra_body=extra_body,
        ),
        Target(base_url=base_url, api_key=api_key, timeout_s=timeout_s),
        plan.Report(
            goodput=tuple(goodput or ()),
            metrics=percentile_metrics,
            percentiles=metric_percentiles,
            result=result,
            save_detailed=save_detailed,
            plot=plot,
        ),
        _options.console(),
    )
