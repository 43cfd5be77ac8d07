"""Overview: is load balanced, is the capture complete, what does it cost?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import GREEN, ORANGE, RED, Axis, lines, number
from dashboards.parts import OURS, add, board, query

IMBALANCE = (
    f"(moescope_layer_hottest_expert_share{{{OURS}}}"
    f" * on (model_name, instance) group_left () moescope_experts{{{OURS}}} - 1)"
    " / on (model_name, instance) group_left ()"
    f" (moescope_experts{{{OURS}}} / moescope_top_k{{{OURS}}} - 1 > 0)"
)
"""MaxVio of each layer's hottest expert over its maximum, experts / top-k - 1."""

IMBALANCE_STEPS = ((None, GREEN), (0.2, ORANGE), (0.3, RED))
"""The last one is the threshold of the alert MoescopeImbalance."""


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
        "Collector", "Up: the collector process of every chosen server answers. Down: one has "
        "ended, and another is started.", "none",
        query('min(moescope_collector_up{instance=~"$instance"})'),
        words={"0": ("down", RED), "1": ("up", GREEN)},
    )  # fmt: skip
    yield number(
        "Capture", "On: rows are captured. Paused: a client called POST /routes/pause; POST "
        "/routes/resume goes on.", "none", query(f"min(moescope_capture_on{{{OURS}}})"),
        words={"0": ("paused", ORANGE), "1": ("on", GREEN)},
    )  # fmt: skip
    yield number(
        "Model", "Layers with experts, routed experts in each, and how many of them a token "
        "selects; of several models, the highest of each.", "none",
        query(f"max(moescope_layers{{{OURS}}})", "layers"),
        query(f"max(moescope_experts{{{OURS}}})", "experts"),
        query(f"max(moescope_top_k{{{OURS}}})", "top-k"),
    )  # fmt: skip
    yield number(
        "Imbalance", "MaxVio of the worst layer's hottest expert over its maximum: 0% is even, "
        "100% that every token selects this expert. Red from the alert's threshold on.",
        "percentunit", query(f"max({IMBALANCE})"), steps=IMBALANCE_STEPS,
    )  # fmt: skip
    yield number(
        "Most idle experts", "Experts that neither prefill nor decode selected in the window, in "
        "the worst layer; an upper bound where the two select different ones.", "none",
        query(f"max((moescope_experts{{{OURS}}} - on (model_name, instance) group_right ()"
              f" max by (model_name, instance, layer) (moescope_layer_active_experts{{{OURS}}}))"
              " * on (model_name, instance, layer)"
              f" (moescope_layer_coldest_expert_share{{{OURS}}} == bool 0))"),
        steps=((None, GREEN), (1, ORANGE)),
    )  # fmt: skip
    yield number(
        "Rows captured", "Share of the rows of requests that finished in the time shown that are "
        "there; 100% is whole.", "percentunit",
        query(f'sum(increase(moescope_trace_rows_total{{{OURS}, source!="missing"}}[$__range]))'
              f" / sum(increase(moescope_trace_rows_total{{{OURS}}}[$__range]))"),
        steps=((None, RED), (0.99, ORANGE), (0.9999, GREEN)),
    )  # fmt: skip


def _balance() -> Iterator[Any]:
    yield lines(
        "Imbalance of the worst layer", "MaxVio of the hottest expert over its maximum; the "
        "dashed red line is the alert's threshold.",
        Axis("percentunit", most=1, limit=((None, "transparent"), (0.3, RED))),
        query(f"max by (model_name) ({IMBALANCE})", "{{model_name}}"), span=8,
    )  # fmt: skip
    yield lines(
        "MaxVio", "The busiest expert's load over the mean, less one, in the worst and the mean "
        "layer: 1 is twice the mean, and that expert's device the slowest.", Axis("none"),
        query(f"max by (phase) (moescope_layer_max_violation{{{OURS}}})", "worst, {{phase}}"),
        query(f"avg by (phase) (moescope_layer_max_violation{{{OURS}}})", "mean, {{phase}}"),
        span=8,
    )  # fmt: skip
    yield lines(
        "Normalized entropy", "Entropy of the selections over its maximum, log2(experts) bits, in "
        "the lowest and the mean layer; 100% is even. A fall means that fewer experts do the work.",
        Axis("percentunit", least=None, most=1, calcs=("lastNotNull", "min")),
        query(f"min by (phase) (moescope_layer_normalized_entropy{{{OURS}}})", "lowest, {{phase}}"),
        query(f"avg by (phase) (moescope_layer_normalized_entropy{{{OURS}}})", "mean, {{phase}}"),
        span=8,
    )  # fmt: skip
    yield lines(
        "Routed tokens", "Tokens routed a second by phase, and those that were captured in every "
        "layer.", Axis("count:tokens/s"),
        query(f"sum by (phase) (rate(moescope_rows_total{{{OURS}}}[$__rate_interval]))",
              "{{phase}}"),
        query(f"sum(rate(moescope_rows_captured_total{{{OURS}}}[$__rate_interval]))",
              "captured in every layer"),
    )  # fmt: skip
    yield lines(
        "Tokens in the window", "Tokens that the balance is computed of; of few it says little.",
        Axis("count:tokens"),
        query(f"sum by (phase) (moescope_window_rows{{{OURS}}})", "{{phase}}"),
    )  # fmt: skip


