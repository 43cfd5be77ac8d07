"""The tables of an archive: those of `moescope.arrow`, with what is known of each trace.

One row a token, in the order in which the traces ended. Beside the columns of `moescope.arrow`:

=================  ============================================================================
``number``         int64: the collector's number of the trace
``model``          string: the served model's name
``lora``           string: the adapter's name; null without one
``created_s``      float64: Unix time at which the request was registered
``finished_s``     float64: Unix time at which the trace was finished; the hour is this one's
``prompt_len``     int32
``num_tokens``     int32: prompt and output tokens
``cached_len``     int32: prompt tokens found in the prefix cache
``finish_reason``  string
``complete``       bool
``owner``          string: whose API key made the request, as a keyed hash; null without keys
``ids``            list of strings: every id of the request; on the trace's first row, else null
``weight_labels``  list of structs, `RouteTrace.weight_labels`; on the first row, else null
=================  ============================================================================

Columns of strings are dictionary-encoded. The schema's metadata hold under ``moescope``, as JSON,
``archive``, which is `SCHEMA_VERSION`, and what all traces of a file share.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from moescope import arrow
from moescope.errors import FormatError
from moescope.filters import Filter
from moescope.received import MALFORMED, MAX_BYTES, parse_json, shown
from moescope.trace import RouteTrace

SCHEMA_VERSION = 1
"""Grows with each change that a reader has to know of."""
METADATA = b"moescope"
_MAX_READ_BYTES = 4 * MAX_BYTES
"""Bytes of weights, as float32, of the traces of a table."""
_LABELS = pa.list_(
    pa.struct([("version", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
)
_SHARED = ("num_experts", "num_hidden_layers", "versions")
_OF_TRACE = {
    "model": pa.string(),
    "lora": pa.string(),
    "created_s": pa.float64(),
    "prompt_len": pa.int32(),
    "num_tokens": pa.int32(),
    "cached_len": pa.int32(),
    "finish_reason": pa.string(),
    "complete": pa.bool_(),
}
"""Columns that are fields of a trace."""
_OF_ENTRY = {"number": pa.int64(), "finished_s": pa.float64(), "owner": pa.string()}
COLUMNS = ("request_id", "index", "position", *_OF_TRACE, *_OF_ENTRY, "ids", "weight_labels")
"""Those that say which trace a row is of."""
FILTERED = ["finished_s", "model", "lora"]
"""Those that `mask` needs."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Archived:
    """A trace, and what an archive knows of it besides."""

    trace: RouteTrace
    number: int
    """The collector's number of it, growing with time."""
    finished_s: float
    """Unix time at which it was finished, in seconds."""
    ids: tuple[str, ...] = ()
    """Every id of its request that its client saw; empty of a part without the first row."""
    owner: str | None = None
    """Whose API key made the request, as a keyed hash; None where none of the server's did."""


def to_table(entries: Sequence[Archived], **about: Any) -> pa.Table:  # noqa: ANN401
    """Return the table of whole traces of one model.

    Args:
        entries: At least one; none without tokens, which would have no row.
        about: What the metadata say besides, as JSON can.

    Raises:
        FormatError: No trace at all, one without tokens, or traces of several models.
    """
    traces = [entry.trace for entry in entries]
    if any(trace.start or not trace.num_tokens for trace in traces):
        raise FormatError("an archive holds whole traces, each of at least one token")
    table = arrow.to_table(traces)
    shared = parse_json(table.schema.metadata[METADATA])
    metas = shared.pop("traces")
    if any(meta[name] != metas[0][name] for meta in metas for name in _SHARED):
        raise FormatError("the traces of a file must be of one model and one server")
    lengths = [trace.num_tokens for trace in traces]
    which = np.repeat(np.arange(len(traces)), lengths)
    columns = {
        **{name: ([meta[name] for meta in metas], kind) for name, kind in _OF_TRACE.items()},
        **{name: ([getattr(one, name) for one in entries], kind)
           for name, kind in _OF_ENTRY.items()},
    }  # fmt: skip
    for name, (values, kind) in columns.items():
        array = pa.array(values, kind)
        array = array.dictionary_encode() if pa.types.is_string(kind) else array
        table = table.append_column(name, array.take(pa.array(which)))
    is_first = np.zeros(len(table), np.bool_)
    is_first[np.cumsum([0, *lengths[:-1]])] = True
    firsts = pa.array(which, mask=~is_first)
    ids = pa.array([list(entry.ids) for entry in entries], pa.list_(pa.string()))
    labels = pa.array([trace.weight_labels for trace in traces], _LABELS)
    table = table.append_column("ids", ids.take(firsts))
    table = table.append_column("weight_labels", labels.take(firsts))
    shared |= {name: metas[0][name] for name in _SHARED}
    metadata = orjson.dumps({"archive": SCHEMA_VERSION, **shared, **about})
    return table.replace_schema_metadata({METADATA: metadata})


