"""Reads the traces of an archive, some at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from moescope.archive.layout import Part
from moescope.archive.store import Store
from moescope.archive.table import Archived, entries_of, firsts, shared_of
from moescope.errors import FormatError
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
        for part in self.parts(since_s=since_s, until_s=until_s):
            try:
                for table, shared in self._tables(part):
                    kept = _filtered(table, since_s, until_s, model, lora)
                    yield from entries_of(kept, shared)
            except FileNotFoundError:
                continue
            except (*MALFORMED, pa.ArrowException, FormatError) as error:
                raise FormatError(f"{part.path}: {shown(error)}") from error

    def _tables(self, part: Part) -> Iterator[tuple[pa.Table, dict[str, Any]]]:
        """Yield the rows of a file as tables of whole traces."""
        with self._store.opened(part.path) as source:
            file = parquet.ParquetFile(source, pre_buffer=False)
            shared = shared_of(file.schema_arrow)
            rest = None
            for batch in file.iter_batches(batch_rows(shared)):
                table = pa.Table.from_batches([batch])
                table = table if rest is None else pa.concat_tables([rest, table])
                last = int(firsts(table)[-2])
                if last:
                    yield table.slice(0, last).combine_chunks(), shared
                rest = table.slice(last)
            if rest is not None:
                yield rest.combine_chunks(), shared


def batch_rows(shared: dict[str, Any]) -> int:
    """Return how many rows of a file are written as a group, and read at once.

    Args:
        shared: `shared_of` the file.
    """
    row_bytes = 5 * max(1, len(shared["layers"]) * int(shared["top_k"]))
    return int(np.clip(_BATCH_BYTES // row_bytes, 1024, 122_880))


def _filtered(
    table: pa.Table,
    since_s: float | None,
    until_s: float | None,
    model: str | None,
    lora: str | None,
) -> pa.Table:
    conditions = []
    if since_s is not None:
        conditions.append(pc.greater_equal(table["finished_s"], since_s))
    if until_s is not None:
        conditions.append(pc.less(table["finished_s"], until_s))
    if model is not None:
        conditions.append(pc.equal(table["model"].cast(pa.string()), model))
    if lora is not None:
        conditions.append(pc.equal(table["lora"].cast(pa.string()).fill_null(""), lora))
    return table.filter(functools.reduce(pc.and_, conditions)) if conditions else table
