"""Requests to a real vLLM server, their traces fetched at once, and what came of both."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx

from benchmarks.faults.served import SENTENCE
from benchmarks.simulation.server import API_KEY, MODEL

MAX_TOKENS = 24
# vLLM closes a connection that rests for 5 s: a request that comes just then would fail.
_LIMITS = httpx.Limits(keepalive_expiry=2.0)
SERVED_STATUS = {200}
ALIKE = 400
"""Requests in a row whose prompts begin alike. Others follow: rows that were lost would else be
missing in all that hit their blocks, for ever."""
_LEAVES, _ABORTS = 0.03, 0.03
"""How often a client leaves while it waits for routes, and while its request runs."""
_GRACE_S = 10.0
"""How long after a fault of the collector its answers may still be those of that fault."""


class Load:
    """Clients that send one request after the other.

    Args:
        url: Whom to ask.
        rng: Decides what is asked, and who leaves.
        concurrency: How many clients there are.
        take: Takes each trace, as .npz; without it none is fetched: stock servers have none.
    """

    def __init__(
        self,
        url: str,
        rng: random.Random,
        concurrency: int,
        take: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> None:
        self._url, self._rng, self._concurrency, self._take = url, rng, concurrency, take
        self.counts: collections.Counter[str] = collections.Counter()
        self.serving_errors: collections.Counter[str] = collections.Counter()
        """Requests that failed though their client had stayed, by what it saw."""
        self.unexplained: collections.Counter[str] = collections.Counter()
        """Statuses of routes, other than 200, long after the last fault of the collector."""
        self.fault_s = -_GRACE_S
        """`time.monotonic` of the last moment at which the collector was gone, or stopped."""

    async def run(self, numbers: Iterator[int]) -> None:
        """Send a request for each number, which its id has."""
        headers = {"Authorization": f"Bearer {API_KEY}"}
        async with httpx.AsyncClient(
            base_url=self._url, headers=headers, timeout=120, limits=_LIMITS
        ) as http:
            await asyncio.gather(*(self._client(http, numbers) for _ in range(self._concurrency)))

    async def _client(self, http: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        for number in numbers:
            started_s = time.monotonic()
            request_id = f"soak-{number}"
            is_known = await self._complete(http, number, request_id)
            self.counts["requests"] += 1
            if self._take and is_known:
                npz = await self._fetch(http, request_id, started_s)
                if npz is not None:
                    await self._take(npz)

    async def _complete(self, http: httpx.AsyncClient, number: int, request_id: str) -> bool:
        """Send one request; return whether the engine surely had it."""
        rng = self._rng
        num_choices = 2 if rng.random() < 0.1 else 1
        body = {
            "model": MODEL,
            "prompt": self._prompt(number),
            "max_tokens": rng.randint(1, MAX_TOKENS),
            "temperature": num_choices - 1,  # vLLM takes n = 1 alone where it is 0
            "ignore_eos": True,
            "n": num_choices,
        }
        aborts = rng.random() < _ABORTS
        timeout_s = rng.uniform(0.01, 0.3) if aborts else 120.0
        headers = {"X-Request-Id": request_id}
        try:
            answer = await http.post(
                "/v1/completions", json=body, headers=headers, timeout=timeout_s
            )
        except httpx.HTTPError as error:
            if aborts and isinstance(error, httpx.TimeoutException):
                self.counts["aborted"] += 1
            else:
                self.serving_errors[type(error).__name__] += 1
            return False
        if answer.status_code in SERVED_STATUS:
            self.counts["served"] += 1
        else:
            self.serving_errors[str(answer.status_code)] += 1
        return answer.status_code in SERVED_STATUS

    def _prompt(self, number: int) -> str:
        rng = self._rng
        start = f"Day {number // ALIKE}. " + rng.choice(["", "Mia has a garden. "])
        return start + SENTENCE * rng.randint(1, 12) + f"How many in {rng.randrange(3)} weeks?"

    async def _fetch(
        self, http: httpx.AsyncClient, request_id: str, started_s: float
    ) -> bytes | None:
        """Return a request's traces, None where there are none."""
        if self._rng.random() < _LEAVES:
            with contextlib.suppress(httpx.TimeoutException):
                await http.get(
                    f"/routes/{request_id}?wait_s=60", timeout=self._rng.uniform(0, 0.02)
                )
            self.counts["left"] += 1
        try:
            answer = await http.get(f"/routes/{request_id}?format=npz&wait_s=5")
        except httpx.HTTPError as error:
            self.unexplained[type(error).__name__] += 1
            return None
        self.counts[f"routes_{answer.status_code}"] += 1
        if answer.status_code == 200:
            return answer.content
        if self.fault_s + _GRACE_S < started_s:
            self.unexplained[str(answer.status_code)] += 1
        return None


def result(load: Load) -> dict[str, Any]:
    """Return what came of a load, for JSON."""
    return {
        **dict(sorted(load.counts.items())),
        "serving_errors": dict(load.serving_errors),
        "unexplained": dict(load.unexplained),
    }
