"""Sends a response that goes on: to few readers at a time, to each only what it takes in time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from moescope_service.api.responses import error_response
from moescope_service.api.sharing import busy, disconnect, patient, pieces
from moescope_service.errors import CollectorGoneError
from moescope_service.vllm_contract.compat import is_stopping

EVENTS_TYPE = "text/event-stream"
_GOLDEN = 0.618
"""Its multiples are far from each other."""


def places() -> Iterator[float]:
    """Yield for one client after another at which share of a while it gets what all get.

    To serve 16 in one go would hold up everyone else.
    """
    for number in itertools.count():
        yield number * _GOLDEN % 1


class Readers:
    """Counts the clients that read a stream. For the app's event loop.

    Args:
        most: How many there may be, of one API server.
        what: What they do, such as ``follow requests``.
    """

    def __init__(self, most: int, what: str) -> None:
        self._most, self._what = most, what
        self.count = 0

    def enter(self) -> None:
        """Let one more in.

        Raises:
            HTTPException: 503, there are as many as may be.
        """
        if self.count >= self._most:
            raise busy(f"{self._most} clients {self._what} already")
        self.count += 1

    def leave(self) -> None:
        """Take in that one is gone."""
        self.count -= 1


class Streamed(StreamingResponse):
    """Sends parts until they end, the client leaves or the server stops.

    A client that does not take them is cut off.

    Args:
        parts: What to send; the next one is asked for when the client has taken those before.
        media_type: Of the parts.
        on_end: Called when the client is gone.
    """

    def __init__(
        self, parts: AsyncIterator[bytes], media_type: str, on_end: Callable[[], None]
    ) -> None:
        self._parts, self._on_end = parts, on_end
        super().__init__(parts, media_type=media_type, headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them; see the ASGI specification."""
        gone = asyncio.create_task(disconnect(Request(scope, receive)))
        try:
            async with patient(send) as send_in_time:
                await self._send_all(scope["app"], send_in_time, gone)
        finally:
            gone.cancel()
            self._on_end()

    async def _send_all(self, app: FastAPI, send: Send, gone: asyncio.Task[None]) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        async for part in self._parts:
            if gone.done():
                return
            if is_stopping(app):
                break
            for piece in pieces(part):
                await send(piece)
            # The server waits with this one until the client has taken those before.
            await send({"type": "http.response.body", "body": b"", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_error(
    request: Request, first: bytes, events: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """Yield server-sent events, and as the last one why there are no more.

    Args:
        request: The client's.
        first: The first event, which was taken already.
        events: Those after it.
    """
    yield first
    try:
        async for event in events:
            yield event
    except CollectorGoneError as error:
        reason = HTTPException(503, str(error))
    except HTTPException as error:
        reason = error
    body = bytes((await error_response(request, reason)).body)
    yield b"event: error\ndata: %s\n\n" % body
