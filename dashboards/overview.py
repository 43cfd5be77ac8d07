"""Overview: is load balanced, is the capture complete, what does it cost?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.parts import OURS, add, board, lines, number, query


def build() -> Dashboard:
    """Return the dashboard."""
    made = board(
        "moescope-overview",
        "Overview",
        "Whether experts are used evenly, whether every route is captured, and what that costs.",
    )
    made = add(made, (*_now(), *_balance()))
    made = add(made, _completeness(), "Completeness")
    return add(made, _cost(), "Cost")


def _now() -> Iterator[Any]:
    yield number(
        "Collector", "1: the collector process answers. 0: it has ended, and another is started.",
        "none", query('min(moescope_collector_up{instance=~"$instance"})'),
    )  # fmt: skip
    yield number(
        "Capture", "1: rows are captured. 0: somebody paused it (POST /routes/resume).",
        "none", query(f"min(moescope_capture_on{{{OURS}}})"),
    )  # fmt: skip
    yield number(
        "Layers x experts", "The model's layers with experts, and routed experts in each.", "none",
        query(f"max(moescope_layers{{{OURS}}})", "layers"),
        query(f"max(moescope_experts{{{OURS}}})", "experts"),
    )  # fmt: skip
    yield number(
        "Highest MaxVio", "The busiest expert's load over the mean, less one, in the worst layer; "
        "0 is even.", "none", query(f"max(moescope_layer_max_violation{{{OURS}}})"),
    )  # fmt: skip
    yield number(
        "Most idle experts", "Experts of a layer that nothing was routed to in the window, in the "
        "worst layer.", "none",
        query(f"max(moescope_experts{{{OURS}}})"
              f" - min(max by (layer) (moescope_layer_active_experts{{{OURS}}}))"),
    )  # fmt: skip
    yield number(
        "Rows captured", "Share of the rows of finished requests that are there; 100% is whole.",
        "percentunit",
        query(f'sum(moescope_trace_rows_total{{{OURS}, source!="missing"}})'
              f" / sum(moescope_trace_rows_total{{{OURS}}})"),
    )  # fmt: skip


def _balance() -> Iterator[Any]:
    yield lines(
        "Entropy", "Entropy of the selections over its maximum, in the lowest and the mean layer; "
        "1 is even. A fall means that fewer experts do the work.", "none",
        query(f"min by (phase) (moescope_layer_normalized_entropy{{{OURS}}})", "lowest, {{phase}}"),
        query(f"avg by (phase) (moescope_layer_normalized_entropy{{{OURS}}})", "mean, {{phase}}"),
    )  # fmt: skip
    yield lines(
        "MaxVio", "The busiest expert's load over the mean, less one, in the worst and the mean "
        "layer: 1 is twice the mean, and that expert's device the slowest.", "none",
        query(f"max by (phase) (moescope_layer_max_violation{{{OURS}}})", "worst, {{phase}}"),
        query(f"avg by (phase) (moescope_layer_max_violation{{{OURS}}})", "mean, {{phase}}"),
    )  # fmt: skip
    yield lines(
        "Routed tokens", "Tokens routed and captured a second.", "short",
        query(f"sum by (phase) (rate(moescope_rows_total{{{OURS}}}[$__rate_interval]))",
              "{{phase}}"),
    )  # fmt: skip
    yield lines(
        "Tokens in the window", "Tokens that the balance is computed of; of few it says little.",
        "short", query(f"sum by (phase) (moescope_window_rows{{{OURS}}})", "{{phase}}"),
    )  # fmt: skip


def _completeness() -> Iterator[Any]:
    yield lines(
        "Lost by workers", "Rows that were routed and could not be shipped. queue_full: the "
        "collector is too slow. hook_missed: a layer routed unseen; please report it.", "short",
        query(f"sum by (reason) (rate(moescope_rows_lost_total{{{OURS}}}[$__rate_interval]))",
              "{{reason}}"),
        query(f"sum(rate(moescope_rows_captured_total{{{OURS}}}[$__rate_interval]))", "captured"),
    )  # fmt: skip
    yield lines(
        "Missing from traces", "Rows that finished traces lack, by cause.", "short",
        query(f"sum by (cause) (rate(moescope_trace_rows_missing_total{{{OURS}}}"
              "[$__rate_interval]))", "{{cause}}"),
    )  # fmt: skip
    yield lines(
        "Incomplete traces", "Finished traces that lack rows, by cause. not_routed: aborted in the "
        "prompt, which is no fault.", "short",
        query(f"sum by (cause) (rate(moescope_traces_incomplete_total{{{OURS}}}"
              "[$__rate_interval]))", "{{cause}}"),
    )  # fmt: skip
    yield lines(
        "Rows of traces", "Where the rows of finished traces come from; cached ones were computed "
        "for an earlier request that shares the prefix.", "short",
        query(f"sum by (source) (rate(moescope_trace_rows_total{{{OURS}}}[$__rate_interval]))",
              "{{source}}"),
    )  # fmt: skip
    yield lines(
        "Traces", "Finished traces a second by completeness, steps lost "
        "altogether, and collectors that were started again.", "short",
        query(f"sum by (status) (rate(moescope_traces_total{{{OURS}}}[$__rate_interval]))",
              "{{status}}"),
        query(f"sum(rate(moescope_step_gaps_total{{{OURS}}}[$__rate_interval]))", "gaps"),
        query(f"sum(increase(moescope_collector_restarts_total{{{OURS}}}[$__rate_interval]))",
              "collector restarts"),
        query(f"sum(rate(moescope_sequences_unclaimed_total{{{OURS}}}[$__rate_interval]))",
              "unclaimed"),
    )  # fmt: skip


def _cost() -> Iterator[Any]:
    yield lines(
        "Host time a step", "What the capture costs the worker's thread, a step.", "s",
        query(f"sum by (instance) (rate(moescope_hook_seconds_total{{{OURS}}}[$__rate_interval]))"
              f" / sum by (instance) (rate(moescope_steps_total{{{OURS}}}[$__rate_interval]))",
              "{{instance}}"),
    )  # fmt: skip
    yield lines(
        "Collector lag", "Age of the newest step when the collector got it; it is sent every 50 "
        "ms. A rising one comes before lost rows.", "s",
        query(f"max by (instance) (moescope_collector_lag_seconds{{{OURS}}})", "{{instance}}"),
    )  # fmt: skip
    yield lines(
        "Memory of traces", "Finished traces in memory, and its bound (--routes-memory).", "bytes",
        query(f"sum(moescope_store_bytes{{{OURS}}})", "used"),
        query(f"sum(moescope_store_limit_bytes{{{OURS}}})", "bound"),
    )  # fmt: skip
    yield lines(
        "Traces in memory", "Kept, running, and evicted a second.", "short",
        query(f"sum(moescope_traces_kept{{{OURS}}})", "kept"),
        query(f"sum(moescope_sequences_running{{{OURS}}})", "running"),
        query(f"sum(rate(moescope_traces_evicted_total{{{OURS}}}[$__rate_interval]))", "evicted"),
    )  # fmt: skip
