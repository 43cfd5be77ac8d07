"""What clients ask a server and make of its responses: one generator a call, without I/O.

`Client` and `AsyncClient` send what these generators yield; see `moescope.retries.Call`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

import httpx
import orjson

from moescope import batch, http, paging, received
from moescope.batch import RoutesBatch
from moescope.errors import FormatError
from moescope.records import ExpertCounts, RecentPage, SequenceInfo, ServerInfo
from moescope.retries import Call, Query, Retries
from moescope.trace import RouteTrace

_T = TypeVar("_T")
_Asked = TypeVar("_Asked")
_Page = TypeVar("_Page")

Layers = Sequence[int] | str | None
"""Global layer numbers, or text such as ``0,5-7``; all layers where None."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """The calls of a client; `Client` describes each of them."""

    max_bytes: int
    """Bytes that one response may have, as sent and decompressed."""
    retries: Retries

    def routes(
        self,
        request_id: str,
        *,
        index: int | None,
        layers: Layers,
        weights: bool,
        tokens: bool,
        wait_s: float | None,
        start: int,
        weights_version: int | None,
        max_staleness: int | None,
    ) -> Call[list[RouteTrace]]:
        """Fetch the traces of one request."""
        params = _wanted(layers, weights, tokens, wait_s, weights_version, max_staleness)
        if index is not None:
            params["index"] = index
        path = http.routes_path(request_id)

        def fetch(first: int) -> Call[paging.TracesPage]:
            page = {**params, "start": first} if first else params
            query = Query(method="GET", path=path, params=page, one_request=True)
            response = yield from self.retries.send(query)
            return paging.load_page(response.content, self.max_bytes)

        return (yield from _fetched(paging.all_pages(start), fetch))

    def routes_batch(
        self,
        request_ids: Sequence[str],
        *,
        layers: Layers,
        weights: bool,
        tokens: bool,
        wait_s: float | None,
        start: int | Mapping[str, int],
        weights_version: int | None,
        max_staleness: int | None,
    ) -> Call[RoutesBatch]:
        """Fetch the traces of many requests."""
        wanted = _wanted(layers, weights, tokens, wait_s, weights_version, max_staleness)
        starts = start if isinstance(start, Mapping) else dict.fromkeys(request_ids, start)

        def fetch(first: Mapping[str, int]) -> Call[RoutesBatch]:
            body = {"request_ids": list(first), **wanted}
            if any(first.values()):
                body["start"] = first
            query = Query(method="POST", path="/routes/batch", body=orjson.dumps(body))
            response = yield from self.retries.send(query)
            return batch.load_npz(response.content, self.max_bytes)

        return (yield from _fetched(paging.whole_batch(request_ids, starts), fetch))

    def follow(
        self, request_id: str, *, index: int, start: int, layers: Layers, weights: bool
    ) -> Call[httpx.Response]:
        """Begin to follow a request; returns a response whose body is yet to come."""
        params = {"index": index, "start": start, **_part(layers, weights)}
        path = http.routes_path(request_id) + "/stream"
        query = Query(method="GET", path=path, params=params, one_request=True, is_stream=True)
        return (yield from self.retries.send(query))

    def recent(self, limit: int, before: int | None) -> Call[RecentPage]:
        """List recent sequences."""
        params = {"limit": limit} if before is None else {"limit": limit, "before": before}
        values = yield from self._json(Query(method="GET", path="/routes", params=params))
        return _recent_page(values, limit, before)

    def experts(self, phase: str, window_s: float | None) -> Call[ExpertCounts]:
        """Fetch how often each expert was selected."""
        params: dict[str, Any] = {"phase": phase}
        if window_s is not None:
            params["window_s"] = window_s
        values = yield from self._json(Query(method="GET", path="/experts", params=params))
        return ExpertCounts.from_json(values)

    def info(self) -> Call[ServerInfo]:
        """Fetch what the server captures."""
        values = yield from self._json(Query(method="GET", path="/moescope/info"))
        return ServerInfo.from_json(values)

    def delete(self, request_id: str) -> Call[int]:
        """Make the server forget a request; a second time it would not know it."""
        path = http.routes_path(request_id)
        query = Query(method="DELETE", path=path, one_request=True, is_idempotent=False)
        return _field((yield from self._json(query)), "deleted", int)

    def pause(self) -> Call[str]:
        """Pause the capture."""
        values = yield from self._json(Query(method="POST", path="/routes/pause"))
        return _field(values, "capture", str)

    def resume(self) -> Call[str]:
        """Resume the capture."""
        values = yield from self._json(Query(method="POST", path="/routes/resume"))
        return _field(values, "capture", str)

    def weights_label(self) -> Call[str]:
        """Fetch the label of the weights."""
        return _field(
            (yield from self._json(Query(method="GET", path="/routes/weights"))), "version", str
        )

    def label_weights(self, label: str) -> Call[str]:
        """Label the weights."""
        query = Query(method="POST", path="/routes/weights", body=orjson.dumps({"version": label}))
        return _field((yield from self._json(query)), "version", str)

    def reset(self) -> Call[float]:
        """Set the expert counts to zero; a second time it would lose those of meanwhile."""
        query = Query(method="POST", path="/routes/reset", is_idempotent=False)
        return float(_field((yield from self._json(query)), "since_s", float, int))

    def _json(self, query: Query) -> Call[dict[str, Any]]:
        return http.json_object((yield from self.retries.send(query)))


def _fetched(
    pages: Generator[_Asked, _Page, _T], fetch: Callable[[_Asked], Call[_Page]]
) -> Call[_T]:
    """Do what `paging.driven` does, with calls."""
    try:
        asked = next(pages)
        while True:
            page = yield from fetch(asked)
            asked = pages.send(page)
    except StopIteration as end:
        joined: _T = end.value
        return joined


def _wanted(
    layers: Layers,
    weights: bool,
    tokens: bool,
    wait_s: float | None,
    weights_version: int | None,
    max_staleness: int | None,
) -> dict[str, Any]:
    """Return the parameters that say which part of a trace is wanted, as the server has them."""
    rest = {
        "tokens": tokens or None,
        "wait_s": wait_s,
        "weights_version": weights_version,
        "max_staleness": max_staleness,
    }
    given = {name: value for name, value in rest.items() if value is not None}
    return {"format": "npz", **_part(layers, weights), **given}


def _part(layers: Layers, weights: bool) -> dict[str, Any]:
    """Return the parameters that say which columns of rows are wanted."""
    part: dict[str, Any] = {}
    if layers is not None:
        part["layers"] = layers if isinstance(layers, str) else ",".join(map(str, layers))
    if not weights:
        part["weights"] = False
    return part


def _recent_page(values: dict[str, Any], limit: int, before: int | None) -> RecentPage:
    """Return a page of the list of recent sequences, of which another one may follow.

    Raises:
        FormatError: It is no such page: it has more, or does not get on.
    """
    try:
        sequences = tuple(map(SequenceInfo.from_json, values["sequences"]))
        next_before = values["next_before"]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"not a list of sequences: {received.shown(error)}") from error
    if len(sequences) > limit:
        raise FormatError(f"expected {limit} sequences at most, got {len(sequences)}")
    if next_before is None:
        return RecentPage(sequences=sequences, next_before=None)
    if not (received.is_int(next_before) and 0 <= next_before < (before or 2**63)):
        raise FormatError(
            f"expected a next_before below {before}, got {received.shown(next_before)}"
        )
    if not sequences:
        raise FormatError(f"expected sequences before {next_before}, got a page without any")
    return RecentPage(sequences=sequences, next_before=next_before)


def _field(values: dict[str, Any], name: str, *kinds: type[_T]) -> _T:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise FormatError(f"the response has no valid {name!r}: {received.shown(values)}")
    return value
