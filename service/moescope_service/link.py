"""A thread that carries messages between this process and the collector.

`Link.put` never blocks and costs the caller a few microseconds: encoding and sending happen in the
link's thread. Make a link in the process that uses it: a thread does not outlive a fork.

The collector may end and come back, as another process that knows nothing. So every connection
begins with what `Link` is told to introduce itself with, made in the link's thread between two
messages; what is put while nobody is there is encoded, since its encoder counts on every message,
and left out.
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

from moescope_service.messages import MESSAGE_BYTES, Frames

logger = logging.getLogger("moescope.link")

SOCKET_QUEUE = 32
"""Messages that ZMQ itself may hold on either side; the rest waits here, counted in bytes."""
_FLUSH_MS = 50
"""How long a message may wait that nobody waits for."""
_LINGER_MS = 500
"""A worker may be killed soon after it was told to stop."""
_END_S = 0.6
"""What a link's end may take: one wait of its thread, and ZMQ's lingering."""
_CONNECTION = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED


def cores_of_parent() -> set[int] | None:
    """Return where the process may run that started this one by ``multiprocessing``; None: none.

    Never those of a shell: whoever starts the first process by ``taskset`` means all of it.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return None
    return os.sched_getaffinity(parent.pid)


class Outgoing(Protocol):
    """Something that becomes a message, or several."""

    @property
    def size_bytes(self) -> int:
        """What it holds while it waits, in bytes."""


class Link:
    """A ZMQ DEALER socket to the collector.

    Args:
        address: Where the collector is bound.
        on_message: Called in the link's thread with the frames of every message that arrives.
        max_bytes: What may wait to be sent. Beyond it the collector is taken to hang and messages
            are given up; it notices by the numbers of the steps, should it go on.
        name: Name of the thread.
        encode: Makes the messages of one thing that was put, in the link's thread.
        join: Whether ``encode`` takes several of the same type, up to `MESSAGE_BYTES`: much cheaper
            than one by one where many wait.
        introduce: Makes the messages that begin a connection, in the link's thread.
        on_away: Called in the link's thread when the collector has gone.
        cores: Where its thread may run; None: where the thread may that makes the link.
    """

    def __init__(
        self,
        address: str,
        on_message: Callable[[Frames], None],
        *,
        max_bytes: int,
        name: str,
        encode: Callable[[list[Any]], Iterable[Frames]],
        join: bool = False,
        introduce: Callable[[], Iterable[Frames]] = tuple,
        on_away: Callable[[], None] = lambda: None,
        cores: Collection[int] | None = None,
    ) -> None:
        self._address = address
        self._on_message = on_message
        self._max_bytes = max_bytes
        self._encode, self._join = encode, join
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
        """Whether the collector was there and is not any more."""
        self._deadline_s = math.inf  # set by `close`
        self._is_ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting_bytes(self) -> int:
        """What waits to be sent, in bytes."""
        return self._added_bytes - self._sent_bytes

    def put(self, message: Outgoing, *, at_once: bool = True) -> bool:
        """Send a message; for one thread, or under the caller's lock.

        Args:
            message: What to send.
            at_once: Whether to wake the link's thread. It wakes by itself every 50 ms: a wake-up a
                step takes the interpreter and a core away from the model.

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

    def close(self, timeout_s: float = 1.0) -> None:
        """Send what waits, for at most so long, then end the thread, in 0.6 s at most."""
        self._deadline_s = time.monotonic() + timeout_s
        self._wake()
        self._thread.join(timeout_s + _END_S)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has reasons enough to wake already
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
            socket.setsockopt(zmq.IMMEDIATE, 1)  # what was meant for one collector reaches no other
            with socket.get_monitor_socket(_CONNECTION) as monitor:
                socket.connect(self._address)
                self._loop(socket, monitor)
                socket.disable_monitor()

    def _loop(self, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        for readable in (self._wake_read, socket, monitor):
            poller.register(readable, zmq.POLLIN)
        while not self._is_over:
            is_sending = self._is_connected and (self._waiting or self._encoded)
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
    def _is_over(self) -> bool:
        if self._waiting or self._encoded:
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
            logger.exception("left out a message that cannot be understood")

    def _send(self, socket: zmq.Socket[bytes]) -> None:
        while (self._encoded or self._waiting) and socket.poll(0, zmq.POLLOUT):
            if not self._encoded:
                self._encoded.extend(self._encode_next())
                continue
            # Again: the collector has just gone; that it comes back is told by the monitor.
            with contextlib.suppress(zmq.Again):
                socket.send_multipart(self._encoded.popleft(), zmq.NOBLOCK, copy=False)

    def _leave_out(self) -> None:
        while self._waiting:
            self._encode_next()

    def _encode_next(self) -> Iterable[Frames]:
        messages = self._next()
        try:
            return self._encode(messages)
        except Exception:
            # Capture must not end with one message; its missing number is noticed.
            logger.exception("left out %d messages that cannot be encoded", len(messages))
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
