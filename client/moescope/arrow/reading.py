"""Makes traces of tables of the wide form again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moescope import formats
from moescope.arrow.long import METADATA
from moescope.arrow.wide import positions, table_rows
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

_KEYS = pa.schema([("request_id", pa.string()), ("index", pa.int32()), ("position", pa.int32())])


def metadata_of(table: pa.Table, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return what the schema's metadata says, parsed.

    Raises:
        FormatError: It says nothing of traces, or too much.
    """
    data = (table.schema.metadata or {}).get(METADATA)
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


def _check_rows(table: pa.Table, metas: list[dict[str, Any]]) -> None:
    described = pa.table(positions(metas)).select(_KEYS.names).cast(_KEYS)
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
