"""Traces as Arrow tables and Parquet files; needs the extra ``arrow``.

The wide form has one row a token, and traces can be made of it again; `moescope.long_table` says
what the long form has, one row a selection. The wide form:

===================  ========================================================================
``request_id``       string, dictionary-encoded
``index``            int32: the choice's index in the response
``position``         int32: the token's position in the sequence, prompt first
``is_prompt``        bool
``token_id``         int32; null where the server keeps token ids out
``token``            string, dictionary-encoded: its text; no such column where it is not asked for
``source``           string, dictionary-encoded: `Source`, as ``computed``, ``missing`` …
``topk_ids``         uint8 or uint16, ``[num_layers][top_k]``
``topk_weights``     float32, the same shape; no such column where the weights were left out
``weights_version``  int32: which weights computed the row; null where that is unknown
===================  ========================================================================

The last sampled token has a row too, so that ``token_id`` holds whole sequences; it was never
routed: its ``source``, ids and weights are null, and its version. Those of a missing row are null,
but for its ``source``.

The list of layers is not one of fixed size, although every row has as many: pyarrow before 26
neither writes nor reads null lists of fixed size in Parquet. Weights are float32, since DuckDB and
others read no float16. The schema's metadata holds the rest under ``moescope``, as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope import formats
from moescope.errors import FormatError
from moescope.formats.shared import narrowed
from moescope.received import (
    MALFORMED,
    MAX_BYTES,
    MAX_TOKENS,
    check_fields,
    is_int,
    parse_json,
    shown,
)
from moescope.trace import RouteTrace, Source
from moescope.version_runs import runs_of

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    from moescope import long_table
    from moescope.long_table import METADATA as _METADATA
except ImportError as error:
    raise ImportError(
        "Arrow and Parquet need pyarrow, moescope's extra `arrow`: pip install pyarrow"
    ) from error

_KEYS = pa.schema([("request_id", pa.string()), ("index", pa.int32()), ("position", pa.int32())])


def to_table(
    traces: Sequence[RouteTrace],
    *,
    truncated: bool = False,
    next_start: int | None = None,
    **members: Any,  # noqa: ANN401 - any JSON
) -> pa.Table:
    """Return a table with a row for every token of traces of one model: the wide form.

    Args:
        traces: At least one.
        truncated: Whether older requests of the same id are left out.
        next_start: The first row that is left out; None where none is.
        members: What else the metadata holds, by name, as JSON.

    Raises:
        FormatError: No trace at all, or traces whose layers, top-k or weights differ.
    """
    if not traces:
        raise FormatError("a table needs at least one trace: its columns are those of the traces")
    formats.check_alike(traces)
    metas = [
        {**meta, "num_rows": trace.num_rows}
        for meta, trace in zip(formats.meta_of(traces), traces, strict=True)
    ]
    routed = _routed(metas)
    source = np.zeros(len(routed), np.int8)
    source[routed] = np.concatenate([trace.source for trace in traces])
    present = routed & (source != Source.MISSING)
    columns = {
        **_positions(metas),
        "token_id": pa.concat_arrays([_tokens(trace) for trace in traces]),
        **_texts(traces),
        "source": pa.DictionaryArray.from_arrays(
            pa.array(source, mask=~routed), pa.array(formats.SOURCE_NAMES)
        ),
        "topk_ids": _nested([trace.topk_ids[trace.present] for trace in traces], present),
    }
    weights = [t.topk_weights[t.present] for t in traces if t.topk_weights is not None]
    if weights:
        columns["topk_weights"] = _nested([w.astype(np.float32) for w in weights], present)
    columns["weights_version"] = _versions(traces, present)
    shared = {
        "layers": traces[0].layers.tolist(),
        "top_k": traces[0].top_k,
        "weights_dtype": weights[0].dtype.name if weights else None,
        "traces": metas,
        **formats.marks(truncated=truncated, next_start=next_start),
        **members,
    }
    return pa.table(columns, metadata={_METADATA: orjson.dumps(shared)})


def empty_table(**members: Any) -> pa.Table:  # noqa: ANN401 - any JSON
    """Return a table without rows, of no traces; ``members`` as of `to_table`."""
    named = pa.dictionary(pa.int32(), pa.string())
    types = {
        "request_id": named,
        "index": pa.int32(),
        "position": pa.int32(),
        "is_prompt": pa.bool_(),
        "token_id": pa.int32(),
        "source": pa.dictionary(pa.int8(), pa.string()),
        "topk_ids": pa.list_(pa.list_(pa.uint8(), 0)),
        "weights_version": pa.int32(),
    }
    shared = {"layers": [], "top_k": 0, "weights_dtype": None, "traces": [], **members}
    return pa.schema(types, {_METADATA: orjson.dumps(shared)}).empty_table()


def to_long_table(traces: Sequence[RouteTrace], *, missing: bool = False) -> pa.Table:
    """Return a table with a row for every selection of traces of one model: the long form.

    Args:
        traces: At least one.
        missing: Whether missing rows are there, with null experts and weights.

    Raises:
        FormatError: No trace at all, or traces whose layers, top-k or weights differ.
    """
    return long_table.of(to_table(traces), missing=missing)


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


def metadata_of(table: pa.Table, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return what the schema's metadata says, parsed.

    Raises:
        FormatError: It says nothing of traces, or too much.
    """
    data = (table.schema.metadata or {}).get(_METADATA)
    shared = None if data is None else parse_json(data, max_bytes)
    if not isinstance(shared, dict) or "traces" not in shared:
        raise FormatError("not a table of traces in the wide form: its metadata has none")
    return shared