def _completeness() -> Iterator[Any]:
    yield lines(
        "Lost by workers", "Rows that were routed and could not be shipped. queue_full: the "
        "collector is too slow. hook_missed: a layer routed unseen; please report it.",
        Axis("count:rows/s"),
        query(f"sum by (reason) (rate(moescope_rows_lost_total{{{OURS}}}[$__rate_interval]))",
              "{{reason}}"), span=8,
    )  # fmt: skip
    yield lines(
        "Missing from traces", "Rows that finished traces lack, by cause.", Axis("count:rows/s"),
        query(f"sum by (cause) (rate(moescope_trace_rows_missing_total{{{OURS}}}"
              "[$__rate_interval]))", "{{cause}}"), span=8,
    )  # fmt: skip
    yield lines(
        "Incomplete traces", "Finished traces that lack rows, by cause. not_routed: aborted in the "
        "prompt, which is no fault.", Axis("count:traces/s"),
        query(f"sum by (cause) (rate(moescope_traces_incomplete_total{{{OURS}}}"
              "[$__rate_interval]))", "{{cause}}"), span=8,
    )  # fmt: skip
    yield lines(
        "Rows of traces", "Where the rows of finished traces come from; cached ones were computed "
        "for an earlier request that shares the prefix. stale: by older weights than the newest "
        "rows of their trace.", Axis("count:rows/s"),
        query(f"sum by (source) (rate(moescope_trace_rows_total{{{OURS}}}[$__rate_interval]))",
              "{{source}}"),
        query(f"sum(rate(moescope_trace_rows_stale_total{{{OURS}}}[$__rate_interval]))", "stale"),
        span=8,
    )  # fmt: skip
    yield lines(
        "Traces", "Finished traces by completeness, ended sequences that no API server asked for, "
        "traces that the route log lacks, and requests whose registration was given up while the "
        "collector hung.", Axis("count:traces/s"),
        query(f"sum by (status) (rate(moescope_traces_total{{{OURS}}}[$__rate_interval]))",
              "{{status}}"),
        query(f"sum(rate(moescope_sequences_unclaimed_total{{{OURS}}}[$__rate_interval]))",
              "unclaimed"),
        query(f"sum(rate(moescope_log_traces_dropped_total{{{OURS}}}[$__rate_interval]))",
              "not in the route log"),
        query(f"sum(rate(moescope_registrations_lost_total{{{OURS}}}[$__rate_interval]))",
              "registrations lost"), span=8,
    )  # fmt: skip
    yield lines(
        "Archive", "Traces that come into files of the archive, and those that it lacks, by cause "
        "(--routes-archive).", Axis("count:traces/s"),
        query(f"sum(rate(moescope_archive_traces_total{{{OURS}}}[$__rate_interval]))", "archived"),
        query(f"sum by (cause) (rate(moescope_archive_traces_dropped_total{{{OURS}}}"
              "[$__rate_interval]))", "{{cause}}"), span=8,
    )  # fmt: skip
    yield lines(
        "Waiting for the archive", "Traces that are in no file of the archive yet, and its files.",
        Axis("count:traces or files"),
        query(f"sum(moescope_archive_traces_waiting{{{OURS}}})", "traces waiting"),
        query(f"sum(moescope_archive_files{{{OURS}}})", "files"), span=8,
    )  # fmt: skip
    yield lines(
        "Size of the archive", "Bytes of its files.", Axis("bytes"),
        query(f"sum(moescope_archive_bytes{{{OURS}}})", "files"), span=8,
    )  # fmt: skip
    yield lines(
        "Gaps, restarts and errors", "Times that steps were lost altogether, that the collector "
        "was started again, that it left out what failed there, and that it refused another node, "
        "within an interval of the graph.", Axis("count:times"),
        query(f"sum(increase(moescope_step_gaps_total{{{OURS}}}[$__rate_interval]))", "step gaps"),
        query(f"sum(increase(moescope_collector_restarts_total{{{OURS}}}[$__rate_interval]))",
              "collector restarts"),
        query(f"sum(increase(moescope_collector_errors_total{{{OURS}}}[$__rate_interval]))",
              "collector errors"),
        query(f"sum(increase(moescope_links_refused_total{{{OURS}}}[$__rate_interval]))",
              "refused links"), span=8,
    )  # fmt: skip


def _cost() -> Iterator[Any]:
    yield lines(
        "Hook time a step", "What the capture costs the worker's thread, a step.", Axis("s"),
        query(f"sum by (instance) (rate(moescope_hook_seconds_total{{{OURS}}}[$__rate_interval]))"
              f" / sum by (instance) (rate(moescope_steps_total{{{OURS}}}[$__rate_interval]))",
              "{{instance}}"),
    )  # fmt: skip
    yield lines(
        "Collector lag", "Age of the newest step when the collector got it; it is sent every 50 "
        "ms. A rising one comes before lost rows.", Axis("s"),
        query(f"max by (instance) (moescope_collector_lag_seconds{{{OURS}}})", "{{instance}}"),
    )  # fmt: skip
    yield lines(
        "Memory of traces", "Finished traces in memory, and its bound (--routes-memory); ids and "
        "tokens of what runs come on top.",
        Axis("bytes"), query(f"sum(moescope_store_bytes{{{OURS}}})", "used"),
        query(f"sum(moescope_running_bytes{{{OURS}}})", "running"),
        query(f"sum(moescope_prefix_bytes{{{OURS}}})", "blocks that left"),
        query(f"sum(moescope_store_limit_bytes{{{OURS}}})", "bound"), span=8,
    )  # fmt: skip
    yield lines(
        "Traces in memory", "Finished traces that are kept, and sequences that are running.",
        Axis("count:traces"), query(f"sum(moescope_traces_kept{{{OURS}}})", "kept"),
        query(f"sum(moescope_sequences_running{{{OURS}}})", "running"), span=8,
    )  # fmt: skip
    yield lines(
        "Evicted traces", "Traces that made room for newer ones.", Axis("count:traces/s"),
        query(f"sum(rate(moescope_traces_evicted_total{{{OURS}}}[$__rate_interval]))", "evicted"),
        span=8,
    )  # fmt: skip
