"""The result file, with the keys of ``vllm bench serve``, so that its tooling reads it.

Source: vLLM 0.32.0, ``vllm/benchmarks/serve.py``, ``benchmark`` and ``main_async``. All times are
seconds but those named ``_ms``. What differs: ``max_concurrent_requests`` and
``max_output_tokens_per_s`` are exact where vLLM counts by whole seconds, and chunks as tokens; and
``failed`` requests are counted by kind. What vLLM's file lacks is under ``moescope``.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from moescope import __version__, environment, files
from moescope.bench import latency
from moescope.bench.driver import Run
from moescope.bench.measured_request import MeasuredRequest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestedLoad:
    """The load that was requested, as the result file has it."""

    model: str
    endpoint: str
    num_prompts: int
    request_rate: float
    burstiness: float
    max_concurrency: int | None
    ramp_up: dict[str, Any] | None = None
    """The three keys of a ramp-up, by vLLM's names."""
    options: dict[str, Any]
    """All else that is needed to run it again."""


def build(
    run: Run,
    summary: latency.Summary,
    load: RequestedLoad,
    *,
    metrics: Iterable[str] = latency.METRICS,
    detailed: bool = False,
) -> dict[str, Any]:
    """Return the result as the file has it.

    Args:
        run: The run.
        summary: Its figures.
        load: The load that was requested.
        metrics: Latencies to write figures of.
        detailed: Whether to write every request's figures and text.
    """
    requests = sorted(run.requests, key=lambda request: request.sent_s)
    backend = "openai-chat" if load.endpoint == "chat" else "openai"
    values = {
        "date": dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,
        "backend": backend,
        "label": None,
        "model_id": load.model,
        "tokenizer_id": None,
        "num_prompts": load.num_prompts,
        "request_rate": "inf" if math.isinf(load.request_rate) else load.request_rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        **(load.ramp_up or {}),
        **_totals(summary),
        "latencies": [request.e2el_s for request in requests],
        "queue_times": [request.queue_s for request in requests],
        **_figures({name: summary.latencies[name] for name in metrics}),
    }
    if load.max_concurrency is not None and not math.isinf(load.request_rate):
        values |= _figures({"client_queue_time": summary.queue})
    if detailed:
        values |= _details(requests, run.start_s)
    return values | {"moescope": _ours(run, summary, load)}


def write(path: Path, values: dict[str, Any]) -> None:
    """Write a result file, as a whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    files.write(path, orjson.dumps(values, option=orjson.OPT_APPEND_NEWLINE))


def percentile_word(percentile: float) -> str:
    """Return a percentile as the keys have it: 99 or 99.9."""
    return str(int(percentile)) if percentile == int(percentile) else str(percentile)


def _totals(summary: latency.Summary) -> dict[str, Any]:
    return {
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.request_goodput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "max_output_tokens_per_s": summary.max_output_tokens_per_s,
        "max_concurrent_requests": summary.max_concurrent_requests,
        "rtfx": 0.0,
    }


def _figures(distributions: dict[str, latency.Distribution]) -> dict[str, float]:
    values = {}
    for name, one in distributions.items():
        values[f"mean_{name}_ms"] = one.mean_ms
        values[f"median_{name}_ms"] = one.median_ms
        values[f"std_{name}_ms"] = one.std_ms
        for percentile, value in one.percentiles_ms.items():
            values[f"p{percentile_word(percentile)}_{name}_ms"] = value
    return values


def _details(requests: Sequence[MeasuredRequest], start_s: float) -> dict[str, list[Any]]:
    return {
        "input_lens": [request.prompt_tokens for request in requests],
        "output_lens": [request.completion_tokens for request in requests],
        "ttfts": [request.chunk_s[0] if request.chunk_s else 0.0 for request in requests],
        "itls": [request.itls_s for request in requests],
        "start_times": [start_s + request.sent_s for request in requests],
        "generated_texts": [request.text for request in requests],
        "errors": [request.error or "" for request in requests],
    }


def _ours(run: Run, summary: latency.Summary, load: RequestedLoad) -> dict[str, Any]:
    return {
        "errors": summary.errors,
        "interrupted": run.interrupted,
        "schedule_lag": dataclasses.asdict(summary.lag),
        "client_cpu": summary.client_cpu,
        "warnings": summary.warnings,
        "options": load.options,
        "hardware": environment.hardware(),
        "versions": {"moescope": __version__, **environment.system()},
    }
