"""Every metric of ours: name, kind, help and labels, in one place.

``/metrics`` is made of this table, and tests hold docs/metrics.md and the dashboards to it.
Importing it starts nothing and needs no package.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class MetricSpec:
    """What one metric is."""

    name: str
    """Name of the family: of counters, without ``_total``."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    """What it says, and in which unit where the name does not."""
    labels: tuple[str, ...]

    @property
    def sample_name(self) -> str:
        """The name in queries: counters end in ``_total``; histograms have several."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _counter(name: str, text: str, *labels: str) -> MetricSpec:
    return MetricSpec(f"moescope_{name}", "counter", text, ("model_name", *labels))


def _gauge(name: str, text: str, *labels: str) -> MetricSpec:
    return MetricSpec(f"moescope_{name}", "gauge", text, ("model_name", *labels))


def _histogram(name: str, text: str, *labels: str) -> MetricSpec:
    return MetricSpec(f"moescope_{name}", "histogram", text, ("model_name", *labels))


_BALANCE = (
    _gauge(
        "layer_normalized_entropy",
        "Entropy of a layer's selections in the window over its maximum, log2(experts) bits: 1 is "
        "uniform.",
        "layer",
        "phase",
    ),
    _gauge(
        "layer_max_violation",
        "MaxVio of a layer in the window: the busiest expert's load over the mean load, less one.",
        "layer",
        "phase",
    ),
    _gauge(
        "layer_max_mean_load_ratio",
        "The busiest expert's load over its layer's mean load.",
        "layer",
        "phase",
    ),
    _gauge(
        "layer_active_experts",
        "Experts of a layer that were selected in the window.",
        "layer",
        "phase",
    ),
    _gauge("layer_hottest_expert", "Number of the expert that a layer selected most.", "layer"),
    _gauge("layer_hottest_expert_share", "Its share of the layer's selections.", "layer"),
    _gauge("layer_coldest_expert", "Number of the expert that a layer selected least.", "layer"),
    _gauge("layer_coldest_expert_share", "Its share of the layer's selections.", "layer"),
    _gauge("window_rows", "Rows (tokens) routed in the window, by phase.", "phase"),
)
_COUNTS = (
    _counter(
        "expert_tokens",
        "Selections of an expert, by layer and phase.",
        "layer",
        "expert",
        "phase",
    ),
    _gauge("experts", "Routed experts a layer."),
    _gauge("top_k", "Experts that a layer selects for a token."),
    _gauge("layers", "Layers with experts."),
    _counter("rows", "Rows (tokens) routed and captured, by phase.", "phase"),
)
_STEPS = (
    _histogram(
        "step_experts",
        "Distinct experts of a layer in a step, by what the step's tokens are: prefill, decode or "
        "mixed; one observation a layer and step.",
        "engine",
        "kind",
    ),
    _histogram("step_tokens", "Tokens of a step, by the same.", "engine", "kind"),
    _counter(
        "step_expert_bytes",
        "Bytes of the weights of each step's distinct experts, by the same.",
        "engine",
        "kind",
    ),
)
_CAPTURE = (
    _counter("rows_captured", "Rows (tokens) that were captured in every layer."),
    _counter("rows_lost", "Rows that a worker routed and could not ship, by reason.", "reason"),
    _counter("step_gaps", "Times that a worker's steps were lost altogether."),
    _counter("steps", "Engine steps that were captured."),
    _counter("hook_seconds", "Seconds the capture spent on the worker's thread."),
    _gauge("capture_on", "Whether rows are captured (0: paused)."),
    _gauge("collector_lag_seconds", "Age of the newest step when the collector received it."),
    _counter("collector_restarts", "Times that the collector process was started again."),
    _counter(
        "collector_errors",
        "Messages, replies and traces that failed in the collector and were left out.",
    ),
    _counter(
        "links_refused",
        "Connections to the collector's tcp address that were refused: another key, or none.",
    ),
    MetricSpec(
        "moescope_collector_up",
        "gauge",
        "Whether the collector process answered within the last second.",
        (),
    ),
)
_TRACES = (
    _counter("traces", "Finished traces, by completeness.", "status"),
    _counter(
        "trace_rows",
        "Rows of finished traces, by source: computed, cached, recalled or missing.",
        "source",
    ),
    _counter(
        "trace_rows_stale",
        "Rows of finished traces that older weights computed than the trace's newest rows, or that "
        "were computed while the weights were updated.",
    ),
    _counter("trace_rows_missing", "Missing rows of finished traces, by cause.", "cause"),
    _counter(
        "traces_incomplete",
        "Incomplete traces, by why they lack rows; several causes count each.",
        "cause",
    ),
    _gauge("traces_kept", "Traces in the store."),
    _counter("traces_evicted", "Traces that made room for newer ones."),
    _counter("log_traces_dropped", "Traces that the route log lacks, in whole or in part."),
    _counter("archive_traces", "Traces in published files of the archive."),
    _counter("archive_traces_dropped", "Traces that the archive lacks, by cause.", "cause"),
    _gauge("archive_traces_waiting", "Traces that are not in a file of the archive yet."),
    _gauge("archive_up", "Whether the archive's process runs and its store takes files."),
    _gauge("archive_files", "Files of the archive."),
    _gauge("archive_bytes", "Size of these, in bytes."),
    _counter("sequences_unclaimed", "Ended sequences that no API server asked for."),
    _counter(
        "registrations_lost",
        "Sequences whose registration an API server gave up while the collector hung.",
    ),
    _gauge("sequences_running", "Registered sequences that have no trace yet."),
    _gauge(
        "running_bytes",
        "Memory of these: ids and tokens, and rows that wait for an API server, in bytes.",
    ),
    _gauge(
        "prefix_bytes",
        "Memory of rows whose blocks left the KV cache and may come back, in bytes.",
    ),
    _gauge("store_bytes", "Memory of the traces in the store, their ids included, in bytes."),
    _gauge("store_limit_bytes", "Upper bound of the store, in bytes."),
)
METRICS = {spec.name: spec for spec in (*_BALANCE, *_COUNTS, *_STEPS, *_CAPTURE, *_TRACES)}
"""All of them by the name of the family."""
