"""Connections to the server under test, and what to call their failures."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
from collections.abc import AsyncIterator

import httpx

from moescope import _http
from moescope.bench.stream import MalformedStreamError, ServerStreamError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server that is asked."""

    base_url: str
    """Its address, without ``/v1``."""
    api_key: str | None = None
    timeout_s: float = 600.0
    """Seconds that one request may take."""


class HTTPStatusError(Exception):
    """The server answered with another status than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status


FAILURES = (
    HTTPStatusError,
    MalformedStreamError,
    ServerStreamError,
    TimeoutError,
    httpx.RequestError,
)
"""What can become of a request that is not answered as it should be."""

_KINDS = (
    (MalformedStreamError, "malformed"),
    (ServerStreamError, "server_error"),
    (httpx.DecodingError, "malformed"),
    (TimeoutError, "timeout"),
    (httpx.TimeoutException, "timeout"),
    (httpx.ConnectError, "connect"),
    (httpx.NetworkError, "reset"),
)
_GONE = ("disconnected", "closed")
"""Words of httpx's protocol errors about a connection that ended too early."""


def kind_of(failure: Exception) -> str:
    """Return what to count a failure as; see `Record.error_kind`."""
    if isinstance(failure, HTTPStatusError):
        return f"http_{failure.status}"
    if isinstance(failure, httpx.RemoteProtocolError):
        return "reset" if any(word in str(failure) for word in _GONE) else "malformed"
    return next((name for kind, name in _KINDS if isinstance(failure, kind)), "transport")


class Connections:
    """Connections to one server, the last one used first; one httpx transport each.

    httpx's own pool looks at every connection for every request: with 64 in flight a core then
    sends 220 requests a second in place of 820. Proxies of the environment are not used.
    """

    def __init__(self, target: Target, path: str) -> None:
        with _http.transport_errors(target.base_url):
            self._url = httpx.URL(target.base_url.rstrip("/") + path)
            self._headers = httpx.Headers(
                {
                    "Host": self._url.netloc.decode(),
                    "Content-Type": "application/json",
                    "Accept": "text/event-stream",
                    **_http.headers(target.api_key),
                }
            )
        self._timeout_s = target.timeout_s
        secure = self._url.scheme == "https"  # reading the certificates takes tens of milliseconds
        self._tls = (
            ssl.create_default_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        )
        self._idle: list[httpx.AsyncHTTPTransport] = []

    @contextlib.asynccontextmanager
    async def stream(self, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """Send a request; gives the parts of the answer's body as they come.

        Raises:
            HTTPStatusError: The answer is not 200.
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
                        await response.aread()
                        message = _http.error_message(response)
                        raise HTTPStatusError(response.status_code, message)
                    yield response.aiter_raw()
                finally:
                    await response.aclose()
        finally:
            self._idle.append(transport)

    async def warm_up(self) -> None:
        """Send one request to a socket of our own.

        httpx imports its backend with the first request: 40 ms that would be the first TTFT.
        """

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            writer.close()

        transport = self._new()
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
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
