"""What others feel of those who look at the page: ``python -m benchmarks.cpu.viewers``.

``/health`` is asked at a rate, in turns beside nobody, beside clients that watch the experts of
each second, and beside clients that follow the requests that end. Meanwhile 64 sequences are
decoded, in the shape of Qwen1.5-MoE-A2.7B.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import multiprocessing
import threading
from collections.abc import Iterator
from typing import Any

import httpx

from benchmarks import result
from benchmarks.cpu.collector import Replay
from benchmarks.cpu.fetch import app_beside, ask_at_rate, quantiles_ms
from benchmarks.cpu.traffic import Load

LOAD = Load(name="served", concurrency=64, prompt_len=1, output_len=128, steps_per_s=20.0)
NUM_VIEWERS = 16
ARMS = {"nobody": None, "live": "/experts/stream", "requests": "/routes?follow=true"}
"""What each of the viewers reads."""
PER_S = 100.0
"""How often ``/health`` is asked."""
TIMEOUT_S = 30.0


@contextlib.contextmanager
def running(replay: Replay) -> Iterator[None]:
    """Let sequences be decoded meanwhile."""
    is_over = threading.Event()

    def go_on() -> None:
        while not is_over.is_set():
            replay.run(1.0, LOAD.steps_per_s)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class Viewers:
    """Clients that read a stream of events."""

    def __init__(self, http: httpx.AsyncClient, path: str) -> None:
        self.num_events = 0
        self._first = [asyncio.Event() for _ in range(NUM_VIEWERS)]
        self._tasks = [asyncio.create_task(self._read(http, path, one)) for one in self._first]

    async def _read(self, http: httpx.AsyncClient, path: str, first: asyncio.Event) -> None:
        async with http.stream("GET", path) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    self.num_events += 1
                    first.set()

    async def wait(self) -> None:
        """Wait until each has had an event."""
        waits = asyncio.gather(*(one.wait() for one in self._first))
        await asyncio.wait_for(waits, TIMEOUT_S)

    async def leave(self) -> None:
        """End all streams; raises what ended one of them before."""
        ended = [task for task in self._tasks if task.done()]
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        for task in ended:
            task.result()


async def probed(
    pool: concurrent.futures.Executor, url: str, path: str | None, seconds: float
) -> tuple[list[float], int]:
    """Ask ``/health`` beside the viewers of a path; return the seconds and their events."""
    loop = asyncio.get_running_loop()
    ask = functools.partial(ask_at_rate, [f"{url}/health"], PER_S, seconds)
    if path is None:
        return await loop.run_in_executor(pool, ask), 0
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as http:
        viewers = Viewers(http, path)
        await viewers.wait()
        before = viewers.num_events
        took_s = await loop.run_in_executor(pool, ask)
        num_events = viewers.num_events - before
        await viewers.leave()
    return took_s, num_events


def measure(url: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure all arms in turns, every other round backwards."""
    took_s: dict[str, list[list[float]]] = {name: [] for name in ARMS}
    events = dict.fromkeys(ARMS, 0)
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawned) as pool:
        for number in range(rounds):
            for name in [*ARMS][:: 1 if number % 2 == 0 else -1]:
                values, num_events = asyncio.run(probed(pool, url, ARMS[name], seconds))
                took_s[name].append(values)
                events[name] += num_events
    return {
        name: {
            **quantiles_ms([one for values in by_round for one in values]),
            "p99_by_round": [quantiles_ms(values)["p99"] for values in by_round],
            "events_read": events[name],
        }
        for name, by_round in took_s.items()
    }


def main() -> None:
    """Measure, print and write."""
    parser = result.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="Of each arm in a round.")
    args = parser.parse_args()
    with app_beside(LOAD) as (url, replay), running(replay):
        figures = measure(url, args.rounds, args.seconds)
    result.write(args.out, "benchmarks.cpu.viewers", viewers=NUM_VIEWERS, health_ms=figures)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
