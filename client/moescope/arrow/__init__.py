"""Traces as Arrow tables and Parquet files; needs the extra ``arrow``.

The wide form (`moescope.arrow.wide`) has one row a token, and traces can be made of it again; the
long form (`moescope.arrow.long`) has one row a selection.
"""

from __future__ import annotations

from collections.abc import Sequence

from moescope.trace import RouteTrace

try:
    import pyarrow as pa
    from pyarrow import parquet

    from moescope.arrow.long import of as _long
    from moescope.arrow.reading import from_table, metadata_of
    from moescope.arrow.wide import empty_table, table_rows, to_table
except ImportError as error:
    raise ImportError(
        "Arrow and Parquet need pyarrow, moescope's extra `arrow`: pip install pyarrow"
    ) from error

__all__ = [
    "arrow_bytes",
    "dump_arrow",
    "dump_parquet",
    "empty_table",
    "from_table",
    "metadata_of",
    "parquet_bytes",
    "table_rows",
    "to_long_table",
    "to_table",
]


def to_long_table(traces: Sequence[RouteTrace], *, missing: bool = False) -> pa.Table:
    """Return a table with a row for every selection of traces of one model: the long form.

    Args:
        traces: At least one.
        missing: Whether missing rows are there, with null experts and weights.

    Raises:
        FormatError: No trace at all, or traces whose layers, top-k or weights differ.
    """
    return _long(to_table(traces), missing=missing)


def dump_arrow(
    traces: Sequence[RouteTrace], *, truncated: bool = False, next_start: int | None = None
) -> bytes:
    """Write `to_table`, which takes the same, as an Arrow IPC stream.

    Raises:
        FormatError: No trace at all, or traces whose layers, top-k or weights differ.
    """
    return arrow_bytes(to_table(traces, truncated=truncated, next_start=next_start))


def arrow_bytes(table: pa.Table) -> bytes:
    """Write a table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def dump_parquet(
    traces: Sequence[RouteTrace], *, truncated: bool = False, next_start: int | None = None
) -> bytes:
    """Write `to_table`, which takes the same, as a Parquet file.

    Raises:
        FormatError: No trace at all, or traces whose layers, top-k or weights differ.
    """
    return parquet_bytes(to_table(traces, truncated=truncated, next_start=next_start))


def parquet_bytes(table: pa.Table) -> bytes:
    """Write a table as a Parquet file."""
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    return bytes(sink.getvalue())
