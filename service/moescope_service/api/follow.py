"""``/routes/{request_id}/stream``: the rows of one choice, while its request runs.

The collector is asked again and again for what is new, each time after the client has taken the
line before: a reader that does not read costs one line, of `LINE_BYTES` of rows at most (1.5 MB of
text), and is cut off as any other that takes no byte.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from moescope import formats
from moescope.trace import RouteTrace
from moescope_service.api.auth import ReaderDep
from moescope_service.api.dependencies import (
    LAYERS,
    MAX_ROWS,
    START,
    WEIGHTS,
    StoreDep,
    layers_of,
    select,
    told,
    wait_for_ends,
)
from moescope_service.api.endpoint import MoescopeRoute
from moescope_service.api.found import RequestId, first_known, raise_unless_found
from moescope_service.api.responses import error_response
from moescope_service.api.streaming import Readers, Streamed
from moescope_service.errors import CollectorGoneError
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.ids import meant_ids, short_id
from moescope_service.queries import Found, RoutesQuery, RoutesReply, WaitQuery, Wanted

POLL_S = 0.05
"""How long after a line the collector is asked for the next one."""
QUIET_S = 5.0
"""After so long without a new row a line says that the request still runs: clients and proxies end
connections that are silent."""
LINE_BYTES = 256 * 2**10
"""Bytes of rows in a line at most, as the collector has them."""
MAX_FOLLOWERS = 64
"""Of one API server."""
MEDIA_TYPE = "application/x-ndjson"

router = APIRouter(route_class=MoescopeRoute, tags=["moescope"])


def _followers_of(request: Request) -> Readers:
    readers: Readers = request.app.state.moescope_followers
    return readers


FollowersDep = Annotated[Readers, Depends(_followers_of)]


@router.get(
    "/routes/{request_id:path}/stream",
    summary="The routes of a running request",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "One line of JSON after another, each as ``/routes/{request_id}`` "
            'answers: a trace with the rows from its ``start`` on. Lines with ``"status": '
            '"running"`` come while the request runs; the last line has neither that nor '
            '``next_start``. A line ``{"error": …}`` ends a stream that cannot go on.',
            "content": {MEDIA_TYPE: {}},
        },
        404: {"description": "No request with this id was recorded."},
        409: {"description": "The server keeps no routes (--routes-mode counts)."},
        410: {"description": "The trace made room for newer ones, or its registration was lost."},
        422: {"description": "A parameter is malformed; the message says what is allowed."},
        503: {"description": f"{MAX_FOLLOWERS} clients follow, or the collector does not answer."},
    },
)
async def follow(
    request: Request,
    request_id: RequestId,
    collector: StoreDep,
    followers: FollowersDep,
    owner: ReaderDep,
    index: Annotated[int, Query(ge=0, description="Which choice of the response.")] = 0,
    start: Annotated[int, Query(ge=0, le=MAX_ROWS, description=START)] = 0,
    layers: Annotated[str | None, Query(description=LAYERS)] = None,
    weights: Annotated[bool, Query(description=WEIGHTS)] = True,
) -> StreamingResponse:
    """Return the rows of one choice as they are computed, and what its trace says at its end.

    Of an id that several requests had, the newest one is followed. An id that itself ends in
    ``/stream`` is found by ``/routes/batch``.
    """
    followers.enter()
    try:
        lines = _Lines(request, collector, owner, index, layers, weights)
        await lines.begin(request_id, start)
    except BaseException:
        followers.leave()
        raise
    return Streamed(lines.lines(), MEDIA_TYPE, on_end=followers.leave)


class _Lines:
    """Follows one sequence for one client.

    Args:
        request: The client's.
        collector: Is asked.
        owner: As of `RoutesQuery`.
        index: Which choice is followed.
        layers: Which layers a line has, as text; None: all.
        weights: Whether it has the weights.
    """

    def __init__(
        self,
        request: Request,
        collector: CollectorClient,
        owner: str | None,
        index: int,
        layers: str | None,
        weights: bool,
    ) -> None:
        self._request, self._collector = request, collector
        self._owner, self._index = owner, index
        self._layers, self._weights = layers_of(layers), weights
        self._line = b""
        self._is_over = False

    async def begin(self, request_id: str, start: int) -> None:
        """Find the sequence, and make the first line.

        Raises:
            HTTPException: There is none to be followed.
            CollectorGoneError: The collector does not answer.
        """
        meant = meant_ids(request_id)
        wanted = [Wanted(request_id=short_id(one), start=start) for one in meant]
        reply = await self._ask(wanted)
        if all(found.status == "unknown" for found in reply.found):  # another server's news
            ids = [one.request_id for one in wanted]
            wait = WaitQuery(request_ids=ids, owner=self._owner)
            await wait_for_ends(self._request, self._collector, wait)
            reply = await self._ask(wanted)
        self._found_id, found = first_known(meant, reply)
        raise_unless_found(found, self._found_id, self._index)
        told(reply.spec)
        (trace,) = traces = reply.traces()
        self._key = trace.key
        self._line = await self._take(found, traces)

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the lines, and nothing each time that nothing is new; asks when one is taken."""
        yield self._line
        try:
            while not self._is_over:
                yield await self._next()
        except CollectorGoneError as error:
            yield await self._error(HTTPException(503, str(error)))
        except HTTPException as error:
            yield await self._error(error)

    async def _next(self) -> bytes:
        """Return the next line, or nothing where nothing is new."""
        if not self._has_more:
            await asyncio.sleep(POLL_S)
        wanted = Wanted(request_id=self._key[0], start=self._start, uid=self._uid)
        reply = await self._ask([wanted])
        (found,) = reply.found
        if found.status == "unknown":
            raise self._gone()
        raise_unless_found(found, self._found_id, self._index)
        if not found.traces and time.monotonic() < self._told_s + QUIET_S:
            return b""
        return await self._take(found, reply.traces())

    async def _ask(self, wanted: list[Wanted]) -> RoutesReply:
        return await self._collector.ask(
            RoutesQuery(
                wanted=wanted,
                index=self._index,
                follows=True,
                max_bytes=LINE_BYTES,
                owner=self._owner,
            )
        )

    async def _take(self, found: Found, traces: list[RouteTrace]) -> bytes:
        """Return a line of what was found, and note where the next one starts."""
        for trace in traces:
            if trace.key != self._key:  # of another collector, which numbers sequences anew
                raise self._gone()
            self._start = trace.start + trace.num_rows
        self._uid, self._has_more = found.uid, found.next_start is not None
        is_running = found.status == "running"
        self._is_over = not is_running and not self._has_more
        selected = select(traces, self._layers, self._weights)
        marks: dict[str, Any] = {"running": is_running, "next_start": found.next_start}
        self._told_s = time.monotonic()
        return await run_in_threadpool(_line, self._found_id, selected, marks)

    def _gone(self) -> HTTPException:
        return HTTPException(
            404,
            f"{self._found_id!r} cannot be followed any more: it was deleted, or the collector "
            f"process was started again; go on with start={self._start}",
        )

    async def _error(self, error: HTTPException) -> bytes:
        return bytes((await error_response(self._request, error)).body) + b"\n"


def _line(request_id: str, traces: list[RouteTrace], marks: dict[str, Any]) -> bytes:
    return formats.dump_json(request_id, traces, **marks) + b"\n"
