"""What this API server has to send to the collector: registrations first, then queries.

A query never overtakes what was told before it; what is told later may overtake a query. Queries
that wait have small quotas of their own: those of metrics, and all others.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable

from moescope_service.frontend.journal import Journal
from moescope_service.messages import Frames, RequestKey

MAX_QUERIES = 2048
"""Queries that may wait to be sent, beside those of metrics; they do where the collector hangs."""
MAX_URGENT = 16
"""Queries of metrics that may."""
MAX_QUERY_BYTES = 4 * 2**20
"""Bytes of either from which on no more are taken."""


class Outbox:
    """Holds messages until the link's thread takes them; for several threads.

    See `moescope_service.link.Source`.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._lock = threading.Lock()
        self.journal = Journal() if journal is None else journal
        self._urgent = _Queries(MAX_URGENT)
        self._others = _Queries(MAX_QUERIES)

    def __bool__(self) -> bool:
        return bool(self.journal.has_unsent or self._urgent.waiting or self._others.waiting)

    def register(self, internal_id: str, request: RequestKey, frames: Frames) -> None:
        """As of `Journal`."""
        with self._lock:
            self.journal.register(internal_id, request, frames)

    def finish(self, internal_id: str, frames: Frames) -> None:
        """As of `Journal`."""
        with self._lock:
            self.journal.finish(internal_id, frames)

    def alias(self, internal_ids: Iterable[str], alias: str, frames: Frames) -> None:
        """As of `Journal`."""
        with self._lock:
            self.journal.alias(internal_ids, alias, frames)

    def forget(self, internal_ids: Iterable[str]) -> None:
        """As of `Journal`."""
        with self._lock:
            self.journal.forget(internal_ids)

    def received(self, count: int) -> None:
        """As of `Journal`."""
        with self._lock:
            self.journal.received(count)

    def query(self, number: int, frames: Frames, *, is_urgent: bool = False) -> bool:
        """Take a query.

        Returns:
            False where too many wait already.
        """
        with self._lock:
            return (self._urgent if is_urgent else self._others).put(number, frames)

    def withdraw(self, number: int, cancel: Frames) -> None:
        """Send a query no more; where it was sent, send what takes it back, if there is room."""
        with self._lock:
            if not self._urgent.remove(number) and not self._others.remove(number):
                self._others.put(-1 - number, cancel)

    def drop_queries(self) -> None:
        """Send none of the queries: the collector that they were for has ended."""
        with self._lock:
            self._urgent.clear()
            self._others.clear()

    def introduce(self) -> list[Frames]:
        """Return what begins a connection."""
        with self._lock:
            return [self.journal.introduce()]

    def take(self) -> Frames | None:
        """Return the next message, which is sent now."""
        with self._lock:
            if self.journal.has_unsent:
                return self.journal.take()
            return self._urgent.take() or self._others.take()


class _Queries:
    """Queries that wait, by number, in order."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._size_bytes = 0
        self.waiting: collections.OrderedDict[int, Frames] = collections.OrderedDict()

    def put(self, number: int, frames: Frames) -> bool:
        if len(self.waiting) >= self._max_waiting or self._size_bytes > MAX_QUERY_BYTES:
            return False
        self.waiting[number] = frames
        self._size_bytes += _size_bytes(frames)
        return True

    def remove(self, number: int) -> bool:
        frames = self.waiting.pop(number, None)
        if frames is None:
            return False
        self._size_bytes -= _size_bytes(frames)
        return True

    def take(self) -> Frames | None:
        if not self.waiting:
            return None
        _, frames = self.waiting.popitem(last=False)
        self._size_bytes -= _size_bytes(frames)
        return frames

    def clear(self) -> None:
        self.waiting.clear()
        self._size_bytes = 0


def _size_bytes(frames: Frames) -> int:
    return sum(memoryview(frame).nbytes for frame in frames)
