"""Tells API servers whose links may break how many messages of theirs have arrived."""

from __future__ import annotations

from collections.abc import Iterator

from moescope_service.collector.workers import Peer
from moescope_service.messages import Frames, pack


class Receipts:
    """Counts messages of sequences, by the connection that they came on."""

    def __init__(self) -> None:
        self._peer: dict[str, Peer] = {}  # by the API server's name
        self._arrived: dict[Peer, int] = {}
        self._untold: set[Peer] = set()

    def begin(self, peer: Peer, name: str) -> Peer | None:
        """Count anew, for an API server that introduced itself.

        Returns:
            The connection that it had before, which is no more.
        """
        before = self._peer.get(name)
        if before is not None:
            self._arrived.pop(before, None)
            self._untold.discard(before)
        self._peer[name] = peer
        self._arrived[peer] = 0
        return before

    def count(self, peer: Peer) -> None:
        """Count a message, whatever becomes of it; of peers without a name none is."""
        if peer in self._arrived:
            self._arrived[peer] += 1
            self._untold.add(peer)

    def take(self) -> Iterator[tuple[Peer, Frames]]:
        """Yield (peer, frames) of what is yet to be told."""
        while self._untold:
            peer = self._untold.pop()
            yield peer, pack("received", count=self._arrived[peer])