def from_table(table: pa.Table, max_bytes: int = MAX_BYTES) -> list[RouteTrace]:
    """Rebuild the traces of a table of `to_table`, such as ``pyarrow.parquet.read_table(…)``.

    Exact but for missing rows: their ids and weights mean nothing and become zero, and at the start
    of a page their version is that of the rows behind them.

    Args:
        table: The table.
        max_bytes: Bytes that the arrays of ids and weights may have; each missing row has its part.

    Raises:
        FormatError: The table lacks moescope's metadata, or other rows than they describe, or it
            is too large.
    """
    try:
        table.validate(full=True)  # offsets of damaged bytes lead anywhere
        shared = metadata_of(table, max_bytes)
        metas = shared["traces"]
        for meta in metas:  # files of before there were pages
            meta.setdefault("start", 0)
            meta.setdefault("num_rows", max(0, meta["num_tokens"] - 1))
        _check_metadata(table, shared, max_bytes)
        if not metas:
            return []
        _check_rows(table, metas)
        return _traces(table, shared)
    except (*MALFORMED, pa.ArrowException) as error:
        raise FormatError(f"not a table of traces: {shown(error)}") from error


def _check_metadata(table: pa.Table, shared: dict[str, Any], max_bytes: int) -> None:
    """Check what the metadata say, before anything of these sizes is made."""
    for meta in shared["traces"]:
        check_fields(RouteTrace, meta)
        for name in ("start", "num_rows", "num_tokens"):
            if not is_int(meta[name]) or not 0 <= meta[name] <= MAX_TOKENS:
                raise ValueError(f"{name} is {shown(meta[name], 80)}")
    num_rows = sum(map(table_rows, shared["traces"]))
    if num_rows != len(table) or any(table_rows(meta) < 0 for meta in shared["traces"]):
        raise ValueError(
            f"rows were left out, added or reordered since `to_table`: {num_rows} are described, "
            f"{len(table)} here"
        )
    top_k, num_layers = shared["top_k"], len(shared["layers"])
    if not is_int(top_k) or top_k < 0:
        raise ValueError(f"top_k is {shown(top_k, 80)}")
    if len(table) * num_layers * top_k * 4 > max_bytes:
        raise ValueError(
            f"[{len(table)}, {num_layers}, {top_k}] weights are more than max_bytes={max_bytes:,}"
        )
    if shared["weights_dtype"] not in {None, "float16", "float32"}:
        raise ValueError(f"weights_dtype is {shown(shared['weights_dtype'], 80)}")


def _routed(metas: list[dict[str, Any]]) -> npt.NDArray[np.bool_]:
    """Return which rows of the table are rows of a trace: all but each sequence's last token."""
    return np.concatenate([np.arange(table_rows(meta)) < meta["num_rows"] for meta in metas])


def table_rows(meta: Mapping[str, Any]) -> int:
    """Return how many rows of the table a trace, or a page of one, has: one for each token.

    Args:
        meta: Of the trace, as in the schema's metadata.
    """
    end = meta["start"] + meta["num_rows"]
    is_last = end >= meta["num_tokens"] - 1
    return max(0, int((meta["num_tokens"] if is_last else end) - meta["start"]))


def _positions(metas: list[dict[str, Any]]) -> dict[str, pa.Array]:
    """Return the columns that say which token a row is."""
    lengths = [table_rows(meta) for meta in metas]
    trace = np.repeat(np.arange(len(metas)), lengths)
    position = np.concatenate(
        [
            np.arange(length, dtype=np.int32) + np.int32(meta["start"])
            for meta, length in zip(metas, lengths, strict=True)
        ]
    )
    prompt_len = np.array([meta["prompt_len"] for meta in metas])[trace]
    names = pa.array([meta["request_id"] for meta in metas]).dictionary_encode()
    return {
        "request_id": names.take(pa.array(trace)),
        "index": pa.array([meta["index"] for meta in metas], pa.int32()).take(pa.array(trace)),
        "position": pa.array(position),
        "is_prompt": pa.array(position < prompt_len),
    }


