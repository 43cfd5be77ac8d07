"""Serving: vLLM's own latency, queue and cache beside the routed tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import Axis, lines
from dashboards.parts import OURS, add, board, query


def build() -> Dashboard:
    """Return the dashboard."""
    made = board(
        "moescope-serving",
        "Serving",
        "vLLM's latency, queue and KV cache beside the tokens that were routed.",
    )
    return add(made, (*_latencies(), *_load(), *_steps()))


def _latencies() -> Iterator[Any]:
    for title, name, description, span in (
        ("TTFT", "time_to_first_token", "From a request's arrival to its first token.", 8),
        ("TPOT", "request_time_per_output_token",
         "Mean time a token after the first, by request.", 8),
        ("ITL", "inter_token_latency", "Between two tokens of a request.", 8),
        ("E2E latency", "e2e_request_latency", "From a request's arrival to its last token.", 12),
        ("Time in queue", "request_queue_time", "Before a request was first scheduled.", 12),
    ):  # fmt: skip
        buckets = f"sum by (le) (rate(vllm:{name}_seconds_bucket{{{OURS}}}[$__rate_interval]))"
        yield lines(
            title, f"{description} Median, 95th and 99th percentile.", Axis("s"),
            *(query(f"histogram_quantile({q}, {buckets})", f"p{round(100 * q)}")
              for q in (0.5, 0.95, 0.99)), span=span,
        )  # fmt: skip


def _load() -> Iterator[Any]:
    yield lines(
        "Requests", "In the engine's batch, and waiting for it.", Axis("count:requests"),
        query(f"sum(vllm:num_requests_running{{{OURS}}})", "running"),
        query(f"sum(vllm:num_requests_waiting{{{OURS}}})", "waiting"), span=8,
    )  # fmt: skip
    yield lines(
        "Tokens", "Tokens a second by vLLM's count, and routed ones by ours: prompts that the "
        "prefix cache knows are not routed again.", Axis("count:tokens/s"),
        query(f"sum(rate(vllm:prompt_tokens_total{{{OURS}}}[$__rate_interval]))", "prompt"),
        query(f"sum(rate(vllm:generation_tokens_total{{{OURS}}}[$__rate_interval]))", "generated"),
        query(f"sum by (phase) (rate(moescope_rows_total{{{OURS}}}[$__rate_interval]))",
              "routed, {{phase}}"), span=8,
    )  # fmt: skip
    yield lines(
        "Finished requests", "By reason, a second.", Axis("reqps"),
        query("sum by (finished_reason) (rate(vllm:request_success_total"
              f"{{{OURS}}}[$__rate_interval]))", "{{finished_reason}}"), span=8,
    )  # fmt: skip
    yield lines(
        "KV cache", "Used share; when it is full, requests are preempted and computed again.",
        Axis("percentunit", most=1), query(f"max(vllm:kv_cache_usage_perc{{{OURS}}})", "used"),
        span=8,
    )  # fmt: skip
    yield lines(
        "Prefix cache", "Share of prompt tokens that were found in the cache.",
        Axis("percentunit", most=1),
        query(f"sum(rate(vllm:prefix_cache_hits_total{{{OURS}}}[$__rate_interval]))"
              f" / sum(rate(vllm:prefix_cache_queries_total{{{OURS}}}[$__rate_interval]))",
              "hits"), span=8,
    )  # fmt: skip
    yield lines(
        "Preemptions", "Requests that had to give their KV cache back.", Axis("reqps"),
        query(f"sum(rate(vllm:num_preemptions_total{{{OURS}}}[$__rate_interval]))", "preempted"),
        span=8,
    )  # fmt: skip


def _steps() -> Iterator[Any]:
    def mean(name: str) -> Any:  # noqa: ANN401
        rates = (
            f"sum by (kind) (rate(moescope_step_{name}_{part}{{{OURS}}}[$__rate_interval]))"
            for part in ("sum", "count")
        )
        return query(" / ".join(rates), "{{kind}}")

    yield lines(
        "Distinct experts a step", "Mean by layer. A step reads the weights of each of them once: "
        "where decode steps come near all experts, more tokens a step cost little more.",
        Axis("none", decimals=1), mean("experts"), span=8,
    )  # fmt: skip
    yield lines(
        "Tokens a step", "Mean, of prompts (prefill), generated (decode) or both (mixed).",
        Axis("none", decimals=1), mean("tokens"), span=8,
    )  # fmt: skip
    yield lines(
        "Expert weights a step", "Bytes of the weights of the distinct experts of a step: over the "
        "memory's bandwidth, that is the least time that a decode step can take.", Axis("bytes"),
        query(f"sum by (kind) (rate(moescope_step_expert_bytes_total{{{OURS}}}[$__rate_interval]))"
              " / sum by (kind) (rate(moescope_step_tokens_count"
              f"{{{OURS}}}[$__rate_interval]))", "{{kind}}"), span=8,
    )  # fmt: skip
