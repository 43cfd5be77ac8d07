"""Makes large responses: few at a time, each once however many ask, bounded in bytes and time.

A response is a page of rows. It is made in a thread, and its bytes count against a budget from
before the collector is asked until the last client has taken them; a client that takes none for
`SEND_TIMEOUT_S` is cut off. Where the budget is used up, requests wait for a while and are then
answered 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import HTTPException, Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

logger = logging.getLogger("moescope")

MAX_BYTES = 256 * 2**20
"""Of all responses that are being made or sent."""
MAX_QUEUED = 256
"""Requests that may wait for their share of it."""
QUEUE_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 30.0
NUM_ENCODERS = 2
_PIECE_BYTES = 256 * 2**10

T = TypeVar("T")


def busy(message: str) -> HTTPException:
    """Return the error that tells a client to come back."""
    return HTTPException(503, f"{message}: try again in a second", {"Retry-After": "1"})


class Budget:
    """Bytes that may be in use at a time; who comes first is served first.

    Args:
        max_bytes: The bytes; one that wants more gets all of them.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._queue: dict[asyncio.Future[None], int] = {}
        self.used_bytes = 0
        """Bytes in use."""

    @property
    def num_queued(self) -> int:
        """How many wait for theirs."""
        return len(self._queue)

    async def take(self, size_bytes: int) -> int:
        """Take bytes once they are free; return how many are to be given back.

        Raises:
            HTTPException: 503, they were not in time, or too many wait for theirs.
        """
        size_bytes = min(size_bytes, self._max_bytes)
        if not self._queue and self.used_bytes + size_bytes <= self._max_bytes:
            self.used_bytes += size_bytes
            return size_bytes
        if len(self._queue) >= MAX_QUEUED:
            raise busy("too many large responses are waited for")
        turn = asyncio.get_running_loop().create_future()
        self._queue[turn] = size_bytes
        try:  # `wait` leaves the turn as it is, whether time is up or the client leaves
            await asyncio.wait((turn,), timeout=QUEUE_TIMEOUT_S)
        except asyncio.CancelledError:
            self._leave(turn, size_bytes)
            raise
        if not turn.done():
            self._leave(turn, size_bytes)
            raise busy("other large responses are being sent")
        return size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Give bytes back, and let the next ones have theirs."""
        self.used_bytes -= size_bytes
        self._let_in()

    def _leave(self, turn: asyncio.Future[None], size_bytes: int) -> None:
        if turn.done():  # it came at the same moment
            self.give_back(size_bytes)
        else:
            del self._queue[turn]
            self._let_in()

    def _let_in(self) -> None:
        for turn, size_bytes in list(self._queue.items()):
            if self.used_bytes + size_bytes > self._max_bytes:
                break
            del self._queue[turn]
            self.used_bytes += size_bytes
            turn.set_result(None)


@dataclasses.dataclass(frozen=True, slots=True)
class MadeBody:
    """A response's body and what goes with it."""

    content: bytes
    media_type: str
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    status_code: int = 200


