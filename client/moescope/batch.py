"""The routes of many requests in one answer: the record and its formats."""

from __future__ import annotations

import dataclasses

import numpy as np
import orjson

from moescope import formats
from moescope.errors import FormatError
from moescope.trace import RouteTrace


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoutesBatch:
    """The routes of many requests."""

    status: dict[str, str]
    """By id, in the order asked: ``finished``, ``running``, ``evicted`` or ``unknown``."""
    traces: dict[str, list[RouteTrace]]
    """The traces of every finished request, by id, in that order."""
    truncated: frozenset[str] = frozenset()
    """Ids whose older requests are left out: clients used them again and again."""

    @property
    def failed(self) -> dict[str, str]:
        """The status of every request that has no traces, by id."""
        return {one: status for one, status in self.status.items() if one not in self.traces}


def dump_json(batch: RoutesBatch) -> bytes:
    """Return ``{"results": [{"request_id": …, "status": …, "traces": [ … ]}, … ]}``."""
    results = [
        {
            "request_id": request_id,
            "status": status,
            "traces": [*map(formats.to_fragments, batch.traces.get(request_id, ()))],
            **_truncated(batch, request_id),
        }
        for request_id, status in batch.status.items()
    ]
    return orjson.dumps({"results": results}, option=orjson.OPT_SERIALIZE_NUMPY)


def dump_npz(batch: RoutesBatch) -> bytes:
    """Write the ``.npz`` of all traces, with one more member.

    ``requests`` is a JSON list of ``request_id``, ``status``, ``num_traces`` and, where it is so,
    ``truncated``, in the order asked; the traces follow one another in that order.

    Raises:
        FormatError: Traces whose layers, top-k or weights differ.
    """
    requests = [
        {
            "request_id": request_id,
            "status": status,
            "num_traces": len(batch.traces.get(request_id, ())),
            **_truncated(batch, request_id),
        }
        for request_id, status in batch.status.items()
    ]
    traces = [trace for request_id in batch.status for trace in batch.traces.get(request_id, ())]
    return formats.dump_npz(traces, requests=np.frombuffer(orjson.dumps(requests), np.uint8))


def _truncated(batch: RoutesBatch, request_id: str) -> dict[str, bool]:
    return {"truncated": True} if request_id in batch.truncated else {}


def load_npz(data: bytes) -> RoutesBatch:
    """Read what `dump_npz` wrote; nothing is unpickled.

    Raises:
        FormatError: The bytes are something else.
    """
    arrays = formats.read_npz(data)
    traces = formats.traces_of(arrays)
    status, by_id, truncated, start = {}, {}, set(), 0
    try:
        for request in orjson.loads(arrays["requests"].tobytes()):
            if request.get("truncated"):
                truncated.add(request["request_id"])
            status[request["request_id"]] = request["status"]
            end = start + request["num_traces"]
            if end > start:
                by_id[request["request_id"]] = traces[start:end]
            start = end
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"not an .npz of requests: {error!r}") from error
    if start != len(traces):
        raise FormatError(f"the requests have {start} traces and the .npz holds {len(traces)}")
    return RoutesBatch(status=status, traces=by_id, truncated=frozenset(truncated))
