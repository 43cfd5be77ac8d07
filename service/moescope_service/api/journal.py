"""What a new collector has to be told of this API server's requests.

Its caller is the link's thread alone, in the order of the messages: what a new collector is told,
with what follows, is neither one message too few nor one too many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from moescope_service.messages import Frames, RequestKey, pack


@dataclasses.dataclass(slots=True)
class _Told:
    """What was told of one request, by sequence, and which of those still run."""

    messages: dict[str, list[Frames]] = dataclasses.field(default_factory=dict)
    running: set[str] = dataclasses.field(default_factory=set)


class Journal:
    """Keeps what was told of every running request until the finish of all of it is told.

    A new collector is told of a request as a whole, with the sequences that have ended: their rows
    went with the old one, and an answer without them would look like one that never had them.
    """

    def __init__(self) -> None:
        self._told: dict[RequestKey, _Told] = {}
        self._request: dict[str, RequestKey] = {}  # by sequence

    def __contains__(self, internal_id: str) -> bool:
        return internal_id in self._request

    def __len__(self) -> int:
        return len(self._told)

    def register(self, internal_id: str, request: RequestKey, frames: Frames) -> None:
        """Take in that the collector is told of a sequence.

        Args:
            internal_id: The sequence.
            request: What it belongs to.
            frames: The message.
        """
        self._request[internal_id] = request
        told = self._told.setdefault(request, _Told())
        told.messages[internal_id] = [frames]
        told.running.add(internal_id)

    def note(self, kind: str, internal_ids: Iterable[str], frames: Frames) -> None:
        """Take in another message that goes to the collector.

        Args:
            kind: ``alias`` or ``finish``; what else there is is nothing to keep.
            internal_ids: The sequences that it is about.
            frames: The message.
        """
        for internal_id in internal_ids:
            if internal_id in self._request:
                told = self._told[self._request[internal_id]]
                told.messages[internal_id].append(frames)
                if kind == "finish":
                    self._end(internal_id)

    def forget(self, internal_ids: Sequence[str]) -> None:
        """Tell no new collector of sequences whose routes somebody deleted."""
        for internal_id in internal_ids:
            if internal_id in self._request:
                del self._told[self._request[internal_id]].messages[internal_id]
                self._end(internal_id)
                self._request.pop(internal_id, None)

    def introduce(self) -> Iterator[Frames]:
        """Yield the messages that begin a connection."""
        yield pack("server")
        for told in self._told.values():
            for messages in told.messages.values():
                yield from messages

    def _end(self, internal_id: str) -> None:
        """Take in that a sequence does not run any more, and let go of a request that is over."""
        request = self._request[internal_id]
        told = self._told[request]
        told.running.discard(internal_id)
        if not told.running:
            del self._told[request]
            for sibling in (internal_id, *told.messages):
                self._request.pop(sibling, None)
