"""Cuts out of the store what fits into one reply, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moescope import formats
from moescope.trace import RouteTrace
from moescope_service.collector.staleness import Staleness
from moescope_service.collector.state import CollectorState
from moescope_service.collector.store import MAX_FOUND, Kept
from moescope_service.queries import ArrayHead, Found, RoutesQuery, RoutesReply, Wanted

TRACE_BYTES = 1024
"""What a trace adds to a reply beside its rows."""
MAX_TRACES = MAX_FOUND
"""Traces that all ids of a query find together, those that several find as often; but for the
first id, whatever it finds."""
AT_ONCE = 128
"""Traces, or ids, that are looked at in one piece, which takes up to 5 ms."""


class Pages:
    """Collects the rows that one query asks for, up to its bytes; each trace once.

    Args:
        state: Where the traces are.
        query: What is asked for.
    """

    def __init__(self, state: CollectorState, query: RoutesQuery) -> None:
        self._state = state
        self._query = query
        self._staleness = Staleness(query, state.workers.weights_version)
        self._left_bytes = query.max_bytes
        self._left_traces = MAX_TRACES
        self._num_looked_at = 0
        self._traces: list[RouteTrace] = []
        self._made: dict[tuple[int, int], tuple[int, int | None]] = {}
        """By uid and start: the trace's number, and the first row that follows its page."""

    def replies(self) -> Iterator[RoutesReply | None]:
        """Do what is asked; yield None between two pieces, the reply after the last one."""
        found = []
        for wanted in self._query.wanted:
            kept, one = self._find(wanted)
            if kept:
                yield from self._take(kept, wanted.start)
                one = self._with_pages(one, kept, wanted.start)
            found.append(one)
            if self._looked_at(1):
                yield None
        if len(self._traces) > AT_ONCE:
            yield None
        heads, arrays = self._arrays()
        yield RoutesReply(found=found, heads=heads, arrays=arrays, spec=self._state.spec)

    def _find(self, wanted: Wanted) -> tuple[list[Kept], Found]:
        """Return the traces that an id finds, if there is room for them, and what else it finds."""
        request_id, owner = wanted.request_id, self._query.owner
        running, finished = self._state.find(request_id, owner)
        if running:
            return [], Found(status="running")
        if not finished:
            if self._state.store.was_evicted(request_id, owner):
                return [], Found(status="evicted")
            is_lost = self._state.store.was_lost(request_id, owner)
            return [], Found(status="lost" if is_lost else "unknown")
        if self._left_traces <= 0 and self._left_traces != MAX_TRACES:
            return [], Found(status="finished", next_start=wanted.start)
        found = self._state.store.newest(finished)
        self._left_traces -= len(found.kept)
        index, kept = self._query.index, found.kept
        if index is not None:
            kept = [one for one in kept if one.trace.index == index]
        if not kept:
            indices = sorted({one.trace.index for one in found.kept})
            return [], Found(status="finished", indices=indices)
        return kept, Found(status="finished", lacks_older=not found.is_all)

    def _take(self, kept: list[Kept], start: int) -> Iterator[None]:
        """Take in the pages of traces that are not there yet, if there is room for them."""
        new = [one for one in kept if (one.uid, start) not in self._made]
        limit = self._limit([one.trace for one in new], start)
        if limit is None:  # no room: another query will ask for all of it
            return
        for one in new:
            trace = one.trace
            is_last = start + limit >= trace.num_rows
            page = trace if is_last and not start else trace.page(start, limit)
            page = self._staleness.page(page, trace)
            self._left_bytes -= page.size_bytes + TRACE_BYTES
            self._made[one.uid, start] = len(self._traces), None if is_last else start + limit
            self._traces.append(page)
            if self._looked_at(1):
                yield

    def _with_pages(self, found: Found, kept: list[Kept], start: int) -> Found:
        """Say which pages those are, and where the next ones start."""
        made = [self._made.get((one.uid, start)) for one in kept]
        pages = [page for page in made if page is not None]
        if len(pages) < len(made):
            return Found(status="finished", next_start=start)
        return Found(
            status="finished",
            traces=[number for number, _ in pages],
            next_start=min((end for _, end in pages if end is not None), default=None),
            lacks_older=found.lacks_older,
        )

    def _looked_at(self, count: int) -> bool:
        """Count traces and ids; return whether it is time for a break."""
        self._num_looked_at += count
        return self._num_looked_at % AT_ONCE == 0

    def _arrays(self) -> tuple[list[ArrayHead], list[Any]]:
        """Return the arrays of all traces, and how to read them."""
        if not self._traces:
            return [], []
        arrays = formats.arrays_of(self._traces)
        # Those of several pipeline stages are not: a frame is.
        members = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        heads = [
            ArrayHead(name=name, dtype=array.dtype.str, shape=array.shape)
            for name, array in members.items()
        ]
        return heads, list(members.values())

    def _limit(self, traces: list[RouteTrace], start: int) -> int | None:
        """Return how many rows of each trace there is room for; None: not for one.

        There always is for one row of each trace, where nothing is in the reply yet.
        """
        longest = max((trace.num_rows - start for trace in traces), default=0)
        wanted = longest if self._query.limit is None else min(longest, self._query.limit)
        if wanted <= 0:
            return 0
        room = self._left_bytes - len(traces) * TRACE_BYTES
        row_bytes = sum(_row_bytes(trace) for trace in traces if trace.num_rows > start)
        if room < row_bytes:
            return None if self._traces else 1
        return min(wanted, room // row_bytes)


def _row_bytes(trace: RouteTrace) -> int:
    per_row = trace.num_layers * trace.top_k
    weights = trace.topk_weights
    size = per_row * trace.topk_ids.itemsize + 1 + 4
    return size + (0 if weights is None else per_row * weights.itemsize)
