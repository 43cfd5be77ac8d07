"""The body of ``/routes/{request_id}`` in every format."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import HTTPException

from moescope import formats
from moescope.errors import FormatError
from moescope.trace import RouteTrace

Format = Literal["json", "jsonl", "npz", "npy", "arrow", "parquet"]


def make_body(
    form: Format,
    request_id: str,
    traces: list[RouteTrace],
    hello: dict[str, Any],
    *,
    truncated: bool,
) -> bytes:
    """Write the traces of a request.

    Args:
        form: The format.
        request_id: The id that was asked for.
        traces: At least one.
        hello: What the worker captures; ``jsonl`` alone needs it.
        truncated: Whether older requests of that id are left out.

    Raises:
        HTTPException: The format cannot hold these traces, or needs pyarrow.
    """
    match form:
        case "json":
            return formats.dump_json(request_id, traces, truncated=truncated)
        case "jsonl":
            return _jsonl(traces, hello, truncated=truncated)
        case "npz":
            return formats.dump_npz(traces, truncated=truncated)
        case "npy":
            return _npy(traces, request_id, truncated=truncated)
        case "arrow" | "parquet":
            return _columnar(traces, form, truncated=truncated)


def _npy(traces: list[RouteTrace], request_id: str, *, truncated: bool) -> bytes:
    if len(traces) > 1 or truncated:
        indices = [trace.index for trace in traces]
        raise HTTPException(
            422,
            f"index: npy holds one sequence and {request_id!r} has {indices}"
            f"{' and older ones' if truncated else ''}; name one with index, and use the id of a "
            "response where an index repeats",
        )
    try:
        return formats.dump_npy(traces[0])
    except FormatError as error:
        raise HTTPException(409, str(error)) from None


def _columnar(
    traces: list[RouteTrace], form: Literal["arrow", "parquet"], *, truncated: bool
) -> bytes:
    try:
        from moescope import arrow
    except ImportError as error:
        raise HTTPException(501, str(error)) from None
    dump = arrow.dump_arrow if form == "arrow" else arrow.dump_parquet
    return dump(traces, truncated=truncated)


def _jsonl(traces: list[RouteTrace], hello: dict[str, Any], *, truncated: bool) -> bytes:
    meta = formats.meta_line(
        model=hello["model"],
        versions=hello["versions"],
        device=hello["device"],
        seed=hello["seed"],
        layers=traces[0].layers.tolist(),
        top_k=hello["top_k"],
        num_experts=hello["num_experts"],
        truncated=truncated,
    )
    return b"".join([meta, *(line for trace in traces for line in formats.route_lines(trace))])
