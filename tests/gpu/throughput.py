"""Throughput of several servers under the same loads, in short rounds of shuffled order.

Outputs are sampled at temperature 1. A step's time depends on how many experts its tokens load, and
greedy outputs of random weights run into loops that differ from server to server by rounding alone:
the same prompts then cost up to 70% more on one than on the other, with or without capture.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
import numpy as np

from moescope.overhead.comparison import bootstrap_interval
from moescope.overhead.hosting import SETTLE_S

STOCK, STOCK_AGAIN, MOESCOPE = "stock", "stock_again", "moescope"
TIMEOUT_S = 300.0
RANDOM_TOKENS = (50, 450)
"""Range of the random tokens: ordinary ones in every vocabulary."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of a server in one round."""

    name: str
    num_requests: int
    prompt_len: int
    output_len: int
    concurrency: int
    rounds: int
    texts: Sequence[str] = ()
    """Prompts to ask in place of random tokens."""

    def prompts(self, round_number: int) -> list[str] | list[list[int]]:
        """Return a round's prompts: no two rounds share a prefix that could be cached."""
        if self.texts:
            return [f"({round_number}) {text}" for text in self.texts[: self.num_requests]]
        generator = np.random.default_rng(round_number)
        shape = (self.num_requests, self.prompt_len)
        return generator.integers(*RANDOM_TOKENS, shape).tolist()


def loads(gsm8k: Sequence[str], scale: float) -> list[Load]:
    """Return the loads of the result file; ``scale`` shortens all of them."""

    def rounds(number: int) -> int:
        return max(3, round(number * scale))

    return [
        Load("batch 1, 128 in, 256 out", 1, 128, 256, 1, rounds(20)),
        Load("64 concurrent, 128 in, 256 out", 64, 128, 256, 64, rounds(12)),
        Load("prefill 64 x 1,024, 1 out", 64, 1024, 1, 64, rounds(20)),
        Load("GSM8K, 25 questions, 128 out", 25, 0, 128, 25, rounds(16), gsm8k),
    ]


async def run_load(http: httpx.AsyncClient, load: Load, round_number: int) -> float:
    """Run one round on one server; return its wall time in seconds."""
    gate = asyncio.Semaphore(load.concurrency)

    async def ask(prompt: Any) -> int:
        body = {
            "prompt": prompt,
            "max_tokens": load.output_len,
            "temperature": 1.0,
            "ignore_eos": True,
        }
        async with gate:
            reply = await http.post("/v1/completions", json=body)
        reply.raise_for_status()
        return int(reply.json()["usage"]["completion_tokens"])

    prompts = load.prompts(round_number)
    started_s = time.perf_counter()
    tokens = await asyncio.gather(*map(ask, prompts))
    wall_s = time.perf_counter() - started_s
    if any(count != load.output_len for count in tokens):
        raise RuntimeError(f"{http.base_url}: outputs of {set(tokens)} tokens: not the same work")
    return wall_s


async def measure(load: Load, urls: Mapping[str, str]) -> dict[str, Any]:
    """Alternate a load between servers and compare each with the first.

    Returns:
        Median seconds and tokens a second of each arm, paired differences to ``stock`` with 95%
        bootstrap intervals of the mean, every round, and what the capture spent on the host.
    """
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in urls}
    clients = {
        name: httpx.AsyncClient(
            base_url=url, timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None)
        )
        for name, url in urls.items()
    }
    try:
        for name in urls:
            await run_load(clients[name], load, load.rounds)
        before = await _host_counters(clients.get(MOESCOPE))
        for number in range(load.rounds):
            names = list(urls)
            order.shuffle(names)
            for name in names:
                await asyncio.sleep(SETTLE_S)
                seconds[name].append(await run_load(clients[name], load, number))
        after = await _host_counters(clients.get(MOESCOPE))
    finally:
        for client in clients.values():
            await client.aclose()
    return _summary(load, seconds, before, after)


def _summary(
    load: Load,
    seconds: Mapping[str, Sequence[float]],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> dict[str, Any]:
    tokens = load.num_requests * (load.output_len if load.output_len > 1 else load.prompt_len)
    change = {
        name: _paired(values, seconds[STOCK]) for name, values in seconds.items() if name != STOCK
    }
    steps = after.get("steps", 0) - before.get("steps", 0)
    host_s = after.get("hook_seconds", 0) - before.get("hook_seconds", 0)
    return {
        "rounds": load.rounds,
        "median_s": {name: float(np.median(values)) for name, values in seconds.items()},
        "tokens_per_s": {
            name: tokens / float(np.median(values)) for name, values in seconds.items()
        },
        "change_percent": change,
        "host_us_per_step": 1e6 * host_s / steps if steps else None,
        "steps": steps,
        "seconds": seconds,
    }


def _paired(values: Sequence[float], stock: Sequence[float]) -> dict[str, Any]:
    percents = [100.0 * (a / b - 1.0) for a, b in zip(values, stock, strict=True)]
    low, high = bootstrap_interval(percents, 0)
    return {
        "mean": float(np.mean(percents)),
        "median": float(np.median(percents)),
        "interval_95": [low, high],
    }


async def _host_counters(http: httpx.AsyncClient | None) -> dict[str, float]:
    if http is None:
        return {}
    await asyncio.sleep(0.3)  # the last steps are on their way to the collector
    text = (await http.get("/metrics")).text
    return dict(_samples(text))


def _samples(text: str) -> Iterator[tuple[str, float]]:
    for name in ("steps", "hook_seconds"):
        for line in text.splitlines():
            if line.startswith(f"moescope_{name}_total"):
                yield name, float(line.rsplit(" ", 1)[1])
