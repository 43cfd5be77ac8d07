"""A way to the collector that delivers when it is told to, and may break off."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Iterable
from typing import Any

from moescope_service.collector.core import Collector
from moescope_service.frontend.journal import Journal
from moescope_service.messages import Frames


class SimLink:
    """One peer's way to the collector.

    Args:
        name: Of the peer.
        introduce: Makes the messages that begin a connection.
        encode: Makes the messages of one thing that was put.
        source: Has the messages where none are put.
    """

    def __init__(
        self,
        name: str,
        introduce: Callable[[], Iterable[Frames]],
        encode: Callable[[Any], Iterable[Frames]] = tuple,
        source: Journal | None = None,
    ) -> None:
        self.name, self._encode, self._source = name, encode, source
        self.waiting: collections.deque[Any] = collections.deque()
        self.pipe: collections.deque[Frames] = collections.deque()
        self.last: Frames | None = None
        self.is_away = True
        self._introduce = introduce
        self._number = 0

    @property
    def peer(self) -> bytes:
        """The identity of the connection."""
        return f"{self.name} {self._number}".encode()

    def put(self, message: Any) -> None:
        """Take a message; encode it and leave it out while the collector is away."""
        if self.is_away:
            self._encode(message)
        else:
            self.waiting.append(message)

    def connect(self) -> None:
        """Begin a connection with an introduction."""
        self.is_away = False
        self._number += 1  # ZMQ gives every connection another identity
        self.pipe = collections.deque(_wire(frames) for frames in self._introduce())

    def break_off(self) -> None:
        """End the connection; what was on its way is lost."""
        self.is_away, self.last = True, None
        self.pipe.clear()
        while self.waiting:
            self._encode(self.waiting.popleft())

    def send(self, count: int | None) -> None:
        """Put the first messages into the pipe; None: all."""
        for _ in range(sys.maxsize if count is None else count):
            if self.waiting:
                self.pipe.extend(map(_wire, self._encode(self.waiting.popleft())))
            elif self._source is not None and (frames := self._source.take()) is not None:
                self.pipe.append(_wire(frames))
            else:
                break

    def deliver(self, collector: Collector, count: int) -> None:
        """Hand the first messages of the pipe to the collector."""
        for _ in range(min(count, len(self.pipe))):
            self.last = self.pipe.popleft()
            collector.handle(self.peer, self.last)


def _wire(frames: Frames) -> Frames:
    return [bytes(memoryview(f).cast("B")) if memoryview(f).nbytes else b"" for f in frames]
