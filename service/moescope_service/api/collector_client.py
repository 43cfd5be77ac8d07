"""Asks the collector: from an API server's event loop, or from a script that has none."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

from moescope_service.api.journal import Journal
from moescope_service.errors import CollectorGoneError, RefusedError
from moescope_service.link import Link
from moescope_service.messages import Frames, RequestKey, pack, unpack

QUERY_TIMEOUT_S = 2.0
HELLO_TIMEOUT_S = 30.0
_HELLO_POLL_S = 0.05
_MAX_BYTES = 256 * 2**20
_CONSEQUENCE = (
    "serving goes on without routes and counts; where it ended (the server's log says so) it is "
    "started again, without the traces of requests that ended before"
)

_ENDED = f"the collector process has ended; {_CONSEQUENCE}"


@dataclasses.dataclass(slots=True)
class Message:
    """A message whose frames are made already."""

    frames: Frames
    kind: str
    internal_ids: Sequence[str] = ()
    """The sequences that it is about, if any."""
    request: RequestKey | None = None
    """Of ``register``: to which request its sequence belongs."""

    @property
    def size_bytes(self) -> int:
        """What it holds while it waits, in bytes."""
        return sum(memoryview(frame).nbytes for frame in self.frames)


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """What the collector answered."""

    values: dict[str, Any]
    arrays: Frames
    """The frames behind the control frame."""


class CollectorClient:
    """Tells the collector about requests and asks it questions, in order, over one link.

    For one thread.

    Args:
        address: Where the collector is bound.
    """

    def __init__(self, address: str) -> None:
        self._numbers = itertools.count()
        self._open: dict[int, concurrent.futures.Future[Reply]] = {}
        self._journal = Journal()
        self._link = Link(
            address,
            self._on_message,
            max_bytes=_MAX_BYTES,
            name="moescope-collector-client",
            encode=self._encode,
            introduce=self._journal.introduce,
            on_away=self._on_away,
        )

    def tell(self, kind: str, arrays: Frames = (), **values: Any) -> None:
        """Send a message that has no answer; never blocks."""
        about = values.get("internal_ids") or [values["internal_id"]]
        request = None
        if kind == "register":
            request = RequestKey(values["request_id"], values["created_s"])
        self._link.put(Message(pack(kind, arrays, **values), kind, about, request))

    async def ask(self, op: str, *, timeout_s: float = QUERY_TIMEOUT_S, **values: Any) -> Reply:
        """Ask a question.

        Args:
            op: What is asked; see `moescope_service.collector.queries`.
            timeout_s: How long to wait for the answer, in seconds.
            values: Its parameters.

        Raises:
            CollectorGoneError: No answer came in time, or the collector has ended.
        """
        number, future = self._send(op, values)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
        except TimeoutError:
            raise _gone(timeout_s) from None
        finally:
            del self._open[number]

    def ask_and_wait(self, op: str, *, timeout_s: float = QUERY_TIMEOUT_S, **values: Any) -> Reply:
        """Ask a question where no event loop runs; as `ask`.

        Raises:
            CollectorGoneError: No answer came in time, or the collector has ended.
        """
        number, future = self._send(op, values)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            raise _gone(timeout_s) from None
        finally:
            del self._open[number]

    def wait_for_hello(self) -> dict[str, Any]:
        """Wait until every worker has said what it captures; return that, a `Hello`'s values.

        Raises:
            RefusedError: One did not in time, what they capture together is not what was asked for,
                or the collector does not answer.
        """
        deadline_s = time.monotonic() + HELLO_TIMEOUT_S
        while time.monotonic() < deadline_s:
            try:
                values = self.ask_and_wait("info").values
            except CollectorGoneError as error:
                raise RefusedError(str(error)) from None
            if values["refusal"] is not None:
                raise RefusedError(values["refusal"])
            if values["workers_complete"]:
                hello: dict[str, Any] = values["hello"]
                return hello
            time.sleep(_HELLO_POLL_S)
        raise RefusedError(
            f"not every worker reported its routers within {HELLO_TIMEOUT_S:g} s, so routes would "
            "be missing; is moescope installed where the workers run, and named in VLLM_PLUGINS?"
        )

    def close(self) -> None:
        """Send what waits, for at most a second, and end the link."""
        self._link.close()

    def _send(
        self, op: str, values: dict[str, Any]
    ) -> tuple[int, concurrent.futures.Future[Reply]]:
        if self._link.is_away:
            raise CollectorGoneError(_ENDED)
        number = next(self._numbers)
        frames = pack("query", number=number, op=op, **values)
        future = self._open[number] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # from here on only the answer settles it
        self._link.put(Message(frames, "query"))
        return number, future

    def _encode(self, messages: list[Message]) -> list[Frames]:
        for message in messages:  # sent or not: a new collector is told of it
            if message.request is not None:
                (internal_id,) = message.internal_ids
                self._journal.register(internal_id, message.request, message.frames)
            else:
                self._journal.note(message.kind, message.internal_ids, message.frames)
        return [message.frames for message in messages]

    def _on_message(self, frames: Frames) -> None:
        kind, values = unpack(frames)
        if kind == "reply":
            future = self._open.get(values.pop("number"))
            if future is not None and not future.done():
                future.set_result(Reply(values, frames[1:]))
        elif kind == "forget":
            self._journal.forget(values["internal_ids"])

    def _on_away(self) -> None:
        for future in list(self._open.values()):
            if not future.done():
                future.set_exception(CollectorGoneError(_ENDED))


def _gone(timeout_s: float) -> CollectorGoneError:
    return CollectorGoneError(
        f"the collector process has not answered within {timeout_s:g} s; {_CONSEQUENCE}"
    )
