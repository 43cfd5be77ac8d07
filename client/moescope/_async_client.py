"""The asynchronous twin of `moescope.Client`: the same calls, another loop around them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx

from moescope import following, http, received
from moescope._client import API_KEY_VARIABLE, RETRIES, TIMEOUT_S
from moescope.addresses import Verify
from moescope.batch import RoutesBatch
from moescope.calls import Calls, Layers
from moescope.errors import ConnectionFailedError
from moescope.records import ExpertCounts, RecentPage, SequenceInfo, ServerInfo
from moescope.retries import Call, Pause, Query, Retries
from moescope.trace import RouteTrace

_T = TypeVar("_T")


class AsyncClient:
    """`Client` for asyncio: its methods return the same, and raise the same; see there.

    >>> async with moescope.AsyncClient("http://localhost:8000") as client:
    ...     (trace,) = await client.routes("chatcmpl-…")

    Any number of tasks of one event loop may use it at once.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
        max_bytes: int = received.MAX_BYTES,
        verify: Verify = True,
        retries: int = RETRIES,
    ) -> None:
        key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
        self._http = http.connect_async(base_url, key, timeout_s, transport, max_bytes, verify)
        self._calls = Calls(max_bytes=max_bytes, retries=Retries(count=retries))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def routes(
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
        """Fetch the traces of one request; see `Client.routes`."""
        return await self._run(
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

    async def routes_batch(
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
        """Fetch the traces of many requests; see `Client.routes_batch`."""
        return await self._run(
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

    async def follow(
        self,
        request_id: str,
        *,
        index: int = 0,
        start: int = 0,
        layers: Layers = None,
        weights: bool = True,
    ) -> AsyncIterator[RouteTrace]:
        """Yield the rows of a running request as they are computed; see `Client.follow`."""
        response = await self._run(
            self._calls.follow(request_id, index=index, start=start, layers=layers, weights=weights)
        )
        pages = following.afollow(
            response, start, self._calls.max_bytes, self._http.timeout.read or math.inf
        )
        async with contextlib.aclosing(pages):
            async for page in pages:
                yield page

    async def recent(self, limit: int = 50, before: int | None = None) -> RecentPage:
        """List recent sequences; see `Client.recent`."""
        return await self._run(self._calls.recent(limit, before))

    async def iter_recent(self, page_size: int = 1000) -> AsyncIterator[SequenceInfo]:
        """Iterate over all sequences that the server knows; see `Client.iter_recent`."""
        page = await self.recent(page_size)
        for one in page.sequences:
            yield one
        while page.next_before is not None:
            page = await self.recent(page_size, page.next_before)
            for one in page.sequences:
                yield one

    async def experts(
        self,
        phase: Literal["all", "prefill", "decode"] = "all",
        window_s: float | None = None,
    ) -> ExpertCounts:
        """Fetch how often each expert was selected; see `Client.experts`."""
        return await self._run(self._calls.experts(phase, window_s))

    async def info(self) -> ServerInfo:
        """Fetch what the server captures; see `Client.info`."""
        return await self._run(self._calls.info())

    async def delete(self, request_id: str) -> int:
        """Make the server forget a request; see `Client.delete`."""
        return await self._run(self._calls.delete(request_id))

    async def pause(self) -> str:
        """Pause the capture; returns its state."""
        return await self._run(self._calls.pause())

    async def resume(self) -> str:
        """Resume the capture; returns its state."""
        return await self._run(self._calls.resume())

    async def weights_label(self) -> str:
        """Return the label of the server's weights; see `Client.weights_label`."""
        return await self._run(self._calls.weights_label())

    async def label_weights(self, label: str) -> str:
        """Label the server's weights; see `Client.label_weights`."""
        return await self._run(self._calls.label_weights(label))

    async def reset(self) -> float:
        """Set the expert counts to zero; see `Client.reset`."""
        return await self._run(self._calls.reset())

    async def _run(self, call: Call[_T]) -> _T:
        try:
            step = next(call)
            while True:
                try:
                    response = await self._do(step)
                except ConnectionFailedError as error:
                    step = call.throw(error)
                else:
                    step = call.send(response)
        except StopIteration as end:
            found: _T = end.value
            return found

    async def _do(self, step: Query | Pause) -> httpx.Response | None:
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            return None
        return await self._http.request(**step.arguments())