class _Shared:
    """A response that is being made or sent, for all clients that asked for it meanwhile.

    Args:
        budget: What its bytes count against.
        max_bytes: What making it takes at most.
        before: Those that are to end first, of the same key.
        make: Asks the collector and makes the body.
    """

    def __init__(
        self,
        budget: Budget,
        max_bytes: int,
        before: Sequence[_Shared],
        make: Callable[[Callable[[], bool]], Coroutine[Any, Any, MadeBody]],
    ) -> None:
        self._budget = budget
        self._held_bytes = 0
        self._users = 0
        self.is_open = True
        """Whether a client may join: the collector is not asked yet, so its reply will not be older
        than the request."""
        tasks = [one.task for one in before]
        self.task: asyncio.Task[MadeBody] = asyncio.create_task(self._make(max_bytes, tasks, make))
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _make(
        self,
        max_bytes: int,
        before: list[asyncio.Task[MadeBody]],
        make: Callable[[Callable[[], bool]], Coroutine[Any, Any, MadeBody]],
    ) -> MadeBody:
        if before:
            await asyncio.wait(before)
        self._held_bytes = await self._budget.take(max_bytes)
        self.is_open = False
        needed_bytes = 0
        try:
            body = await make(lambda: self._users > 0)
            needed_bytes = len(body.content)
        finally:  # what making it took is free again; its own bytes are not, until they are sent
            self._hold(needed_bytes if self._users else 0)
        return body

    async def body(self, request: Request) -> MadeBody:
        """Return the body, for one client more; `leave` says that it needs it no longer."""
        self._users += 1
        try:
            return await while_connected(request, asyncio.shield(self.task))
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Take in that a client is done; the last one frees the bytes.

        What the collector was asked for, or a thread makes, is held in memory until that ends, and
        so are its bytes.
        """
        self._users -= 1
        if self._users:
            return
        if self.task.done():
            self._hold(0)
        elif self.is_open:
            self.is_open = False
            self.task.cancel()

    def _hold(self, size_bytes: int) -> None:
        surplus_bytes, self._held_bytes = self._held_bytes - size_bytes, size_bytes
        self._budget.give_back(surplus_bytes)


class SharedResponses:
    """Makes each response once for all that ask for it meanwhile. For the app's event loop.

    Args:
        budget: Bounds the bytes.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget or Budget()
        self._making: dict[Hashable, list[_Shared]] = {}  # the newest last
        self._encoders = ThreadPoolExecutor(NUM_ENCODERS, thread_name_prefix="moescope-encoder")

    @property
    def num_making(self) -> int:
        """Keys of which a response is being made."""
        return len(self._making)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Return what a function gives, in one of the threads that make responses."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoders, function, *args)

    async def respond(
        self,
        request: Request,
        key: Hashable,
        *,
        max_bytes: int,
        ask: Callable[[], Awaitable[T]],
        make: Callable[[T], MadeBody],
    ) -> Response:
        """Return a response; requests with an equal key share it.

        One that comes after the collector was asked has the next one, which is made once that one
        is: it may be about a request that ended meanwhile.

        Args:
            request: Whose client waits.
            key: What the response depends on.
            max_bytes: What making it takes at most.
            ask: Asks the collector.
            make: Makes the body of its reply, in a thread.

        Raises:
            HTTPException: 503, too much is being sent already; or what ``ask`` and ``make`` raise.
        """

        async def ask_and_make(is_wanted: Callable[[], bool]) -> MadeBody:
            reply = await ask()
            if not is_wanted():
                raise ClientDisconnect
            return await self.in_thread(make, reply)

        making = self._making.setdefault(key, [])
        if making and making[-1].is_open:
            shared = making[-1]
        else:
            shared = _Shared(self.budget, max_bytes, making, ask_and_make)
            making.append(shared)
            shared.task.add_done_callback(functools.partial(self._forget, key, shared))
        body = await shared.body(request)
        return SentInPieces(body, shared.leave)

    def _forget(self, key: Hashable, shared: _Shared, task: asyncio.Task[MadeBody]) -> None:
        making = self._making[key]
        making.remove(shared)
        if not making:
            del self._making[key]


class SentInPieces(Response):
    """A body that is sent in pieces; a client that does not take them is cut off.

    Args:
        body: What to send.
        on_end: Called once it is sent, or will never be.
    """

    def __init__(self, body: MadeBody, on_end: Callable[[], None]) -> None:
        super().__init__(body.content, body.status_code, dict(body.headers), body.media_type)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; see the ASGI specification."""
        try:
            async with patient(send) as send_in_time:
                start = {"status": self.status_code, "headers": self.raw_headers}
                await send_in_time({"type": "http.response.start", **start})
                for piece in pieces(bytes(self.body)):
                    await send_in_time(piece)
                await send_in_time({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._on_end()


@contextlib.asynccontextmanager
async def patient(send: Send) -> AsyncIterator[Send]:
    """Give a ``send`` whose client has `SEND_TIMEOUT_S` to take what was sent before.

    One that does not is cut off: the block ends there, without an error.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as patience:

            async def send_in_time(message: Message) -> None:
                patience.reschedule(loop.time() + SEND_TIMEOUT_S)
                await send(message)
                patience.reschedule(None)

            yield send_in_time
    except TimeoutError:
        logger.warning("cut off a client that took no byte of a response for %g s", SEND_TIMEOUT_S)


def pieces(content: bytes) -> Iterator[Message]:
    """Yield messages that send parts of a body, none of them too large."""
    view = memoryview(content)
    for first in range(0, len(view), _PIECE_BYTES):
        piece = bytes(view[first : first + _PIECE_BYTES])
        yield {"type": "http.response.body", "body": piece, "more_body": True}


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return what some work gives, unless the client leaves before.

    Raises:
        ClientDisconnect: It has left; the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()


async def disconnect(request: Request) -> None:
    """Wait until the client of a request has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
