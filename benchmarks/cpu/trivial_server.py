"""A server that does next to nothing: ``python -m benchmarks.cpu.trivial_server PORT``.

It answers every request with a stream of four tokens, 2 ms apart, and writes no log.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

TOKENS, GAP_S = 4, 0.002
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = b'data: {"id":"cmpl-1","choices":[{"index":0,"text":" a","finish_reason":null}]}\n\n'
END = (
    b'data: {"id":"cmpl-1","choices":[],"usage":{"prompt_tokens":8,"completion_tokens":%d}}\n\n'
    b"data: [DONE]\n\n" % TOKENS
)


def framed(data: bytes) -> bytes:
    """Return data as an HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


PARTS = [*([framed(TOKEN)] * TOKENS), framed(END) + b"0\r\n\r\n"]


class Trivial(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer a request that is whole; wait for more of one that is not."""
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        size = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(rest) < size:
            return
        self._received = rest[size:]
        if head.startswith(b"GET"):
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return
        self._transport.write(HEAD)
        self._send(0)

    def _send(self, number: int) -> None:
        self._transport.write(PARTS[number])
        if number + 1 < len(PARTS):
            asyncio.get_running_loop().call_later(GAP_S, self._send, number + 1)


async def main(port: int) -> None:
    """Serve until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Trivial, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
