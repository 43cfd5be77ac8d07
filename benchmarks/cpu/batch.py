"""What a trainer's fetch of many traces takes: ``python -m benchmarks.cpu.batch``.

1,000 traces of 1,024 tokens in the shape of Qwen1.5-MoE-A2.7B (24 layers, top-4, float16 weights),
295 MB, by one `moescope.Client.routes_batch`; those that lost rows, where the machine is busy, are
left out. Beside it the same responses, of which a client reads
the bytes alone, in each format of arrays and columns, and as many bytes that cost nothing to make;
and what other endpoints feel.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from benchmarks import result
from benchmarks.cpu.fetch import PROBES, ask_at_rate, quantiles_ms, received, served
from benchmarks.cpu.traffic import PREFILL, ROW_BYTES, Load
from moescope import Client

NUM_TRACES = 1000
TOKENS = 1024
PAGE_TRACES = 50
"""What fits into one response."""
PROBED_S = 1.0
"""Less than a batch takes."""
TRACE_BYTES = (TOKENS - 1) * ROW_BYTES
LOAD = Load(
    name="rollouts", concurrency=8, prompt_len=TOKENS - 1, output_len=1,
    steps_per_s=PREFILL.steps_per_s,
)  # fmt: skip


def whole(url: str, ids: Sequence[str]) -> list[str]:
    """Return the requests whose traces lack no row: a missing one costs less."""
    with Client(url) as client:
        found = client.routes_batch(ids).traces
    return [one for one in ids if all(trace.complete for trace in found.get(one, ()))]


def fetch(url: str, ids: Sequence[str]) -> int:
    """Fetch all traces as a trainer does; return the bytes of their rows."""
    with Client(url) as client:
        batch = client.routes_batch(ids)
    return sum(one.num_rows * ROW_BYTES for found in batch.traces.values() for one in found)


def read(form: str, url: str, ids: Sequence[str]) -> int:
    """Read the bytes of such responses in a format, and nothing more; return how many."""
    total = 0
    with httpx.Client(timeout=60.0) as http:
        for first in range(0, len(ids), PAGE_TRACES):
            wanted = {"request_ids": ids[first : first + PAGE_TRACES], "format": form}
            total += received(http, "POST", f"{url}/routes/batch", json=wanted)
    return total


def read_zeros(url: str, ids: Sequence[str]) -> int:
    """Read as many bytes that cost nothing to make, in responses of the same size."""
    size, total = PAGE_TRACES * TRACE_BYTES, 0
    with httpx.Client(timeout=60.0) as http:
        while total < len(ids) * TRACE_BYTES:
            total += received(http, "GET", f"{url}/bytes/{size}")
    return total


BATCH = "Client.routes_batch"
ARMS: dict[str, Callable[[str, Sequence[str]], int]] = {
    BATCH: fetch,
    "its responses' bytes": functools.partial(read, "npz"),
    "Arrow's bytes": functools.partial(read, "arrow"),
    "Parquet's bytes": functools.partial(read, "parquet"),
    "bytes that cost nothing": read_zeros,
}


def timed(arm: str, url: str, ids: Sequence[str]) -> float:
    """Run one of `ARMS`; return the MB a second of rows that it read."""
    started_s = time.perf_counter()
    num_bytes = ARMS[arm](url, ids)
    seconds = time.perf_counter() - started_s
    rows_bytes = len(ids) * TRACE_BYTES
    if num_bytes < rows_bytes and arm != "Parquet's bytes":  # which are compressed
        raise RuntimeError(f"{arm}: {num_bytes} bytes of {rows_bytes}: rows are missing")
    return rows_bytes / seconds / 1e6


def measure(url: str, ids: Sequence[str], rounds: int) -> dict[str, Any]:
    """Run all arms in shuffled rounds; then probe other endpoints beside the first."""
    order, rates = random.Random(0), {arm: list[float]() for arm in ARMS}
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, spawned) as others:
        for _ in range(rounds):
            for arm in order.sample(list(ARMS), len(ARMS)):
                rates[arm].append(others.submit(timed, arm, url, ids).result())
        felt: dict[str, Any] = {}
        for probe, per_s in PROBES.items():
            for name in ("nobody", BATCH):
                fetching = others.submit(timed, name, url, ids) if name in ARMS else None
                asked = others.submit(ask_at_rate, [url + probe], per_s, PROBED_S)
                felt.setdefault(name, {})[probe] = quantiles_ms(asked.result())
                if fetching is not None:
                    fetching.result()
    return {
        "traces": len(ids),
        "rows_bytes": len(ids) * TRACE_BYTES,
        "mb_per_s": {
            arm: {"median": statistics.median(values), "rounds": values}
            for arm, values in rates.items()
        },
        "others_ms": felt,
    }


def main() -> None:
    """Measure, print and write."""
    parser = result.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with served(LOAD, NUM_TRACES) as (url, ids, _):
        figures = measure(url, whole(url, ids), args.rounds)
    result.write(args.out, "benchmarks.cpu.batch", **figures)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
