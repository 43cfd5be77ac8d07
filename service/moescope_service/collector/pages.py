"""Cuts out of the store what fits into one reply, piece by piece."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from moescope import formats
from moescope.trace import RouteTrace
from moescope_service.collector.rows import Rows
from moescope_service.collector.sequences import Sequence
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
            kept, one = self._follow(wanted) if self._query.follows else self._find(wanted)
            if kept:
                yield from self._take(kept, wanted.start)
                one = self._with_pages(one, kept, wanted.start)
            found.append(one)
            if self._looked_at(1):
                yield None
        if len(self._traces) > AT_ONCE:
            yield None
        heads, arrays = arrays_of(self._traces)
        yield RoutesReply(found=found, heads=heads, arrays=arrays, spec=self._state.spec)

    def _find(self, wanted: Wanted) -> tuple[list[Kept], Found]:
        """Return the traces that an id finds, if there is room for them, and what else it finds."""
        request_id, owner = wanted.request_id, self._query.owner
        running, finished = self._state.find(request_id, owner)
        if running:
            return [], Found(status="running")
        if not finished:
            return [], self._nothing(wanted)
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

    def _nothing(self, wanted: Wanted) -> Found:
        """Say what became of a request that an id finds no longer, or never did."""
        request_id, owner = wanted.request_id, self._query.owner
        if self._state.store.was_evicted(request_id, owner):
            return Found(status="evicted")
        is_lost = self._state.store.was_lost(request_id, owner)
        return Found(status="lost" if is_lost else "unknown")

    def _follow(self, wanted: Wanted) -> tuple[list[Kept], Found]:
        """Return the sequence that is followed: its trace, or the page of its rows so far."""
        found: list[Sequence | Kept] = []
        for some in self._state.find(wanted.request_id, self._query.owner):
            if wanted.uid is None:
                found += itertools.islice(reversed(some.values()), MAX_FOUND)  # type: ignore[call-overload]
            elif wanted.uid in some:
                found.append(some[wanted.uid])
        if not found:
            return [], self._nothing(wanted)
        newest = max((one.request for one in found), key=lambda request: request.created_s)
        choices = [one for one in found if one.request == newest]
        followed = [one for one in choices if one.index == self._query.index]
        if not followed:
            return [], Found(status="finished", indices=sorted({one.index for one in choices}))
        one = max(followed, key=lambda one: one.uid)
        if isinstance(one, Kept):
            return [one], Found(status="finished", uid=one.uid)
        return [], self._so_far(one, wanted)

    def _so_far(self, sequence: Sequence, wanted: Wanted) -> Found:
        """Take in a page of a running sequence's rows so far, as many as there is room for."""
        spec, start, uid = self._state.spec, wanted.start, sequence.uid
        if spec is None:
            return Found(status="running", uid=uid)
        nothing = Rows.nothing(spec)
        room = max(1, (self._left_bytes - TRACE_BYTES) // _row_bytes(nothing))
        internal_id = sequence.register.internal_id
        rows, num_settled = self._state.workers.so_far(internal_id, start, room) or (nothing, 0)
        page = sequence.page_so_far(spec, rows, start, num_settled)
        if wanted.uid is not None and not page.num_rows:
            return Found(status="running", uid=uid)
        self._traces.append(page)
        has_more = page.num_rows == room and start + room < num_settled
        return Found(
            status="running",
            traces=[len(self._traces) - 1],
            next_start=start + room if has_more else None,
            uid=uid,
        )

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
            uid=found.uid,
        )

    def _looked_at(self, count: int) -> bool:
        """Count traces and ids; return whether it is time for a break."""
        self._num_looked_at += count
        return self._num_looked_at % AT_ONCE == 0

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


def arrays_of(traces: list[RouteTrace]) -> tuple[list[ArrayHead], list[Any]]:
    """Return the arrays of traces as a reply has them, and how to read them."""
    if not traces:
        return [], []
    # Those of several pipeline stages are not contiguous: a frame is.
    arrays = formats.arrays_of(traces)
    members = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    heads = [
        ArrayHead(name=name, dtype=array.dtype.str, shape=array.shape)
        for name, array in members.items()
    ]
    return heads, list(members.values())


def _row_bytes(trace: RouteTrace | Rows) -> int:
    per_row = trace.topk_ids.shape[1] * trace.topk_ids.shape[2]
    weights = trace.topk_weights
    size = per_row * trace.topk_ids.itemsize + 1 + 4
    return size + (0 if weights is None else per_row * weights.itemsize)