def shared_of(schema: pa.Schema) -> dict[str, Any]:
    """Return what the metadata of an archive's file say.

    Raises:
        FormatError: It is no file of an archive, or one of a later version.
    """
    try:
        shared: dict[str, Any] = parse_json((schema.metadata or {})[METADATA])
        version = shared["archive"]
    except MALFORMED as error:
        raise FormatError(f"not a file of an archive: {shown(error)}") from error
    if version != SCHEMA_VERSION:
        raise FormatError(
            f"it has schema version {shown(version, 80)}, and this moescope reads {SCHEMA_VERSION}"
        )
    return shared


def firsts(table: pa.Table) -> npt.NDArray[np.int64]:
    """Return the first row of each trace in a table, and the number of its rows at the end."""
    number = table["number"].to_numpy()
    changes = np.flatnonzero(np.diff(number)) + 1
    return np.concatenate([[0], changes, [len(number)]] if len(number) else [[0]]).astype(np.int64)


def mask(table: Any, where: Filter) -> Any:  # noqa: ANN401 - a table or a batch, an array
    """Return which rows are of traces that are wanted.

    Args:
        table: Rows of an archive, with the columns `FILTERED`.
        where: Which traces; it wants something.
    """
    conditions = []
    if where.since_s is not None:
        conditions.append(pc.greater_equal(table["finished_s"], where.since_s))
    if where.until_s is not None:
        conditions.append(pc.less(table["finished_s"], where.until_s))
    if where.model is not None:
        conditions.append(pc.equal(table["model"].cast(pa.string()), where.model))
    if where.lora is not None:
        conditions.append(pc.equal(table["lora"].cast(pa.string()).fill_null(""), where.lora))
    return functools.reduce(pc.and_, conditions)


def entries_of(table: pa.Table, shared: dict[str, Any]) -> list[Archived]:
    """Rebuild the traces of a table, or the parts of them that its rows are.

    Args:
        table: Rows of one file, all of its columns, in their order.
        shared: `shared_of` that file.

    Raises:
        FormatError: The rows are not those of traces.
    """
    if not len(table):
        return []
    try:
        bounds = firsts(table)
        heads = table.select(COLUMNS).take(pa.array(bounds[:-1])).to_pylist()
        has_tokens = table["token_id"].is_valid().to_numpy()[bounds[:-1]]
        metas = [
            {
                **{name: shared[name] for name in _SHARED},
                **{name: head[name] for name in ("request_id", "index", *_OF_TRACE)},
                "start": head["position"],
                "num_rows": min(end - first, head["num_tokens"] - 1 - head["position"]),
                "weight_labels": head["weight_labels"] or [],
                "has_token_ids": bool(has),
            }
            for head, first, end, has in zip(
                heads, bounds[:-1].tolist(), bounds[1:].tolist(), has_tokens, strict=True
            )
        ]
        described = {
            **{name: shared[name] for name in ("layers", "top_k", "weights_dtype")},
            "traces": metas,
        }
        dropped = [*_OF_TRACE, *_OF_ENTRY, "ids", "weight_labels"]
        plain = table.drop_columns(dropped).replace_schema_metadata(
            {METADATA: orjson.dumps(described)}
        )
        traces = arrow.from_table(plain, _MAX_READ_BYTES)
    except (*MALFORMED, pa.ArrowException) as error:
        raise FormatError(f"not the rows of an archive: {shown(error)}") from error
    return [
        Archived(
            trace=trace,
            ids=tuple(head["ids"] or ()),
            **{name: head[name] for name in _OF_ENTRY},
        )
        for trace, head in zip(traces, heads, strict=True)
    ]
