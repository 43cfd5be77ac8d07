"""What an archive of a million traces takes: ``python -m benchmarks.cpu.archive``.

Traces of 12 tokens in the simulated engine's shape (2 of 5 layers, top-2 of 8 experts) are handed
over as the collector does, message by message, to the archive in this process; then its index is
read anew, ids are looked up, all traces are scanned, and the three queries of docs/archive.md run.
"""

from __future__ import annotations

import collections
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl

from benchmarks import result
from benchmarks.simulation.parts import make_spec
from moescope.archive import Archive as Reading
from moescope.archive.store import Store
from moescope.trace import RouteTrace
from moescope_service.archive.core import Archive
from moescope_service.archive_messages import Handed, pack_traces
from moescope_service.messages import pack, unpack
from moescope_service.queries import RoutesQuery, Wanted, pack_query
from moescope_service.settings import Settings

NUM_TOKENS, AT_ONCE, LOOKUPS = 12, 500, 200
SPEC = make_spec()


def make_trace(number: int, rng: np.random.Generator) -> RouteTrace:
    """Return a trace of random experts."""
    shape = (NUM_TOKENS - 1, len(SPEC.layers), SPEC.top_k)
    return RouteTrace(
        request_id=f"chatcmpl-{number:032x}", index=0, model=SPEC.model,
        num_experts=SPEC.num_experts, num_hidden_layers=SPEC.num_hidden_layers,
        layers=np.array(SPEC.layers, np.int32),
        topk_ids=rng.integers(0, SPEC.num_experts, shape).astype(np.uint8),
        topk_weights=rng.random(shape, np.float32).astype(np.float16),
        source=np.zeros(NUM_TOKENS - 1, np.uint8),
        weights_versions=np.zeros((1, 2), np.int64),
        token_ids=rng.integers(0, 1000, NUM_TOKENS).astype(np.int32), prompt_len=NUM_TOKENS // 2,
        num_tokens=NUM_TOKENS, cached_len=0, finish_reason="length", complete=True,
        created_s=time.time(), versions=SPEC.versions,
    )  # fmt: skip


def write(archive: Archive, num_traces: int) -> float:
    """Hand traces over and publish them; return the seconds that the archive took."""
    rng = np.random.default_rng(0)
    archive.handle(b"collector", pack("archive", collector="0" * 20))
    took_s = 0.0
    for first in range(0, num_traces, AT_ONCE):
        numbers = range(first, min(first + AT_ONCE, num_traces))
        traces = [make_trace(number, rng) for number in numbers]
        handed = [
            Handed(number=number + 1, finished_s=time.time(), ids=(trace.request_id,), owner=None)
            for number, trace in zip(numbers, traces, strict=True)
        ]
        frames = [bytes(frame) for frame in pack_traces(SPEC, handed, traces)]
        started_s = time.perf_counter()
        archive.handle(b"collector", frames)
        archive.tick()
        archive.outbox.clear()
        took_s += time.perf_counter() - started_s
    started_s = time.perf_counter()
    archive.close()
    return took_s + time.perf_counter() - started_s


def look_up(archive: Archive, num_traces: int) -> list[float]:
    """Return the seconds of look-ups of ids by chance.

    Raises:
        RuntimeError: One is not found.
    """
    took_s = []
    for number in random.Random(0).choices(range(num_traces), k=LOOKUPS):
        query = RoutesQuery(wanted=[Wanted(request_id=f"chatcmpl-{number:032x}")])
        started_s = time.perf_counter()
        archive.handle(b"server", pack_query(0, query))
        took_s.append(time.perf_counter() - started_s)
        ((_, frames),) = archive.outbox
        if unpack(frames)[1]["values"]["found"][0]["status"] != "finished":
            raise RuntimeError(f"trace {number} is not found")
        archive.outbox.clear()
    return took_s


def queries(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the queries of docs/archive.md."""
    routes = f"read_parquet('{folder}/**/*.parquet', hive_partitioning = true)"
    return {
        "duckdb_selections": lambda: duckdb.execute(
            "SELECT expert, count(*) AS selections FROM (SELECT unnest(topk_ids[1]) AS expert "  # noqa: S608
            f"FROM {routes} WHERE NOT is_prompt) GROUP BY expert ORDER BY selections DESC LIMIT 5"
        ).fetchall(),
        "duckdb_hours": lambda: duckdb.execute(
            "SELECT date, hour, count(*) AS requests, sum(num_tokens) AS tokens, "  # noqa: S608
            f"sum(cached_len) / sum(prompt_len) AS cached FROM {routes} WHERE position = 0 "
            "GROUP BY date, hour ORDER BY date, hour"
        ).fetchall(),
        "polars_tokens": lambda: (
            pl.scan_parquet(f"{folder}/**/*.parquet", hive_partitioning=True)
            .filter(pl.col("topk_ids").list.get(0).arr.contains(7))
            .group_by("token_id")
            .len()
            .sort("len", descending=True)
            .head(5)
            .collect()
        ),
    }


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def measure(folder: Path, num_traces: int, *, scans: bool) -> dict[str, Any]:
    """Write, read and query an archive."""
    settings = Settings(archive=str(folder))
    archive = Archive(Store(str(folder)), settings)
    archive.tick()
    write_s = write(archive, num_traces)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    files = list(folder.rglob("*.parquet"))
    again = Archive(Store(str(folder)), settings)

    def read_index() -> None:
        again.tick()
        while again.is_busy:
            again.tick()

    found = {
        "traces": num_traces,
        "write_s": write_s,
        "peak_memory_bytes": peak_bytes,
        "files": len(files),
        "files_bytes": sum(file.stat().st_size for file in files),
        "read_index_s": timed(read_index),
        "lookup_s_median": float(np.median(took_s := look_up(again, num_traces))),
        "lookup_s_worst": max(took_s),
        **{f"{name}_s": timed(query) for name, query in queries(folder).items()},
    }
    if scans:
        found["scan_s"] = timed(lambda: collections.deque(Reading(folder).scan(), maxlen=0))
    return found


def main() -> None:
    """Measure, print and write."""
    parser = result.parser(__doc__)
    parser.add_argument("--traces", type=int, default=1_000_000)
    parser.add_argument("--scan", action="store_true", help="read every trace in Python, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder) / "archive", args.traces, scans=args.scan)
    result.write(args.out, "benchmarks.cpu.archive", tokens_a_trace=NUM_TOKENS, **found)
    for name, value in found.items():
        print(f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value:,}")


if __name__ == "__main__":
    main()
