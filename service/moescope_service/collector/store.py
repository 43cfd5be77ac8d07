"""Finished traces, bounded in bytes."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping

from moescope.trace import RouteTrace
from moescope_service.collector.ids import IdIndex
from moescope_service.ids import id_hash
from moescope_service.messages import RequestKey

OVERHEAD_BYTES = 2048
"""What a kept trace costs beside its arrays and ids: objects, entries of indices."""

MAX_FOUND = 1024
"""Traces that one look-up returns at most: clients can give any number of requests the same id."""

NUM_ADDED = 4096
"""Traces of which it is known in which order they came."""

_INDEX_BYTES = 512
"""What an id costs beside its text: a set of numbers, and its place in an index."""

_REMEMBERED = 100_000
"""Evicted requests and their ids that are still told apart from those never seen; of lost ones as
many ids."""


def id_bytes(request_id: str) -> int:
    """Return what keeping an id costs, in bytes."""
    return sys.getsizeof(request_id) + _INDEX_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """A finished trace and every id that finds it."""

    uid: int
    """The collector's own number of the sequence, growing with time."""
    trace: RouteTrace
    ids: tuple[str, ...]
    owner: str | None = None
    """As of `moescope_service.messages.Register`."""
    coverage: float = 1.0
    """Of the trace: counting its rows takes too long for a list of a thousand."""
    weights_versions: tuple[int, int] | None = None
    """The oldest and the newest number of the weights that computed its rows."""

    @property
    def request_id(self) -> str:
        """The id in the response."""
        return self.trace.request_id

    @property
    def request(self) -> RequestKey:
        """Which request it belongs to."""
        return RequestKey(self.trace.request_id, self.trace.created_s)

    @property
    def index(self) -> int:
        """The choice's index in the response."""
        return self.trace.index

    @property
    def size_bytes(self) -> int:
        """Bytes that count against the store's limit."""
        ids = (*self.ids, self.trace.request_id)
        return self.trace.size_bytes + OVERHEAD_BYTES + sum(map(id_bytes, ids))


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What an id finds."""

    kept: list[Kept]
    """The newest request first, its choices in their order."""
    is_all: bool = True
    """Whether no older request of that id was left out."""


class TraceStore:
    """Keeps the newest finished traces; the requests that ended first make room.

    A request is kept as a whole or not at all: one that lacks choices could not be told from one
    that never had them. Where one choice made room, those that end later do not come back.

    No call but `add`, which may evict, takes longer with more traces in the store.

    Args:
        limit_bytes: Upper bound for the sum of `Kept.size_bytes`.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.size_bytes = 0
        self.num_evicted = 0
        """Traces that made room, or found none."""
        self.num_added = 0
        """Traces that ever came."""
        self._added: collections.deque[int] = collections.deque(maxlen=NUM_ADDED)
        self.ids: IdIndex[Kept] = IdIndex()
        # The traces of each request; the request whose newest trace is the oldest comes first.
        self._requests: collections.OrderedDict[RequestKey, dict[int, None]]
        self._requests = collections.OrderedDict()
        # The owner of what was evicted last under an id or of a request, by its hash.
        self._evicted: collections.OrderedDict[int, str | None] = collections.OrderedDict()
        # The owner of what was lost last under an id, by its `id_hash`.
        self._lost: collections.OrderedDict[int, str | None] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Kept]:
        return iter(self.ids)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.ids

    def add(self, kept: Kept) -> None:
        """Keep a trace and evict the requests that no longer fit.

        Only its own one is evicted if the trace never would fit, or is one of a request that was.
        """
        size_bytes = kept.size_bytes
        self.num_added += 1
        self._added.append(kept.uid)
        self.ids.add(kept)
        self.size_bytes += size_bytes
        self._requests.setdefault(kept.request, {})[kept.uid] = None
        self._requests.move_to_end(kept.request)
        if kept.size_bytes > self.limit_bytes or hash(kept.request) in self._evicted:
            self._evict(kept.request)
        while self.size_bytes > self.limit_bytes:
            self._evict(next(iter(self._requests)))

    def added_since(self, number: int) -> Iterator[Kept | None]:
        """Yield what came after so many traces, and None for each that is here no longer.

        Of those that came before the last `NUM_ADDED` nothing is known: they are left out.
        """
        known = min(self.num_added - number, len(self._added))
        for uid in itertools.islice(self._added, len(self._added) - known, None):
            yield self.ids.get(uid)

    def newest(self, found: Mapping[int, Kept]) -> Found:
        """Return of what an id finds the requests that ended last, each as a whole.

        Of a single request with more than `MAX_FOUND` choices the first ones by index.

        Args:
            found: What the id finds, as `IdIndex` says.
        """
        last = itertools.islice(reversed(found.values()), MAX_FOUND)  # type: ignore[call-overload]
        requests = dict.fromkeys(kept.request for kept in last)
        newest: list[Kept] = []
        for request in sorted(requests, key=lambda one: (-one.created_s, one.request_id)):
            choices = [found[uid] for uid in self._requests[request] if uid in found]
            if newest and len(newest) + len(choices) > MAX_FOUND:
                break
            newest += sorted(choices, key=lambda one: one.trace.index)
        return Found(newest[:MAX_FOUND], is_all=len(newest) == len(found) <= MAX_FOUND)

    def add_id(self, request_id: str, to: str) -> None:
        """Let one more id find the traces that another one finds."""
        for kept in list(self.ids.any(to).values()):
            if request_id not in kept.ids:
                more = dataclasses.replace(kept, ids=(*kept.ids, request_id))
                self.ids.add(more)
                self.size_bytes += more.size_bytes - kept.size_bytes

    def remove(self, uid: int) -> bool:
        """Forget a trace; return whether it was there."""
        kept = self.ids.get(uid)
        if kept is None:
            return False
        self.ids.remove(kept)
        self.size_bytes -= kept.size_bytes
        request = self._requests[kept.request]
        del request[uid]
        if not request:
            del self._requests[kept.request]
        return True

    def was_evicted(self, request_id: str, owner: str | None = None) -> bool:
        """Whether a trace with this id was evicted, as far as that is still known.

        Args:
            request_id: Any id of the request.
            owner: Whose it has to be; None: anyone's.
        """
        key = hash(request_id)
        return key in self._evicted and owner in {None, self._evicted[key]}

    def note_lost(self, lost: Mapping[int, str | None]) -> None:
        """Remember ids, by `id_hash`, of requests that were never registered, and their owners."""
        self._lost.update(lost)
        while len(self._lost) > _REMEMBERED:
            self._lost.popitem(last=False)

    def was_lost(self, request_id: str, owner: str | None = None) -> bool:
        """Whether a request was never registered; as of `was_evicted`."""
        key = id_hash(request_id)
        return key in self._lost and owner in {None, self._lost[key]}

    def _evict(self, request: RequestKey) -> None:
        for uid in list(self._requests[request]):
            kept = self.ids.get(uid)
            if kept is not None:
                self.remove(uid)
                self.num_evicted += 1
                hashes = map(hash, (*kept.ids, request))
                self._evicted.update(dict.fromkeys(hashes, kept.owner))
        while len(self._evicted) > _REMEMBERED:
            self._evicted.popitem(last=False)