def _tokens(trace: RouteTrace) -> pa.Array:
    if trace.token_ids is None:
        num_tokens = table_rows({**formats.meta(trace), "num_rows": trace.num_rows})
        return pa.nulls(num_tokens, pa.int32())
    return pa.array(trace.token_ids)


def _texts(traces: Sequence[RouteTrace]) -> dict[str, pa.Array]:
    """Return the column of the tokens' text, if any trace has it."""
    if all(trace.tokens is None for trace in traces):
        return {}
    texts = [
        pa.nulls(len(_tokens(trace)), pa.string())
        if trace.tokens is None
        else pa.array(trace.tokens, pa.string())
        for trace in traces
    ]
    return {"token": pa.concat_arrays(texts).dictionary_encode()}


def _versions(traces: Sequence[RouteTrace], present: npt.NDArray[np.bool_]) -> pa.Array:
    """Return the numbers of the weights for the rows that are present, null for the others."""
    numbers, known = np.zeros(len(present), np.int32), present.copy()
    start = 0
    for trace in traces:
        rows = slice(start, start + trace.num_rows)
        version = trace.weights_version
        if version is None:
            known[rows] = False
        else:
            numbers[rows] = version
        start += table_rows({**formats.meta(trace), "num_rows": trace.num_rows})
    return pa.array(numbers, mask=~known)


def _nested(rows: list[npt.NDArray[Any]], present: npt.NDArray[np.bool_]) -> pa.Array:
    """Return ``[num_layers][top_k]`` for the rows that are present, null for the others."""
    values = np.concatenate(rows)
    _, num_layers, top_k = values.shape
    offsets = np.concatenate([[0], np.cumsum(present)]) * num_layers
    layers = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), top_k)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), layers, mask=pa.array(~present))


def _check_rows(table: pa.Table, metas: list[dict[str, Any]]) -> None:
    described = pa.table(_positions(metas)).select(_KEYS.names).cast(_KEYS)
    if not table.select(_KEYS.names).cast(_KEYS).equals(described):
        raise ValueError("rows were left out, added or reordered since `to_table`")


def _traces(table: pa.Table, shared: dict[str, Any]) -> list[RouteTrace]:
    present = table["topk_ids"].is_valid().to_numpy()

    def values(name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        array = np.zeros((len(table), len(shared["layers"]), shared["top_k"]), dtype)
        flat = pc.list_flatten(pc.list_flatten(table[name])).to_numpy()
        array[present] = narrowed(flat, dtype).reshape(-1, *array.shape[1:])
        return array

    ids = values("topk_ids", formats.id_dtype(shared["traces"][0]["num_experts"]))
    weights = shared["weights_dtype"] and values("topk_weights", shared["weights_dtype"])
    names = table["source"].cast(pa.string())
    source = pc.index_in(names, pa.array(formats.SOURCE_NAMES)).fill_null(Source.MISSING)
    source = source.to_numpy().astype(np.uint8)
    tokens = table["token_id"].fill_null(0).to_numpy()
    texts = table["token"].cast(pa.string()) if "token" in table.column_names else None
    numbers, known = _numbers(table)
    traces, start = [], 0
    for meta in shared["traces"]:
        end = start + table_rows(meta)
        rows = slice(start, start + meta.pop("num_rows"))
        traces.append(
            RouteTrace(
                layers=np.array(shared["layers"], np.int32),
                topk_ids=ids[rows],
                topk_weights=None if weights is None else weights[rows],
                source=source[rows],
                weights_versions=runs_of(numbers[rows], known[rows], meta["start"]),
                token_ids=tokens[start:end] if meta.pop("has_token_ids") else None,
                tokens=None if texts is None else _text(texts.slice(start, end - start)),
                **meta,
            ).check_values()
        )
        start = end
    return traces


def _text(texts: pa.ChunkedArray) -> list[str] | None:
    """Return the text of a trace's tokens; None where it has none."""
    return None if texts.null_count == len(texts) else texts.to_pylist()


def _numbers(table: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the number of the weights of each row, and where it is known."""
    if "weights_version" not in table.column_names:  # of before there were versions
        return np.zeros(len(table), np.int64), np.zeros(len(table), np.bool_)
    column = table["weights_version"]
    numbers = narrowed(column.fill_null(0).to_numpy(), np.int64)
    return numbers, column.is_valid().to_numpy()
