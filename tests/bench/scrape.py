"""What a scrape of a big model costs: ``python -m tests.bench.scrape --out result.json``.

Renders ``/metrics`` for 58 layers of 256 experts in two phases, with every expert shown and with
the defaults, beside vLLM's own exposition alone, in one process and in shuffled order; and watches
how long the event loop stands still meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from prometheus_client import generate_latest
from starlette.concurrency import run_in_threadpool
from vllm.utils.gc_utils import freeze_gc_heap

from moescope import environment
from moescope_service import bundled_model
from moescope_service.api import metrics
from moescope_service.api.collector_client import Reply
from moescope_service.settings import variable
from moescope_service.versions import versions

LAYERS, EXPERTS = 58, 256
BEAT_S = 0.002


def register_vllm_metrics() -> Callable[[], bytes]:
    """Let vLLM register what an engine shows; return its exposition."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    config = EngineArgs(model=str(bundled_model.path())).create_engine_config()
    PrometheusStatLogger(config, [0])
    registry = get_prometheus_registry()
    return lambda: generate_latest(registry)


def make_reply() -> Reply:
    """Return the collector's answer for a model that has seen traffic."""
    generator = np.random.default_rng(0)
    shape = (2, LAYERS, EXPERTS)
    arrays = [generator.integers(0, 10**9, shape).tobytes() for _ in range(2)]
    hello = {"model": "big", "layers": list(range(3, 3 + LAYERS)), "num_experts": EXPERTS}
    store = {"evicted": 0, "traces": 10, "bytes": 10**8, "limit_bytes": 2**30}
    values: dict[str, Any] = {
        "hello": hello, "capture": "on", "store": store, "steps": 10**6, "rows_captured": 10**8,
        "rows_lost": {}, "hook_seconds": 20.0, "traces": {}, "trace_rows": {}, "missing": {},
        "lag_seconds": 0.01, "running": 64, "gaps": 0, "unclaimed": 0, "rows": [10**7, 10**8],
        "window_rows": [10**4, 10**5],
    }  # fmt: skip
    return Reply(values, arrays)


async def longest_stall(work: Callable[[], Any]) -> tuple[float, float]:
    """Run work in a thread; return its seconds and the loop's longest stall meanwhile."""
    beats, done = [time.perf_counter()], False

    async def beat() -> None:
        while not done:
            await asyncio.sleep(BEAT_S)
            beats.append(time.perf_counter())

    heart = asyncio.create_task(beat())
    started_s = time.perf_counter()
    await run_in_threadpool(work)
    seconds = time.perf_counter() - started_s
    done = True
    await heart
    stall_s = max(b - a for a, b in itertools.pairwise(beats)) - BEAT_S
    return seconds, max(stall_s, 0.0)


def measure(rounds: int) -> dict[str, Any]:
    """Measure all three expositions in shuffled rounds."""
    vllm, reply = register_vllm_metrics(), make_reply()
    freeze_gc_heap()  # as vLLM's API server does when it has started

    def render(expert_metrics: str) -> bytes:
        os.environ[variable("expert_metrics")] = expert_metrics
        return metrics.render(reply, "text/plain")[0]

    works: dict[str, Callable[[], bytes]] = {
        "vllm_alone": vllm,
        "defaults": lambda: render("auto"),
        "every_expert": lambda: render("on"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    stalls: dict[str, list[float]] = {name: [] for name in works}
    order = random.Random(0)
    for number in range(rounds + 1):
        names = list(works)
        order.shuffle(names)
        for name in names:
            took_s, stall_s = asyncio.run(longest_stall(works[name]))
            if number:  # the first round warms up
                seconds[name].append(took_s)
                stalls[name].append(stall_s)
    base = statistics.median(seconds["vllm_alone"])
    return {
        name: {
            "bytes": len(work()),
            "our_series": sum(line.startswith(b"moescope_") for line in work().splitlines()),
            "median_ms": 1e3 * statistics.median(seconds[name]),
            "quartiles_ms": [1e3 * q for q in statistics.quantiles(seconds[name])],
            "ratio_to_vllm_alone": statistics.median(seconds[name]) / base,
            "longest_loop_stall_ms": 1e3 * max(stalls[name]),
        }
        for name, work in works.items()
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="The result file.")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    result = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": f"python -m tests.bench.scrape --out {args.out.name} --rounds {args.rounds}",
        "hardware": environment.hardware(),
        "versions": {**versions(), **environment.system()},
        "model": {"layers": LAYERS, "experts": EXPERTS, "phases": 2},
        **measure(args.rounds),
    }
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(orjson.dumps(result, option=options))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
