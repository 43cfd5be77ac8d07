"""The routes of many requests in one response: the record and its formats."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from moescope import formats
from moescope.errors import FormatError
from moescope.received import MALFORMED, MAX_BYTES, check_fields, parse_json, shown
from moescope.trace import RouteTrace

if TYPE_CHECKING:
    import pyarrow as pa


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoutesBatch:
    """The routes of many requests."""

    status: dict[str, str]
    """By id, in the order requested: ``finished``, ``running``, ``evicted``, ``lost`` or
    ``unknown``."""
    traces: dict[str, list[RouteTrace]]
    """The traces of every finished request, by id, in that order. Ids of the same request have the
    very same traces."""
    truncated: frozenset[str] = frozenset()
    """Ids whose older requests are left out: clients used them again and again."""
    next_start: dict[str, int] = dataclasses.field(default_factory=dict)
    """By id, the first row that this page of the batch left out; empty in what `Client` returns."""

    @property
    def failed(self) -> dict[str, str]:
        """The status of every request that has no traces, by id."""
        return {one: status for one, status in self.status.items() if one not in self.traces}


def dump_json(batch: RoutesBatch) -> bytes:
    """Return ``{"results": [{"request_id": …, "status": …, "traces": [ … ]}, … ]}``.

    Where an id has the same traces as one before it, ``same_as`` names that one in their place.
    """
    results: list[dict[str, Any]] = []
    first: dict[tuple[int, ...], str] = {}
    for request_id in batch.status:
        traces = batch.traces.get(request_id, [])
        result = _head(batch, request_id)
        same_as = first.setdefault(tuple(map(id, traces)), request_id) if traces else request_id
        if same_as != request_id:
            result["same_as"] = same_as
        else:
            result["traces"] = [*map(formats.to_fragments, traces)]
        results.append(result)
    return orjson.dumps({"results": results}, option=orjson.OPT_SERIALIZE_NUMPY)


def dump_npz(batch: RoutesBatch) -> bytes:
    """Write the ``.npz`` of all traces, each of them once, with one more member.

    ``requests`` is a JSON list of ``request_id``, ``status``, ``traces`` (numbers of the traces in
    the archive) and, where it is so, ``truncated`` and ``next_start``, in the order requested.

    Raises:
        FormatError: Traces whose layers, top-k or weights differ.
    """
    traces, requests = _parts(batch)
    return formats.dump_npz(traces, requests=np.frombuffer(orjson.dumps(requests), np.uint8))


def to_table(batch: RoutesBatch) -> pa.Table:
    """Return the table of all traces, each of them once; needs the extra ``arrow``.

    It is that of `moescope.arrow.to_table`, whose metadata has ``requests`` as well, as in
    `dump_npz`.

    Raises:
        FormatError: Traces whose layers, top-k or weights differ.
        ImportError: pyarrow is not installed.
    """
    from moescope import arrow  # noqa: PLC0415 - the light base has no pyarrow

    traces, requests = _parts(batch)
    if not traces:
        return arrow.empty_table(requests=requests)
    return arrow.to_table(traces, requests=requests)


def _parts(batch: RoutesBatch) -> tuple[list[RouteTrace], list[dict[str, Any]]]:
    """Return each trace once, and what is said of each request."""
    numbers: dict[int, int] = {}  # by identity
    traces: list[RouteTrace] = []
    requests = []
    for request_id in batch.status:
        own = batch.traces.get(request_id, [])
        for trace in own:
            if numbers.setdefault(id(trace), len(traces)) == len(traces):
                traces.append(trace)
        head = _head(batch, request_id)
        requests.append({**head, "traces": [numbers[id(trace)] for trace in own]})
    return traces, requests


def _head(batch: RoutesBatch, request_id: str) -> dict[str, Any]:
    next_start = batch.next_start.get(request_id)
    marks = formats.marks(truncated=request_id in batch.truncated, next_start=next_start)
    return {"request_id": request_id, "status": batch.status[request_id], **marks}


def load_npz(data: bytes, max_bytes: int = MAX_BYTES) -> RoutesBatch:
    """Read what `dump_npz` wrote; nothing is unpickled.

    Args:
        data: The file.
        max_bytes: Bytes that its arrays may have.

    Raises:
        FormatError: The bytes are something else, or more than that.
    """
    arrays = formats.read_npz(data, max_bytes)
    traces = formats.traces_of(arrays, max_bytes)
    try:
        requests = parse_json(arrays["requests"].tobytes(), max_bytes)
    except MALFORMED as error:
        raise FormatError(f"not an .npz of requests: {shown(error)}") from error
    return _batch(traces, requests, "an .npz")


def from_table(table: pa.Table, max_bytes: int = MAX_BYTES) -> RoutesBatch:
    """Rebuild the batch of a table of `to_table`, exact as `moescope.arrow.from_table` is.

    Args:
        table: The table.
        max_bytes: As of `moescope.arrow.from_table`.

    Raises:
        FormatError: It is something else, or too large.
        ImportError: pyarrow is not installed.
    """
    from moescope import arrow  # noqa: PLC0415

    traces = arrow.from_table(table, max_bytes)
    requests = arrow.metadata_of(table, max_bytes).get("requests")
    if requests is None:
        raise FormatError("not a table of requests: its metadata has none")
    return _batch(traces, requests, "a table")


def _batch(traces: list[RouteTrace], requests: list[dict[str, Any]], what: str) -> RoutesBatch:
    status, by_id, truncated, next_start = {}, {}, set(), {}
    try:
        for values in requests:
            check_fields(_Request, values)
            request = _Request(**{name: values[name] for name in _FIELDS if name in values})
            request_id = request.request_id
            status[request_id] = request.status
            if request.status == "finished":
                by_id[request_id] = [_numbered(traces, number) for number in request.traces]
            if request.next_start is not None:
                next_start[request_id] = request.next_start
            elif request.truncated:
                truncated.add(request_id)
    except MALFORMED as error:
        raise FormatError(f"not {what} of requests: {shown(error)}") from error
    return RoutesBatch(
        status=status, traces=by_id, truncated=frozenset(truncated), next_start=next_start
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """An entry of ``requests`` in an ``.npz``."""

    request_id: str
    status: str
    traces: list[int]
    truncated: bool = False
    next_start: int | None = None


_FIELDS = [field.name for field in dataclasses.fields(_Request)]


def _numbered(traces: list[RouteTrace], number: int) -> RouteTrace:
    if not 0 <= number < len(traces):
        raise IndexError(f"trace {number} of {len(traces)}")
    return traces[number]
