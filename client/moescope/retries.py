"""Tries calls again that failed for a moment: on errors of the connection, and on HTTP 503."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

import httpx

from moescope import bodies, http
from moescope.errors import CollectorDownError, ConnectionFailedError

_T = TypeVar("_T")
_logger = logging.getLogger("moescope")
_FIRST_PAUSE_S = 0.5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A request to the server."""

    method: str
    path: str
    params: Mapping[str, Any] | None = None
    body: bytes | None = None
    """JSON."""
    one_request: bool = False
    """Whether the path names one request, of which 404 speaks."""
    is_idempotent: bool = True
    """Whether sending it twice does what sending it once does."""
    is_stream: bool = False
    """Whether the response is taken as it arrives, line by line."""

    def arguments(self) -> dict[str, Any]:
        """Return it as the arguments of ``request`` of httpx's clients."""
        headers = {} if self.body is None else {"Content-Type": "application/json"}
        return {
            "method": self.method,
            "url": self.path,
            "params": self.params,
            "content": self.body,
            "headers": headers | (bodies.NO_ENCODING if self.is_stream else {}),
            "extensions": {http.IS_STREAM: True} if self.is_stream else None,
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Pause:
    """Time to wait before the next attempt."""

    seconds: float


Call = Generator[Query | Pause, Any, _T]
"""Work with a server, without I/O: it yields each query, is sent the query's response, or is thrown
the `ConnectionFailedError` in its place, and returns what it found. It yields pauses too."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often, and how long, a query is tried again."""

    count: int
    """Attempts after the first one, at most."""
    within_s: float = 30.0
    """Seconds from the first attempt in which the last one begins."""
    clock: Callable[[], float] = time.monotonic

    def send(self, query: Query) -> Call[httpx.Response]:
        """Send a query until it succeeds, fails for good, or was tried often or long enough.

        The server says how long to wait with ``Retry-After``; else pauses double, from half a
        second on.

        Returns:
            A response with the status 200.

        Raises:
            ConnectionFailedError: The last attempt had no response.
            ServerError: Or the subclass that belongs to the status.
        """
        started_s, attempt = self.clock(), 1
        while True:
            try:
                response: httpx.Response = yield query
                http.check(response, one_request=query.one_request)
            except (ConnectionFailedError, CollectorDownError) as error:
                failure = error
            else:
                return response
            elapsed_s = self.clock() - started_s
            pause_s = _pause_s(failure, attempt) if query.is_idempotent else None
            if pause_s is None or attempt > self.count or elapsed_s + pause_s > self.within_s:
                if attempt > 1:
                    failure.args = (f"{failure}; tried {attempt} times in {elapsed_s:.1f} s",)
                raise failure
            attempt += 1
            _logger.warning(
                "%s; attempt %d of %d in %.1f s", failure, attempt, self.count + 1, pause_s
            )
            yield Pause(pause_s)


def _pause_s(failure: ConnectionFailedError | CollectorDownError, attempt: int) -> float | None:
    """Return how long to wait before the next attempt; None where it cannot help."""
    if isinstance(failure, ConnectionFailedError) and not failure.is_transient:
        return None
    if isinstance(failure, CollectorDownError) and failure.retry_after_s is not None:
        return failure.retry_after_s
    # Clients that failed together do not all come back together.
    return _FIRST_PAUSE_S * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.0)  # noqa: S311
