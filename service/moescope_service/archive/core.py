"""The archive without its socket: messages in, replies out; runs in one thread."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from moescope.archive.layout import Part
from moescope.archive.store import Store
from moescope.archive.table import Archived, to_table
from moescope.errors import FormatError
from moescope.received import MALFORMED
from moescope_service.archive import lookup
from moescope_service.archive.files import BROKEN, Files
from moescope_service.archive.index import id_key
from moescope_service.archive.pending import Pending, groups, matching, part_of
from moescope_service.archive_messages import unpack_traces
from moescope_service.messages import Frames, pack, unpack
from moescope_service.queries import (
    ArchiveFigures,
    DeleteQuery,
    DeleteReply,
    Query,
    RoutesQuery,
    pack_reply,
    unpack_query,
)
from moescope_service.settings import Settings

logger = logging.getLogger("moescope.archive")

FILE_BYTES = 32 * 2**20
"""Bytes of the arrays of traces at which a file is published, even before its time."""
MAX_QUERIES = 256
"""Queries that may wait until the files that were there at the start are read."""
_FIRST_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0
_FIGURES_S = 1.0


class Archive:
    """Takes traces in, publishes them, and answers what is asked of them.

    Where the store takes no file it is tried again, after pauses of 1 s that double up to 30 s;
    the traces wait, here and in the collector, which bounds them.

    Args:
        store: Where the files are.
        settings: How often files are published, and when they leave.
        clock: Unix time, in seconds; it may be set back.
        monotonic: Seconds that only grow.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = Files(
            store, ttl_s=settings.archive_ttl_s, max_bytes=settings.archive_max_bytes
        )
        self._interval_s = settings.archive_interval_s
        self._clock, self._monotonic = clock, monotonic
        self._pending: dict[tuple[str, int], Pending] = {}  # by collector and number
        self._unsure: Part | None = None  # not published, as far as is known
        self._pending_bytes = 0
        self._collectors: dict[bytes, str] = {}  # by the connection
        self._received: dict[str, int] = {}  # the last number, by collector
        self._told: dict[str, int] = {}  # the last number that is published or given up
        self._forgotten: dict[str, set[int]] = {}  # numbers that are yet to be deleted
        self._queries: list[tuple[bytes, int, Query[Any]]] = []
        self._error: OSError | None = None
        self._retry_at_s, self._pause_s = 0.0, _FIRST_PAUSE_S
        self._figures: tuple[ArchiveFigures, float] | None = None
        self.outbox: list[tuple[bytes, Frames]] = []
        """(peer, frames) to be sent."""

    @property
    def is_busy(self) -> bool:
        """Whether there is something to do at once."""
        return self._error is None and not self._files.are_read

    def handle(self, peer: bytes, frames: Frames) -> None:
        """Take one message in.

        Raises:
            ValueError: The kind of message is unknown.
        """
        kind, values = unpack(frames)
        match kind:
            case "archive":
                self._on_collector(peer, values["collector"])
            case "traces":
                self._on_traces(peer, values, frames)
            case "forget":
                self._forget(self._collectors[peer], {*values["numbers"]})
            case "alias":
                self._add_ids(self._collectors[peer], values["ids"])
            case "query":
                self._ask(peer, *unpack_query(values))
            case "cancel":
                self._queries = [
                    one for one in self._queries if one[:2] != (peer, values["number"])
                ]
            case "server":
                pass
            case _:
                raise ValueError(f"unknown kind of message: {kind!r}")

    def tick(self) -> None:
        """Do what is due: read files of before, publish, tidy up, tell the collector."""
        now_s = self._monotonic()
        if now_s >= self._retry_at_s:
            try:
                self._work(now_s)
            except OSError as error:
                self._fail(error, now_s)
            else:
                self._recover()
        if self._files.are_read and self._queries:
            waiting, self._queries = self._queries, []
            for one in waiting:
                self._answer(*one)
        self._tell(now_s)

    def close(self) -> None:
        """Publish what is here."""
        try:
            if not self._files.is_listed:
                self._files.list_all()
            self._publish()
        except OSError as error:
            logger.warning("the archive lacks the last %d traces: %s", len(self._pending), error)

    def _work(self, now_s: float) -> None:
        """Do all that is due, whatever of it fails: on a full disk, what is too old makes room.

        Raises:
            OSError: The first thing that failed.
        """
        if not self._files.is_listed:
            self._files.list_all()
            for peer, collector in self._collectors.items():
                self._acknowledge(peer, collector)
        failed: list[OSError] = []
        for job, at_s in (
            (self._publish_due, self._clock()),
            (self._files.read_next, now_s),
            (self._delete_forgotten, now_s),
            (self._files.expire, self._clock()),
            (self._files.compact, now_s),
        ):
            try:
                job(at_s)
            except OSError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def _publish_due(self, now_s: float) -> None:
        oldest_s = min((one.entry.finished_s for one in self._pending.values()), default=now_s)
        is_due = not 0 <= now_s - oldest_s < self._interval_s  # below 0 the clock was set back
        if is_due or self._pending_bytes >= FILE_BYTES:
            self._publish()

    def _on_collector(self, peer: bytes, collector: str) -> None:
        self._collectors = {p: c for p, c in self._collectors.items() if c != collector}
        self._collectors[peer] = collector
        self._figures = None
        if self._files.is_listed:
            self._acknowledge(peer, collector)

    def _acknowledge(self, peer: bytes, collector: str) -> None:
        """Say what of a collector's traces was published before."""
        if last := max(self._files.last(collector), self._told.get(collector, 0)):
            self.outbox.append((peer, pack("archived", last=last)))

    def _on_traces(self, peer: bytes, values: dict[str, Any], frames: Frames) -> None:
        collector = self._collectors[peer]
        try:
            spec, handed, traces = unpack_traces(values, frames)
        except MALFORMED:
            numbers = [one["number"] for one in values["handed"]]
            logger.exception("left %d traces out of the archive", len(numbers))
            self.outbox.append((peer, pack("lost", numbers=numbers)))
            return
        for one, trace in zip(handed, traces, strict=True):
            if one.number > self._received.get(collector, 0):
                self._received[collector] = one.number
                entry = Archived(
                    trace=trace, number=one.number, finished_s=one.finished_s,
                    ids=one.ids, owner=one.owner,
                )  # fmt: skip
                new = self._pending[collector, one.number] = Pending(entry, collector, spec)
                self._pending_bytes += new.size_bytes

    def _add_ids(self, collector: str, ids: list[tuple[int, str]]) -> None:
        """Let more ids find traces that are not published yet."""
        for number, one in ids:
            if found := self._pending.get((collector, number)):
                entry = dataclasses.replace(found.entry, ids=(*found.entry.ids, one))
                self._pending[collector, number] = dataclasses.replace(found, entry=entry)

    def _publish(self) -> None:
        """Publish what is pending, group by group.

        Raises:
            OSError: The store takes no file now.
        """
        if self._unsure and not any(one.belongs(self._unsure) for one in self._pending.values()):
            self._files.remove_unsure(self._unsure)  # all of it is deleted
            self._unsure = None
        for group in groups(self._pending.values(), self._unsure):
            collector, last = group[0].collector, group[-1].entry.number
            new = [one for one in group if one.entry.number > self._files.last(collector)]
            is_lost = False
            if new:
                spec = new[0].spec
                try:
                    table = to_table([one.entry for one in new], spec=spec)
                except (FormatError, pa.ArrowException):
                    logger.exception("left %d traces out of the archive", len(new))
                    is_lost = True
                else:
                    # What has no answer may be there: in the same place it is not there twice.
                    part = self._unsure
                    if part is None or not new[0].belongs(part):
                        part = self._unsure = part_of(new)
                    self._files.publish(part, table)
                    self._unsure = None
            self._drop(group)
            self._told[collector] = last
            for peer in [p for p, name in self._collectors.items() if name == collector]:
                message = pack("archived", last=last, is_lost=is_lost)
                self.outbox.append((peer, message))

    def _drop(self, gone: Iterable[Pending]) -> None:
        for one in gone:
            del self._pending[one.collector, one.entry.number]
            self._pending_bytes -= one.size_bytes

    def _forget(self, collector: str, numbers: set[int]) -> None:
        """Take in that the collector deleted traces; they may be in a file not read yet."""
        places = [(collector, number) for number in numbers]
        self._drop([self._pending[place] for place in places if place in self._pending])
        self._forgotten.setdefault(collector, set()).update(numbers)
        with contextlib.suppress(OSError):  # it is tried again
            self._delete_forgotten(self._monotonic())

    def _delete_forgotten(self, now_s: float) -> None:
        while self._forgotten and self._files.are_read:
            collector, numbers = next(iter(self._forgotten.items()))
            self._files.delete_numbers(collector, numbers, now_s)
            del self._forgotten[collector]

    def _ask(self, peer: bytes, number: int, query: Query[Any]) -> None:
        if self._files.are_read:
            self._answer(peer, number, query)
        elif len(self._queries) < MAX_QUERIES:
            self._queries.append((peer, number, query))

    def _answer(self, peer: bytes, number: int, query: Query[Any]) -> None:
        """Answer a query; one that fails is not answered, and its server says so."""
        try:
            match query:
                case RoutesQuery():
                    reply: Any = lookup.routes(self._files, self._pending.values(), query)
                case DeleteQuery():
                    reply = DeleteReply(deleted=self._delete(query))
                case _:
                    raise ValueError(f"the archive answers no {type(query).__name__}")
        except BROKEN as error:
            logger.warning("a query of the archive is not answered: %s", error)
            return
        self.outbox.append((peer, pack_reply(number, reply)))

    def _delete(self, query: DeleteQuery) -> int:
        if query.owner == lookup.NOBODY:
            return 0
        own, found = matching(self._pending.values(), query.request_id, query.owner)
        key = id_key(query.request_id, query.owner)
        in_files = self._files.find(key, own_only=True)
        chosen = own
        if not (own or in_files or query.own_only):
            in_files, chosen = self._files.find(key), found
        deleted = self._files.delete(in_files, self._monotonic())
        self._drop(chosen)
        return deleted + len(chosen)

    def _fail(self, error: OSError, now_s: float) -> None:
        if self._error is None:
            logger.error(
                "the archive cannot be written or read: %s; it is tried again every %g s at the "
                "latest, and traces wait", error, _MAX_PAUSE_S,
            )  # fmt: skip
        self._error = error
        self._retry_at_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)

    def _recover(self) -> None:
        if self._error is not None:
            logger.warning("the archive goes on")
        self._error, self._pause_s = None, _FIRST_PAUSE_S

    def _tell(self, now_s: float) -> None:
        figures = ArchiveFigures(
            files=len(self._files),
            bytes=self._files.size_bytes,
            is_failing=self._error is not None,
        )
        told, at_s = self._figures or (None, 0.0)
        is_news = told is None or told.is_failing != figures.is_failing
        if not is_news and (figures == told or now_s - at_s < _FIGURES_S):
            return
        self._figures = figures, now_s
        message = pack("figures", figures=figures)
        self.outbox += [(peer, message) for peer in self._collectors]
