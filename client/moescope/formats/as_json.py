"""Traces as JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope import version_runs
from moescope.errors import FormatError
from moescope.formats.shared import META_FIELDS, SOURCE_NAMES, id_dtype, marks, meta, narrowed
from moescope.received import MALFORMED, MAX_BYTES, is_int, shown
from moescope.trace import RouteTrace, Source

_Rows = npt.NDArray[Any] | list[npt.NDArray[Any] | None] | list[str]
_PIECE_ROWS = 128
_LATER = frozenset({"start", "weight_labels"})
"""Fields that JSON of older servers does not have."""


def to_dict(trace: RouteTrace) -> dict[str, Any]:
    """Return a trace's values for JSON; the ids and weights of a missing row are None.

    Arrays stay numpy arrays: dump with ``orjson.OPT_SERIALIZE_NUMPY``, as `dump_json` does.
    """
    return {
        **meta(trace),
        "coverage": trace.coverage,
        "top_k": trace.top_k,
        "layers": trace.layers,
        "token_ids": trace.token_ids,
        **({} if trace.tokens is None else {"tokens": trace.tokens}),
        "weights_versions": trace.weights_versions,
        "source": [SOURCE_NAMES[value] for value in trace.source.tolist()],
        "topk_ids": _rows(trace.topk_ids, trace.present),
        "topk_weights": _rows(trace.topk_weights, trace.present),
    }


def dump_json(
    request_id: str,
    traces: Sequence[RouteTrace],
    *,
    truncated: bool = False,
    next_start: int | None = None,
    running: bool = False,
) -> bytes:
    """Return ``{"request_id": …, "traces": [ … ]}``, the default response of ``/routes/{id}``.

    ``truncated`` and ``next_start`` are those of `moescope.formats`. Where the request is
    ``running``, it says so: ``"status": "running"``.
    """
    values: dict[str, Any] = {
        "request_id": request_id,
        **({"status": "running"} if running else {}),
        **marks(truncated=truncated, next_start=next_start),
        "traces": [*map(to_fragments, traces)],
    }
    return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)


def to_fragments(trace: RouteTrace) -> dict[str, Any]:
    """Return `to_dict` with ids, weights and tokens as JSON already, written in pieces.

    orjson holds the interpreter's lock while it writes: a server that wrote megabytes at once, in
    a thread or not, would do nothing else meanwhile.
    """
    values = to_dict(trace)
    for name in ("topk_ids", "topk_weights", "tokens"):
        if values.get(name) is not None:
            values[name] = _in_pieces(values[name])
    return values


def _in_pieces(rows: _Rows) -> orjson.Fragment:
    pieces = []
    for first in range(0, len(rows), _PIECE_ROWS):
        piece = orjson.dumps(rows[first : first + _PIECE_ROWS], option=orjson.OPT_SERIALIZE_NUMPY)
        pieces.append(piece[1:-1])
        time.sleep(0)  # lets waiting threads run now, not after the switch interval of 5 ms
    return orjson.Fragment(b"[" + b",".join(pieces) + b"]")


def _rows(values: npt.NDArray[Any] | None, present: npt.NDArray[np.bool_]) -> _Rows | None:
    if values is None or present.all():
        return values if values is None else np.ascontiguousarray(values)
    return [row if here else None for row, here in zip(values, present.tolist(), strict=True)]


def from_dict(values: dict[str, Any], max_bytes: int = MAX_BYTES) -> RouteTrace:
    """Rebuild a trace from the JSON that `dump_json` wrote; weights become float32.

    Args:
        values: The trace's JSON, parsed.
        max_bytes: Bytes that its arrays may have.

    Raises:
        FormatError: A field is missing or does not fit the others, or the arrays are too large.
    """
    try:
        num_layers, top_k = len(values["layers"]), values["top_k"]
        if not is_int(top_k) or top_k < 0:
            raise ValueError(f"top_k is {shown(top_k, 80)}")
        shape = (len(values["topk_ids"]), num_layers, top_k)
        if shape[0] * num_layers * top_k * 4 > max_bytes:  # a row of any size may be null
            raise ValueError(f"{shape} weights are more than max_bytes={max_bytes:,}")
        return RouteTrace(
            **{name: values[name] for name in META_FIELDS if name not in _LATER},
            start=values.get("start", 0),
            weight_labels=values.get("weight_labels", []),
            layers=narrowed(np.array(values["layers"]), np.int32),
            topk_ids=_filled(values["topk_ids"], shape, id_dtype(values["num_experts"])),
            topk_weights=None
            if values["topk_weights"] is None
            else _filled(values["topk_weights"], shape, np.float32),
            source=np.array([Source[name.upper()] for name in values["source"]], np.uint8),
            weights_versions=_runs(values.get("weights_versions")),  # older servers tell none
            token_ids=None
            if values["token_ids"] is None
            else narrowed(np.array(values["token_ids"]), np.int32),
            tokens=values.get("tokens"),
        ).check_values()
    except MALFORMED as error:
        raise FormatError(f"not a trace in moescope's JSON: {shown(error)}") from error


def _runs(pairs: list[Any] | None) -> npt.NDArray[np.int64]:
    return narrowed(np.array(pairs), np.int64) if pairs else version_runs.unknown()


def _filled(rows: list[Any], shape: tuple[int, int, int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    blank = np.zeros(shape[1:], dtype)
    array = np.array([blank if row is None else row for row in rows])
    if array.dtype == object and np.dtype(dtype).kind == "f":
        array = array.astype(np.float64)  # JSON has null for a weight that is no number
    return narrowed(array, dtype).reshape(shape)
