"""The published files: which there are, what ids find in them, what leaves them and when."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet
from sortedcontainers import SortedDict

from moescope.archive.layout import Part
from moescope.archive.reading import batch_rows
from moescope.archive.store import Store
from moescope.archive.table import shared_of
from moescope.received import MALFORMED
from moescope_service.archive.index import FileIndex

logger = logging.getLogger("moescope.archive")

COMPACT_AFTER_S = 30.0
"""How long a deleted trace, which nobody finds any more, is still in its file."""
_DELETED = "_deleted.json"
"""Which traces of which files are deleted and still there; readers of Parquet pass over it."""


Places = tuple[FileIndex, npt.NDArray[np.int64]]
"""A file, and the places of some of its traces, ``[num_traces]``."""
_TRIES = 3
BROKEN = (*MALFORMED, pa.ArrowException, OSError)
"""What reading a file raises that is damaged, of another version, or cannot be read now."""


def encoded(table: pa.Table) -> pa.Buffer:
    """Return a table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    group_rows = batch_rows(shared_of(table.schema))
    parquet.write_table(table, sink, compression="zstd", row_group_size=group_rows)
    return sink.getvalue()


class Files:
    """The files of an archive, in the memory of the one process that writes it.

    Args:
        store: Where they are.
        ttl_s: Age at which traces leave; None: they stay.
        max_bytes: Size of all files beyond which the oldest ones leave; None: they stay.
    """

    def __init__(self, store: Store, *, ttl_s: float | None, max_bytes: int | None) -> None:
        self._store, self._ttl_s, self._max_bytes = store, ttl_s, max_bytes
        self._unread: list[tuple[Part, int]] | None = None
        self._deleted: dict[str, list[int]] = {}
        self._by_part: SortedDict[Part, FileIndex] = SortedDict()
        self._size_bytes = 0
        self._num_tries = 0
        self._last: collections.Counter[str] = collections.Counter()
        self._compact_at_s: float | None = None

    @property
    def are_read(self) -> bool:
        """Whether what was there at the start is known."""
        return self._unread == []

    @property
    def size_bytes(self) -> int:
        """Bytes of the files."""
        return self._size_bytes

    def __len__(self) -> int:
        return len(self._by_part) + len(self._unread or ())

    def list_all(self) -> None:
        """List what is there at the start.

        Raises:
            OSError: It cannot be listed or read.
        """
        self._store.sweep()
        parts = self._store.parts()
        try:
            with self._store.opened(_DELETED) as file:
                self._deleted = msgspec.json.decode(file.read(), type=dict[str, list[int]])
        except FileNotFoundError:
            self._deleted = {}
        except msgspec.DecodeError as error:
            raise OSError(
                f"{_DELETED}, which says what is deleted, is damaged ({error}): bring it back, or "
                "remove it, and deleted traces that are still in their files are found again"
            ) from error
        for part, _ in parts:
            self._last[part.collector] = max(self._last[part.collector], part.last)
        self._unread = parts
        self._size_bytes = sum(size_bytes for _, size_bytes in parts)

    @property
    def is_listed(self) -> bool:
        """Whether `list_all` was successful."""
        return self._unread is not None

    def read_next(self, now_s: float) -> None:
        """Read what ids find in one more file; the newest comes first.

        In one that is broken, or cannot be read in three tries though the store can, nothing is
        found. It leaves as others do, by its age and size.

        Raises:
            OSError: It cannot be read now.
        """
        if not self._unread:
            return
        part, size_bytes = self._unread[-1]
        self._num_tries += 1
        found = None
        try:
            with self._store.opened(part.path) as source:
                found = FileIndex.read(part, size_bytes, source)
        except FileNotFoundError:
            logger.warning("%s was removed by another hand", part.path)
        except BROKEN as error:
            if isinstance(error, OSError):
                if self._num_tries < _TRIES:
                    raise
                self._store.parts()  # raises where it is the store that cannot be read
            logger.warning("%s is left out of the archive's index: %s", part.path, error)
            found = FileIndex.nothing(part, size_bytes)
        self._size_bytes -= size_bytes
        if found is not None:
            self._add(found)
            found.deleted.update(self._deleted.get(part.path, ()))
            if found.deleted:
                self._compact_at_s = now_s
        self._unread.pop()
        self._num_tries = 0

    def last(self, collector: str) -> int:
        """Return the last number of a collector's traces that are published; 0: none is."""
        return self._last[collector]

    def publish(self, part: Part, table: pa.Table) -> None:
        """Publish a file.

        Raises:
            OSError: It cannot be written.
        """
        data = encoded(table)
        self._store.put(part.path, data)
        self._add(FileIndex.of(part, data.size, table))

    def remove_unsure(self, part: Part) -> None:
        """Remove a file whose publication failed, if it is there all the same.

        Raises:
            OSError: It cannot be removed.
        """
        self._store.remove(part.path)

    def find(self, key: int, *, own_only: bool = False) -> list[Places]:
        """Return the traces that an id finds, by their file.

        Args:
            key: `moescope_service.archive.index.id_key` of the id.
            own_only: Whether only those are found whose response has the id.
        """
        found = []
        for file in self._by_part.values():
            places, is_own = file.find(key)
            places = places[is_own] if own_only else places
            if places.size:
                found.append((file, places))
        return found

    def rows(self, file: FileIndex, first: int, end: int) -> tuple[pa.Table, dict[str, Any]]:
        """Read rows of a file, and what its traces share.

        Raises:
            OSError: They cannot be read. FileNotFoundError: the file was removed by another hand;
                nothing is found in it from now on.
        """
        with self._reading(file) as source:
            opened = parquet.ParquetFile(source, pre_buffer=False)
            groups: list[int] = []
            begin = skipped = 0
            for number in range(opened.metadata.num_row_groups):
                after = begin + opened.metadata.row_group(number).num_rows
                if after > first and begin < end:
                    skipped = begin if not groups else skipped
                    groups.append(number)
                begin = after
            table = opened.read_row_groups(groups)
            return table.slice(first - skipped, end - first), shared_of(opened.schema_arrow)

    def delete(self, found: Iterable[Places], now_s: float) -> int:
        """Let nobody find traces any more; they leave their files at the next compaction.

        Raises:
            OSError: It cannot be written down; nothing is deleted.
        """
        chosen = [(file, {*file.number[places].tolist()}) for file, places in found]
        if not chosen:
            return 0
        deleted = {**self._deleted}
        for file, numbers in chosen:
            deleted[file.part.path] = sorted(numbers | file.deleted)
        self._write_down(deleted)
        for file, numbers in chosen:
            file.deleted.update(numbers)
        if self._compact_at_s is None:
            self._compact_at_s = now_s + COMPACT_AFTER_S
        return sum(len(numbers) for _, numbers in chosen)

    def delete_numbers(self, collector: str, numbers: set[int], now_s: float) -> None:
        """Delete traces by their collector's numbers.

        Raises:
            OSError: As of `delete`.
        """
        files = [one for one in self._by_part.values() if one.part.collector == collector]
        wanted = [*numbers]
        found = [(file, np.flatnonzero(np.isin(file.number, wanted))) for file in files]
        self.delete([(file, places) for file, places in found if places.size], now_s)

    def expire(self, now_s: float) -> None:
        """Remove what is too old or too much.

        Raises:
            OSError: A file cannot be removed now.
        """
        while (
            self.are_read  # the oldest are read last
            and self._by_part
            and self._leaves(self._by_part.peekitem(0)[1], now_s)
        ):
            self._remove(self._by_part.peekitem(0)[1])

    def _leaves(self, file: FileIndex, now_s: float) -> bool:
        is_old = self._ttl_s is not None and file.oldest_s <= now_s - self._ttl_s
        return is_old or (self._max_bytes is not None and self._size_bytes > self._max_bytes)

    def compact(self, now_s: float) -> None:
        """Rewrite files without what was deleted; one that cannot be read is tried again later.

        Raises:
            OSError: A file cannot be written or removed now.
        """
        if not self.are_read or self._compact_at_s is None or now_s < self._compact_at_s:
            return
        left: dict[str, list[int]] = {}
        for file in [one for one in self._by_part.values() if one.deleted]:
            if file.number.size and file.deleted >= {*file.number.tolist()}:
                self._remove(file)
                continue
            try:
                with self._reading(file) as source:
                    table = parquet.read_table(source)
                shared_of(table.schema)
            except FileNotFoundError:
                continue
            except BROKEN as error:
                logger.warning("%s still has what was deleted of it: %s", file.part.path, error)
                left[file.part.path] = sorted(file.deleted)
                continue
            gone = pc.is_in(table["number"], pa.array(sorted(file.deleted), pa.int64()))
            rest = table.filter(pc.invert(gone))
            if len(rest):
                self.publish(file.part, rest)
            else:
                self._remove(file)
        self._write_down(left)
        self._compact_at_s = now_s + COMPACT_AFTER_S if left else None

    @contextlib.contextmanager
    def _reading(self, file: FileIndex) -> Iterator[Any]:
        try:
            with self._store.opened(file.part.path) as source:
                yield source
        except FileNotFoundError:
            self._drop(file)
            raise

    def _remove(self, file: FileIndex) -> None:
        self._store.remove(file.part.path)
        self._drop(file)

    def _drop(self, file: FileIndex) -> None:
        del self._by_part[file.part]
        self._size_bytes -= file.size_bytes

    def _add(self, file: FileIndex) -> None:
        before = self._by_part.get(file.part)
        self._size_bytes += file.size_bytes - (before.size_bytes if before else 0)
        self._by_part[file.part] = file
        self._last[file.part.collector] = max(self._last[file.part.collector], file.part.last)

    def _write_down(self, deleted: dict[str, list[int]]) -> None:
        if deleted != self._deleted:
            self._store.put(_DELETED, orjson.dumps(deleted))
            self._deleted = deleted
