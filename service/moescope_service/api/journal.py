"""What a new collector has to be told of this API server's requests.

Its caller is the link's thread alone, in the order of the messages: what a new collector is told,
with what follows, is neither one message too few nor one too many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from moescope_service.messages import Frames, pack


class Journal:
    """Keeps what was told of every running sequence until its finish is told."""

    def __init__(self) -> None:
        self._told: dict[str, list[Frames]] = {}

    def __len__(self) -> int:
        return len(self._told)

    def note(self, kind: str, internal_ids: Iterable[str], frames: Frames) -> None:
        """Take in a message that goes to the collector.

        Args:
            kind: ``register``, ``alias`` or ``finish``.
            internal_ids: The sequences that it is about.
            frames: The message.
        """
        for internal_id in internal_ids:
            if kind == "register":
                self._told[internal_id] = [frames]
            elif kind == "alias" and internal_id in self._told:
                self._told[internal_id].append(frames)
            elif kind == "finish":
                self._told.pop(internal_id, None)

    def forget(self, internal_ids: Sequence[str]) -> None:
        """Tell no new collector of sequences whose routes somebody deleted."""
        for internal_id in internal_ids:
            self._told.pop(internal_id, None)

    def introduce(self) -> Iterator[Frames]:
        """Yield the messages that begin a connection."""
        yield pack("server")
        for messages in self._told.values():
            yield from messages
