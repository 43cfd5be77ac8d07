"""``/metrics``: vLLM's metrics and moescope's in one scrape.

The names and labels are `METRICS`; the README's table is held to it by a test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector as PrometheusCollector
from starlette.concurrency import run_in_threadpool

from moescope import analysis
from moescope.trace import Source
from moescope_service.api.collector_client import CollectorClient, Reply
from moescope_service.collector.counters import PHASES
from moescope_service.collector.reassembly import CAUSES
from moescope_service.errors import CollectorGoneError
from moescope_service.messages import LOST_REASONS
from moescope_service.settings import Settings

Samples = dict[tuple[str, ...], float]
"""Values by label values, ``model_name`` left out."""
Counts = npt.NDArray[np.int64]
"""Selections, ``[num_phases, num_layers, num_experts]``."""

SCRAPE_TIMEOUT_S = 0.25
MAX_EXPERT_SERIES = 2000
"""Layers x experts up to which ``moescope_expert_tokens_total`` is shown unless asked for."""

METRICS = {
    "moescope_collector_up": "Whether the collector process answers.",
    "moescope_expert_tokens": "Selections of an expert, by layer and phase.",
    "moescope_layer_normalized_entropy": "Entropy of a layer's selections in the window over its "
    "maximum: 1 is uniform.",
    "moescope_layer_max_violation": "MaxVio of a layer in the window: the busiest expert's load "
    "over the mean load, less one.",
    "moescope_layer_max_mean_load_ratio": "The busiest expert's load over its layer's mean load.",
    "moescope_layer_active_experts": "Experts of a layer that were selected in the window.",
    "moescope_layer_hottest_expert": "Number of the expert that a layer selected most.",
    "moescope_layer_hottest_expert_share": "Its share of the layer's selections.",
    "moescope_layer_coldest_expert": "Number of the expert that a layer selected least.",
    "moescope_layer_coldest_expert_share": "Its share of the layer's selections.",
    "moescope_window_rows": "Rows (tokens) routed in the window, by phase.",
    "moescope_experts": "Routed experts a layer.",
    "moescope_layers": "Layers with experts.",
    "moescope_rows": "Rows (tokens) routed and captured, by phase.",
    "moescope_rows_captured": "Rows (tokens) that were captured in every layer.",
    "moescope_rows_lost": "Rows that a worker routed and could not ship, by reason.",
    "moescope_step_gaps": "Times that a worker's steps were lost altogether.",
    "moescope_steps": "Engine steps that were captured.",
    "moescope_hook_seconds": "Seconds the capture spent on the worker's thread.",
    "moescope_collector_lag_seconds": "Age of the newest step when the collector received it.",
    "moescope_traces": "Finished traces, by completeness.",
    "moescope_trace_rows": "Rows of finished traces, by source: computed, cached or missing.",
    "moescope_trace_rows_missing": "Missing rows of finished traces, by cause.",
    "moescope_traces_kept": "Traces in the store.",
    "moescope_traces_evicted": "Traces that made room for newer ones.",
    "moescope_sequences_unclaimed": "Ended sequences that no API server asked for.",
    "moescope_sequences_running": "Registered sequences that have no trace yet.",
    "moescope_store_bytes": "Memory of the traces in the store, in bytes.",
    "moescope_store_limit_bytes": "Upper bound of the store, in bytes.",
    "moescope_capture_on": "Whether rows are captured (0: paused).",
}

router = APIRouter(tags=["moescope"])


class Snapshot(PrometheusCollector):
    """One answer of the collector process as Prometheus metrics.

    Args:
        reply: The answer to ``metrics``; None where none came in time.
        expert_metrics: Whether every expert is shown: ``auto``, ``on`` or ``off``.
    """

    def __init__(self, reply: Reply | None, expert_metrics: str = "auto") -> None:
        self._values: dict[str, Any] = {} if reply is None else reply.values
        self._arrays = () if reply is None else reply.arrays
        self._expert_metrics = expert_metrics

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics; none but ``moescope_collector_up`` without an answer."""
        yield _family(GaugeMetricFamily, "moescope_collector_up", {(): float(bool(self._values))})
        hello = self._values.get("hello")
        if hello is None:
            return
        model = hello["model"]
        for name, labels, samples in self._counters():
            yield _family(CounterMetricFamily, name, samples, ("model_name", *labels), model)
        for name, value in self._gauges().items():
            yield _family(GaugeMetricFamily, name, {(): value}, ("model_name",), model)
        rows: Samples = {(phase,): self._values["window_rows"][p] for p, phase in enumerate(PHASES)}
        labels = ("model_name", "phase")
        yield _family(GaugeMetricFamily, "moescope_window_rows", rows, labels, model)
        shape = (len(PHASES), len(hello["layers"]), hello["num_experts"])
        totals, window = (np.frombuffer(array, np.int64).reshape(shape) for array in self._arrays)
        yield from _balance(hello, window)
        is_small = len(hello["layers"]) * hello["num_experts"] <= MAX_EXPERT_SERIES
        if self._expert_metrics == "on" or (self._expert_metrics == "auto" and is_small):
            yield _experts(hello, totals)

    def _counters(self) -> list[tuple[str, tuple[str, ...], Samples]]:
        values = self._values
        return [
            (
                "moescope_rows",
                ("phase",),
                {(phase,): values["rows"][p] for p, phase in enumerate(PHASES)},
            ),
            ("moescope_rows_captured", (), {(): values["rows_captured"]}),
            (
                "moescope_rows_lost",
                ("reason",),
                {(reason,): values["rows_lost"].get(reason, 0) for reason in LOST_REASONS},
            ),
            ("moescope_step_gaps", (), {(): values["gaps"]}),
            ("moescope_sequences_unclaimed", (), {(): values["unclaimed"]}),
            ("moescope_steps", (), {(): values["steps"]}),
            ("moescope_hook_seconds", (), {(): values["hook_seconds"]}),
            (
                "moescope_traces",
                ("status",),
                {(s,): values["traces"].get(s, 0) for s in ("complete", "incomplete")},
            ),
            (
                "moescope_trace_rows",
                ("source",),
                {(s.name.lower(),): values["trace_rows"].get(s.name.lower(), 0) for s in Source},
            ),
            (
                "moescope_trace_rows_missing",
                ("cause",),
                {(cause,): values["missing"].get(cause, 0) for cause in CAUSES},
            ),
            ("moescope_traces_evicted", (), {(): values["store"]["evicted"]}),
        ]

    def _gauges(self) -> dict[str, float]:
        values = self._values
        return {
            "moescope_collector_lag_seconds": values["lag_seconds"],
            "moescope_traces_kept": values["store"]["traces"],
            "moescope_sequences_running": values["running"],
            "moescope_store_bytes": values["store"]["bytes"],
            "moescope_store_limit_bytes": values["store"]["limit_bytes"],
            "moescope_capture_on": float(values["capture"] == "on"),
            "moescope_experts": values["hello"]["num_experts"],
            "moescope_layers": len(values["hello"]["layers"]),
        }


