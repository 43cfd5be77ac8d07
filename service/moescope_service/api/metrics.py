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

from moescope_service.api.collector_client import CollectorClient, Reply
from moescope_service.collector.counters import PHASES
from moescope_service.errors import CollectorGoneError
from moescope_service.messages import LOST_REASONS

SCRAPE_TIMEOUT_S = 0.25
MAX_EXPERT_SERIES = 2000
"""Layers x experts up to which ``moescope_expert_tokens_total`` is shown."""

METRICS = {
    "moescope_collector_up": "Whether the collector process answers.",
    "moescope_expert_tokens": "Selections of an expert, by layer and phase.",
    "moescope_rows_captured": "Rows (tokens) that were captured in every layer.",
    "moescope_rows_lost": "Rows that a worker routed and could not ship, by reason.",
    "moescope_step_gaps": "Times that a worker's steps were lost altogether.",
    "moescope_steps": "Engine steps that were captured.",
    "moescope_hook_seconds": "Seconds the capture spent on the worker's thread after each step.",
    "moescope_collector_lag_seconds": "Age of the newest step when the collector received it.",
    "moescope_traces": "Finished traces, by completeness.",
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
    """

    def __init__(self, reply: Reply | None) -> None:
        self._values: dict[str, Any] = {} if reply is None else reply.values
        self._arrays = () if reply is None else reply.arrays

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
        if len(hello["layers"]) * hello["num_experts"] <= MAX_EXPERT_SERIES:
            yield self._experts(hello)

    def _counters(self) -> list[tuple[str, tuple[str, ...], dict[tuple[str, ...], float]]]:
        values = self._values
        return [
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
        }

    def _experts(self, hello: dict[str, Any]) -> Metric:
        shape = (len(PHASES), len(hello["layers"]), hello["num_experts"])
        counts: npt.NDArray[np.int64] = np.frombuffer(self._arrays[0], np.int64).reshape(shape)
        samples: dict[tuple[str, ...], float] = {
            (str(layer), str(expert), phase): float(counts[p, column, expert])
            for p, phase in enumerate(PHASES)
            for column, layer in enumerate(hello["layers"])
            for expert in range(hello["num_experts"])
        }
        labels = ("model_name", "layer", "expert", "phase")
        return _family(
            CounterMetricFamily, "moescope_expert_tokens", samples, labels, hello["model"]
        )


def _family(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    samples: dict[tuple[str, ...], float],
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
    registry.register(Snapshot(reply))
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
