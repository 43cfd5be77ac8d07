"""Finished traces, bounded in bytes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from moescope.trace import RouteTrace
from moescope_service.messages import RequestKey

OVERHEAD_BYTES = 2048
"""What a kept trace costs beside its arrays: objects, ids, index entries."""

_REMEMBERED = 100_000
"""Evicted requests and their ids that are still told apart from those never seen."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """A finished trace and every id that finds it."""

    uid: int
    """The collector's own number of the sequence, growing with time."""
    trace: RouteTrace
    ids: tuple[str, ...]

    @property
    def request(self) -> RequestKey:
        """Which request it belongs to."""
        return RequestKey(self.trace.request_id, self.trace.created_s)

    @property
    def size_bytes(self) -> int:
        """Bytes that count against the store's limit."""
        return self.trace.size_bytes + OVERHEAD_BYTES + sum(map(len, self.ids))


class TraceStore:
    """Keeps the newest finished traces; the requests that ended first make room.

    A request is kept as a whole or not at all: nobody could tell one that lacks choices from one
    that never had them. Where one choice made room, those that end later do not come back.

    Args:
        limit_bytes: Upper bound for the sum of `Kept.size_bytes`.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.size_bytes = 0
        self.num_evicted = 0
        """Traces that made room, or found none."""
        self._kept: dict[int, Kept] = {}
        self._uids: dict[str, list[int]] = {}
        # The traces of each request; the request whose newest trace is the oldest comes first.
        self._requests: collections.OrderedDict[RequestKey, list[int]] = collections.OrderedDict()
        self._evicted: collections.OrderedDict[int, None] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._kept.values())

    def add(self, kept: Kept) -> None:
        """Keep a trace and evict the requests that no longer fit.

        Only its own one is evicted if the trace never would fit, or is one of a request that was.
        """
        self._kept[kept.uid] = kept
        self.size_bytes += kept.size_bytes
        for request_id in kept.ids:
            self._uids.setdefault(request_id, []).append(kept.uid)
        self._requests.setdefault(kept.request, []).append(kept.uid)
        self._requests.move_to_end(kept.request)
        if kept.size_bytes > self.limit_bytes or hash(kept.request) in self._evicted:
            self._evict(kept.request)
        while self.size_bytes > self.limit_bytes:
            self._evict(next(iter(self._requests)))

    def find(self, request_id: str) -> list[Kept]:
        """Return what an id finds: the newest request first, its choices in their order."""
        found = [self._kept[uid] for uid in self._uids.get(request_id, ())]
        return sorted(found, key=_newest_first)

    def add_id(self, kept: Kept, request_id: str) -> None:
        """Let one more id find a trace."""
        if request_id not in kept.ids:
            self._kept[kept.uid] = dataclasses.replace(kept, ids=(*kept.ids, request_id))
            self.size_bytes += len(request_id)
            self._uids.setdefault(request_id, []).append(kept.uid)

    def remove(self, kept: Kept) -> None:
        """Forget a trace."""
        del self._kept[kept.uid]
        self.size_bytes -= kept.size_bytes
        for request_id in kept.ids:
            uids = self._uids[request_id]
            uids.remove(kept.uid)
            if not uids:
                del self._uids[request_id]
        siblings = self._requests[kept.request]
        siblings.remove(kept.uid)
        if not siblings:
            del self._requests[kept.request]

    def was_evicted(self, request_id: str) -> bool:
        """Whether a trace with this id was evicted, as far as that is still known."""
        return hash(request_id) in self._evicted

    def _evict(self, request: RequestKey) -> None:
        for kept in [self._kept[uid] for uid in self._requests[request]]:
            self.remove(kept)
            self.num_evicted += 1
            self._evicted.update(dict.fromkeys(map(hash, (*kept.ids, request))))
        while len(self._evicted) > _REMEMBERED:
            self._evicted.popitem(last=False)


def _newest_first(kept: Kept) -> tuple[float, str, int]:
    request_id, created_s = kept.request
    return -created_s, request_id, kept.trace.index
