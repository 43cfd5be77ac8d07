"""The HTTP client of a moescope server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx

from moescope import _http, batch, formats
from moescope.batch import RoutesBatch
from moescope.errors import FormatError
from moescope.records import ExpertCounts, RecentPage, SequenceInfo, ServerInfo
from moescope.trace import RouteTrace

_T = TypeVar("_T")


class Client:
    """Fetches routes and counts from a server. Not for use by several threads at once.

    >>> with moescope.Client("http://localhost:8000") as client:
    ...     (trace,) = client.routes("chatcmpl-…")

    Every method raises `ConnectionFailedError` where the server does not answer, and a subclass
    of `ServerError` where it answers with an error.

    Args:
        base_url: The server's address, without ``/v1``.
        api_key: The server's API key, if it wants one.
        timeout_s: Seconds to wait for an answer.
        transport: httpx's transport, in place of the network.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._base_url = base_url
        with _http.transport_errors(base_url):
            self._http = httpx.Client(
                base_url=base_url,
                headers=_http.headers(api_key),
                timeout=timeout_s,
                transport=transport,
                trust_env=_http.uses_environment(base_url),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def routes(
        self,
        request_id: str,
        *,
        index: int | None = None,
        layers: Sequence[int] | str | None = None,
        weights: bool = True,
        wait_s: float | None = None,
    ) -> list[RouteTrace]:
        """Fetch the traces of one request, one for each sequence.

        Of an id that several requests had, the newest come first, and older ones can be left out:
        `routes_batch` says where they are.

        Args:
            request_id: Any id of the request that its client saw.
            index: Only the choice with this index; all choices where None.
            layers: Global layer numbers, or text such as ``0,5-7``; all layers where None.
            weights: Whether to fetch the routing weights too.
            wait_s: Seconds to wait for the end of a request; the server's default where None.

        Raises:
            RequestNotFoundError: The server never saw this id.
            StillRunningError: The request has not finished.
            TraceEvictedError: The trace made room for newer ones.
            InvalidQueryError: The server cannot take a parameter, such as an unknown layer.
            FormatError: The answer is no trace.
        """
        params = _wanted(layers, weights, wait_s)
        if index is not None:
            params["index"] = index
        response = self._send("GET", _path(request_id), params, one_request=True)
        return formats.load_npz(response.content)

    def routes_batch(
        self,
        request_ids: Sequence[str],
        *,
        layers: Sequence[int] | str | None = None,
        weights: bool = True,
        wait_s: float | None = None,
    ) -> RoutesBatch:
        """Fetch the traces of many requests at once.

        A request that has none is no error here: ``failed`` tells why.

        Args:
            request_ids: Any ids of the requests that their clients saw: 1 to 1,024 of them.
            layers: Global layer numbers, or text such as ``0,5-7``; all layers where None.
            weights: Whether to fetch the routing weights too.
            wait_s: Seconds to wait for all of them to end; the server's default where None.

        Raises:
            InvalidQueryError: The server cannot take a parameter, such as an unknown layer.
            FormatError: The answer is no batch.
        """
        body = {"request_ids": list(request_ids), **_wanted(layers, weights, wait_s)}
        return batch.load_npz(self._send("POST", "/routes/batch", body=body).content)

    def recent(self, limit: int = 50, before: int | None = None) -> RecentPage:
        """List recent sequences, newest first.

        Args:
            limit: How many at most.
            before: The ``next_before`` of the page before this one.
        """
        params = {"limit": limit} if before is None else {"limit": limit, "before": before}
        values = self._json("GET", "/routes", params)
        try:
            sequences = tuple(map(SequenceInfo.from_json, values["sequences"]))
            return RecentPage(sequences=sequences, next_before=values["next_before"])
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"not a list of sequences: {error!r}") from error

    def experts(
        self,
        phase: Literal["all", "prefill", "decode"] = "all",
        window_s: float | None = None,
    ) -> ExpertCounts:
        """Fetch how often each expert was selected, over all traffic.

        Args:
            phase: Which tokens to count.
            window_s: Only the last seconds, at most 3600 and less for very big models; since start
                or reset where None.

        Raises:
            InvalidQueryError: The window is longer than what the server keeps.
        """
        params: dict[str, Any] = {"phase": phase}
        if window_s is not None:
            params["window_s"] = window_s
        return ExpertCounts.from_json(self._json("GET", "/experts", params))

    def info(self) -> ServerInfo:
        """Fetch what the server captures: model, layers, experts, versions, limits."""
        return ServerInfo.from_json(self._json("GET", "/moescope/info"))

    def delete(self, request_id: str) -> int:
        """Make the server forget a request.

        Returns:
            How many sequences were deleted.

        Raises:
            RequestNotFoundError: The server never saw this id.
        """
        response = self._send("DELETE", _path(request_id), one_request=True)
        return _field(_http.json_object(response), "deleted", int)

    def pause(self) -> str:
        """Pause the capture; returns its state."""
        return _field(self._json("POST", "/routes/pause"), "capture", str)

    def resume(self) -> str:
        """Resume the capture; returns its state."""
        return _field(self._json("POST", "/routes/resume"), "capture", str)

    def reset(self) -> float:
        """Set the expert counts to zero.

        Returns:
            The Unix time from which they run, in seconds.
        """
        return _field(self._json("POST", "/routes/reset"), "since_s", float)

    def _json(self, method: str, path: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        return _http.json_object(self._send(method, path, params))

    def _send(
        self,
        method: str,
        path: str,
        params: dict[str, Any] | None = None,
        *,
        body: dict[str, Any] | None = None,
        one_request: bool = False,
    ) -> httpx.Response:
        with _http.transport_errors(self._base_url):
            response = self._http.request(method, path, params=params, json=body)
        _http.check(response, one_request=one_request)
        return response


def _wanted(
    layers: Sequence[int] | str | None, weights: bool, wait_s: float | None
) -> dict[str, Any]:
    """Return the parameters that say which part of a trace is wanted, as the server has them."""
    wanted: dict[str, Any] = {"format": "npz"}
    if layers is not None:
        wanted["layers"] = layers if isinstance(layers, str) else ",".join(map(str, layers))
    if not weights:
        wanted["weights"] = False
    if wait_s is not None:
        wanted["wait_s"] = wait_s
    return wanted


def _path(request_id: str) -> str:
    """Return the path of a request; an id may hold slashes, or be ``..``."""
    if not request_id:
        raise ValueError("the request id is empty")
    return "/routes/" + quote(request_id, safe="").replace(".", "%2E")


def _field(values: dict[str, Any], name: str, kind: Callable[[Any], _T]) -> _T:
    try:
        return kind(values[name])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"the answer has no valid {name!r}: {values}") from error
