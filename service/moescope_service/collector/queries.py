"""What API servers ask the collector, and its answers."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from moescope import formats
from moescope_service.collector.sequences import Sequence
from moescope_service.collector.store import Kept
from moescope_service.messages import Frames, pack

if TYPE_CHECKING:
    from moescope_service.collector.core import Collector
    from moescope_service.collector.workers import Peer

FINISHING_WAIT_S = 2.0
"""How long a question waits, unless it says so, for a request that was answered already.

The worker's end follows the response by 0 to 2 ms, measured on the CPU and on an H200.
"""

OTHER_SERVER_WAIT_S = 0.1
"""How long it waits for one that has not been answered yet, where there are several API servers:
the news of the answer comes from another one than the question."""

MAX_REPLY_BYTES = 64 * 2**20
"""Traces of an answer that holds several requests: one client's use of an id stops all the others.

Answering takes this thread 3 ms a MB, in which it takes in no rows.
"""

Answer = tuple[dict[str, Any], Frames]


@dataclasses.dataclass(slots=True, eq=False)
class _Waiting:
    peer: Peer
    query: dict[str, Any]
    deadline_s: float


class Queries:
    """Answers questions; those for routes wait until the request has ended.

    Args:
        collector: Whose state is asked for.
        clock: Monotonic seconds.
    """

    def __init__(self, collector: Collector, clock: Callable[[], float]) -> None:
        self._collector = collector
        self._clock = clock
        self._waiting: list[_Waiting] = []
        self._answers: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "capture": self._capture,
            "delete": self._delete,
            "experts": self._experts,
            "info": self._info,
            "metrics": self._metrics,
            "recent": self._recent,
            "reset": self._reset,
            "routes": self._routes,
            "settle": self._settle,
        }

    def ask(self, peer: Peer, query: dict[str, Any]) -> None:
        """Answer a question now or, if it can wait for its answer, later.

        ``routes`` waits for the end of one request, ``settle`` for the traces of all that were
        answered already.

        Raises:
            ValueError: The question is unknown.
        """
        if query["op"] not in self._answers:
            raise ValueError(f"unknown query: {query['op']!r}")
        wait_s = self._wait_s(query)
        if wait_s > 0:
            self._waiting.append(_Waiting(peer, query, self._clock() + wait_s))
        else:
            self._reply(peer, query)

    def retry(self, ids: Iterable[str]) -> None:
        """Answer the questions that waited for a request whose sequences have all ended."""
        if not self._waiting:
            return
        ended = {one for one in ids if not self._collector.sequences.find(one)}
        self._reply_to([w for w in self._waiting if w.query.get("request_id") in ended])
        settling = [w for w in self._waiting if w.query["op"] == "settle"]
        if settling and not self._num_unsettled:
            self._reply_to(settling)

    def expire(self) -> None:
        """Answer the questions that have waited long enough."""
        now = self._clock()
        self._reply_to([waiting for waiting in self._waiting if waiting.deadline_s <= now])

    def _reply_to(self, ready: list[_Waiting]) -> None:
        for waiting in ready:
            self._waiting.remove(waiting)
            self._reply(waiting.peer, waiting.query)

    def _reply(self, peer: Peer, query: dict[str, Any]) -> None:
        values, arrays = self._answers[query["op"]](query)
        reply = pack("reply", arrays, number=query["number"], **values)
        self._collector.outbox.append((peer, reply))

    def _wait_s(self, query: dict[str, Any]) -> float:
        if query["op"] == "settle":
            return float(query["wait_s"]) if self._num_unsettled else 0.0
        if query["op"] != "routes":
            return 0.0
        running = self._collector.sequences.find(query["request_id"])
        if not running:
            return 0.0
        if query["wait_s"] is not None:
            return float(query["wait_s"])
        if all(sequence.is_finishing for sequence in running):
            return FINISHING_WAIT_S
        return OTHER_SERVER_WAIT_S if len(self._collector.servers) > 1 else 0.0

    @property
    def _num_unsettled(self) -> int:
        return sum(sequence.is_finishing for sequence in self._collector.sequences)

    def _settle(self, query: dict[str, Any]) -> Answer:
        return {"unsettled": self._num_unsettled}, ()

    def _routes(self, query: dict[str, Any]) -> Answer:
        request_id = query["request_id"]
        if self._collector.sequences.find(request_id):
            return {"status": "running"}, ()
        kept = self._collector.store.find(request_id)
        if kept:
            newest = newest_requests(kept)
            truncated = len(newest) < len(kept)
            values = {"status": "finished", "truncated": truncated, "hello": self._collector.hello}
            return values, [formats.dump_npz([one.trace for one in newest], truncated=truncated)]
        evicted = self._collector.store.was_evicted(request_id)
        return {"status": "evicted" if evicted else "unknown"}, ()

    def _delete(self, query: dict[str, Any]) -> Answer:
        running = self._collector.sequences.find(query["request_id"])
        kept = self._collector.store.find(query["request_id"])
        self._collector.forget(running)
        for one in kept:
            self._collector.store.remove(one)
        return {"deleted": len(running) + len(kept)}, ()

    def _recent(self, query: dict[str, Any]) -> Answer:
        limit, before = query["limit"], query["before"]
        known: list[Sequence | Kept] = [s for s in self._collector.sequences if s.keep]
        known += self._collector.store
        if before is not None:
            known = [one for one in known if one.uid < before]
        page = heapq.nlargest(limit, known, key=lambda one: one.uid)
        return {
            "sequences": [_summary(one) for one in page],
            "next_before": page[-1].uid if len(known) > len(page) and page else None,
        }, ()

    def _experts(self, query: dict[str, Any]) -> Answer:
        counters, windows = self._collector.counters, self._collector.windows
        if counters is None or windows is None:
            return {"hello": None}, ()
        window_s = query.get("window_s")
        if window_s is None:
            counts, rows = counters.since_reset()
            values: dict[str, Any] = {"since_s": counters.since_s, "window_s": None}
        else:
            counts, rows, covered_s = windows.last(window_s)
            values = {"since_s": time.time() - covered_s, "window_s": covered_s}
        values |= {"rows": rows.tolist(), "kept_s": windows.kept_s, "hello": self._collector.hello}
        return values, [counts]

    def _reset(self, query: dict[str, Any]) -> Answer:
        if self._collector.counters is not None and self._collector.windows is not None:
            self._collector.counters.reset()
            self._collector.windows.begin()
        return self._experts({})

    def _capture(self, query: dict[str, Any]) -> Answer:
        self._collector.set_capturing(query["on"])
        return {"capture": "on" if query["on"] else "paused"}, ()

    def _info(self, query: dict[str, Any]) -> Answer:
        store = self._collector.store
        return {
            "hello": self._collector.hello,
            "workers_complete": self._collector.workers.are_complete,
            "refusal": self._collector.refusal,
            "capture": "on" if self._collector.is_capturing else "paused",
            "started_s": self._collector.stats.started_s,
            "epoch": self._collector.epoch,
            "store": {
                "limit_bytes": store.limit_bytes,
                "bytes": store.size_bytes,
                "traces": len(store),
                "evicted": store.num_evicted,
            },
        }, ()

    def _metrics(self, query: dict[str, Any]) -> Answer:
        collector, stats = self._collector, self._collector.stats
        info, _ = self._info(query)
        values = {
            **info,
            "steps": stats.steps,
            "rows_captured": stats.rows_captured,
            "rows_lost": dict(stats.rows_lost),
            "hook_seconds": stats.hook_seconds,
            "traces": dict(stats.traces),
            "trace_rows": dict(stats.trace_rows),
            "missing": dict(stats.missing),
            "incomplete": dict(stats.incomplete),
            "lag_seconds": stats.lag_seconds,
            "running": len(collector.sequences),
            "gaps": collector.workers.num_gaps,
            "unclaimed": collector.sequences.num_unclaimed,
        }
        if collector.counters is None or collector.windows is None:
            return values, ()
        window, window_rows, _ = collector.windows.last(collector.settings.metrics_window)
        values |= {"rows": collector.counters.rows.tolist(), "window_rows": window_rows.tolist()}
        return values, [collector.counters.totals, window]


def newest_requests(kept: list[Kept], max_bytes: int = MAX_REPLY_BYTES) -> list[Kept]:
    """Return the newest of the requests that one id found, up to so many bytes of traces.

    Args:
        kept: As `TraceStore.find` returns them; at least one.
        max_bytes: What the older ones may add up to with the newest, which is always there.
    """
    newest: list[Kept] = []
    size_bytes = 0
    for _, choices in itertools.groupby(kept, key=lambda one: one.request):
        request = list(choices)
        size_bytes += sum(one.trace.size_bytes for one in request)
        if newest and size_bytes > max_bytes:
            break
        newest += request
    return newest


def _summary(one: Sequence | Kept) -> dict[str, Any]:
    if isinstance(one, Sequence):
        register = one.register
        return {
            "request_id": register.request_id,
            "ids": sorted(one.ids),
            "index": register.index,
            "status": "running",
            "prompt_len": register.prompt_len,
            "num_tokens": None,
            "finish_reason": one.finish_reason,
            "complete": None,
            "coverage": None,
            "created_s": register.created_s,
            "size_bytes": None,
        }
    trace = one.trace
    return {
        "request_id": trace.request_id,
        "ids": sorted(one.ids),
        "index": trace.index,
        "status": "finished",
        "prompt_len": trace.prompt_len,
        "num_tokens": trace.num_tokens,
        "finish_reason": trace.finish_reason,
        "complete": trace.complete,
        "coverage": trace.coverage,
        "created_s": trace.created_s,
        "size_bytes": one.size_bytes,
    }
