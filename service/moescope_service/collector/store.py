"""Finished traces, bounded in bytes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from moescope.trace import RouteTrace

OVERHEAD_BYTES = 2048
"""What a kept trace costs beside its arrays: objects, ids, index entries."""

_REMEMBERED_IDS = 100_000
"""Ids of evicted traces that are still told apart from ids never seen."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """A finished trace and every id that finds it."""

    uid: int
    """The collector's own number of the sequence, growing with time."""
    trace: RouteTrace
    ids: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes that count against the store's limit."""
        return self.trace.size_bytes + OVERHEAD_BYTES + sum(map(len, self.ids))


class TraceStore:
    """Keeps the newest finished traces; those that finished first make room.

    Args:
        limit_bytes: Upper bound for the sum of `Kept.size_bytes`.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.size_bytes = 0
        self.num_evicted = 0
        self._kept: collections.OrderedDict[int, Kept] = collections.OrderedDict()
        self._uids: dict[str, list[int]] = {}
        self._evicted_ids: collections.OrderedDict[int, None] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._kept.values())

    def add(self, kept: Kept) -> None:
        """Keep a trace and evict what no longer fits; the new one alone if it never would."""
        if kept.size_bytes > self.limit_bytes:
            self._note_eviction(kept)
            return
        self._kept[kept.uid] = kept
        self.size_bytes += kept.size_bytes
        for request_id in kept.ids:
            self._uids.setdefault(request_id, []).append(kept.uid)
        while self.size_bytes > self.limit_bytes:
            oldest = next(iter(self._kept.values()))
            self.remove(oldest)
            self._note_eviction(oldest)

    def find(self, request_id: str) -> list[Kept]:
        """Return what an id finds: the newest request first, its choices in their order."""
        found = [self._kept[uid] for uid in self._uids.get(request_id, ())]
        return sorted(found, key=lambda kept: (-kept.trace.created_s, kept.trace.index))

    def add_id(self, kept: Kept, request_id: str) -> None:
        """Let one more id find a trace."""
        if request_id not in kept.ids:
            self._kept[kept.uid] = dataclasses.replace(kept, ids=(*kept.ids, request_id))
            self.size_bytes += len(request_id)
            self._uids.setdefault(request_id, []).append(kept.uid)

    def remove(self, kept: Kept) -> None:
        """Forget a trace."""
        del self._kept[kept.uid]
        self.size_bytes -= kept.size_bytes
        for request_id in kept.ids:
            uids = self._uids[request_id]
            uids.remove(kept.uid)
            if not uids:
                del self._uids[request_id]

    def was_evicted(self, request_id: str) -> bool:
        """Whether a trace with this id was evicted, as far as that is still known."""
        return hash(request_id) in self._evicted_ids

    def _note_eviction(self, kept: Kept) -> None:
        self.num_evicted += 1
        self._evicted_ids.update(dict.fromkeys(map(hash, kept.ids)))
        while len(self._evicted_ids) > _REMEMBERED_IDS:
            self._evicted_ids.popitem(last=False)
