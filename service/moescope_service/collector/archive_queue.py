"""Hands finished traces over to the archive's process, which says what of them is published."""

from __future__ import annotations

import collections
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection
from typing import Protocol

from moescope_service.archive_messages import Handed, figures_of, pack_traces
from moescope_service.causes import ARCHIVE_CAUSES
from moescope_service.collector.store import OVERHEAD_BYTES, Kept
from moescope_service.limited_logger import LimitedLogger
from moescope_service.messages import MESSAGE_BYTES, CaptureSpec, Frames, pack, unpack
from moescope_service.queries import ArchiveFigures, ArchiveInfo

logger = logging.getLogger("moescope.collector")

MAX_WAITING_BYTES = 128 * 2**20
"""Traces that are not published yet; most of them are in the store too, and take nothing more."""
MAX_SENT_BYTES = 64 * 2**20
"""Of these, how many the archive's process may hold."""
_CLOSE_S = 10.0
_BEHIND_S = 60.0
"""Shortest time between two messages that traces are left out."""


@dataclasses.dataclass(slots=True)
class _Item:
    number: int
    finished_s: float
    kept: Kept

    @property
    def size_bytes(self) -> int:
        return self.kept.trace.size_bytes + OVERHEAD_BYTES

    @property
    def handed(self) -> Handed:
        ids, owner = tuple(sorted(self.kept.ids)), self.kept.owner
        return Handed(number=self.number, finished_s=self.finished_s, ids=ids, owner=owner)


class Carrier(Protocol):
    """What carries messages; `moescope_service.link.Link` is one."""

    def wake(self) -> None:
        """Ask for messages."""

    def close(self, timeout_s: float = ...) -> None:
        """Send what there is, for so long, and end."""


