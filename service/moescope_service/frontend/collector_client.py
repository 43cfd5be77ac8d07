"""Asks the collector: from an API server's event loop, or from a script that has none."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import itertools
import math
import secrets
import time
from typing import Any, TypeVar, cast

from moescope_service.addresses import Address
from moescope_service.errors import CollectorGoneError, RefusedError
from moescope_service.frontend.journal import Journal
from moescope_service.frontend.outbox import Outbox
from moescope_service.link import Link
from moescope_service.messages import CaptureSpec, Frames, RequestKey, pack, unpack
from moescope_service.queries import InfoQuery, Query, Reply, pack_cancel, pack_query, unpack_reply

QUERY_TIMEOUT_S = 2.0
WORKERS_TIMEOUT_S = 30.0
UP_S = 1.0
"""How long ago the collector may have answered something to be up."""
_WORKERS_POLL_S = 0.05
_CONSEQUENCE = (
    "serving goes on without routes and counts; where it ended (the server's log says so) it is "
    "started again, without the traces of requests that ended before"
)
_OF_ARCHIVE = "serving goes on, and what is kept in memory can still be fetched"

_ENDED = "has ended, or the link to its node is broken"
_FULL = "takes no queries, and too many wait already"

R = TypeVar("R", bound=Reply)


class CollectorClient:
    """Tells the collector about requests and sends it queries over one link.

    For one thread.

    Args:
        address: Where the collector is bound.
        is_archive: Whether it is the archive's process in its place.
    """

    def __init__(self, address: Address | str, *, is_archive: bool = False) -> None:
        self._name = "archive" if is_archive else "collector"
        self._consequence = _OF_ARCHIVE if is_archive else _CONSEQUENCE
        self._numbers = itertools.count()
        self._open: dict[int, _OpenQuery] = {}
        self._heard_s = -math.inf
        may_break = isinstance(address, Address) and address.key is not None
        self._outbox = Outbox(Journal(name=secrets.token_hex(8)) if may_break else None)
        self._link = Link(
            address,
            self._on_message,
            name="moescope-collector-client",
            source=self._outbox,
            introduce=self._outbox.introduce,
            on_away=self._on_away,
        )

    @property
    def is_up(self) -> bool:
        """Whether the collector has answered something within the last second."""
        return not self._link.is_away and time.monotonic() - self._heard_s < UP_S

    def tell(self, kind: str, arrays: Frames = (), **values: Any) -> None:
        """Send a message that has no answer; never blocks.

        Args:
            kind: ``register``, ``finish`` or ``alias``.
            arrays: Of ``register`` the prompt, of ``finish`` the output.
            values: The message's values.
        """
        frames = pack(kind, arrays, **values)
        match kind:
            case "register":
                request = RequestKey(values["request_id"], values["created_s"])
                self._outbox.register(values["internal_id"], request, frames)
            case "finish":
                self._outbox.finish(values["internal_id"], frames)
            case "alias":
                self._outbox.alias(values["internal_ids"], values["alias"], frames)
            case _:
                raise ValueError(f"invalid kind {kind!r}: expected register, finish or alias")
        self._link.wake()

    async def ask(self, query: Query[R], *, timeout_s: float = QUERY_TIMEOUT_S) -> R:
        """Send a query and wait for its reply.

        Args:
            query: What is asked.
            timeout_s: How long to wait, in seconds.

        Raises:
            CollectorGoneError: No reply came in time, too many queries wait already, or the
                collector has ended.
        """
        number, future = self._send(query)
        try:
            return cast("R", await asyncio.wait_for(asyncio.wrap_future(future), timeout_s))
        except TimeoutError:
            raise self._gone(f"has not answered within {timeout_s:g} s") from None
        finally:
            self._close(number)

    async def ask_first(self, query: Query[R], *, timeout_s: float) -> R:
        """Send a query before all others, and wait for its reply.

        Args:
            query: What is asked.
            timeout_s: How long to wait, in seconds; as long as the collector answers others, it is
                waited for up to `QUERY_TIMEOUT_S`.

        Raises:
            CollectorGoneError: As of `ask`.
        """
        number, future = self._send(query, is_urgent=True)
        end_s = time.monotonic() + QUERY_TIMEOUT_S
        try:
            reply = asyncio.wrap_future(future)
            while not (await asyncio.wait({reply}, timeout=timeout_s))[0]:
                if not self.is_up or time.monotonic() > end_s:
                    raise self._gone(f"has not answered within {timeout_s:g} s")
            return cast("R", await reply)
        finally:
            self._close(number)

    def ask_and_wait(self, query: Query[R], *, timeout_s: float = QUERY_TIMEOUT_S) -> R:
        """Send a query where no event loop runs; as `ask`.

        Raises:
            CollectorGoneError: No reply came in time, or the collector has ended.
        """
        number, future = self._send(query)
        try:
            return cast("R", future.result(timeout_s))
        except TimeoutError:
            raise self._gone(f"has not answered within {timeout_s:g} s") from None
        finally:
            self._close(number)

    def wait_for_workers(self) -> CaptureSpec:
        """Wait until every worker has said what it captures; return what they capture together.

        Raises:
            RefusedError: One did not in time, what they capture together is not what was asked for,
                or the collector does not answer.
        """
        deadline_s = time.monotonic() + WORKERS_TIMEOUT_S
        while time.monotonic() < deadline_s:
            try:
                info = self.ask_and_wait(InfoQuery()).info
            except CollectorGoneError as error:
                raise RefusedError(str(error)) from None
            if info.refusal is not None:
                raise RefusedError(info.refusal)
            if info.workers_complete and info.spec is not None:
                return info.spec
            time.sleep(_WORKERS_POLL_S)
        raise RefusedError(
            f"not every worker reported its routers within {WORKERS_TIMEOUT_S:g} s, so routes "
            "would be missing; is moescope installed where the workers run, and named in "
            "VLLM_PLUGINS?"
        )

    def close(self) -> None:
        """Send what waits, for at most a second, and end the link."""
        self._link.close()

    def _send(
        self, query: Query[Any], *, is_urgent: bool = False
    ) -> tuple[int, concurrent.futures.Future[Reply]]:
        if self._link.is_away:
            raise self._gone(_ENDED)
        number = next(self._numbers)
        frames = pack_query(number, query)
        future: concurrent.futures.Future[Reply] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # from here on only the reply settles it
        self._open[number] = _OpenQuery(query.reply, future)
        if not self._outbox.query(number, frames, is_urgent=is_urgent):
            del self._open[number]
            raise self._gone(_FULL)
        self._link.wake()
        return number, future

    def _close(self, number: int) -> None:
        """Take back a query that was not answered: the collector need not wait with it."""
        if not self._open.pop(number).future.done():
            self._outbox.withdraw(number, pack_cancel(number))
            self._link.wake()

    def _on_message(self, frames: Frames) -> None:
        self._heard_s = time.monotonic()
        kind, values = unpack(frames)
        if kind == "reply":
            query = self._open.get(values["number"])
            if query is not None and not query.future.done():
                query.future.set_result(unpack_reply(query.reply, values, frames))
        elif kind == "received":
            self._outbox.received(values["count"])
        elif kind == "forget":
            self._outbox.forget(values["internal_ids"])

    def _on_away(self) -> None:
        self._outbox.drop_queries()
        for query in list(self._open.values()):
            if not query.future.done():
                query.future.set_exception(self._gone(_ENDED))

    def _gone(self, what: str) -> CollectorGoneError:
        return CollectorGoneError(f"the {self._name} process {what}; {self._consequence}")


@dataclasses.dataclass(frozen=True, slots=True)
class _OpenQuery:
    """A query whose reply has yet to come."""

    reply: type[Reply]
    future: concurrent.futures.Future[Reply]
