"""The wide form of a table of traces: one row a token.

===================  ========================================================================
``request_id``       string, dictionary-encoded
``index``            int32: the choice's index in the response
``position``         int32: the token's position in the sequence, prompt first
``is_prompt``        bool; null in a file that was made of a log, which does not say it
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
import pyarrow as pa

from moescope import formats
from moescope.arrow.long import METADATA
from moescope.errors import FormatError
from moescope.trace import RouteTrace, Source


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
        **positions(metas),
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
        "weights_dtype": np.result_type(*weights).name if weights else None,
        "traces": metas,
        **formats.marks(truncated=truncated, next_start=next_start),
        **members,
    }
    return pa.table(columns, metadata={METADATA: orjson.dumps(shared)})


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
    return pa.schema(types, {METADATA: orjson.dumps(shared)}).empty_table()


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


def positions(metas: list[dict[str, Any]]) -> dict[str, pa.Array]:
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