class ArchiveQueue:
    """Holds traces until the archive's process has published them; its callers never wait.

    What was handed over and is not published when that process dies is handed over again to the
    next one, which leaves out what it finds in the archive: nothing is lost by it, nor there twice.
    Traces that find the queue full are left out and counted, by why it is full.

    Args:
        carry: Makes what carries its messages, of which it is the source.
        max_waiting_bytes: Traces that may wait; one may always, however large it is.
        max_sent_bytes: Traces of these that may be handed over.
    """

    def __init__(
        self,
        carry: Callable[[ArchiveQueue], Carrier],
        *,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        max_sent_bytes: int = MAX_SENT_BYTES,
    ) -> None:
        self._name = f"{int(time.time() * 1000):012x}{secrets.token_hex(4)}"
        self._max_waiting_bytes, self._max_sent_bytes = max_waiting_bytes, max_sent_bytes
        self._lock = threading.Lock()  # guards all that follows
        self._spec: CaptureSpec | None = None
        self._unsent: collections.deque[_Item] = collections.deque()
        self._sent: dict[int, _Item] = {}  # in the order of their numbers
        self._by_uid: dict[int, _Item] = {}  # all of both
        self._waiting_bytes = self._sent_bytes = 0
        self._forgotten: collections.deque[int] = collections.deque()
        self._new_ids: list[tuple[int, str]] = []  # of traces that were handed over
        self._next_number = 1
        self._num_archived = 0
        self._dropped = dict.fromkeys(ARCHIVE_CAUSES, 0)
        self._figures: ArchiveFigures | None = None
        self._behind_logger = LimitedLogger(logger, _BEHIND_S)
        self._carrier = carry(self)

    @property
    def info(self) -> ArchiveInfo:
        """What became of the traces, and what the archive's process says of its files."""
        with self._lock:
            return ArchiveInfo(
                archived=self._num_archived,
                waiting=len(self._unsent) + len(self._sent),
                dropped=dict(self._dropped),
                figures=self._figures,
            )

    def add(self, kept: Kept, spec: CaptureSpec) -> None:
        """Take a finished trace, or count it as dropped where too much waits."""
        item = _Item(self._next_number, time.time(), kept)
        with self._lock:
            self._spec = spec
            is_full = self._waiting_bytes + item.size_bytes > self._max_waiting_bytes
            if is_full and (self._unsent or self._sent):
                cause = self._cause()
                self._dropped[cause] += 1
            else:
                cause = None
                self._next_number += 1
                self._unsent.append(item)
                self._by_uid[kept.uid] = item
                self._waiting_bytes += item.size_bytes
        if cause is None:
            self._carrier.wake()
        else:
            self._behind_logger.warning(
                "traces are left out of the archive, and counted: %d MiB wait already (%s)",
                self._max_waiting_bytes // 2**20, cause,
            )  # fmt: skip

    def forget(self, uids: Collection[int]) -> None:
        """Keep traces out of the archive, by the collector's number of their sequences."""
        if not uids:
            return
        with self._lock:
            self._remove([self._by_uid[uid] for uid in uids if uid in self._by_uid])
        self._carrier.wake()

    def delete(self, request_id: str, owner: str | None, *, own_only: bool = False) -> set[int]:
        """Keep out of the archive what an id finds of the traces that wait.

        Where it is the id of a response, only what has that response.

        Args:
            request_id: Any id of the request.
            owner: Whose it has to be; None: anyone's.
            own_only: Whether only what has that response is meant.

        Returns:
            The collector's numbers of their sequences.
        """
        with self._lock:
            found = [
                one
                for one in self._items()
                if owner in {None, one.kept.owner} and request_id in one.kept.ids
            ]
            own = [one for one in found if one.kept.request_id == request_id]
            chosen = own if own or own_only else found
            self._remove(chosen)
        self._carrier.wake()
        return {one.kept.uid for one in chosen}

    def add_id(self, request_id: str, uids: Collection[int]) -> None:
        """Let one more id find traces that wait, by the collector's number of their sequences."""
        with self._lock:
            for item in [self._by_uid[uid] for uid in uids if uid in self._by_uid]:
                if request_id not in item.kept.ids:
                    ids = (*item.kept.ids, request_id)
                    item.kept = dataclasses.replace(item.kept, ids=ids)
                    if item.number in self._sent:
                        self._new_ids.append((item.number, request_id))
        self._carrier.wake()

    def close(self) -> None:
        """Hand over what waits, for at most 10 s, and end the thread."""
        with self._lock:
            self._max_sent_bytes = self._max_waiting_bytes
        self._carrier.close(_CLOSE_S)
        if self._unsent:
            logger.error("the archive lacks the last %d traces", len(self._unsent))

    def __bool__(self) -> bool:
        """Whether there is a message for the archive's process."""
        with self._lock:
            return bool(self._forgotten or self._new_ids) or self._fits()

    def take(self) -> Frames | None:
        """Return the next message; for the link's thread."""
        with self._lock:
            if self._forgotten:
                numbers = list(self._forgotten)
                self._forgotten.clear()
                return pack("forget", numbers=numbers)
            if self._new_ids:
                ids, self._new_ids = self._new_ids, []
                return pack("alias", ids=ids)
            items: list[_Item] = []
            size_bytes = 0
            while self._fits() and (not items or size_bytes < MESSAGE_BYTES):
                item = self._unsent.popleft()
                items.append(item)
                self._sent[item.number] = item
                self._sent_bytes += item.size_bytes
                size_bytes += item.size_bytes
            spec = self._spec
        if not items or spec is None:
            return None
        try:
            return pack_traces(
                spec, [one.handed for one in items], [one.kept.trace for one in items]
            )
        except Exception:  # a dead thread would hand over no other trace either
            logger.exception("left traces out of the archive that cannot be packed")
            with self._lock:
                self._dropped["unwritable"] += self._remove(items)
            return None

    def _fits(self) -> bool:
        if not self._unsent:
            return False
        size_bytes = self._sent_bytes + self._unsent[0].size_bytes
        return not self._sent or size_bytes <= self._max_sent_bytes

    def _cause(self) -> str:
        if self._figures is None:
            return "away"
        return "failing" if self._figures.is_failing else "behind"

    def _items(self) -> list[_Item]:
        return [*self._sent.values(), *self._unsent]

    def _remove(self, items: Collection[_Item]) -> int:
        """Take items out of the queue; what was sent of them is forgotten by the other side, too.

        Returns:
            How many were in it.
        """
        numbers = {one.number for one in items}
        sent = [self._sent.pop(number) for number in numbers & self._sent.keys()]
        unsent = [one for one in self._unsent if one.number in numbers]
        if unsent:
            self._unsent = collections.deque(o for o in self._unsent if o.number not in numbers)
        for one in (*sent, *unsent):
            del self._by_uid[one.kept.uid]
        self._forgotten.extend(one.number for one in sent)
        self._sent_bytes -= sum(one.size_bytes for one in sent)
        self._waiting_bytes -= sum(one.size_bytes for one in (*sent, *unsent))
        return len(sent) + len(unsent)

    def introduce(self) -> list[Frames]:
        """Begin a connection: what is not published is handed over, again where it was before."""
        with self._lock:
            self._unsent = collections.deque(self._items())
            self._sent.clear()
            self._sent_bytes = 0
        return [pack("archive", collector=self._name)]

    def on_away(self) -> None:
        """Take in that the archive's process is gone."""
        with self._lock:
            self._figures = None

    def on_message(self, frames: Frames) -> None:
        """Take in what the archive's process tells."""
        kind, values = unpack(frames)
        with self._lock:
            if kind == "archived":
                self._on_archived(**values)
            elif kind == "lost":
                numbers = {*values["numbers"]}
                lost = [one for one in self._items() if one.number in numbers]
                self._dropped["unwritable"] += self._remove(lost)
            elif kind == "figures":
                self._figures = figures_of(values)

    def _on_archived(self, last: int, *, is_lost: bool = False) -> None:
        done = [one for one in self._items() if one.number <= last]
        numbers = {one.number for one in done}
        for one in done:
            self._waiting_bytes -= one.size_bytes
            del self._by_uid[one.kept.uid]
            if self._sent.pop(one.number, None) is not None:
                self._sent_bytes -= one.size_bytes
        if self._unsent and self._unsent[0].number <= last:  # published for an earlier connection
            self._unsent = collections.deque(o for o in self._unsent if o.number not in numbers)
        if is_lost:
            self._dropped["unwritable"] += len(done)
        else:
            self._num_archived += len(done)
