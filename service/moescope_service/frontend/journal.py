"""What the collector has to be told of this API server's requests, sent or not.

A message is here from when it is put. It stays until it is sent, and what was told of a request
stays until the finish of all of it is: a new collector is told of what runs, and of what ended
while there was none.

Not for several threads: see `moescope_service.frontend.outbox.Outbox`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable

import orjson

from moescope_service.ids import id_hash
from moescope_service.messages import Frames, RequestKey, pack

MAX_BYTES = 64 * 2**20
"""Beyond it requests are given up that have ended and of which the collector was told nothing.

What runs is bounded by what vLLM's own queue holds of it, and is kept.
"""
MAX_LOST = 100_000
"""Ids of given up requests that are remembered at most."""
_OVERHEAD_BYTES = 1024
"""What a message takes beside its frames."""


@dataclasses.dataclass(slots=True)
class _Message:
    number: int
    kind: str
    frames: Frames
    internal_id: str = ""
    """Of ``register`` and ``finish``: the sequence."""
    is_held: bool = False
    """Whether its request needs it, told or not."""
    is_told: bool = False
    """Whether it was sent and, where there are receipts, arrived."""

    @property
    def size_bytes(self) -> int:
        return _OVERHEAD_BYTES + sum(memoryview(frame).nbytes for frame in self.frames)


@dataclasses.dataclass(slots=True)
class _Told:
    """What is told of one request."""

    messages: dict[str, list[_Message]] = dataclasses.field(default_factory=dict)
    """By sequence; ``alias`` under the empty name."""
    running: set[str] = dataclasses.field(default_factory=set)
    """Sequences without a finish."""
    unfinished: set[str] = dataclasses.field(default_factory=set)
    """Sequences whose finish was not told."""

    @property
    def registers(self) -> list[_Message]:
        """The first message of each sequence."""
        return [messages[0] for name, messages in self.messages.items() if name]


class Journal:
    """Keeps what is told of requests, in order, and says what is to be sent next.

    A new collector is told of a request as a whole, with the sequences that have ended: their rows
    went with the old one, and an answer without them would look like one that never had them.

    Args:
        max_bytes: See `MAX_BYTES`.
        name: Of a link that may break while the collector lives on. The collector tells under this
            name what arrived, and what did not is told again. Empty: what is sent arrives.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, name: str = "") -> None:
        self._max_bytes = max_bytes
        self._name = name
        self.size_bytes = 0
        """Bytes of the messages that it has."""
        self._numbers = itertools.count()
        self._told: dict[RequestKey, _Told] = {}
        self._request: dict[str, RequestKey] = {}  # by sequence
        self._unsent: collections.OrderedDict[int, _Message] = collections.OrderedDict()
        self._on_the_way: collections.deque[_Message] = collections.deque()  # without a receipt
        self._num_received = 0  # since the connection began
        # Owners by the ids' hashes, the oldest first; and those that are yet to be told.
        self._lost: collections.OrderedDict[int, str | None] = collections.OrderedDict()
        self._untold: collections.OrderedDict[int, str | None] = collections.OrderedDict()
        self._num_untold = 0

    def __contains__(self, internal_id: str) -> bool:
        return internal_id in self._request

    def __len__(self) -> int:
        """Return of how many requests something is to be told or told again."""
        return len(self._told)

    @property
    def has_unsent(self) -> bool:
        """Whether there is something to send."""
        return bool(self._unsent or self._untold or self._num_untold)

    def register(self, internal_id: str, request: RequestKey, frames: Frames) -> None:
        """Take in a ``register`` message.

        Args:
            internal_id: The sequence.
            request: What it belongs to.
            frames: The message.
        """
        told = self._told.setdefault(request, _Told())
        self._request[internal_id] = request
        told.messages[internal_id] = [self._put("register", frames, internal_id, is_held=True)]
        told.running.add(internal_id)
        told.unfinished.add(internal_id)

    def finish(self, internal_id: str, frames: Frames) -> None:
        """Take in a ``finish`` message."""
        request = self._request.get(internal_id)
        told = None if request is None else self._told[request]
        message = self._put("finish", frames, internal_id, is_held=told is not None)
        if request is None or told is None:
            return
        told.messages[internal_id].append(message)
        told.running.discard(internal_id)
        is_over = not told.running and all(one.number in self._unsent for one in told.registers)
        if is_over and self.size_bytes > self._max_bytes:
            self._give_up(request)

    def alias(self, internal_ids: Iterable[str], alias: str, frames: Frames) -> None:
        """Take in an ``alias`` message.

        Args:
            internal_ids: Sequences of one request.
            alias: One more id that finds them.
            frames: The message.
        """
        for key in map(id_hash, internal_ids):
            if key in self._lost:
                self._note_lost([alias], self._lost[key])
                return
        request = next((self._request[one] for one in internal_ids if one in self), None)
        message = self._put("alias", frames, is_held=request is not None)
        if request is not None:
            self._told[request].messages.setdefault("", []).append(message)

    def forget(self, internal_ids: Iterable[str]) -> None:
        """Tell no new collector of sequences whose routes a client deleted."""
        for internal_id in internal_ids:
            request = self._request.pop(internal_id, None)
            if request is not None:
                told = self._told[request]
                self._release(told.messages.pop(internal_id))
                told.running.discard(internal_id)
                self._end(request, internal_id)

    def introduce(self) -> Frames:
        """Return the message that begins a connection; all that the journal has follows it."""
        messages = {one.number: one for one in (*self._on_the_way, *self._unsent.values())}
        for told in self._told.values():
            for own in told.messages.values():
                messages.update((one.number, one) for one in own)
        self._unsent = collections.OrderedDict(sorted(messages.items()))
        for message in messages.values():
            message.is_told = False
        self._on_the_way.clear()
        self._num_received = 0
        self._untold = self._lost.copy()
        return pack("server", **({"name": self._name} if self._name else {}))

    def take(self) -> Frames | None:
        """Return the next message, which is sent now."""
        if self._unsent:
            _, message = self._unsent.popitem(last=False)
            if self._name:
                self._on_the_way.append(message)
            else:
                self._note_told(message)
            return message.frames
        if not self.has_unsent:
            return None
        frames = pack("lost", count=self._num_untold, lost=list(self._untold.items()))
        self._untold.clear()
        self._num_untold = 0
        return frames

    def received(self, count: int) -> None:
        """Take in how many messages of sequences have arrived since the connection began."""
        while self._on_the_way and self._num_received < count:
            self._num_received += 1
            self._note_told(self._on_the_way.popleft())

    def _note_told(self, message: _Message) -> None:
        message.is_told = True
        if not message.is_held:
            self.size_bytes -= message.size_bytes
        elif message.kind == "finish":
            self._end(self._request[message.internal_id], message.internal_id)

    def _put(self, kind: str, frames: Frames, internal_id: str = "", *, is_held: bool) -> _Message:
        message = _Message(next(self._numbers), kind, frames, internal_id, is_held)
        self._unsent[message.number] = message
        self.size_bytes += message.size_bytes
        return message

    def _end(self, request: RequestKey, internal_id: str) -> None:
        """Take in that a sequence's finish is told, and let go of a request that is over."""
        told = self._told[request]
        told.unfinished.discard(internal_id)
        if not told.unfinished:
            self._let_go(request)

    def _let_go(self, request: RequestKey) -> _Told:
        told = self._told.pop(request)
        for internal_id, messages in told.messages.items():
            self._request.pop(internal_id, None)
            self._release(messages)
        return told

    def _release(self, messages: Iterable[_Message]) -> None:
        """Keep messages no longer than until they are told."""
        for message in messages:
            message.is_held = False
            if message.is_told:
                self.size_bytes -= message.size_bytes

    def _give_up(self, request: RequestKey) -> None:
        told = self._let_go(request)
        for message in itertools.chain.from_iterable(told.messages.values()):
            if self._unsent.pop(message.number, None) is not None:
                self.size_bytes -= message.size_bytes
        aliases = [
            orjson.loads(message.frames[0])["alias"] for message in told.messages.get("", ())
        ]
        for message in told.registers:
            register = orjson.loads(message.frames[0])
            if register["keep"]:
                self._num_untold += 1
                self._note_lost([*register["ids"], *aliases], register["owner"])

    def _note_lost(self, ids: Iterable[str], owner: str | None) -> None:
        hashes = dict.fromkeys(map(id_hash, ids), owner)
        for known in (self._lost, self._untold):
            known.update(hashes)
            while len(known) > MAX_LOST:
                known.popitem(last=False)