def _experts(hello: dict[str, Any], counts: Counts) -> Metric:
    samples: Samples = {
        (str(layer), str(expert), phase): float(counts[p, column, expert])
        for p, phase in enumerate(PHASES)
        for column, layer in enumerate(hello["layers"])
        for expert in range(hello["num_experts"])
    }
    labels = ("model_name", "layer", "expert", "phase")
    return _family(CounterMetricFamily, "moescope_expert_tokens", samples, labels, hello["model"])


def _balance(hello: dict[str, Any], window: Counts) -> Iterable[Metric]:
    """Yield the load balance of every layer in the window; nothing of layers without traffic."""
    model, layers = hello["model"], [str(layer) for layer in hello["layers"]]
    by_phase = {
        "moescope_layer_normalized_entropy": analysis.normalized_entropy(window),
        "moescope_layer_max_violation": analysis.max_violation(window),
        "moescope_layer_max_mean_load_ratio": analysis.max_violation(window) + 1.0,
        "moescope_layer_active_experts": analysis.active_experts(window),
    }
    samples: Samples
    for name, values in by_phase.items():
        samples = {
            (layer, phase): float(values[p, column])
            for p, phase in enumerate(PHASES)
            for column, layer in enumerate(layers)
            if window[p, column].any()
        }
        yield _family(GaugeMetricFamily, name, samples, ("model_name", "layer", "phase"), model)
    both = window.sum(axis=0)
    shares = analysis.shares(both)
    for word, expert in (("hottest", both.argmax(axis=-1)), ("coldest", both.argmin(axis=-1))):
        share = np.take_along_axis(shares, expert[:, None], -1)[:, 0]
        for suffix, values in (("", expert), ("_share", share)):
            samples = {
                (layer,): float(values[column])
                for column, layer in enumerate(layers)
                if both[column].any()
            }
            name = f"moescope_layer_{word}_expert{suffix}"
            yield _family(GaugeMetricFamily, name, samples, ("model_name", "layer"), model)


def _family(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    samples: Samples,
    labels: tuple[str, ...] = (),
    model: str | None = None,
) -> Metric:
    metric = family(name, METRICS[name], labels=labels)
    first = () if model is None else (model,)
    for values, sample in samples.items():
        metric.add_metric((*first, *values), sample)
    return metric


def render(reply: Reply | None, accept: str) -> tuple[bytes, str]:
    """Return vLLM's metrics and ours as text, and the text's media type.

    Args:
        reply: The collector's answer, if it came in time.
        accept: The scrape's ``Accept`` header: OpenMetrics or Prometheus' plain text.
    """
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    registry = CollectorRegistry()
    registry.register(get_prometheus_registry())
    registry.register(Snapshot(reply, Settings.from_env().expert_metrics))
    if openmetrics.CONTENT_TYPE_LATEST.split(";")[0] in accept:
        # The default escaping would rename vLLM's metrics (vllm:x to vllm_x).
        encode: Any = openmetrics.generate_latest
        return encode(registry, escaping=openmetrics.ALLOWUTF8), openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Return vLLM's metrics and moescope's, as Prometheus text or OpenMetrics."""
    collector: CollectorClient | None = getattr(request.app.state, "moescope_collector", None)
    reply = None
    if collector is not None:
        with contextlib.suppress(CollectorGoneError):  # moescope_collector_up says so
            reply = await collector.ask("metrics", timeout_s=SCRAPE_TIMEOUT_S)
    body, content_type = await run_in_threadpool(render, reply, request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})
