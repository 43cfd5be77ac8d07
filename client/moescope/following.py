"""Reads the lines in which a server tells of a running request, as they arrive."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator

import httpx

from moescope import bodies, formats, http
from moescope.errors import ConnectionFailedError, FormatError
from moescope.failures import transport_errors
from moescope.received import MALFORMED, shown
from moescope.trace import RouteTrace


def follow(
    response: httpx.Response, start: int, max_bytes: int, timeout_s: float
) -> Iterator[RouteTrace]:
    """Yield the pages in the lines of a response, and close it.

    Args:
        response: The response, of which nothing is read yet.
        start: The first row that is wanted.
        max_bytes: Bytes that a line may have.
        timeout_s: As of `bodies.Body`, of each line.

    Raises:
        MoescopeError: The stream ends early, or is none of one trace.
    """
    pages = _Pages(start, max_bytes)
    lines = bodies.lines(response, max_bytes, timeout_s)
    with contextlib.closing(lines), transport_errors(str(response.request.url)):
        for line in lines:
            yield from pages.take(line)
            if pages.are_all:
                return
    raise pages.cut_off(response)


async def afollow(
    response: httpx.Response, start: int, max_bytes: int, timeout_s: float
) -> AsyncGenerator[RouteTrace]:
    """Do what `follow` does, of an asynchronous response.

    Raises:
        MoescopeError: See `follow`.
    """
    pages = _Pages(start, max_bytes)
    lines = bodies.alines(response, max_bytes, timeout_s)
    async with contextlib.aclosing(lines):
        with transport_errors(str(response.request.url)):
            async for line in lines:
                for page in pages.take(line):
                    yield page
                if pages.are_all:
                    return
    raise pages.cut_off(response)


class _Pages:
    """The pages of one trace, each beginning where the one before it ends."""

    def __init__(self, start: int, max_bytes: int) -> None:
        self._end, self._max_bytes = start, max_bytes
        self._key: tuple[str, float, int] | None = None
        self.are_all = False
        """Whether the last page is here."""

    def take(self, line: httpx.Response) -> list[RouteTrace]:
        """Return the page in a line, if it has one.

        Raises:
            ServerError: It says that the stream cannot go on.
            FormatError: It is no page, or not the next one of this trace.
        """
        values = http.json_object(line)
        http.check_line(values)
        try:
            pages = [formats.from_dict(one, self._max_bytes) for one in values["traces"]]
        except MALFORMED as error:
            raise FormatError(f"not a line of a stream of traces: {shown(error)}") from error
        self.are_all = "status" not in values and "next_start" not in values
        for page in pages:
            self._key = self._key or page.key
            if page.key != self._key or page.start != self._end:
                raise FormatError(
                    f"expected a page of {shown(self._key)} from row {self._end} on, got one of "
                    f"{shown(page.key)} from row {page.start} on"
                )
            self._end += page.num_rows
        return pages

    def cut_off(self, response: httpx.Response) -> ConnectionFailedError:
        """Return the error that says that the last page never came."""
        url = shown(str(response.request.url))
        return ConnectionFailedError(
            f"{url} ended before the trace did: go on with start={self._end}", is_transient=True
        )
