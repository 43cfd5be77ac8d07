"""Packs traces as the page's ``embedded.js`` unpacks them.

gzip of: the length of a JSON header (uint32), the header, then each trace's arrays one after the
other: weights, token ids, expert ids, sources. All numbers are little-endian. The bytes of numbers
of several are taken apart, all first bytes before all second ones, since gzip finds more in these.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from moescope import formats, version_runs
from moescope.view.shown import Selection, Shown


def pack(selection: Selection, texts: Mapping[int, str]) -> bytes:
    """Return what a page shows as bytes; equal traces are equal bytes.

    Args:
        selection: The traces, at least one.
        texts: The text of token ids, for traces that have none of their own.
    """
    first = selection.traces[0].trace
    header = {
        "model": selection.name,
        "layers": first.layers,
        "num_experts": first.num_experts,
        "top_k": first.top_k,
        "num_requests": selection.num_requests,
        "num_left_out": selection.num_left_out,
        "traces": [_facts(one, texts) for one in selection.traces],
    }
    head = orjson.dumps(header, option=orjson.OPT_SERIALIZE_NUMPY)
    arrays = [_bytes(array) for one in selection.traces for array in _arrays(one)]
    return gzip.compress(struct.pack("<I", len(head)) + head + b"".join(arrays), mtime=0)


def _facts(one: Shown, texts: Mapping[int, str]) -> dict[str, Any]:
    """Return what the header says of a trace."""
    trace = one.trace
    oldest, newest = version_runs.span(trace.weights_versions) or (None, None)
    return {
        **formats.meta(trace),
        "prompt_len": trace.prompt_len if one.has_phases else None,
        "created_s": trace.created_s or None,  # 0: a route log does not say it
        "coverage": trace.coverage,
        "status": "finished",
        "weights_versions": trace.weights_versions,
        "oldest_weights_version": oldest,
        "newest_weights_version": newest,
        "tokens": _tokens(one, texts),
        "dtypes": [None if array is None else array.dtype.name for array in _arrays(one)],
    }


def _tokens(one: Shown, texts: Mapping[int, str]) -> Sequence[str | None] | None:
    """Return the text of each token: that of the trace, or else that of its id."""
    trace = one.trace
    if trace.tokens is not None or trace.token_ids is None or not texts:
        return trace.tokens
    return [texts.get(token) for token in trace.token_ids.tolist()]


def _arrays(one: Shown) -> tuple[npt.NDArray[Any] | None, ...]:
    """Return the arrays of a trace, in the order of the pack."""
    trace = one.trace
    return trace.topk_weights, trace.token_ids, trace.topk_ids, trace.source


def _bytes(array: npt.NDArray[Any] | None) -> bytes:
    if array is None:
        return b""
    flat = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).ravel()
    return flat.view(np.uint8).reshape(-1, array.itemsize).T.tobytes()
