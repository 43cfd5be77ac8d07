"""``moescope bench``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from moescope.cli import _options

_LOAD, _PACE, _REPORT = "What is sent", "When it is sent", "Figures and files"


def bench(
    *,
    base_url: _options.BaseUrlOption = _options.DEFAULT_BASE_URL,
    api_key: _options.ApiKeyOption = None,
    ca_cert: _options.CaCertOption = None,
    model: _options.ModelNameOption = None,
    timeout_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which a request fails.")
    ] = 600.0,
    dataset_name: Annotated[
        str,
        typer.Option(
            help="Data set of the prompts: gsm8k, prose, sample or random.", rich_help_panel=_LOAD
        ),
    ] = "sample",
    file: Annotated[
        Path | None,
        typer.Option(
            help="GSM8K's .jsonl; the Hugging Face hub by default.", rich_help_panel=_LOAD
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Endpoint: chat or completions; by default completions for random, else chat.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    num_prompts: Annotated[
        int,
        typer.Option(
            "--limit",
            "--num-prompts",
            min=1,
            help="How many conversations to measure; also --num-prompts.",
            rich_help_panel=_LOAD,
        ),
    ] = 100,
    num_warmups: Annotated[
        int,
        typer.Option(
            min=0, help="Conversations before them that are not measured.", rich_help_panel=_LOAD
        ),
    ] = 0,
    turns: Annotated[
        int,
        typer.Option(
            min=1,
            help="Turns of each conversation; every turn sends all before it again.",
            rich_help_panel=_LOAD,
        ),
    ] = 1,
    input_len: Annotated[
        int,
        typer.Option(min=1, help="For random: tokens that each turn adds.", rich_help_panel=_LOAD),
    ] = 128,
    output_len: Annotated[
        int, typer.Option(min=1, help="Most output tokens of a request.", rich_help_panel=_LOAD)
    ] = 128,
    range_ratio: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="For random: part by which lengths vary around the mean.",
            rich_help_panel=_LOAD,
        ),
    ] = 0.0,
    prefix_len: Annotated[
        int,
        typer.Option(
            min=0,
            help="For random: length of a prefix that all prompts share.",
            rich_help_panel=_LOAD,
        ),
    ] = 0,
    token_range: Annotated[
        tuple[int, int],
        typer.Option(
            help="For random: range of token ids, the second excluded.", rich_help_panel=_LOAD
        ),
    ] = (50, 450),
    ignore_eos: Annotated[
        bool | None,
        typer.Option(
            help="Generate exactly --output-len tokens (vLLM); the default for random.",
            rich_help_panel=_LOAD,
            show_default=False,
        ),
    ] = None,
    temperature: _options.TemperatureOption = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of prompts and send times, 0 by default; if given, of the sampling too."
        ),
    ] = None,
    extra_body: Annotated[
        str,
        typer.Option(
            help="Further fields of every request, as a JSON object.", rich_help_panel=_LOAD
        ),
    ] = "{}",
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "--max-concurrency",
            min=1,
            help="Most requests in flight at a time; without a rate, a closed loop. Also "
            "--max-concurrency.",
            rich_help_panel=_PACE,
        ),
    ] = None,
    request_rate: Annotated[
        float,
        typer.Option(help="Open loop: conversations started per second.", rich_help_panel=_PACE),
    ] = math.inf,
    burstiness: Annotated[
        float,
        typer.Option(
            help="Shape of the gamma-distributed gaps between starts; 1 is a Poisson process.",
            rich_help_panel=_PACE,
        ),
    ] = 1.0,
    ramp_up_strategy: Annotated[
        str | None,
        typer.Option(help="How the rate grows: linear or exponential.", rich_help_panel=_PACE),
    ] = None,
    ramp_up_start_rps: Annotated[
        float | None,
        typer.Option(help="Rate at the first conversation, per second.", rich_help_panel=_PACE),
    ] = None,
    ramp_up_end_rps: Annotated[
        float | None,
        typer.Option(help="Rate at the last conversation, per second.", rich_help_panel=_PACE),
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            help="Limit in ms of a good request: ttft:500, tpot:50 or e2el:3000; repeatable.",
            rich_help_panel=_REPORT,
        ),
    ] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Latencies to report, separated by commas.", rich_help_panel=_REPORT)
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[
        str,
        typer.Option(
            help="Percentiles of each latency, separated by commas.", rich_help_panel=_REPORT
        ),
    ] = "50,90,99",
    result: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write, with the keys of vllm bench serve.", rich_help_panel=_REPORT
        ),
    ] = None,
    save_detailed: Annotated[
        bool,
        typer.Option(
            help="Add every request's figures and text to the JSON file.", rich_help_panel=_REPORT
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="PNG file to draw: latencies and throughput over time.", rich_help_panel=_REPORT
        ),
    ] = None,
) -> None:
    """Load-test any OpenAI-compatible server: latencies, throughput, goodput, errors."""
    from moescope.bench import command
    from moescope.bench.connections import Target
    from moescope.bench.plan import Plan

    command.run(
        Plan(
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
        Target(base_url=base_url, api_key=api_key, timeout_s=timeout_s, verify=ca_cert or True),
        command.ReportOptions(
            goodput=tuple(goodput or ()),
            metrics=percentile_metrics,
            percentiles=metric_percentiles,
            result=result,
            save_detailed=save_detailed,
            plot=plot,
        ),
        _options.console(),
    )
