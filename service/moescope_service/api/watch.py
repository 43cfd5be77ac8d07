"""``/experts/stream``: the selections of each second, for everyone who watches.

One task asks the collector once a second while anybody watches, and makes one event for all of
them. Each viewer gets the newest event once it has taken the one before: a slow one skips some.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from typing import Annotated

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import StreamingResponse
from isal import isal_zlib
from starlette.concurrency import run_in_threadpool

from moescope_service.api.dependencies import CollectorDep, told
from moescope_service.api.endpoint import MoescopeRoute
from moescope_service.api.streaming import EVENTS_TYPE, Readers, Streamed, places, until_error
from moescope_service.errors import CollectorGoneError
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.histogram import PHASES
from moescope_service.queries import ExpertsQuery, ExpertsReply

EVENT_S = 1.0
"""How often there is an event."""
MAX_VIEWERS = 64
"""Of one API server."""
_ZLIB_LEVEL = 1
"""ISA-L's: 94 layers x 512 experts x 2 phases take 1.2 ms and 190 kB at 2,000 tokens a second of
top-8; as JSON they are 300 kB."""

router = APIRouter(route_class=MoescopeRoute, tags=["moescope"])


class Watch:
    """Makes the events while anybody watches. For the app's event loop."""

    def __init__(self) -> None:
        self.viewers = Readers(MAX_VIEWERS, "watch the experts")
        self._places = places()
        self._newest: bytes | None = None
        self._coming: asyncio.Future[bytes]
        self._task: asyncio.Task[None] | None = None

    async def events(self, collector: CollectorClient) -> AsyncIterator[bytes]:
        """Yield the newest event each time that one is taken and another one is there.

        Raises:
            CollectorGoneError: The collector does not answer.
            HTTPException: 503, no worker has said yet what it captures.
        """
        if self._task is None or self._task.done():
            self._coming = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._make(collector))
        place_s = next(self._places) * EVENT_S / 2
        taken = None
        while True:
            newest = self._newest
            if newest is None or newest is taken:
                newest = await asyncio.shield(self._coming)
                if taken is not None:
                    await asyncio.sleep(place_s)
            taken = self._newest or newest
            yield taken

    def leave(self) -> None:
        """Take in that a viewer is gone; nothing is made after the last one."""
        self.viewers.leave()
        if self.viewers.count == 0 and self._task is not None:
            self._task.cancel()
            self._task = self._newest = None

    async def _make(self, collector: CollectorClient) -> None:
        """Make events until the task is cancelled, or the collector does not answer."""
        loop = asyncio.get_running_loop()
        number, counted = 0, _Counted()
        try:
            while True:
                began_s = loop.time()
                reply = await collector.ask(ExpertsQuery())
                event = await run_in_threadpool(counted.event, number, reply)
                self._newest = event
                coming, self._coming = self._coming, loop.create_future()
                coming.set_result(event)
                number += 1
                await asyncio.sleep(began_s + EVENT_S - loop.time())
        except (CollectorGoneError, HTTPException) as error:
            self._newest = None
            self._coming.set_exception(error)
            self._coming.exception()  # whoever comes for it has it; perhaps nobody does


class _Counted:
    """What was counted when the last event was made."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._at_s = time.time()
        self._counts: npt.NDArray[np.int64]
        self._rows: npt.NDArray[np.int64]

    def event(self, number: int, reply: ExpertsReply) -> bytes:
        """Return the event of what was counted since the last one, as server-sent events are.

        After a reset, or of another collector, that is what was counted from there on; in the first
        event, nothing.

        Raises:
            HTTPException: 503, no worker has said yet what it captures.
        """
        spec = told(reply.spec)
        shape = (len(PHASES), len(spec.layers), spec.num_experts)
        counts = np.frombuffer(reply.arrays[0], np.int64).reshape(shape)
        rows, at_s = np.array(reply.rows), time.time()
        is_first, goes_on = self._since_s is None, self._since_s == reply.since_s
        new_counts = counts - self._counts if goes_on else counts * (not is_first)
        new_rows = rows - self._rows if goes_on else rows * (not is_first)
        packed = isal_zlib.compress(new_counts.astype("<u4").tobytes(), _ZLIB_LEVEL)
        values = {
            "model": spec.model,
            "from_s": at_s if is_first else self._at_s,
            "to_s": at_s,
            "phases": PHASES,
            "layers": spec.layers,
            "num_experts": spec.num_experts,
            "num_rows": new_rows.tolist(),
            "counts": base64.b64encode(packed).decode(),
        }
        self._since_s, self._at_s = reply.since_s, at_s
        self._counts, self._rows = counts, rows
        return b"id: %d\ndata: %s\n\n" % (number, orjson.dumps(values))


def watch_of(request: Request) -> Watch:
    """Return what makes the app's events."""
    watch: Watch = request.app.state.moescope_watch
    return watch


@router.get(
    "/experts/stream",
    summary="Selections of each second",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-sent events, one a second: JSON whose ``counts`` are base64 of "
            "zlib of little-endian uint32 ``[phases, layers, experts]``, the selections from "
            "``from_s`` to ``to_s``. The first event may have none. An event of the name ``error`` "
            "ends a stream that cannot go on.",
            "content": {EVENTS_TYPE: {}},
        },
        503: {"description": f"{MAX_VIEWERS} clients watch, or the collector does not answer."},
    },
)
async def experts_stream(
    request: Request, collector: CollectorDep, watch: Annotated[Watch, Depends(watch_of)]
) -> StreamingResponse:
    """Return how often each expert was selected, second by second, of all traffic.

    A client that does not take an event in time gets the newest one afterwards: ``from_s`` is then
    later than the ``to_s`` before.
    """
    watch.viewers.enter()
    try:
        events = watch.events(collector)
        first = await anext(events)
    except BaseException:
        watch.leave()
        raise
    told_events = until_error(request, first, events)
    return Streamed(told_events, EVENTS_TYPE, on_end=watch.leave)
