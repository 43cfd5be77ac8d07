"""What fetching long traces takes, and takes from others: ``python -m benchmarks.cpu.fetch``.

Traces are of 4,096 tokens in the shape of Qwen1.5-MoE-A2.7B: 24 layers, top-4, float16 weights.
First each format by itself, one fetch after the other. Then ``/health`` and ``/experts`` while
a client fetches at a rate, beside none, and beside one that fetches as many bytes that cost
nothing to make.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks import result
from benchmarks.cpu.collector import Replay, collector
from benchmarks.cpu.traffic import PREFILL, ROW_BYTES, Load
from moescope import servers
from moescope.records import StoreInfo
from moescope_service.queries import InfoQuery
from moescope_service.runtime import collector_address
from moescope_service.settings import ENABLE, RUNTIME_DIR

NUM_TRACES = 64
TOKENS = 4096
LOAD = Load(
    name="traces", concurrency=2, prompt_len=TOKENS - 1, output_len=1,
    steps_per_s=PREFILL.steps_per_s,
)  # fmt: skip
FORMATS = ("npz", "json")
ENCODINGS = ("identity", "gzip")
RATES = {"npz": 100.0, "json": 10.0}
"""Fetches a second, of what others feel."""
PROBES = {"/health": 100.0, "/experts": 50.0}
"""Other endpoints, the second of which asks the collector too, and how often a second."""


@contextlib.contextmanager
def served(load: Load, number: int) -> Iterator[tuple[str, list[str], StoreInfo]]:
    """Serve the traces of a load; yield the address, their ids and what the store holds.

    Args:
        load: What the collector is told of.
        number: Traces that are stored.
    """
    with app_beside(load) as (url, replay):
        while replay.num_answered < number + load.concurrency:
            replay.send()
        replay.settle()
        ids = [f"cmpl-{i}" for i in range(number)]
        yield url, ids, replay.ask(InfoQuery()).info.store


@contextlib.contextmanager
def app_beside(load: Load) -> Iterator[tuple[str, Replay]]:
    """Start a collector and the app; yield the app's address, and what replays a load."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= {ENABLE: "1", RUNTIME_DIR: directory, "VLLM_PLUGINS": "moescope"}
        with collector(collector_address(), os.sched_getaffinity(0)):
            replay = Replay(load, collector_address())
            replay.api.wait_for_workers()
            (port,) = servers.free_ports(1)
            url = f"http://127.0.0.1:{port}"
            command = [sys.executable, "-m", "benchmarks.cpu.routes_server", str(port)]
            log = Path(directory) / "log"
            with servers.Server("routes", command, url, log, os.environ) as server:
                servers.wait_ready((server,), 120.0)
                yield url, replay
            replay.close()


def ask_at_rate(urls: Sequence[str], per_s: float, seconds: float) -> list[float]:
    """Fetch one URL after the other at a rate; return the seconds from when each was due."""
    took_s = []
    with httpx.Client(headers={"Accept-Encoding": "identity"}, timeout=60.0) as http:
        http.get(urls[0])  # connected
        start_s = time.perf_counter()
        for number in range(round(per_s * seconds)):
            due_s = start_s + number / per_s
            time.sleep(max(0.0, due_s - time.perf_counter()))
            http.get(urls[number % len(urls)]).raise_for_status()
            took_s.append(time.perf_counter() - due_s)
    return took_s


def quantiles_ms(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the median and the tail of durations, in milliseconds, and how many there are."""
    values = (1e3 * np.quantile(seconds, (0.5, 0.99, 1.0))).tolist()
    return {**dict(zip(("p50", "p99", "max"), values, strict=True)), "requests": len(seconds)}


def received(http: httpx.Client, method: str, url: str, **options: Any) -> int:
    """Read a response, and do nothing with it; return how many bytes came."""
    with http.stream(method, url, **options) as response:
        response.raise_for_status()
        return sum(map(len, response.iter_raw()))


def fetched_alone(url: str, ids: Sequence[str], repeat: int) -> dict[str, Any]:
    """Fetch traces one after the other in every format and encoding."""
    figures: dict[str, Any] = {}
    for form in FORMATS:
        for encoding in ENCODINGS:
            took_s, wire_bytes = [], 0
            with httpx.Client(headers={"Accept-Encoding": encoding}, timeout=60.0) as http:
                for number in range(repeat):
                    where = f"{url}/routes/{ids[number % len(ids)]}?format={form}"
                    started_s = time.perf_counter()
                    wire_bytes = received(http, "GET", where)
                    took_s.append(time.perf_counter() - started_s)
            figures[f"{form}, {encoding}"] = {**quantiles_ms(took_s), "wire_bytes": wire_bytes}
    return figures


def felt_by_others(
    url: str, ids: Sequence[str], sizes: dict[str, int], rounds: int, seconds: float
) -> dict[str, Any]:
    """Probe other endpoints in shuffled rounds: alone, beside fetches, beside as many bytes."""
    arms: dict[str, tuple[list[str], float]] = {"nobody": ([], 0.0)}
    for form, rate in RATES.items():
        arms[f"{rate:g} {form} a second"] = (
            [f"{url}/routes/{one}?format={form}" for one in ids], rate,
        )  # fmt: skip
        arms[f"{rate:g} x {sizes[form]} bytes a second"] = ([f"{url}/bytes/{sizes[form]}"], rate)
    took_s: dict[str, dict[str, list[float]]] = {
        name: {probe: [] for probe in (*PROBES, "fetches")} for name in arms
    }
    order = random.Random(0)
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, spawned) as others:
        for probe, per_s in [*PROBES.items()] * rounds:
            for name in order.sample(list(arms), len(arms)):
                urls, rate = arms[name]
                fetching = others.submit(ask_at_rate, urls, rate, seconds) if urls else None
                asked = others.submit(ask_at_rate, [url + probe], per_s, seconds)
                took_s[name][probe] += asked.result()
                took_s[name]["fetches"] += fetching.result() if fetching else []
    return {
        name: {what: quantiles_ms(values) for what, values in by_what.items() if values}
        for name, by_what in took_s.items()
    }


def main() -> None:
    """Measure, print and write."""
    parser = result.parser(__doc__)
    parser.add_argument("--repeat", type=int, default=200, help="Fetches of each format.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="Of each arm in a round.")
    args = parser.parse_args()
    with served(LOAD, NUM_TRACES) as (url, ids, store):
        figures = measure(args, url, ids)
    figures["store_bytes_per_entry"] = store.bytes / (store.traces * (TOKENS - 1) * ROW_BYTES // 3)
    result.write(args.out, "benchmarks.cpu.fetch", **figures)
    print(args.out.read_text())


def measure(args: Any, url: str, ids: Sequence[str]) -> dict[str, Any]:
    """Fetch the traces."""
    alone = fetched_alone(url, ids, args.repeat)
    sizes = {form: alone[f"{form}, identity"]["wire_bytes"] for form in FORMATS}
    return {
        "alone_ms": alone,
        "others_ms": felt_by_others(url, ids, sizes, args.rounds, args.seconds),
    }


if __name__ == "__main__":
    main()
