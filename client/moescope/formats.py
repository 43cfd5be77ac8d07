"""The formats of traces: JSON, ``.npz``, vLLM's ``.npy``, and JSON Lines as ``VLLM_LOG_MOE`` has.

``.npz`` holds any number of traces ragged: the rows of all of them one after the other in
``topk_ids``, ``topk_weights`` and ``source``, their tokens in ``token_ids``; trace ``i`` has rows
``row_splits[i]:row_splits[i + 1]`` and tokens ``token_splits[i]:token_splits[i + 1]``. ``meta`` is
a JSON list with everything else. With one trace the arrays are that trace's own.

An answer to an id that clients used again can be ``truncated``: it lacks the older requests of that
id. Where it is, ``.npz`` has a member of that name; JSON, the meta line of JSON Lines and the
metadata of Arrow and Parquet have ``"truncated": true``.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope.errors import FormatError
from moescope.trace import RouteTrace, Source

_Rows = npt.NDArray[Any] | list[npt.NDArray[Any] | None]
_PIECE_ROWS = 128
_LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
_ARRAY_FIELDS = frozenset({"layers", "topk_ids", "topk_weights", "source", "token_ids"})
SOURCE_NAMES = tuple(source.name.lower() for source in Source)
"""The names of `Source`, as every format but ``.npz`` spells them."""
_META_FIELDS = tuple(
    field.name for field in dataclasses.fields(RouteTrace) if field.name not in _ARRAY_FIELDS
)


def check_alike(traces: Sequence[RouteTrace]) -> None:
    """Check that traces fit into one file.

    Raises:
        FormatError: Their layers, top-k or weights differ.
    """
    for trace in traces[1:]:
        first = traces[0]
        if (
            not np.array_equal(trace.layers, first.layers)
            or trace.top_k != first.top_k
            or (trace.topk_weights is None) != (first.topk_weights is None)
        ):
            raise FormatError(
                "traces in one file must share layers, top-k and weights: those of "
                f"{trace.request_id!r} are not those of {first.request_id!r}"
            )


def meta_of(traces: Sequence[RouteTrace]) -> list[dict[str, Any]]:
    """Return all that is no array, and whether there are token ids, for JSON."""
    return [{**_meta(trace), "has_token_ids": trace.token_ids is not None} for trace in traces]


def _meta(trace: RouteTrace) -> dict[str, Any]:
    return {name: getattr(trace, name) for name in _META_FIELDS}


def to_dict(trace: RouteTrace) -> dict[str, Any]:
    """Return a trace's values for JSON; the ids and weights of a missing row are None.

    Arrays stay numpy arrays: dump with ``orjson.OPT_SERIALIZE_NUMPY``, as `dump_json` does.
    """
    return {
        **_meta(trace),
        "coverage": trace.coverage,
        "top_k": trace.top_k,
        "layers": trace.layers,
        "token_ids": trace.token_ids,
        "source": [SOURCE_NAMES[value] for value in trace.source.tolist()],
        "topk_ids": _rows(trace.topk_ids, trace.present),
        "topk_weights": _rows(trace.topk_weights, trace.present),
    }


def dump_json(request_id: str, traces: Sequence[RouteTrace], *, truncated: bool = False) -> bytes:
    """Return ``{"request_id": …, "traces": [ … ]}``, the default answer of ``/routes/{id}``."""
    values: dict[str, Any] = {"request_id": request_id, "traces": [*map(to_fragments, traces)]}
    if truncated:
        values["truncated"] = True
    return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)


def to_fragments(trace: RouteTrace) -> dict[str, Any]:
    """Return `to_dict` with ids and weights as JSON already, written in pieces.

    orjson holds the interpreter while it writes: a server that wrote megabytes at once, in a thread
    or not, would stand still for that long.
    """
    values = to_dict(trace)
    for name in ("topk_ids", "topk_weights"):
        if values[name] is not None:
            values[name] = _in_pieces(values[name])
    return values


def _in_pieces(rows: _Rows) -> orjson.Fragment:
    pieces = []
    for first in range(0, len(rows), _PIECE_ROWS):
        piece = orjson.dumps(rows[first : first + _PIECE_ROWS], option=orjson.OPT_SERIALIZE_NUMPY)
        pieces.append(piece[1:-1])
        time.sleep(0)  # others first, without the 5 ms for which they would have to wait
    return orjson.Fragment(b"[" + b",".join(pieces) + b"]")


def _rows(values: npt.NDArray[Any] | None, present: npt.NDArray[np.bool_]) -> _Rows | None:
    if values is None or present.all():
        return values if values is None else np.ascontiguousarray(values)
    return [row if here else None for row, here in zip(values, present.tolist(), strict=True)]


def from_dict(values: dict[str, Any]) -> RouteTrace:
    """Rebuild a trace from the JSON that `dump_json` wrote; weights become float32.

    Raises:
        FormatError: A field is missing or does not fit the others.
    """
    try:
        num_layers, top_k = len(values["layers"]), values["top_k"]
        shape = (len(values["topk_ids"]), num_layers, top_k)
        return RouteTrace(
            **{name: values[name] for name in _META_FIELDS},
            layers=np.array(values["layers"], np.int32),
            topk_ids=_filled(values["topk_ids"], shape, id_dtype(values["num_experts"])),
            topk_weights=None
            if values["topk_weights"] is None
            else _filled(values["topk_weights"], shape, np.float32),
            source=np.array([Source[name.upper()] for name in values["source"]], np.uint8),
            token_ids=None
            if values["token_ids"] is None
            else np.array(values["token_ids"], np.int32),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"not a trace in moescope's JSON: {error!r}") from error


def id_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """Return the narrowest dtype that holds every expert id."""
    return np.uint8 if num_experts <= 256 else np.uint16


def _filled(rows: list[Any], shape: tuple[int, int, int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    blank = np.zeros(shape[1:], dtype)
    return np.array([blank if row is None else row for row in rows], dtype).reshape(shape)


def dump_npz(
    traces: Sequence[RouteTrace], *, truncated: bool = False, **members: npt.NDArray[Any]
) -> bytes:
    """Write traces of one model as the bytes of an ``.npz`` (uncompressed).

    Args:
        traces: Any number of them; without any there are no layers either.
        truncated: Whether older requests of the same id are left out.
        members: What else the archive holds.

    Raises:
        FormatError: Traces whose layers, top-k or weights differ.
    """
    check_alike(traces)
    tokens = [np.empty(0, np.int32) if t.token_ids is None else t.token_ids for t in traces]
    arrays: dict[str, npt.NDArray[Any]] = {
        "meta": np.frombuffer(orjson.dumps(meta_of(traces)), np.uint8),
        "layers": traces[0].layers if traces else np.empty(0, np.int32),
        "topk_ids": _joined([t.topk_ids for t in traces], np.empty((0, 0, 0), np.uint8)),
        "source": _joined([t.source for t in traces], np.empty(0, np.uint8)),
        "row_splits": np.cumsum([0, *(t.num_rows for t in traces)]),
        "token_ids": _joined(tokens, np.empty(0, np.int32)),
        "token_splits": np.cumsum([0, *map(len, tokens)]),
    }
    weights = [t.topk_weights for t in traces if t.topk_weights is not None]
    if weights:
        arrays["topk_weights"] = np.concatenate(weights)
    if truncated:
        arrays["truncated"] = np.array(True)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays, **members)
    return buffer.getvalue()


def _joined(arrays: list[npt.NDArray[Any]], nothing: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else nothing


def load_npz(data: bytes) -> list[RouteTrace]:
    """Read the traces that `dump_npz` wrote; nothing is unpickled.

    Raises:
        FormatError: The bytes are no ``.npz`` of traces.
    """
    return traces_of(read_npz(data))


def traces_of(arrays: dict[str, npt.NDArray[Any]]) -> list[RouteTrace]:
    """Return the traces in the arrays of an ``.npz``.

    Raises:
        FormatError: An array is missing, or does not fit the others.
    """
    traces = []
    try:
        metas = orjson.loads(arrays["meta"].tobytes())
        row_spans = itertools.pairwise(arrays["row_splits"])
        token_spans = itertools.pairwise(arrays["token_splits"])
        for meta, row_span, token_span in zip(metas, row_spans, token_spans, strict=True):
            rows, tokens = slice(*row_span), slice(*token_span)
            has_tokens = meta.pop("has_token_ids")
            traces.append(
                RouteTrace(
                    **meta,
                    layers=arrays["layers"],
                    topk_ids=arrays["topk_ids"][rows],
                    topk_weights=arrays["topk_weights"][rows] if "topk_weights" in arrays else None,
                    source=arrays["source"][rows],
                    token_ids=arrays["token_ids"][tokens] if has_tokens else None,
                )
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"not an .npz of traces: {error!r}") from error
    return traces


def read_npz(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an ``.npz``; nothing is unpickled.

    Raises:
        FormatError: The bytes are no ``.npz``.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        # Damaged bytes make zipfile, zlib and numpy raise whatever they meet first.
        raise FormatError(f"not an .npz: {error!r}") from error


def dump_npy(trace: RouteTrace) -> bytes:
    """Write the expert ids as vLLM's own ``routed_experts``, byte for byte: a ``.npy``.

    The array is ``[num_tokens - 1, num_hidden_layers, top_k]``, uint8 up to 256 experts, else
    uint16. A layer that the trace does not hold is zero: one without experts, as in vLLM, and one
    that `RouteTrace.select` left out.

    Source: vLLM 0.32.0, ``utils/serial_utils.py`` (``numpy2base64``) and
    ``model_executor/layers/fused_moe/routed_experts_capturer.py``.

    Raises:
        FormatError: The trace is incomplete, which a plain array cannot say.
    """
    if not trace.complete:
        raise FormatError(
            f"the trace of {trace.request_id!r}, index {trace.index}, is incomplete (coverage "
            f"{trace.coverage:.3f}), and a .npy cannot mark the rows that are missing: every other "
            "format can, such as .npz"
        )
    shape = (trace.num_rows, trace.num_hidden_layers, trace.top_k)
    array = np.zeros(shape, id_dtype(trace.num_experts))
    array[:, trace.layers] = trace.topk_ids
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def meta_line(
    *,
    model: str,
    versions: dict[str, str],
    device: str,
    seed: int | None,
    layers: Sequence[int],
    top_k: int,
    num_experts: int | None = None,
    truncated: bool = False,
) -> bytes:
    """Return the first line of a route log, in the schema of ``VLLM_LOG_MOE``.

    ``num_experts`` is ours: the schema has no field for it, and without it a reader cannot know
    of experts that were never selected. It is left out where None. So is ``truncated`` where False.
    """
    record: dict[str, Any] = {
        "type": "meta",
        "model_id": model,
        "vllm_version": versions.get("vllm"),
        "torch_version": versions.get("torch"),
        "device": device,
        "seed": seed,
        "layers_logged": list(layers),
        "top_k": top_k,
    }
    if num_experts is not None:
        record["num_experts"] = num_experts
    if truncated:
        record["truncated"] = True
    return orjson.dumps(record, option=_LINE)


def route_lines(trace: RouteTrace) -> Iterator[bytes]:
    """Yield one line a token and layer, in the schema of ``VLLM_LOG_MOE``.

    ``token_idx`` is the position in the sequence. Lines of a sequence with index > 0 carry
    ``index``; the ids and weights of a missing row are null.
    """
    head: dict[str, Any] = {"type": "route", "req_id": trace.request_id}
    if trace.index:
        head["index"] = trace.index
    layers = trace.layers.tolist()
    present = trace.present.tolist()
    weights = None if trace.topk_weights is None else np.ascontiguousarray(trace.topk_weights)
    ids = np.ascontiguousarray(trace.topk_ids)
    for position, here in enumerate(present):
        for column, layer in enumerate(layers):
            record = {
                **head,
                "token_idx": position,
                "layer": layer,
                "topk_ids": ids[position, column] if here else None,
                "topk_weights": None if weights is None or not here else weights[position, column],
            }
            yield orjson.dumps(record, option=_LINE)
