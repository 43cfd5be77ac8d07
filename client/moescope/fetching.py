"""Fetches the routes of requests as they are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from moescope.errors import MoescopeError
from moescope.log_draft import LogDraft
from moescope.trace import RouteTrace
from moescope.traces_draft import TracesDraft

Draft = LogDraft | TracesDraft
"""What routes are collected in: for a route log, or for another format."""
Fetch = Callable[[str], Awaitable[list[RouteTrace]]]
"""Fetches the traces of a request by its id."""
MAX_CONCURRENCY = 8
"""Requests whose routes are fetched at a time."""


class RoutesFetcher:
    """Fetches the routes of several requests at a time into the draft of a file.

    Args:
        fetch: Fetches those of one.
        draft: Where to.
        max_concurrency: How many at a time; the next one waits.

    Attributes:
        draft: The draft.
        on_fetched: Called after each request, whether it has routes or not.
        num_fetched: How many requests' routes were fetched.
    """

    def __init__(self, fetch: Fetch, draft: Draft, max_concurrency: int = MAX_CONCURRENCY) -> None:
        self.on_fetched: Callable[[], object] = lambda: None
        self.num_fetched = 0
        self.draft: Any = draft  # which takes what it prepared itself
        self._fetch = fetch
        self._free = asyncio.Semaphore(max_concurrency)
        self._failed: dict[str, str] = {}

    def missing(self, request_ids: Iterable[str]) -> dict[str, str]:
        """Return which of some requests have no routes here, and why."""
        return {
            request_id: self._failed.get(request_id, "they were not fetched")
            for request_id in request_ids
            if request_id not in self.draft
        }

    async def start(self, group: asyncio.TaskGroup, request_id: str) -> None:
        """Begin to fetch the routes of a request, once there is room for it.

        Whoever waits for this before the next prompt is sent is not answered faster than routes are
        fetched: the server has to keep those of few requests.
        """
        await self._free.acquire()
        task = group.create_task(self._one(request_id))
        task.add_done_callback(lambda _: self._free.release())

    async def all(self, request_ids: Iterable[str]) -> None:
        """Fetch the routes of requests, of those that have none here."""
        async with asyncio.TaskGroup() as group:
            for request_id in self.missing(request_ids):
                await self.start(group, request_id)

    async def _one(self, request_id: str) -> None:
        try:
            traces = await self._fetch(request_id)
            # In a thread, since long traces would hold up the requests in flight, which are timed.
            prepared = await asyncio.to_thread(self.draft.prepared, request_id, traces)
            self.draft.add(request_id, prepared)
            self.num_fetched += 1
        except (MoescopeError, OSError) as error:
            self._failed[request_id] = str(error)
        self.on_fetched()
