"""``/metrics``: vLLM's metrics and moescope's in one scrape.

Names, kinds and labels are those of `moescope_service.metric_names`.
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
from moescope_service.collector.reassembly import CAUSES
from moescope_service.errors import CollectorGoneError
from moescope_service.histogram import PHASES
from moescope_service.messages import LOST_REASONS
from moescope_service.metric_names import METRICS
from moescope_service.settings import Settings

Samples = dict[tuple[str, ...], float]
"""Values by label values, ``model_name`` left out."""
Counts = npt.NDArray[np.int64]
"""Selections, ``[num_phases, num_layers, num_experts]``."""

SCRAPE_TIMEOUT_S = 0.25
MAX_EXPERT_SERIES = 2000
"""Layers x experts up to which ``moescope_expert_tokens_total`` is shown unless asked for."""

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
        yield _family("moescope_collector_up", {(): float(bool(self._values))})
        hello = self._values.get("hello")
        if hello is None:
            return
        for name, samples in (self._counters() | self._gauges()).items():
            yield _family(name, samples, hello["model"])
        shape = (len(PHASES), len(hello["layers"]), hello["num_experts"])
        totals, window = (np.frombuffer(array, np.int64).reshape(shape) for array in self._arrays)
        yield from _balance(hello, window)
        is_small = len(hello["layers"]) * hello["num_experts"] <= MAX_EXPERT_SERIES
        if self._expert_metrics == "on" or (self._expert_metrics == "auto" and is_small):
            yield _experts(hello, totals)

    def _counters(self) -> dict[str, Samples]:
        values = self._values

        def by(name: str, keys: Iterable[str]) -> Samples:
            return {(key,): values[name].get(key, 0) for key in keys}

        return {
            "moescope_rows": _by_phase(values["rows"]),
            "moescope_rows_captured": {(): values["rows_captured"]},
            "moescope_rows_lost": by("rows_lost", LOST_REASONS),
            "moescope_step_gaps": {(): values["gaps"]},
            "moescope_sequences_unclaimed": {(): values["unclaimed"]},
            "moescope_steps": {(): values["steps"]},
            "moescope_hook_seconds": {(): values["hook_seconds"]},
            "moescope_collector_restarts": {(): values["epoch"]},
            "moescope_traces": by("traces", ("complete", "incomplete")),
            "moescope_trace_rows": by("trace_rows", [source.name.lower() for source in Source]),
            "moescope_trace_rows_missing": by("missing", CAUSES),
            "moescope_traces_incomplete": by("incomplete", CAUSES),
            "moescope_traces_evicted": {(): values["store"]["evicted"]},
        }

    def _gauges(self) -> dict[str, Samples]:
        values = self._values
        return {
            "moescope_collector_lag_seconds": {(): values["lag_seconds"]},
            "moescope_traces_kept": {(): values["store"]["traces"]},
            "moescope_sequences_running": {(): values["running"]},
            "moescope_store_bytes": {(): values["store"]["bytes"]},
            "moescope_store_limit_bytes": {(): values["store"]["limit_bytes"]},
            "moescope_capture_on": {(): float(values["capture"] == "on")},
            "moescope_experts": {(): values["hello"]["num_experts"]},
            "moescope_layers": {(): len(values["hello"]["layers"])},
            "moescope_window_rows": _by_phase(values["window_rows"]),
        }


def _by_phase(values: list[int]) -> Samples:
    return {(phase,): value for phase, value in zip(PHASES, values, strict=True)}


def _experts(hello: dict[str, Any], counts: Counts) -> Metric:
    samples: Samples = {
        (str(layer), str(expert), phase): float(counts[p, column, expert])
        for p, phase in enumerate(PHASES)
        for column, layer in enumerate(hello["layers"])
        for expert in range(hello["num_experts"])
    }
    return _family("moescope_expert_tokens", samples, hello["model"])


def _balance(hello: dict[str, Any], window: Counts) -> Iterable[Metric]:
    """Yield the load balance of every layer in the window; nothing of layers without traffic."""
    model, layers = hello["model"], [str(layer) for layer in hello["layers"]]
    max_violation = analysis.max_violation(window)
    by_phase = {
        "moescope_layer_normalized_entropy": analysis.normalized_entropy(window),
        "moescope_layer_max_violation": max_violation,
        "moescope_layer_max_mean_load_ratio": max_violation + 1.0,
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
        yield _family(name, samples, model)
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
            yield _family(f"moescope_layer_{word}_expert{suffix}", samples, model)


_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


def _family(name: str, samples: Samples, model: str | None = None) -> Metric:
    spec = METRICS[name]
    metric = _FAMILIES[spec.kind](name, spec.help, labels=spec.labels)
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
