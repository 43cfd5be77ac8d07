"""Reads and writes tables of traces some rows at a time: Parquet, and Arrow files.

Files of an archive are read, too.

An Arrow file, which polars, pandas and others open by its name, has one dictionary a column: those
of the whole file are known before its rows are written. Needs the extra ``arrow``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from moescope import arrow
from moescope.archive.reading import entries
from moescope.arrow.long import METADATA
from moescope.arrow.long import of as long_of
from moescope.columns_file import columns_file
from moescope.errors import CommandError
from moescope.filters import EVERY, OPTIONS, Filter
from moescope.received import MAX_BYTES
from moescope.route_files.spool import Kept, Server, Stored
from moescope.trace import RouteTrace

_GROUP_CELLS = 2**21
_MAX_SEQUENCE_BYTES = 4 * MAX_BYTES
"""Bytes of weights, as float32, of the sequences that are read at a time."""


def write(path: Path, stored: Stored, *, long: bool = False, missing: bool = False) -> None:
    """Write the wide form, with the server in its metadata, or the long form.

    Args:
        path: The file; ``.parquet`` or ``.arrow``.
        stored: The traces; the long form needs at least one.
        long: Whether the form is the long one.
        missing: Whether the long form has missing rows.
    """
    weights = stored.dtype("topk_weights")
    shared = {
        "layers": stored.layers.tolist(),
        "top_k": stored.top_k,
        "weights_dtype": weights.name if weights else None,
        "traces": stored.metas,
        "server": stored.server,
    }
    metadata = None if long else {METADATA: orjson.dumps(shared)}
    dictionaries = _dictionaries(stored)
    with contextlib.ExitStack() as stack:
        writer = None
        for table in _groups(stored):
            group = _encoded(table, dictionaries)
            if long:
                group = _encoded(long_of(table, missing=missing), dictionaries)
            elif metadata:
                group = group.replace_schema_metadata(metadata)
            writer = writer or stack.enter_context(_writer(path, group.schema))
            writer.write_table(group)
        if writer is None:
            stack.enter_context(_writer(path, arrow.empty_table(**shared).schema))


def _writer(path: Path, schema: pa.Schema) -> Any:  # noqa: ANN401
    if path.suffix == ".parquet":
        return parquet.ParquetWriter(path, schema)
    return pa.ipc.new_file(str(path), schema)


def _dictionaries(stored: Stored) -> dict[str, pa.Array]:
    """Return the values of the columns that name the same things again and again."""
    names = dict.fromkeys(meta["request_id"] for meta in stored.metas)
    found = {"request_id": pa.array(names, pa.string())}
    if stored.dtype("tokens"):
        texts: dict[str, None] = {}
        for array in stored.arrays("tokens"):
            if array is not None:
                texts.update(dict.fromkeys(orjson.loads(array.tobytes())))
        found["token"] = pa.array(texts, pa.string())
    return found


def _encoded(table: pa.Table, dictionaries: dict[str, pa.Array]) -> pa.Table:
    for name, values in dictionaries.items():
        texts = table[name].cast(pa.string()).combine_chunks()
        indices = pc.index_in(texts, value_set=values, skip_nulls=True)
        column = pa.DictionaryArray.from_arrays(indices, values)
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _groups(stored: Stored) -> Iterator[pa.Table]:
    """Yield the wide form, some rows at a time, with metadata of the first of its traces."""
    cells = max(len(stored.layers) * stored.top_k, 1)
    num_rows = int(np.clip(_GROUP_CELLS // cells, 256, 2**16))
    has_text, waiting, size = stored.dtype("tokens") is not None, list[pa.Table](), 0
    for meta, trace in stored.traces():
        for start in range(
            trace.start, max(trace.start + trace.num_rows, trace.start + 1), num_rows
        ):
            table = _wide(trace.page(start, num_rows), meta, has_text=has_text)
            waiting.append(table)
            size += len(table)
            if size >= num_rows:
                yield _joined(waiting)
                waiting, size = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(tables: list[pa.Table]) -> pa.Table:
    first = tables[0].schema.metadata
    whole = pa.concat_tables([one.replace_schema_metadata(None) for one in tables])
    return whole.unify_dictionaries().combine_chunks().replace_schema_metadata(first)


def _wide(page: RouteTrace, meta: dict[str, Any], *, has_text: bool) -> pa.Table:
    table = arrow.to_table([page])
    if meta["prompt_len"] is None:
        place = table.schema.get_field_index("is_prompt")
        table = table.set_column(place, "is_prompt", pa.nulls(len(table), pa.bool_()))
    if has_text and page.tokens is None:
        named = pa.nulls(len(table), pa.string()).dictionary_encode()
        table = table.add_column(table.schema.get_field_index("token_id") + 1, "token", named)
    return table


def read(path: Path, where: Filter = EVERY) -> tuple[Server, Iterator[Kept]]:
    """Return what a table says of its server, and its traces, every value checked.

    Args:
        path: The file.
        where: Which traces, of a file of an archive.

    Raises:
        CommandError: It is of no archive, and not all traces are wanted.
        FormatError: It is of the long form, or a table of something else.
        Exception: It is no such file; what it is depends on where it is broken.
    """
    with columns_file(path) as file:
        if "archive" in file.shared:
            spec = file.shared["spec"]
            return {name: spec[name] for name in ("device", "seed")}, _archived(path, where)
        if where:
            raise CommandError(f"it is no file of an archive, from which alone {OPTIONS} choose")
        return file.shared.get("server", {}), _traces(path)


def _archived(path: Path, where: Filter) -> Iterator[Kept]:
    with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        num_done = 0
        for one in entries(file, where):
            num_done += one.trace.num_tokens
            yield Kept(one.trace, done=min(1.0, num_done / file.metadata.num_rows))


def _traces(path: Path) -> Iterator[Kept]:
    with columns_file(path) as file:
        shared, metas = file.shared, file.shared["traces"]
        cells = max(len(shared["layers"]) * shared["top_k"], 1)
        num_rows = int(np.clip(_GROUP_CELLS // cells, 256, 2**16))
        rest, first = None, 0
        for batch in file.batches(num_rows):
            table = pa.Table.from_batches([batch])
            rest = table if rest is None else pa.concat_tables([rest, table])
            end, size = first, 0
            while end < len(metas) and size + arrow.table_rows(metas[end]) <= len(rest):
                size += arrow.table_rows(metas[end])
                end += 1
            yield from _whole(rest.slice(0, size), shared, metas[first:end], end / len(metas))
            rest, first = rest.slice(size), end
        if first < len(metas) or (rest is not None and len(rest)):
            raise ValueError("it has other rows than its metadata describe")


def _whole(
    table: pa.Table, shared: dict[str, Any], metas: list[dict[str, Any]], done: float
) -> Iterator[Kept]:
    known = [meta["prompt_len"] is not None for meta in metas]
    metas = [{**meta, "prompt_len": meta["prompt_len"] or 0} for meta in metas]
    of_these = {METADATA: orjson.dumps({**shared, "traces": metas})}
    traces = arrow.from_table(table.replace_schema_metadata(of_these), _MAX_SEQUENCE_BYTES)
    for trace, knows_prompt in zip(traces, known, strict=True):
        yield Kept(trace, knows_prompt, done)
