"""A thread that carries messages between this process and the collector.

`Link.put` never blocks and costs the caller a few microseconds: encoding and sending happen in the
link's thread. Make a link in the process that uses it: a thread does not outlive a fork.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Protocol

import zmq

from moescope_service.messages import Frames

logger = logging.getLogger("moescope.link")

_SOCKET_QUEUE = 16
"""Messages that ZMQ itself may hold; the rest waits here, where it is counted in bytes."""
_LINGER_MS = 500
"""A worker may be killed soon after it was told to stop."""


class Outgoing(Protocol):
    """Something that can become a message."""

    @property
    def size_bytes(self) -> int:
        """What it holds while it waits, in bytes."""

    def encode(self) -> Frames:
        """Return its frames; called in the link's thread."""


class Link:
    """A ZMQ DEALER socket to the collector.

    Args:
        address: Where the collector is bound.
        on_message: Called in the link's thread with the frames of every message that arrives.
        max_bytes: What may wait to be sent. Beyond it the collector is taken to be gone and what
            waits is given up: the collector would notice by the numbers of the steps.
        name: Name of the thread.
    """

    def __init__(
        self,
        address: str,
        on_message: Callable[[Frames], None],
        *,
        max_bytes: int,
        name: str,
    ) -> None:
        self._address = address
        self._on_message = on_message
        self._max_bytes = max_bytes
        self._waiting: collections.deque[Outgoing] = collections.deque()
        self._added_bytes = self._sent_bytes = 0  # each written by one thread alone
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting_bytes(self) -> int:
        """What waits to be sent, in bytes."""
        return self._added_bytes - self._sent_bytes

    def put(self, message: Outgoing) -> None:
        """Send a message as soon as possible; safe from one thread or under the caller's lock."""
        self._added_bytes += message.size_bytes
        self._waiting.append(message)
        self._wake()

    def close(self, timeout_s: float = 1.0) -> None:
        """Send what waits, for at most so long, and end the thread."""
        self._closing = True
        self._wake()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has reasons enough to wake already
            os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.SNDHWM, _SOCKET_QUEUE)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.LINGER, _LINGER_MS)
            socket.connect(self._address)
            poller = zmq.Poller()
            poller.register(self._wake_read, zmq.POLLIN)
            poller.register(socket, zmq.POLLIN)
            while self._waiting or not self._closing:
                poller.modify(socket, zmq.POLLIN | (zmq.POLLOUT if self._waiting else 0))
                events = dict(poller.poll(1000))
                if self._wake_read in events:
                    os.read(self._wake_read, 65536)
                if events.get(socket, 0) & zmq.POLLIN:
                    self._on_message(socket.recv_multipart())
                self._send(socket)

    def _send(self, socket: zmq.Socket[bytes]) -> None:
        while self._waiting and socket.poll(0, zmq.POLLOUT):
            message = self._pop()
            try:
                frames = message.encode()
            except Exception:
                # Capture must not end with one message; its missing number is noticed.
                logger.exception("left out a message that cannot be encoded")
                continue
            socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        if self.waiting_bytes > self._max_bytes:
            logger.error(
                "the collector takes no messages: gave up %d of them (%d bytes)",
                len(self._waiting),
                self.waiting_bytes,
            )
            while self._waiting:
                self._pop()

    def _pop(self) -> Outgoing:
        message = self._waiting.popleft()
        self._sent_bytes += message.size_bytes
        return message
