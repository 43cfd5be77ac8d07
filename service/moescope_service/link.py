"""A thread that carries messages between this process and the collector.

`Link.put` never blocks and costs the caller a few microseconds: encoding and sending happen in the
link's thread. Make a link in the process that uses it: a thread does not outlive a fork.

The collector may end, and another process take its place that has none of its data. So every
connection begins with an introduction, which the link's thread makes between two messages. What is
put while the collector is away (`Link.is_away`) is encoded, since the encoder must see every
message, and then dropped. A `Source` decides by itself what to keep.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from moescope_service.addresses import Address
from moescope_service.limited_logger import LimitedLogger
from moescope_service.messages import MESSAGE_BYTES, Frames

logger = logging.getLogger("moescope.link")

SOCKET_QUEUE = 32
"""Messages that ZMQ itself may hold on either side; the others wait in `Link`, counted in bytes."""
_FLUSH_MS = 50
"""Longest time a message waits for the next flush, in ms, where its `put` wakes no thread."""
_LINGER_MS = 500
"""How long ZMQ may send on after the time that `Link.close` was given: a worker that stops slowly
may be killed."""
_END_S = 0.6
"""Longest time that the end of a link takes then: one wait of its thread, and ZMQ's lingering."""
_CONNECTION = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED


def cores_of_parent() -> set[int] | None:
    """Return the cores of the process that started this one by ``multiprocessing``.

    Returns:
        None where another program started it, such as a shell: a limit set there, by ``taskset``,
        holds for all of moescope's threads.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return None
    return os.sched_getaffinity(parent.pid)


class Outgoing(Protocol):
    """Something that the link's thread encodes as one message or several."""

    @property
    def size_bytes(self) -> int:
        """Bytes that it holds while it waits."""


class Source(Protocol):
    """Holds messages itself until a link can send one; the link's thread asks."""

    def __bool__(self) -> bool:
        """Whether there is one."""

    def take(self) -> Frames | None:
        """Return the next message, which is sent now; None where there is none any more."""


