"""A server that streams what a script says, when it says, and notes when it did."""

import asyncio
import contextlib
import dataclasses
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import orjson

RESET, CLOSE, WAIT = object(), object(), object()
"""In place of bytes: reset the connection, close it in the middle, never go on."""


def chunk(text="a", **more) -> bytes:
    """A chunk of a text completion."""
    return event({"choices": [{"index": 0, "text": text, "finish_reason": None, **more}]})


def delta(**values) -> bytes:
    """A chunk of a chat completion."""
    return event({"choices": [{"index": 0, "delta": values, "finish_reason": None}]})


def usage(prompt=5, completion=4) -> bytes:
    return event({
        "choices": [],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion},
    })  # fmt: skip


def event(values) -> bytes:
    return b"data: " + orjson.dumps(values) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def answer(tokens=4, after_s=0.0) -> list:
    """The script of an ordinary completion: a token a chunk, each after the same time."""
    return [*((after_s, chunk()) for _ in range(tokens)), (0, usage(completion=tokens) + DONE)]


@dataclasses.dataclass
class Seen:
    """One request as the server saw it; times by time.perf_counter."""

    body: dict
    arrived_s: float
    path: str = ""
    headers: bytes = b""
    sent_s: list[float] = dataclasses.field(default_factory=list)


class StreamServer:
    """Answers every request by a script.

    Args:
        script: Takes the request's number and body; returns pairs of seconds to wait and bytes to
            send as one HTTP chunk (or RESET, CLOSE, WAIT, or an event to wait for). A status in
            front of them other than 200 makes of what follows an error's body and header lines.
    """

    def __init__(self, script: Callable[[int, dict], list]) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.connections = 0
        self.pages: dict[str, bytes] = {}  # what GET finds, by path
        self.url = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
        except asyncio.CancelledError:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET "):
            page = self.pages.get(head.split(b" ")[1].decode())
            status = b"404 Not Found" if page is None else b"200 OK"
            page = page or b"{}"
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(page), page))
            return
        size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = orjson.loads(await reader.readexactly(size))
        seen = Seen(body, time.perf_counter(), head.split(b" ")[1].decode(), head)
        self.seen.append(seen)
        script = self.script(len(self.seen) - 1, body)
        status = script.pop(0) if script and isinstance(script[0], int) else 200
        if status != 200:
            data, *headers = script
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n" % (status, len(data)))
            writer.write(b"".join(headers) + b"\r\n" + data)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for after_s, data in script:
            if after_s:
                await asyncio.sleep(after_s)
            if isinstance(data, bytes):
                seen.sent_s.append(time.perf_counter())
                writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            elif isinstance(data, asyncio.Event):
                await data.wait()
            else:
                await self._act(data, writer)
        writer.write(b"0\r\n\r\n")

    async def _act(self, action: object, writer: asyncio.StreamWriter) -> None:
        if action is WAIT:
            await self.finish.wait()
        await writer.drain()
        if action is RESET:  # closing with a linger of 0 s sends RST
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort() if action is RESET else writer.close()
        raise ConnectionError


@contextlib.contextmanager
def serving(script: Callable[[int, dict], list]) -> Iterator[StreamServer]:
    """Run a server on a thread of its own."""
    server, ready = StreamServer(script), threading.Event()

    async def main() -> None:
        listening = await asyncio.start_server(server._serve, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        server.loop, server.finish = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        async with listening:
            await server.finish.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield server
    finally:
        server.loop.call_soon_threadsafe(server.finish.set)
        thread.join()
