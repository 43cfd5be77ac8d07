"""``/routes?follow=true``: sequences as they end, for everyone who follows.

One task asks the collector while anybody follows. What ended waits for each follower until it is
taken; of one that is slow only so many wait, and it is told how many were left out.
"""

from __future__ import annotations

import asyncio
import collections
import math
from collections.abc import AsyncIterator

import orjson
from fastapi import Request

from moescope_service.api.streaming import EVENTS_TYPE, Readers, Streamed, places, until_error
from moescope_service.errors import CollectorGoneError
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.queries import EndedQuery, EndedReply

POLL_S = 0.5
"""How often the collector is asked."""
QUIET_S = 5.0
"""After so long without an end there is an event that has none: clients and proxies end
connections that are silent."""
MAX_FOLLOWERS = 64
"""Of one API server."""
MAX_WAITING = 1024
"""Sequences that wait for one follower: about 400 kB."""


class Follower:
    """What waits for one client. For the app's event loop.

    Args:
        owner: Whose sequences it may see; None: everyone's.
        place_s: How long it is held back behind those that are told at the same moment.
    """

    def __init__(self, owner: str | None, place_s: float) -> None:
        self.owner = owner
        self._place_s = place_s
        self._waiting: collections.deque[tuple[bytes, int]] = collections.deque()
        self._num_waiting = self._num_skipped = 0
        self._others_skipped = False
        self._error: CollectorGoneError | None = None
        self._is_new = asyncio.Event()
        self._told_s = -math.inf

    def tell(self, event: bytes, num_sequences: int, num_skipped: int) -> None:
        """Let an event wait, unless it has none and the client heard something lately.

        Of an owner's sequences it is not known how many were skipped, only of everyone's.
        Once something is left out, everything is until the client has taken what waits: so it hears
        of the gap where it is.
        """
        self._is_new.set()
        now_s = asyncio.get_running_loop().time()
        if not num_sequences + num_skipped and now_s < self._told_s + QUIET_S:
            return
        self._told_s = now_s
        if self.owner is None:
            self._num_skipped += num_skipped
        else:
            self._others_skipped |= num_skipped > 0
        if self._has_gap or self._num_waiting + num_sequences > MAX_WAITING:
            self._num_skipped += num_sequences
        else:
            self._waiting.append((event, num_sequences))
            self._num_waiting += num_sequences

    @property
    def _has_gap(self) -> bool:
        return self._others_skipped or self._num_skipped > 0

    def end(self, error: CollectorGoneError) -> None:
        """Let the client have what waits, and then the error."""
        self._error = error
        self._is_new.set()

    async def events(self) -> AsyncIterator[bytes]:
        """Yield what waits, each time that the event before was taken; and nothing now and then.

        Raises:
            CollectorGoneError: The collector does not answer any more.
        """
        place_s = 0.0
        while True:
            await self._is_new.wait()
            await asyncio.sleep(place_s)
            place_s = self._place_s  # from the second event on
            self._is_new.clear()
            while self._waiting:
                event, num_sequences = self._waiting.popleft()
                self._num_waiting -= num_sequences
                yield event
            if self._has_gap:
                skipped = None if self._others_skipped else self._num_skipped
                self._num_skipped, self._others_skipped = 0, False
                yield b"event: skipped\ndata: %s\n\n" % orjson.dumps({"sequences": skipped})
            if self._error and not self._waiting:
                raise self._error
            yield b""  # so that it is noticed in time that the client left or the server stops


class Ended:
    """Asks what ended while anybody follows. For the app's event loop."""

    def __init__(self) -> None:
        self.readers = Readers(MAX_FOLLOWERS, "follow what ends")
        self._places = places()
        self._followers: set[Follower] = set()
        self._task: asyncio.Task[None] | None = None

    def enter(self, collector: CollectorClient, owner: str | None) -> Follower:
        """Let one more follow; of what ends from its first event on, it hears.

        Raises:
            HTTPException: 503, as many follow as may.
        """
        self.readers.enter()
        follower = Follower(owner, next(self._places) * POLL_S / 2)
        self._followers.add(follower)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._ask(collector))
        return follower

    def leave(self, follower: Follower) -> None:
        """Take in that one is gone; nobody is asked after the last one."""
        self.readers.leave()
        self._followers.discard(follower)
        if not self._followers and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _ask(self, collector: CollectorClient) -> None:
        """Ask until the task is cancelled, or the collector does not answer."""
        query = EndedQuery()
        try:
            while True:
                reply = await collector.ask(query)
                self._tell(reply)
                query = EndedQuery(epoch=reply.epoch, number=reply.number)
                if not reply.has_more:
                    await asyncio.sleep(POLL_S)
        except CollectorGoneError as error:
            while self._followers:
                self._followers.pop().end(error)

    def _tell(self, reply: EndedReply) -> None:
        """Make one event for all that may see the same, and let it wait for each of them."""
        both = list(zip(reply.sequences, reply.owners, strict=True))
        for owner in {follower.owner for follower in self._followers}:
            seen = [one for one, its_owner in both if owner is None or owner == its_owner]
            event = b"data: %s\n\n" % orjson.dumps({"sequences": seen})
            for follower in self._followers:
                if follower.owner == owner:
                    follower.tell(event, len(seen), reply.skipped)


async def follow_ended(request: Request, collector: CollectorClient, owner: str | None) -> Streamed:
    """Return the stream of what ends from now on.

    Raises:
        HTTPException: 503, as many follow as may.
        CollectorGoneError: The collector does not answer.
    """
    ended: Ended = request.app.state.moescope_ended
    follower = ended.enter(collector, owner)
    try:
        events = follower.events()
        first = await anext(events)
    except BaseException:
        ended.leave(follower)
        raise
    stream = until_error(request, first, events)
    return Streamed(stream, EVENTS_TYPE, on_end=lambda: ended.leave(follower))
