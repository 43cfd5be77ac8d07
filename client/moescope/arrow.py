"""Traces as Arrow tables and Parquet files, one row a token; needs the extra ``arrow``.

=================  ==========================================================================
``request_id``     string, dictionary-encoded
``index``          int32: the choice's index in the response
``position``       int32: the token's position in the sequence, prompt first
``is_prompt``      bool
``token_id``       int32; null where the server keeps token ids out
``source``         string, dictionary-encoded: ``computed``, ``cached`` or ``missing``
``topk_ids``       uint8 or uint16, ``[num_layers][top_k]``
``topk_weights``   float32, the same shape; no such column where the weights were left out
=================  ==========================================================================

The last sampled token has a row too, so that ``token_id`` holds whole sequences; it was never
routed: its ``source``, ids and weights are null. Ids and weights of a missing row are null.

The list of layers is not one of fixed size, although every row has as many: pyarrow before 26
neither writes nor reads null lists of fixed size in Parquet. Weights are float32, since DuckDB and
others read no float16. The schema's metadata holds the rest under ``moescope``, as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope import formats
from moescope.errors import FormatError
from moescope.trace import RouteTrace, Source

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet
except ImportError as error:
    raise ImportError(
        "Arrow and Parquet need pyarrow, moescope's extra `arrow`: pip install pyarrow"
    ) from error

_METADATA = b"moescope"
_KEYS = pa.schema([("request_id", pa.string()), ("index", pa.int32()), ("position", pa.int32())])


def to_table(traces: Sequence[RouteTrace], *, truncated: bool = False) -> pa.Table:
    """Return a table with a row for every token of traces of one model.

    Args:
        traces: At least one.
        truncated: Whether older requests of the same id are left out.

    Raises:
        FormatError: No trace at all, or traces whose layers, top-k or weights differ.
    """
    if not traces:
        raise FormatError("a table needs at least one trace: its columns are those of the traces")
    formats.check_alike(traces)
    metas = formats.meta_of(traces)
    routed = _routed(metas)
    source = np.zeros(len(routed), np.int8)
    source[routed] = np.concatenate([trace.source for trace in traces])
    present = routed & (source != Source.MISSING)
    columns = {
        **_positions(metas),
        "token_id": pa.concat_arrays([_tokens(trace) for trace in traces]),
        "source": pa.DictionaryArray.from_arrays(
            pa.array(source, mask=~routed), pa.array(formats.SOURCE_NAMES)
        ),
        "topk_ids": _nested([trace.topk_ids[trace.present] for trace in traces], present),
    }
    weights = [t.topk_weights[t.present] for t in traces if t.topk_weights is not None]
    if weights:
        columns["topk_weights"] = _nested([w.astype(np.float32) for w in weights], present)
    shared = {
        "layers": traces[0].layers.tolist(),
        "top_k": traces[0].top_k,
        "weights_dtype": weights[0].dtype.name if weights else None,
        "traces": metas,
    }
    if truncated:
        shared["truncated"] = True
    return pa.table(columns, metadata={_METADATA: orjson.dumps(shared)})


def dump_arrow(traces: Sequence[RouteTrace], *, truncated: bool = False) -> bytes:
    """Write `to_table` as an Arrow IPC stream.

    Raises:
        FormatError: No trace at all, or traces whose layers, top-k or weights differ.
    """
    table, sink = to_table(traces, truncated=truncated), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def dump_parquet(traces: Sequence[RouteTrace], *, truncated: bool = False) -> bytes:
    """Write `to_table` as a Parquet file.

    Raises:
        FormatError: No trace at all, or traces whose layers, top-k or weights differ.
    """
    sink = pa.BufferOutputStream()
    parquet.write_table(to_table(traces, truncated=truncated), sink)
    return bytes(sink.getvalue())


def from_table(table: pa.Table) -> list[RouteTrace]:
    """Rebuild the traces of a table of `to_table`, such as ``pyarrow.parquet.read_table(…)``.

    Exact but for the ids and weights of missing rows, which mean nothing and become zero.

    Raises:
        FormatError: The table lacks moescope's metadata, or has not the rows that they tell of.
    """
    try:
        shared = orjson.loads((table.schema.metadata or {})[_METADATA])
        _check_rows(table, shared["traces"])
        return _traces(table, shared)
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise FormatError(f"not a table of traces: {error!r}") from error


def _routed(metas: list[dict[str, Any]]) -> npt.NDArray[np.bool_]:
    """Return which rows of the table are rows of a trace: all but each sequence's last."""
    return np.concatenate([np.arange(m["num_tokens"]) < m["num_tokens"] - 1 for m in metas])


def _positions(metas: list[dict[str, Any]]) -> dict[str, pa.Array]:
    """Return the columns that say which token a row is."""
    lengths = [meta["num_tokens"] for meta in metas]
    trace = np.repeat(np.arange(len(metas)), lengths)
    position = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
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
        return pa.nulls(trace.num_tokens, pa.int32())
    return pa.array(trace.token_ids)


def _nested(rows: list[npt.NDArray[Any]], present: npt.NDArray[np.bool_]) -> pa.Array:
    """Return ``[num_layers][top_k]`` for the rows that are present, null for the others."""
    values = np.concatenate(rows)
    _, num_layers, top_k = values.shape
    offsets = np.concatenate([[0], np.cumsum(present)]) * num_layers
    layers = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), top_k)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), layers, mask=pa.array(~present))


def _check_rows(table: pa.Table, metas: list[dict[str, Any]]) -> None:
    told = pa.table(_positions(metas)).select(_KEYS.names).cast(_KEYS)
    if not table.select(_KEYS.names).cast(_KEYS).equals(told):
        raise ValueError("rows were left out, added or reordered since `to_table`")


def _traces(table: pa.Table, shared: dict[str, Any]) -> list[RouteTrace]:
    present = table["topk_ids"].is_valid().to_numpy()

    def values(name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        array = np.zeros((len(table), len(shared["layers"]), shared["top_k"]), dtype)
        flat = pc.list_flatten(pc.list_flatten(table[name])).to_numpy()
        array[present] = flat.reshape(-1, *array.shape[1:])
        return array

    ids = values("topk_ids", formats.id_dtype(shared["traces"][0]["num_experts"]))
    weights = shared["weights_dtype"] and values("topk_weights", shared["weights_dtype"])
    names = table["source"].cast(pa.string())
    source = pc.index_in(names, pa.array(formats.SOURCE_NAMES)).fill_null(Source.MISSING)
    source = source.to_numpy().astype(np.uint8)
    tokens = table["token_id"].fill_null(0).to_numpy()
    traces, start = [], 0
    for meta in shared["traces"]:
        end = start + meta["num_tokens"]
        rows = slice(start, max(start, end - 1))
        traces.append(
            RouteTrace(
                layers=np.array(shared["layers"], np.int32),
                topk_ids=ids[rows],
                topk_weights=None if weights is None else weights[rows],
                source=source[rows],
                token_ids=tokens[start:end] if meta.pop("has_token_ids") else None,
                **meta,
            )
        )
        start = end
    return traces
