"""Connections to the server under test, and the kinds of their failures."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import httpx

from moescope import addresses, bodies, http
from moescope.addresses import Verify
from moescope.bench.stream import MalformedStreamError, StreamError
from moescope.errors import ConnectionFailedError
from moescope.failures import ended_early, transport_errors
from moescope.received import MAX_BYTES


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server under test."""

    base_url: str
    """Its address, with or without ``/v1``."""
    api_key: str | None = None
    timeout_s: float = 600.0
    """Seconds that one request may take."""
    verify: Verify = True
    """How its certificate is verified."""


class HTTPStatusError(Exception):
    """The server responded with another status than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status


FAILURES = (
    HTTPStatusError,
    StreamError,
    ConnectionFailedError,
    TimeoutError,
    httpx.RequestError,
)
"""The exceptions of a request that fails."""

_KINDS = (
    (ConnectionFailedError, "malformed"),
    (TimeoutError, "timeout"),
    (httpx.TimeoutException, "timeout"),
    (httpx.ConnectError, "connect"),
    (httpx.NetworkError, "reset"),
)


def kind_of(failure: Exception) -> str:
    """Return the kind that a failure is counted as; see `MeasuredRequest.error_kind`."""
    if isinstance(failure, HTTPStatusError):
        return f"http_{failure.status}"
    if isinstance(failure, StreamError):
        return failure.kind
    if isinstance(failure, httpx.RemoteProtocolError):
        return "reset" if ended_early(failure) else "malformed"
    return next((name for kind, name in _KINDS if isinstance(failure, kind)), "transport")


class Connections:
    """Connections to one server, the last one used first; one httpx transport each.

    httpx's own pool looks at every connection for every request: with 64 in flight a core then
    sends 220 requests a second in place of 820. Proxies of the environment are not used.
    """

    def __init__(self, target: Target, path: str) -> None:
        with transport_errors(target.base_url):
            self._url = httpx.URL(addresses.base_url(target.base_url) + path)
            self._headers = httpx.Headers(
                {
                    "Host": self._url.netloc.decode(),
                    "Content-Type": "application/json",
                    "Accept": "text/event-stream",
                    **http.headers(target.api_key),
                }
            )
        self._timeout_s = target.timeout_s
        self._tls = addresses.tls_context(self._url, target.verify)
        self._idle: list[httpx.AsyncHTTPTransport] = []

    @contextlib.asynccontextmanager
    async def stream(self, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """Send a request; gives the parts of the response's body as they arrive.

        Raises:
            HTTPStatusError: The status is not 200.
            ConnectionFailedError: It is not, and the body cannot be decompressed.
            TimeoutError: The request took too long.
            httpx.TransportError: There is no connection, or it failed.
        """
        request = httpx.Request("POST", self._url, headers=self._headers, content=body)
        transport = self._idle.pop() if self._idle else self._new()
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await transport.handle_async_request(request)
                try:
                    if response.status_code != 200:
                        response.request = request
                        whole = await bodies.aread(response, MAX_BYTES, self._timeout_s)
                        message = http.error_message(whole)
                        raise HTTPStatusError(response.status_code, message)
                    yield _bounded(response.aiter_raw())
                finally:
                    await response.aclose()
        finally:
            self._idle.append(transport)

    async def warm_up(self) -> None:
        """Send one request to a socket of our own.

        httpx imports its backend with the first request: 40 ms that would be the first TTFT.
        """

        async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            writer.close()

        transport = self._new()
        async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            request = httpx.Request("GET", f"http://127.0.0.1:{port}/")
            response = await transport.handle_async_request(request)
            await response.aread()
            await response.aclose()
        await transport.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        for transport in self._idle:
            await transport.aclose()

    def _new(self) -> httpx.AsyncHTTPTransport:
        return httpx.AsyncHTTPTransport(verify=self._tls, limits=httpx.Limits(max_connections=1))


async def _bounded(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    num_bytes = 0
    async for part in parts:
        num_bytes += len(part)
        if num_bytes > MAX_BYTES:
            raise MalformedStreamError(f"the response has more than {MAX_BYTES:,} bytes")
        yield part
