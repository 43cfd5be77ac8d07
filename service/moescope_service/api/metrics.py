"""``/metrics``: vLLM's metrics and moescope's in one scrape.

Names, kinds and labels are those of `moescope_service.metric_names`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector as PrometheusCollector
from starlette.concurrency import run_in_threadpool

from moescope import analysis
from moescope.trace import Source
from moescope_service.api.dependencies import SettingsDep
from moescope_service.causes import ARCHIVE_CAUSES, LOST_CAUSES, MISSING_CAUSES
from moescope_service.errors import CollectorGoneError
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.histogram import KINDS, MIN_TOKENS, PHASES, expert_bounds
from moescope_service.messages import CaptureSpec
from moescope_service.metric_names import METRICS
from moescope_service.queries import (
    ArchiveFigures,
    CollectorInfo,
    MetricsQuery,
    MetricsReply,
    StepMetrics,
)

Samples = dict[tuple[str, ...], float]
"""Values by label values, ``model_name`` left out."""
Counts = npt.NDArray[np.int64]
"""Selections, ``[num_phases, num_layers, num_experts]``."""

SCRAPE_TIMEOUT_S = 0.25
MAX_EXPERT_SERIES = 2000
"""Layers x experts up to which ``moescope_expert_tokens_total`` is shown unless asked for."""

router = APIRouter(tags=["moescope"])


class MoescopeMetrics(PrometheusCollector):
    """One reply of the collector process as Prometheus metrics.

    Args:
        reply: The reply; None where none came in time.
        expert_metrics: Whether every expert is shown: ``auto``, ``on`` or ``off``.
        is_up: Whether the collector answered others meanwhile.
    """

    def __init__(
        self, reply: MetricsReply | None, expert_metrics: str = "auto", *, is_up: bool = False
    ) -> None:
        self._reply = reply
        self._is_up = is_up or reply is not None
        self._expert_metrics = expert_metrics

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics; none but ``moescope_collector_up`` without a reply."""
        reply = self._reply
        yield _family("moescope_collector_up", {(): float(self._is_up)})
        if reply is None or reply.info.spec is None:
            return
        spec = reply.info.spec
        for name, samples in (_counters(reply) | _gauges(reply, spec) | _archive(reply)).items():
            yield _family(name, samples, spec.model)
        shape = (len(PHASES), len(spec.layers), spec.num_experts)
        totals, window = (np.frombuffer(array, np.int64).reshape(shape) for array in reply.arrays)
        yield from _balance(spec, window)
        yield from _steps(spec, reply.read)
        is_small = len(spec.layers) * spec.num_experts <= MAX_EXPERT_SERIES
        if self._expert_metrics == "on" or (self._expert_metrics == "auto" and is_small):
            yield _experts(spec, totals)


def _counters(reply: MetricsReply) -> dict[str, Samples]:
    def by(values: dict[str, int], keys: Iterable[str]) -> Samples:
        return {(key,): values.get(key, 0) for key in keys}

    return {
        "moescope_rows": _by_phase(reply.rows),
        "moescope_rows_captured": {(): reply.rows_captured},
        "moescope_rows_lost": by(reply.rows_lost, LOST_CAUSES),
        "moescope_step_gaps": {(): reply.gaps},
        "moescope_sequences_unclaimed": {(): reply.unclaimed},
        "moescope_registrations_lost": {(): reply.registrations_lost},
        "moescope_steps": {(): reply.steps},
        "moescope_hook_seconds": {(): reply.hook_s},
        "moescope_collector_restarts": {(): reply.info.epoch},
        "moescope_collector_errors": {(): reply.errors},
        "moescope_links_refused": {(): reply.links_refused},
        "moescope_traces": by(reply.traces, ("complete", "incomplete")),
        "moescope_trace_rows": by(reply.trace_rows, [source.name.lower() for source in Source]),
        "moescope_trace_rows_stale": {(): reply.stale},
        "moescope_trace_rows_missing": by(reply.missing, MISSING_CAUSES),
        "moescope_traces_incomplete": by(reply.incomplete, MISSING_CAUSES),
        "moescope_traces_evicted": {(): reply.info.store.evicted},
        "moescope_log_traces_dropped": {(): reply.info.log.dropped},
    }


def _gauges(reply: MetricsReply, spec: CaptureSpec) -> dict[str, Samples]:
    info: CollectorInfo = reply.info
    return {
        "moescope_collector_lag_seconds": {(): reply.lag_s},
        "moescope_traces_kept": {(): info.store.traces},
        "moescope_sequences_running": {(): reply.running},
        "moescope_running_bytes": {(): reply.running_bytes},
        "moescope_prefix_bytes": {(): reply.prefix_bytes},
        "moescope_store_bytes": {(): info.store.bytes},
        "moescope_store_limit_bytes": {(): info.store.limit_bytes},
        "moescope_capture_on": {(): float(info.capture == "on")},
        "moescope_experts": {(): spec.num_experts},
        "moescope_top_k": {(): spec.top_k},
        "moescope_layers": {(): len(spec.layers)},
        "moescope_window_rows": _by_phase(reply.window_rows),
    }


