"""Answers the queries of API servers, now or when what they wait for has happened."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from moescope_service.collector.ids import Identified
from moescope_service.collector.pages import Pages
from moescope_service.collector.replies import REPLIES
from moescope_service.collector.state import CollectorState
from moescope_service.collector.workers import Peer
from moescope_service.queries import (
    FINISHING_WAIT_S,
    DeleteQuery,
    DeleteReply,
    Query,
    Reply,
    RoutesQuery,
    SettleQuery,
    SettleReply,
    WaitQuery,
    WaitReply,
    pack_reply,
)

T = TypeVar("T")

OTHER_SERVER_WAIT_S = 0.1
"""How long a query waits for a request that has not been answered yet, or that nobody knows, where
there are several API servers: the news of it comes from another one than the query."""

MAX_WAITING = 1024
"""Queries that may wait at a time, of all API servers."""

MAX_WAITING_IDS = 65_536
"""Ids that they may wait for, all of them together."""

DELETED_AT_ONCE = 256
"""Traces that are deleted in one go, within 5 ms; then steps are taken in before the next ones."""

Place = tuple[Peer, int]
"""Who asked, and the number of the query."""


@dataclasses.dataclass(slots=True, eq=False)
class _Waiting:
    place: Place
    running: set[str] | None
    """Ids of a `WaitQuery` that still find running sequences; None of a `SettleQuery`."""
    owner: str | None
    deadline_s: float
    again: WaitQuery | None = None
    """Asked again at the deadline: until then nobody knew the requests."""


class Answers:
    """Answers queries: at once, when what they wait for has happened, or piece by piece.

    A piece takes a few milliseconds. The first one is done as the query comes, the others by
    `work`, in turns with those of other queries, and steps are taken in between two of them.

    Args:
        state: What is asked for.
    """

    def __init__(self, state: CollectorState) -> None:
        self._state = state
        self._waiting: dict[Place, _Waiting] = {}
        self._by_id: dict[str, dict[Place, None]] = {}  # who waits for an id
        self._num_waiting_ids = 0
        self._jobs: dict[Place, Iterator[Reply | None]] = {}  # whose turn is next comes first

    @property
    def num_waiting(self) -> int:
        """Queries that wait."""
        return len(self._waiting)

    def ask(self, peer: Peer, number: int, query: Query[Any]) -> None:
        """Answer a query now or later."""
        match query:
            case WaitQuery():
                self._wait(peer, number, query)
            case SettleQuery():
                if self._state.sequences.num_finishing:
                    deadline_s = self._state.clock() + query.wait_s
                    self._add(_Waiting((peer, number), None, None, deadline_s))
                else:
                    self._reply(peer, number, SettleReply(unsettled=0))
            case DeleteQuery():
                self._go_on((peer, number), self._delete(query))
            case RoutesQuery():
                self._go_on((peer, number), Pages(self._state, query).replies())
            case _:
                self._reply(peer, number, REPLIES[type(query)](self._state, query))

    def cancel(self, peer: Peer, number: int) -> None:
        """Forget a query that waits, or that is answered piece by piece."""
        self._remove((peer, number))
        self._jobs.pop((peer, number), None)

    def retry(self, ids: Iterable[str]) -> None:
        """Answer the queries that waited for requests whose sequences have all ended."""
        for request_id in ids:
            for place in list(self._by_id.get(request_id, ())):
                waiting = self._waiting[place]
                if not self._state.find(request_id, waiting.owner)[0]:
                    self._forget_id(waiting, request_id)
                    if not waiting.running:
                        self._end(place)
        if not self._state.sequences.num_finishing:
            for place, one in list(self._waiting.items()):
                if one.running is None:
                    self._end(place)

    def expire(self) -> None:
        """Answer the queries that have waited long enough."""
        now = self._state.clock()
        for waiting in [one for one in self._waiting.values() if one.deadline_s <= now]:
            if not self._waits_again(waiting, now):
                self._end(waiting.place)

    def _waits_again(self, waiting: _Waiting, now: float) -> bool:
        """Return whether a query waits on for requests that somebody has told of meanwhile."""
        query, waiting.again = waiting.again, None
        if query is None:
            return False
        ids = waiting.running or ()
        known = [one for one in ids if self._state.find(one, query.owner)[0]]
        waiting.deadline_s = now + max((self._wait_s(one, query) for one in known), default=0.0)
        return bool(known)

    def work(self) -> bool:
        """Go on with what is done piece by piece; return whether there is more of it."""
        if self._jobs:
            place = next(iter(self._jobs))
            self._go_on(place, self._jobs.pop(place))
        return bool(self._jobs)

    def _go_on(self, place: Place, job: Iterator[Reply | None]) -> None:
        """Do one piece; where it was not the last one, the others have their turn first."""
        reply = next(job)
        if reply is None:
            self._jobs[place] = job
        else:
            self._reply(*place, reply)

    def _delete(self, query: DeleteQuery) -> Iterator[Reply | None]:
        """Delete what an id finds now; None between two pieces, the reply after the last one."""
        state, deleted = self._state, 0
        found, kept = state.find(query.request_id, query.owner)
        others = sum(map(len, state.find(query.request_id))) - len(found) - len(kept)
        running, uids = list(found.values()), [*kept, *found]
        # All of them have the id of the response, or none of them has: see `find`.
        first = next(itertools.chain[Identified](found.values(), kept.values()), None)
        is_own = first is not None and first.request_id == query.request_id
        if state.archive is not None:  # the store may keep none, or not all, of what waits
            waiting = state.archive.delete(query.request_id, query.owner, own_only=is_own)
            deleted += len(waiting.difference(uids))
        for some in _pieces(running):
            ids = [one for sequence in some for one in sequence.ids]
            deleted += state.forget(some)
            self.retry(ids)
            yield None
        # Of those that ended between two pieces there are traces now.
        for these in _pieces(uids):
            deleted += sum(map(state.store.remove, these))
            if state.archive is not None:
                state.archive.forget(these)
            yield None
        yield DeleteReply(deleted=deleted, is_own=is_own, others=max(0, others))

    def _wait(self, peer: Peer, number: int, query: WaitQuery) -> None:
        waits = {one: self._wait_s(one, query) for one in query.request_ids}
        running = {request_id for request_id, wait_s in waits.items() if wait_s > 0}
        num_ids = self._num_waiting_ids + len(running)
        is_full = len(self._waiting) >= MAX_WAITING or num_ids > MAX_WAITING_IDS
        if not running or is_full:
            self._reply(peer, number, WaitReply(is_refused=bool(running)))
            return
        deadline_s = self._state.clock() + max(waits.values())
        are_unknown = not any(self._state.find(one, query.owner)[0] for one in running)
        again = query if are_unknown else None
        self._add(_Waiting((peer, number), running, query.owner, deadline_s, again))

    def _wait_s(self, request_id: str, query: WaitQuery) -> float:
        running, kept = self._state.find(request_id, query.owner)
        other_wait_s = OTHER_SERVER_WAIT_S if len(self._state.servers) > 1 else 0.0
        if not running:
            store = self._state.store
            is_over = (
                kept
                or store.was_evicted(request_id, query.owner)
                or store.was_lost(request_id, query.owner)
            )
            return 0.0 if is_over else other_wait_s
        if query.wait_s is not None:
            return query.wait_s
        if all(sequence.is_finishing for sequence in running.values()):
            return FINISHING_WAIT_S
        return other_wait_s

    def _add(self, waiting: _Waiting) -> None:
        self._remove(waiting.place)  # a number that is used twice is no query of ours
        self._waiting[waiting.place] = waiting
        for request_id in waiting.running or ():
            self._by_id.setdefault(request_id, {})[waiting.place] = None
            self._num_waiting_ids += 1

    def _remove(self, place: Place) -> _Waiting | None:
        waiting = self._waiting.pop(place, None)
        if waiting is not None:
            for request_id in list(waiting.running or ()):
                self._forget_id(waiting, request_id)
        return waiting

    def _forget_id(self, waiting: _Waiting, request_id: str) -> None:
        if waiting.running is not None:
            waiting.running.discard(request_id)
        self._num_waiting_ids -= 1
        places = self._by_id[request_id]
        del places[waiting.place]
        if not places:
            del self._by_id[request_id]

    def _end(self, place: Place) -> None:
        waiting = self._remove(place)
        if waiting is not None:
            unsettled = self._state.sequences.num_finishing
            is_wait = waiting.running is not None
            self._reply(*place, WaitReply() if is_wait else SettleReply(unsettled=unsettled))

    def _reply(self, peer: Peer, number: int, reply: Reply) -> None:
        self._state.outbox.append((peer, pack_reply(number, reply)))


def _pieces(items: list[T]) -> Iterator[list[T]]:
    for first in range(0, len(items), DELETED_AT_ONCE):
        yield items[first : first + DELETED_AT_ONCE]
