"""Reads the traces of an archive, some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from moescope.archive.layout import Part
from moescope.archive.store import Store
from moescope.archive.table import FILTERED, Archived, entries_of, firsts, mask, shared_of
from moescope.errors import FormatError
from moescope.filters import Filter
from moescope.received import MALFORMED, shown

_BATCH_BYTES = 16 * 2**20


class Archive:
    """An archive of traces, to be read while a server writes it, too.

    Args:
        location: Its directory, or ``s3://bucket/prefix``; that of one server, or one in which
            several have theirs, ``server=NAME``.
    """

    def __init__(self, location: str | Path) -> None:
        self._store = Store(str(location))

    def parts(self, *, since_s: float | None = None, until_s: float | None = None) -> list[Part]:
        """Return the files whose hours have a part of a span of time.

        Args:
            since_s: Unix time in seconds; None: from the beginning.
            until_s: Unix time in seconds, itself left out; None: to the end.

        Raises:
            OSError: They cannot be listed.
        """
        parts = self._store.parts(of_servers=True)
        return [part for part, _ in parts if part.overlaps(since_s, until_s)]

    def scan(
        self,
        *,
        since_s: float | None = None,
        until_s: float | None = None,
        model: str | None = None,
        lora: str | None = None,
    ) -> Iterator[Archived]:
        """Yield traces in the order in which they finished, with what is known of them besides.

        Those of several servers come hour by hour, and in each hour collector by collector.

        Holds one row group at a time, and the trace that goes on in the next one. A file that the
        server removes meanwhile, by age or size, is passed over.

        Args:
            since_s: As of `parts`: only traces that finished then or later.
            until_s: As of `parts`: only traces that finished before.
            model: Only those of the model of this name.
            lora: Only those of the adapter of this name; ``""``: only those without one.

        Raises:
            FormatError: A file is broken; the message names it.
            OSError: A file cannot be read.
        """
        where = Filter(since_s=since_s, until_s=until_s, model=model, lora=lora)
        for part in self.parts(since_s=since_s, until_s=until_s):
            try:
                with self._store.opened(part.path) as source:
                    yield from entries(parquet.ParquetFile(source, pre_buffer=False), where)
            except FileNotFoundError:
                continue
            except (*MALFORMED, pa.ArrowException, FormatError) as error:
                raise FormatError(f"{part.path}: {shown(error)}") from error


def entries(file: parquet.ParquetFile, where: Filter) -> Iterator[Archived]:
    """Yield the traces of a file, one row group in memory at a time.

    Args:
        file: The file.
        where: Which traces.

    Raises:
        FormatError: It is no file of an archive, or one of a later version.
        Exception: It is broken; what it is depends on where.
    """
    shared = shared_of(file.schema_arrow)
    for table in _tables(file, batch_rows(shared), groups(file, where)):
        yield from entries_of(table.filter(mask(table, where)) if where else table, shared)


def groups(file: parquet.ParquetFile, where: Filter) -> list[int]:
    """Return the row groups that have a trace which is wanted.

    Of the others nothing is read but the columns that say it.

    Args:
        file: A file of an archive.
        where: Which traces.
    """
    every = range(file.num_row_groups)
    return [one for one in every if not where or _has(file, one, where)]


def _has(file: parquet.ParquetFile, row_group: int, where: Filter) -> bool:
    table = file.read_row_group(row_group, columns=FILTERED)
    table.validate(full=True)  # indices of damaged bytes lead anywhere
    return bool(pc.any(mask(table, where)).as_py())


def _tables(file: parquet.ParquetFile, num_rows: int, row_groups: list[int]) -> Iterator[pa.Table]:
    """Yield the rows of row groups as tables of whole traces."""
    rest = None
    for batch in file.iter_batches(num_rows, row_groups=row_groups):
        table = pa.Table.from_batches([batch])
        table = table if rest is None else pa.concat_tables([rest, table])
        last = int(firsts(table)[-2])
        if last:
            yield table.slice(0, last).combine_chunks()
        rest = table.slice(last)
    if rest is not None:
        yield rest.combine_chunks()


def batch_rows(shared: dict[str, Any]) -> int:
    """Return how many rows of a file are written as a group, and read at once.

    Args:
        shared: `shared_of` the file.
    """
    row_bytes = 5 * max(1, len(shared["layers"]) * int(shared["top_k"]))
    return int(np.clip(_BATCH_BYTES // row_bytes, 1024, 122_880))
