"""Traces as vLLM has them: its ``.npy``, and JSON Lines in the schema of ``VLLM_LOG_MOE``."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope.errors import FormatError
from moescope.formats.shared import id_dtype, marks
from moescope.trace import RouteTrace

_LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY


def routed_experts(
    trace: RouteTrace, *, dtype: npt.DTypeLike | None = None, fill: int | None = None
) -> npt.NDArray[Any]:
    """Return the expert ids as the array that vLLM calls ``routed_experts``.

    The array is ``[num_tokens - 1, num_hidden_layers, top_k]`` (a page has fewer rows). A layer
    that the trace does not hold is zero: one without experts, as in vLLM, and one that
    `RouteTrace.select` left out.

    Args:
        trace: The trace.
        dtype: Of the array; by default vLLM's, uint8 up to 256 experts, else uint16, and with
            ``fill`` int16, or int32 beyond 32,768 experts.
        fill: What the experts of missing rows are, a negative number, such as -1.

    Raises:
        FormatError: The trace is incomplete and there is no ``fill``, or the dtype does not hold
            the ids or ``fill``.
    """
    if not trace.complete and fill is None:
        raise FormatError(
            f"the trace of {trace.request_id!r}, index {trace.index}, is incomplete (coverage "
            f"{trace.coverage:.3f}), and the array marks no missing row unless fill=-1 is given: "
            "every other format does, such as .npz"
        )
    if fill is not None and fill >= 0:
        raise FormatError(f"fill is {fill}, which may be an expert: give a negative number")
    if dtype is None:
        signed = np.int16 if trace.num_experts <= 2**15 else np.int32
        dtype = id_dtype(trace.num_experts) if fill is None else signed
    held = np.iinfo(np.dtype(dtype))
    if not held.min <= (fill or 0) <= trace.num_experts - 1 <= held.max:
        raise FormatError(
            f"{np.dtype(dtype)} does not hold {trace.num_experts} experts"
            f"{'' if fill is None else f' and {fill}'}: take int32"
        )
    array = np.zeros((trace.num_rows, trace.num_hidden_layers, trace.top_k), dtype)
    array[:, trace.layers] = trace.topk_ids
    if fill is not None:
        array[np.ix_(~trace.present, trace.layers)] = fill
    return array


def dump_npy(
    trace: RouteTrace, *, dtype: npt.DTypeLike | None = None, fill: int | None = None
) -> bytes:
    """Write `routed_experts` as ``.npy``: by default vLLM's own, byte for byte.

    Source: vLLM 0.32.0, ``utils/serial_utils.py`` (``numpy2base64``) and
    ``model_executor/layers/fused_moe/routed_experts_capturer.py``.

    Raises:
        FormatError: See `routed_experts`.
    """
    buffer = io.BytesIO()
    np.save(buffer, routed_experts(trace, dtype=dtype, fill=fill), allow_pickle=False)
    return buffer.getvalue()


def meta_line(
    *,
    model: str | None,
    versions: dict[str, str],
    device: str | None,
    seed: int | None,
    layers: Sequence[int],
    top_k: int,
    num_experts: int | None = None,
    truncated: bool = False,
    next_start: int | None = None,
) -> bytes:
    """Return the first line of a route log, in the schema of ``VLLM_LOG_MOE``.

    ``num_experts`` is ours: the schema has no field for it, and without it a reader cannot know
    of experts that were never selected. It is left out where None. So are ``truncated`` and
    ``next_start`` (see `moescope.formats`) where all is here.
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
    record |= marks(truncated=truncated, next_start=next_start)
    return orjson.dumps(record, option=_LINE)


def route_lines(trace: RouteTrace) -> Iterator[bytes]:
    """Yield one line a token and layer, in the schema of ``VLLM_LOG_MOE``.

    ``token_idx`` is the position in the sequence; the ids and weights of a missing row are null.
    ``index`` and ``weights_version`` (null where it is unknown, and of a missing row) are ours, and
    stand in every line: readers take their columns from the first ones. So does ``token``, the text
    of the token, where the trace has it.
    """
    head: dict[str, Any] = {"type": "route", "req_id": trace.request_id, "index": trace.index}
    layers = trace.layers.tolist()
    present = trace.present.tolist()
    numbers = trace.weights_version
    versions = [None] * trace.num_rows if numbers is None else numbers.tolist()
    weights = None if trace.topk_weights is None else np.ascontiguousarray(trace.topk_weights)
    ids = np.ascontiguousarray(trace.topk_ids)
    for row, here in enumerate(present):
        place: dict[str, Any] = {"token_idx": trace.start + row}
        if trace.tokens is not None:
            place["token"] = trace.tokens[row]
        for column, layer in enumerate(layers):
            record = {
                **head,
                **place,
                "layer": layer,
                "topk_ids": ids[row, column] if here else None,
                "topk_weights": None if weights is None or not here else weights[row, column],
                "weights_version": versions[row] if here else None,
            }
            yield orjson.dumps(record, option=_LINE)
