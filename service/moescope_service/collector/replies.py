"""Replies that are made at once, of what the collector knows now."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moescope.records import LogInfo, SequenceInfo, StoreInfo
from moescope_service.collector.layer_rows import layer_rows
from moescope_service.collector.sequences import Sequence
from moescope_service.collector.state import CollectorState
from moescope_service.collector.store import NUM_ADDED, Kept
from moescope_service.nodes import alike
from moescope_service.queries import (
    CaptureQuery,
    CaptureReply,
    CollectorInfo,
    EndedQuery,
    EndedReply,
    ExpertsQuery,
    ExpertsReply,
    InfoQuery,
    InfoReply,
    LayerQuery,
    MetricsQuery,
    MetricsReply,
    NodeQuery,
    NodeReply,
    Query,
    RecentQuery,
    RecentReply,
    Reply,
    ResetQuery,
    StepMetrics,
    StepsQuery,
    StepsReply,
)

ENDED_AT_ONCE = 256
"""Sequences that a reply says to have ended."""


def _recent(state: CollectorState, query: RecentQuery) -> RecentReply:
    newest: Iterator[Sequence | Kept] = heapq.merge(
        state.sequences.ids.newest(query.before, query.owner),
        state.store.ids.newest(query.before, query.owner),
        key=lambda one: one.uid,
        reverse=True,
    )
    page = list(itertools.islice(newest, query.limit))
    has_more = next(newest, None) is not None
    return RecentReply(
        sequences=[_summary(one) for one in page],
        next_before=page[-1].uid if has_more and page else None,
    )


def _ended(state: CollectorState, query: EndedQuery) -> EndedReply:
    store = state.store
    if query.epoch is None:
        return EndedReply(sequences=[], owners=[], epoch=state.epoch, number=store.num_added)
    # Another collector's number says nothing here: all that this one has is new.
    first = query.number if query.epoch == state.epoch else 0
    number = max(first, store.num_added - NUM_ADDED)
    some = list(itertools.islice(store.added_since(number), ENDED_AT_ONCE))
    kept = [one for one in some if one is not None]
    return EndedReply(
        sequences=[_summary(one) for one in kept],
        owners=[one.owner for one in kept],
        epoch=state.epoch,
        number=number + len(some),
        skipped=number - first,
        has_more=number + len(some) < store.num_added,
    )


def _experts(state: CollectorState, query: ExpertsQuery) -> ExpertsReply:
    counters, windows = state.counters, state.windows
    if counters is None or windows is None:
        return ExpertsReply()
    covered_s = None
    if query.window_s is None:
        counts, rows = counters.since_reset()
        since_s = counters.since_s
    else:
        counts, rows, covered_s = windows.last(query.window_s)
        since_s = time.time() - covered_s
    return ExpertsReply(
        spec=state.spec,
        since_s=since_s,
        window_s=covered_s,
        rows=rows.tolist(),
        kept_s=windows.kept_s,
        arrays=[counts],
    )


def _steps(state: CollectorState, query: StepsQuery) -> StepsReply:
    if state.steps is None:
        return StepsReply()
    by_engine = state.steps.since_reset
    return StepsReply(
        spec=state.spec,
        since_s=state.steps.since_s,
        engines=[*by_engine],
        arrays=[
            array
            for one in by_engine.values()
            for array in (one.steps, one.tokens, one.distinct, one.busiest)
        ],
    )


def _reset(state: CollectorState, query: ResetQuery) -> ExpertsReply:
    if state.counters and state.windows and state.steps:
        state.counters.reset()
        state.windows.begin()
        state.steps.reset()
    return _experts(state, ExpertsQuery())


def _capture(state: CollectorState, query: CaptureQuery) -> CaptureReply:
    state.set_capturing(query.on)
    return CaptureReply(capture="on" if query.on else "paused")


def _info(state: CollectorState, query: InfoQuery) -> InfoReply:
    return InfoReply(info=_collector_info(state))


def _collector_info(state: CollectorState) -> CollectorInfo:
    return CollectorInfo(
        spec=state.spec,
        workers_complete=state.workers.are_complete,
        refusal=state.refusal,
        capture="on" if state.is_capturing else "paused",
        weights_version=state.workers.weights_version,
        started_s=state.stats.started_s,
        epoch=state.epoch,
        log=LogInfo(state="off", dropped=0) if state.log is None else state.log.info,
        store=StoreInfo(
            limit_bytes=state.store.limit_bytes,
            bytes=state.store.size_bytes,
            traces=len(state.store),
            evicted=state.store.num_evicted,
        ),
    )


def _node(state: CollectorState, query: NodeQuery) -> NodeReply:
    return NodeReply(alike=alike(state.settings))


def _metrics(state: CollectorState, query: MetricsQuery) -> MetricsReply:
    stats = state.stats
    reply = MetricsReply(
        info=_collector_info(state),
        steps=stats.steps,
        rows_captured=stats.rows_captured,
        rows_lost=stats.rows_lost,
        hook_s=stats.hook_s,
        traces=stats.traces,
        trace_rows=stats.trace_rows,
        missing=stats.missing,
        incomplete=stats.incomplete,
        stale=stats.stale,
        lag_s=stats.lag_s,
        running=len(state.sequences),
        running_bytes=state.sequences.size_bytes,
        prefix_bytes=state.workers.size_bytes,
        registrations_lost=stats.registrations_lost,
        links_refused=stats.links_refused,
        errors=stats.errors,
        gaps=state.workers.num_gaps,
        unclaimed=state.sequences.num_unclaimed,
        archive=None if state.archive is None else state.archive.info,
    )
    if state.counters is None or state.windows is None:
        return reply
    window, window_rows, _ = state.windows.last(state.settings.metrics_window_s)
    return dataclasses.replace(
        reply,
        rows=state.counters.rows.tolist(),
        window_rows=window_rows.tolist(),
        read=_read(state),
        arrays=[state.counters.totals, window],
    )


def _read(state: CollectorState) -> list[StepMetrics]:
    if state.steps is None or state.spec is None:
        return []
    sizes = np.array(state.spec.expert_bytes or [0] * len(state.spec.layers), np.int64)
    return [
        StepMetrics(
            engine=engine,
            steps=one.steps.tolist(),
            tokens=one.tokens.sum(-1).tolist(),
            histogram=one.histogram.tolist(),
            distinct=one.distinct.sum((1, 2)).tolist(),
            expert_bytes=(one.distinct.sum(1) @ sizes).tolist(),
        )
        for engine, one in state.steps.totals.items()
    ]


def _summary(one: Sequence | Kept) -> SequenceInfo:
    if isinstance(one, Sequence):
        register = one.register
        return SequenceInfo(
            request_id=register.request_id,
            ids=tuple(sorted(one.ids)),
            index=register.index,
            status="running",
            prompt_len=register.prompt_len,
            num_tokens=None,
            finish_reason=one.finish_reason,
            complete=None,
            coverage=None,
            created_s=register.created_s,
            size_bytes=None,
        )
    trace = one.trace
    oldest, newest = one.weights_versions or (None, None)
    return SequenceInfo(
        request_id=trace.request_id,
        ids=tuple(sorted(one.ids)),
        index=trace.index,
        status="finished",
        prompt_len=trace.prompt_len,
        num_tokens=trace.num_tokens,
        finish_reason=trace.finish_reason,
        complete=trace.complete,
        coverage=one.coverage,
        created_s=trace.created_s,
        size_bytes=one.size_bytes,
        oldest_weights_version=oldest,
        newest_weights_version=newest,
    )


REPLIES: dict[type[Query[Any]], Callable[[CollectorState, Any], Reply]] = {
    RecentQuery: _recent,
    LayerQuery: layer_rows,
    EndedQuery: _ended,
    ExpertsQuery: _experts,
    StepsQuery: _steps,
    ResetQuery: _reset,
    CaptureQuery: _capture,
    InfoQuery: _info,
    NodeQuery: _node,
    MetricsQuery: _metrics,
}
"""How each kind of query is answered that needs no wait and no pieces."""
