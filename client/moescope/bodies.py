"""Reads the body of a response within bounds: bytes, bytes once decompressed, and time."""

from __future__ import annotations

import functools
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Generator, Iterator

import httpx

from moescope.errors import ConnectionFailedError, ResponseTooLargeError
from moescope.received import MAX_BYTES, shown

ENCODING = {"Accept-Encoding": "gzip"}
"""The header of requests whose responses `Body` takes."""
NO_ENCODING = {"Accept-Encoding": "identity"}
"""That of requests whose responses `Lines` takes."""
ERROR_BYTES = 2**20
"""What is read of the body of an error: its words come first."""
_SLOW_BYTES = 64 * 2**10
_GZIP = 16 + zlib.MAX_WBITS


class Body:
    """The body of one response as it arrives.

    httpx decompresses whole parts, by every method that is installed: one part of 64 KiB becomes
    gigabytes.

    Args:
        response: The response, of which nothing is read yet.
        max_bytes: Bytes that it may have, as sent and decompressed. Of an error `ERROR_BYTES` are
            read, and the rest is left.
        timeout_s: Seconds in which the end must come, or 64 KiB for each of them that pass.
        clock: Seconds from a monotonic clock.

    Raises:
        ConnectionFailedError: It is compressed in another way than gzip.
        ResponseTooLargeError: It says that it is too large.
    """

    def __init__(
        self,
        response: httpx.Response,
        max_bytes: int = MAX_BYTES,
        timeout_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._response, self._max_bytes = response, max_bytes
        self._is_error = response.status_code != 200
        self._limit = min(max_bytes, ERROR_BYTES) if self._is_error else max_bytes
        self._timeout_s, self._clock, self._start_s = timeout_s, clock, clock()
        self._received, self._content = 0, bytearray()
        self._is_cut = False
        length = response.headers.get("Content-Length", "")[:20]  # more digits say as much
        if not self._is_error and length.isdecimal() and int(length) > max_bytes:
            raise self._too_large()
        self._gzip = zlib.decompressobj(_GZIP) if self._is_gzip() else None

    def add(self, part: bytes) -> bool:
        """Take the next part; return whether more is wanted.

        Raises:
            ConnectionFailedError: It comes too slowly, or is not gzip as its header says.
            ResponseTooLargeError: It is too large.
        """
        self._received += len(part)
        elapsed_s = self._clock() - self._start_s
        if elapsed_s > self._timeout_s * (1 + self._received // _SLOW_BYTES):
            raise ConnectionFailedError(
                f"no whole response from {self._where} in time: {self._received:,} bytes in "
                f"{elapsed_s:.0f} s"
            )
        room = self._limit - len(self._content)
        self._content += part[: room + 1] if self._gzip is None else self._plain(part, room + 1)
        if max(len(self._content), self._received) <= self._limit:
            return True
        if not self._is_error:
            raise self._too_large()
        self._is_cut = True
        del self._content[self._limit :]
        return False

    def response(self) -> httpx.Response:
        """Return the response with the body that was added, as UTF-8.

        Raises:
            ConnectionFailedError: The end of what is compressed is missing.
        """
        if self._gzip is not None and self._received and not self._gzip.eof and not self._is_cut:
            raise ConnectionFailedError(f"the response of {self._where} ends within its gzip")
        return _plain(self._response, bytes(self._content), self._max_bytes)

    def _is_gzip(self) -> bool:
        encoding: str = self._response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip"):
            raise ConnectionFailedError(
                f"the response of {self._where} has Content-Encoding {shown(encoding, 80)!r}: "
                "expected gzip or none"
            )
        return "gzip" in encoding

    def _plain(self, part: bytes, room: int) -> bytes:
        decoder = self._gzip
        if decoder is None or decoder.eof:
            return b""
        try:
            return decoder.decompress(part, room)
        except zlib.error as error:
            raise ConnectionFailedError(
                f"the response of {self._where} is no gzip: {error}"
            ) from error

    def _too_large(self) -> ResponseTooLargeError:
        return ResponseTooLargeError(
            f"the response of {self._where} has more than max_bytes={self._max_bytes:,} bytes: "
            "fetch less at a time, or raise max_bytes where the server is trusted"
        )

    @property
    def _where(self) -> str:
        return shown(str(self._response.request.url))


def read(response: httpx.Response, max_bytes: int, timeout_s: float) -> httpx.Response:
    """Read a response and close it; return it with its body, decompressed.

    Raises:
        MoescopeError: See `Body`.
    """
    try:
        if response.is_stream_consumed:  # a transport in place of the network read it
            return _whole(response, max_bytes)
        body = Body(response, max_bytes, timeout_s)
        for part in response.iter_raw():
            if not body.add(part):
                break
        return body.response()
    finally:
        response.close()


class Lines:
    """The lines of a response as they arrive, each within the bounds of a `Body`.

    Args:
        response: The response, of which nothing is read yet.
        max_bytes: Bytes that a line may have.
        timeout_s: Seconds in which the end of a line must come, as of `Body`.
        clock: Seconds from a monotonic clock.
    """

    def __init__(
        self,
        response: httpx.Response,
        max_bytes: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._begin = functools.partial(Body, response, max_bytes, timeout_s, clock)
        self._body = self._begin()

    def add(self, part: bytes) -> Iterator[httpx.Response]:
        """Take the next part; yield each line that it ends as a response of its own.

        Raises:
            MoescopeError: See `Body`.
        """
        *ends, rest = part.split(b"\n")
        for end in ends:
            self._body.add(end)
            yield self._body.response()
            self._body = self._begin()
        self._body.add(rest)


def lines(response: httpx.Response, max_bytes: int, timeout_s: float) -> Generator[httpx.Response]:
    """Yield the lines of a response, and close it.

    Raises:
        MoescopeError: See `Body`.
    """
    try:
        arriving = Lines(response, max_bytes, timeout_s)
        for part in response.iter_raw():
            yield from arriving.add(part)
    finally:
        response.close()


async def alines(
    response: httpx.Response, max_bytes: int, timeout_s: float
) -> AsyncGenerator[httpx.Response]:
    """Do what `lines` does, of an asynchronous response.

    Raises:
        MoescopeError: See `Body`.
    """
    try:
        arriving = Lines(response, max_bytes, timeout_s)
        async for part in response.aiter_raw():
            for line in arriving.add(part):
                yield line
    finally:
        await response.aclose()


async def aread(response: httpx.Response, max_bytes: int, timeout_s: float) -> httpx.Response:
    """Do what `read` does, of an asynchronous response.

    Raises:
        MoescopeError: See `Body`.
    """
    try:
        if response.is_stream_consumed:
            return _whole(response, max_bytes)
        body = Body(response, max_bytes, timeout_s)
        async for part in response.aiter_raw():
            if not body.add(part):
                break
        return body.response()
    finally:
        await response.aclose()


def _whole(response: httpx.Response, max_bytes: int) -> httpx.Response:
    headers = {**response.headers}
    headers.pop("content-encoding", None)
    plain = httpx.Response(
        response.status_code,
        headers=headers,
        stream=httpx.ByteStream(b""),
        request=response.request,
        extensions=response.extensions,
    )
    body = Body(plain, max_bytes)
    body.add(response.content)
    return body.response()


def _plain(response: httpx.Response, content: bytes, max_bytes: int) -> httpx.Response:
    """Return a response as it would have been without compression, its text UTF-8.

    A charset of the server's choice decompresses too: Python has one that is called ``zip``.
    """
    headers = httpx.Headers(response.headers)
    for name in ("Content-Encoding", "Content-Length", "Transfer-Encoding"):
        headers.pop(name, None)
    plain = httpx.Response(
        response.status_code,
        headers=headers,
        content=content,
        request=response.request,
        extensions={**response.extensions, "max_bytes": max_bytes},
    )
    plain.encoding = "utf-8"
    return plain