def _archive(reply: MetricsReply) -> dict[str, Samples]:
    """Return what became of traces that the archive was to hold; nothing where there is none."""
    info = reply.archive
    if info is None:
        return {}
    figures = info.figures or ArchiveFigures(is_failing=True)
    return {
        "moescope_archive_traces": {(): info.archived},
        "moescope_archive_traces_dropped": {
            (cause,): info.dropped.get(cause, 0) for cause in ARCHIVE_CAUSES
        },
        "moescope_archive_traces_waiting": {(): info.waiting},
        "moescope_archive_up": {(): float(not figures.is_failing)},
        "moescope_archive_files": {(): figures.files},
        "moescope_archive_bytes": {(): figures.bytes},
    }


def _by_phase(values: list[int]) -> Samples:
    return {(phase,): value for phase, value in zip(PHASES, values, strict=True)}


def _experts(spec: CaptureSpec, counts: Counts) -> Metric:
    samples: Samples = {
        (str(layer), str(expert), phase): float(counts[p, column, expert])
        for p, phase in enumerate(PHASES)
        for column, layer in enumerate(spec.layers)
        for expert in range(spec.num_experts)
    }
    return _family("moescope_expert_tokens", samples, spec.model)


def _balance(spec: CaptureSpec, window: Counts) -> Iterable[Metric]:
    """Yield the load balance of every layer in the window; nothing of layers without traffic."""
    model, layers = spec.model, [str(layer) for layer in spec.layers]
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


def _steps(spec: CaptureSpec, read: Sequence[StepMetrics]) -> Iterable[Metric]:
    """Yield what steps read, of kinds of steps that ran."""
    ran = [
        (one, kind, (spec.model, str(one.engine), name))
        for one in read
        for kind, name in enumerate(KINDS)
        if any(one.steps[kind])
    ]
    experts, tokens = _histogram("moescope_step_experts"), _histogram("moescope_step_tokens")
    bounds = expert_bounds(spec.num_experts)
    # Sizes are told apart by the fewest tokens that a step of theirs has.
    most = [least - 1 for least in MIN_TOKENS[1:]]
    for one, kind, labels in ran:
        experts.add_metric(labels, _buckets(bounds, one.histogram[kind]), float(one.distinct[kind]))
        tokens.add_metric(labels, _buckets(most, one.steps[kind]), float(one.tokens[kind]))
    yield experts
    yield tokens
    if any(spec.expert_bytes):
        samples: Samples = {labels[1:]: float(one.expert_bytes[kind]) for one, kind, labels in ran}
        yield _family("moescope_step_expert_bytes", samples, spec.model)


def _histogram(name: str) -> HistogramMetricFamily:
    spec = METRICS[name]
    return HistogramMetricFamily(name, spec.help, labels=spec.labels)


def _buckets(bounds: Sequence[int], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return cumulative buckets, of counts by bound and of what is above all of them."""
    sums = np.cumsum(counts).tolist()
    named = [(f"{float(bound)}", float(sums[place])) for place, bound in enumerate(bounds)]
    return [*named, ("+Inf", float(sums[-1]))]


_FAMILIES = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


def _family(name: str, samples: Samples, model: str | None = None) -> Metric:
    spec = METRICS[name]
    metric = _FAMILIES[spec.kind](name, spec.help, labels=spec.labels)
    first = () if model is None else (model,)
    for values, sample in samples.items():
        metric.add_metric((*first, *values), sample)
    return metric


def render(
    reply: MetricsReply | None, accept: str, expert_metrics: str = "auto", *, is_up: bool = False
) -> tuple[bytes, str]:
    """Return vLLM's metrics and ours as text, and the text's media type.

    Args:
        reply: The collector's reply, if it came in time.
        accept: The scrape's ``Accept`` header: OpenMetrics or Prometheus' plain text.
        expert_metrics: As of `MoescopeMetrics`.
        is_up: As of `MoescopeMetrics`.
    """
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    registry = CollectorRegistry()
    registry.register(get_prometheus_registry())
    registry.register(MoescopeMetrics(reply, expert_metrics, is_up=is_up))
    if openmetrics.CONTENT_TYPE_LATEST.split(";")[0] in accept:
        # The default escaping would rename vLLM's metrics (vllm:x to vllm_x).
        encode: Any = openmetrics.generate_latest
        return encode(registry, escaping=openmetrics.ALLOWUTF8), openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request, settings: SettingsDep) -> Response:
    """Return vLLM's metrics and moescope's, as Prometheus text or OpenMetrics."""
    collector: CollectorClient | None = getattr(request.app.state, "moescope_collector", None)
    reply, is_up = None, False
    if collector is not None:
        with contextlib.suppress(CollectorGoneError):  # moescope_collector_up says so
            reply = await collector.ask_first(MetricsQuery(), timeout_s=SCRAPE_TIMEOUT_S)
        is_up = collector.is_up
    accept = request.headers.get("accept", "")
    body, content_type = await run_in_threadpool(
        render, reply, accept, settings.expert_metrics, is_up=is_up
    )
    return Response(body, headers={"Content-Type": content_type})
