"""What several formats of traces share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope.errors import FormatError
from moescope.trace import RouteTrace, Source

_ARRAY_FIELDS = frozenset(
    {"layers", "topk_ids", "topk_weights", "source", "weights_versions", "token_ids", "tokens"}
)
META_FIELDS = tuple(
    field.name for field in dataclasses.fields(RouteTrace) if field.name not in _ARRAY_FIELDS
)
"""The fields of a trace that are neither arrays nor as long."""
SOURCE_NAMES = tuple(source.name.lower() for source in Source)
"""The names of `Source`, as every format but ``.npz`` spells them."""


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
    """Return the fields that are not arrays, and whether there are token ids, for JSON."""
    return [{**meta(trace), "has_token_ids": trace.token_ids is not None} for trace in traces]


def meta(trace: RouteTrace) -> dict[str, Any]:
    """Return the fields that are not arrays."""
    return {name: getattr(trace, name) for name in META_FIELDS}


def marks(*, truncated: bool, next_start: int | None) -> dict[str, Any]:
    """Return what a format says of traces that are not all here.

    Args:
        truncated: Whether older requests of the same id are left out.
        next_start: The first row that is left out; None where none is.
    """
    if next_start is not None:
        return {"truncated": True, "next_start": next_start}
    return {"truncated": True} if truncated else {}


def id_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """Return the narrowest dtype that holds every expert id."""
    return np.uint8 if num_experts <= 256 else np.uint16


def narrowed(array: npt.NDArray[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return numbers in a dtype that can hold them.

    Args:
        array: Numbers; whole ones where the dtype is one of integers.
        dtype: The dtype, of integers or floats.

    Raises:
        TypeError: The array holds something else.
        ValueError: An integer does not fit.
        FloatingPointError: A float is beyond the largest one of the dtype.
    """
    wanted = np.dtype(dtype)
    if array.size and array.dtype.kind not in ("iuf" if wanted.kind == "f" else "iu"):
        raise TypeError(f"expected numbers for {wanted}, got {array.dtype}")
    if array.size and wanted.kind != "f":
        limits = np.iinfo(wanted)
        if not limits.min <= array.min() <= array.max() <= limits.max:
            raise ValueError(f"{array.min()} to {array.max()} do not fit into {wanted}")
    with np.errstate(over="raise"):
        return array.astype(wanted)