class Link:
    """A ZMQ DEALER socket to the collector.

    Args:
        address: Where the collector is bound; a text is that of one without a key.
        on_message: Called in the link's thread with the frames of every message that arrives.
        max_bytes: Bytes that may wait to be sent. Beyond them the collector is taken to hang and
            messages are given up; if it goes on, it sees the gap in the numbers of the steps.
        name: Name of the thread.
        encode: Makes the messages of one thing that was put, in the link's thread.
        source: Has the messages where none are put; `wake` says that there is one.
        join: Whether ``encode`` takes several of the same type, up to `MESSAGE_BYTES`: much cheaper
            than one by one where many wait.
        introduce: Makes the messages that begin a connection, in the link's thread.
        on_away: Called in the link's thread when the connection to the collector ends.
        cores: Cores of its thread; None: those of the thread that makes the link.
    """

    def __init__(
        self,
        address: Address | str,
        on_message: Callable[[Frames], None],
        *,
        max_bytes: int = 0,
        name: str,
        encode: Callable[[list[Any]], Iterable[Frames]] = tuple,
        source: Source | None = None,
        join: bool = False,
        introduce: Callable[[], Iterable[Frames]] = tuple,
        on_away: Callable[[], None] = lambda: None,
        cores: Collection[int] | None = None,
    ) -> None:
        self._address = Address(address) if isinstance(address, str) else address
        self._on_message = on_message
        self._max_bytes = max_bytes
        self._encode, self._join = encode, join
        self._source = source
        self._introduce = introduce
        self._on_away = on_away
        self._cores = cores
        self._waiting: collections.deque[Outgoing] = collections.deque()
        self._encoded: collections.deque[Frames] = collections.deque()
        self._added_bytes = self._sent_bytes = 0  # each written by one thread alone
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.num_given_up = 0
        """Messages that were never sent."""
        self._is_connected = False
        self.is_away = False
        """Whether the collector was connected and is not any more."""
        self._deadline_s = math.inf  # set by `close`
        self._is_ended = False
        self._limited_logger = LimitedLogger(logger)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait to be sent."""
        return self._added_bytes - self._sent_bytes

    def put(self, message: Outgoing, *, at_once: bool = True) -> bool:
        """Send a message; for one thread, or under the caller's lock.

        Args:
            message: What to send.
            at_once: Whether to wake the link's thread, which wakes by itself every 50 ms. A wake-up
                in every step would take the interpreter and a core from the model.

        Returns:
            False where the message was given up.
        """
        if self._is_ended or self.waiting_bytes > self._max_bytes:
            if not self.num_given_up:
                logger.error("the collector takes no messages: they are given up from here on")
            self.num_given_up += 1
            return False
        self._added_bytes += message.size_bytes
        self._waiting.append(message)
        if at_once:
            self._wake()
        return True

    def wake(self) -> None:
        """Let the link's thread ask its source; for the thread that closes the link."""
        if not self._is_ended:
            self._wake()

    def close(self, timeout_s: float = 1.0) -> None:
        """Send what waits, for at most ``timeout_s``; then end the thread, in 0.6 s at most."""
        self._deadline_s = time.monotonic() + timeout_s
        self._wake()
        self._thread.join(timeout_s + _END_S)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full: it will wake anyway
            os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            self._is_ended = True
            self._waiting.clear()

    def _serve(self) -> None:
        if self._cores is not None:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self._cores)
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.SNDHWM, SOCKET_QUEUE)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.LINGER, _LINGER_MS)
            socket.setsockopt(zmq.IMMEDIATE, 1)  # no message for one collector reaches the next
            with socket.get_monitor_socket(_CONNECTION) as monitor:
                self._address.connect(socket)
                self._loop(socket, monitor)
                socket.disable_monitor()
                # What ZMQ holds has the rest of the time: the other side may be slow.
                left_ms = int(1000 * (self._deadline_s - time.monotonic()))
                socket.setsockopt(zmq.LINGER, max(left_ms, _LINGER_MS))

    def _loop(self, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        for readable in (self._wake_read, socket, monitor):
            poller.register(readable, zmq.POLLIN)
        while not self._is_over:
            is_sending = self._is_connected and self._has_messages
            poller.modify(socket, zmq.POLLIN | (zmq.POLLOUT if is_sending else 0))
            events = dict(poller.poll(_FLUSH_MS))
            if self._wake_read in events:
                os.read(self._wake_read, 65536)
            if monitor in events:
                self._on_connection(recv_monitor_message(monitor)["event"])
            if events.get(socket, 0) & zmq.POLLIN:
                self._receive(socket.recv_multipart())
            if self._is_connected:
                self._send(socket)
            elif self.is_away:
                self._leave_out()

    @property
    def _has_messages(self) -> bool:
        return bool(self._encoded or self._waiting or self._source)

    @property
    def _is_over(self) -> bool:
        if self._has_messages and not self.is_away:
            return time.monotonic() > self._deadline_s
        return self._deadline_s < math.inf

    def _on_connection(self, event: int) -> None:
        self._is_connected = event == zmq.Event.HANDSHAKE_SUCCEEDED
        self.is_away = not self._is_connected
        self._encoded.clear()
        if self._is_connected:
            self._encoded.extend(self._introduce())
        else:
            self._on_away()

    def _receive(self, frames: Frames) -> None:
        try:
            self._on_message(frames)
        except Exception:
            self._limited_logger.exception("left out a message that cannot be understood")

    def _send(self, socket: zmq.Socket[bytes]) -> None:
        while self._has_messages and socket.poll(0, zmq.POLLOUT):
            if not self._encoded:
                self._encoded.extend(self._encode_next())
                continue
            # Again: the collector has just disconnected; the monitor reports it, and its return.
            with contextlib.suppress(zmq.Again):
                socket.send_multipart(self._encoded.popleft(), zmq.NOBLOCK, copy=False)

    def _leave_out(self) -> None:
        while self._waiting:
            self._encode_next()

    def _encode_next(self) -> Iterable[Frames]:
        if not self._waiting:
            frames = self._source.take() if self._source else None
            return () if frames is None else (frames,)
        messages = self._next()
        try:
            return self._encode(messages)
        except Exception:
            # One message must not end the capture; the collector notices the missing number.
            self._limited_logger.exception(
                "left out %d messages that cannot be encoded", len(messages)
            )
            return ()

    def _next(self) -> list[Outgoing]:
        messages = [self._waiting.popleft()]
        size_bytes = messages[0].size_bytes
        while (
            self._join
            and self._waiting
            and type(self._waiting[0]) is type(messages[0])
            and size_bytes + self._waiting[0].size_bytes <= MESSAGE_BYTES
        ):
            messages.append(self._waiting.popleft())
            size_bytes += messages[-1].size_bytes
        self._sent_bytes += size_bytes
        return messages
