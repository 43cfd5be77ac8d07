"""The HTTP client of a moescope server."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx

from moescope import following, http, received
from moescope.addresses import Verify
from moescope.batch import RoutesBatch
from moescope.calls import Calls, Layers
from moescope.errors import ConnectionFailedError
from moescope.records import ExpertCounts, RecentPage, SequenceInfo, ServerInfo
from moescope.retries import Call, Pause, Query, Retries
from moescope.trace import RouteTrace

_T = TypeVar("_T")
API_KEY_VARIABLE = "VLLM_API_KEY"
"""The variable that holds the API key where none is given, as for vLLM's server."""
RETRIES = 3
TIMEOUT_S = 60.0


class Client:
    """Fetches routes and counts from a server; several threads may use it at once.

    >>> with moescope.Client("http://localhost:8000") as client:
    ...     (trace,) = client.routes("chatcmpl-…")

    Every method raises `ConnectionFailedError` where the server does not respond, and a subclass
    of `ServerError` where it responds with an error. What reads, pauses or resumes is tried again
    where the connection fails or the server is unavailable (HTTP 503), with pauses between, for 30
    seconds at most; each time a warning is logged as ``moescope``.

    Args:
        base_url: The server's address, with or without ``/v1``.
        api_key: The server's API key; ``VLLM_API_KEY`` by default, none where it is empty.
        timeout_s: Seconds to wait for each part of a response.
        transport: httpx's transport, in place of the network.
        max_bytes: Bytes that one response may have, as sent and decompressed; a larger one raises
            `ResponseTooLargeError`. A server of moescope sends at most 48 MiB at a time.
        verify: How the certificate of an ``https`` server is verified: True by ``SSL_CERT_FILE`` or
            ``SSL_CERT_DIR``, or else certifi's list of authorities; a path by the authorities in
            that PEM file or directory; False not at all; or an `ssl.SSLContext`.
        retries: How often a call is tried again, at most.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
        max_bytes: int = received.MAX_BYTES,
        verify: Verify = True,
        retries: int = RETRIES,
    ) -> None:
        key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
        self._http = http.connect(base_url, key, timeout_s, transport, max_bytes, verify)
        self._calls = Calls(max_bytes=max_bytes, retries=Retries(count=retries))

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
        layers: Layers = None,
        weights: bool = True,
        wait_s: float | None = None,
        start: int = 0,
        weights_version: int | None = None,
        max_staleness: int | None = None,
        tokens: bool = False,
    ) -> list[RouteTrace]:
        """Fetch the traces of one request, one for each sequence.

        Long ones come in several responses, and are joined.

        Of an id that several requests had, the newest come first, and older ones can be left out:
        `routes_batch` says where they are.

        Args:
            request_id: Any id of the request that its client saw.
            index: Only the choice with this index; all choices where None.
            layers: Global layer numbers, or text such as ``0,5-7``; all layers where None.
            weights: Whether to fetch the routing weights too.
            wait_s: Seconds to wait for the end of a request; the server's default where None.
            start: The first row to fetch: those before it are known, as in a conversation.
            weights_version: Only rows that the weights of this number computed; others are missing.
            max_staleness: By how many changes of the weights rows may lag behind the present ones;
                others are missing.
            tokens: Whether to fetch the text of the tokens too: `RouteTrace.tokens`, which is None
                where the server keeps token ids out, or is older than this.

        Raises:
            RequestNotFoundError: The server never saw this id.
            StillRunningError: The request has not finished.
            TraceEvictedError: The trace made room for newer ones.
            InvalidQueryError: The server cannot take a parameter, such as an unknown layer.
            FormatError: The response holds no traces.
        """
        return self._run(
            self._calls.routes(
                request_id,
                index=index,
                layers=layers,
                weights=weights,
                wait_s=wait_s,
                start=start,
                weights_version=weights_version,
                max_staleness=max_staleness,
                tokens=tokens,
            )
        )

    def routes_batch(
        self,
        request_ids: Sequence[str],
        *,
        layers: Layers = None,
        weights: bool = True,
        wait_s: float | None = None,
        start: int | Mapping[str, int] = 0,
        weights_version: int | None = None,
        max_staleness: int | None = None,
        tokens: bool = False,
    ) -> RoutesBatch:
        """Fetch the traces of many requests, in as few responses as they fit into.

        A request that has none is no error here: ``failed`` says why.

        Args:
            request_ids: Any ids of the requests that their clients saw, any number of them.
            layers: Global layer numbers, or text such as ``0,5-7``; all layers where None.
            weights: Whether to fetch the routing weights too.
            wait_s: Seconds to wait for all of them to end; the server's default where None.
            start: The first row to fetch of each request, or by id.
            weights_version: As of `routes`.
            max_staleness: As of `routes`.
            tokens: As of `routes`; a server that is older refuses it.

        Raises:
            InvalidQueryError: The server cannot take a parameter, such as an unknown layer.
            FormatError: The response holds no batch.
        """
        return self._run(
            self._calls.routes_batch(
                request_ids,
                layers=layers,
                weights=weights,
                wait_s=wait_s,
                start=start,
                weights_version=weights_version,
                max_staleness=max_staleness,
                tokens=tokens,
            )
        )

    def follow(
        self,
        request_id: str,
        *,
        index: int = 0,
        start: int = 0,
        layers: Layers = None,
        weights: bool = True,
    ) -> Iterator[RouteTrace]:
        """Yield the rows of a running request as they are computed, page by page.

        While it runs, a page's ``finish_reason`` is None and it has no ``token_ids``; the pages
        after its end say what the finished trace does. `RouteTrace.joined` joins pages.

        Args:
            request_id: Any id of the request that its client saw; of several requests that had it,
                the newest is followed.
            index: Which choice of the response.
            start: The first row to fetch: to go on where a stream ended early, the first row that
                did not come.
            layers: Global layer numbers, or text such as ``0,5-7``; all layers where None.
            weights: Whether to fetch the routing weights too.

        Raises:
            RequestNotFoundError: The server never saw this id, or was told to forget it meanwhile.
            TraceEvictedError: The trace made room for newer ones.
            InvalidQueryError: The server cannot take a parameter, such as an unknown layer.
            CollectorDownError: Too many clients follow, or the collector ended meanwhile.
            FormatError: The response holds no pages of one trace.
        """
        response = self._run(
            self._calls.follow(request_id, index=index, start=start, layers=layers, weights=weights)
        )
        yield from following.follow(
            response, start, self._calls.max_bytes, self._http.timeout.read or math.inf
        )

    def recent(self, limit: int = 50, before: int | None = None) -> RecentPage:
        """List recent sequences, newest first.

        Args:
            limit: How many at most.
            before: The ``next_before`` of the page before this one.

        Raises:
            FormatError: The response is no such page: it has more, or does not get on.
        """
        return self._run(self._calls.recent(limit, before))

    def iter_recent(self, page_size: int = 1000) -> Iterator[SequenceInfo]:
        """Iterate over all sequences that the server knows, newest first, page by page.

        Args:
            page_size: Sequences that are fetched at a time, at most 1000.

        Raises:
            FormatError: A response is no page of that list.
        """
        page = self.recent(page_size)
        yield from page.sequences
        while page.next_before is not None:
            page = self.recent(page_size, page.next_before)
            yield from page.sequences

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
        return self._run(self._calls.experts(phase, window_s))

    def info(self) -> ServerInfo:
        """Fetch what the server captures: model, layers, experts, versions, limits."""
        return self._run(self._calls.info())

    def delete(self, request_id: str) -> int:
        """Make the server forget a request.

        Returns:
            How many sequences were deleted.

        Raises:
            RequestNotFoundError: The server never saw this id.
        """
        return self._run(self._calls.delete(request_id))

    def pause(self) -> str:
        """Pause the capture; returns its state."""
        return self._run(self._calls.pause())

    def resume(self) -> str:
        """Resume the capture; returns its state."""
        return self._run(self._calls.resume())

    def weights_label(self) -> str:
        """Return the label of the server's weights; ``default`` where none was set."""
        return self._run(self._calls.weights_label())

    def label_weights(self, label: str) -> str:
        """Label the server's weights, which is the admin's to do; returns the label.

        vLLM tells it of the tokens that are sampled from here on, see `RouteTrace.weight_labels`.
        """
        return self._run(self._calls.label_weights(label))

    def reset(self) -> float:
        """Set the expert counts to zero.

        Returns:
            The Unix time from which they run, in seconds.
        """
        return self._run(self._calls.reset())

    def _run(self, call: Call[_T]) -> _T:
        try:
            step = next(call)
            while True:
                try:
                    response = self._do(step)
                except ConnectionFailedError as error:
                    step = call.throw(error)
                else:
                    step = call.send(response)
        except StopIteration as end:
            found: _T = end.value
            return found

    def _do(self, step: Query | Pause) -> httpx.Response | None:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        return self._http.request(**step.arguments())
