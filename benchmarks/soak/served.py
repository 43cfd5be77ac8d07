"""Requests to real vLLM servers with two API servers, disturbed; every row compared with HF's."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.faults import plugin
from benchmarks.faults.served import CHANCES, CONCURRENCY, KV_BLOCKS
from benchmarks.simulation.server import API_KEY, serving
from benchmarks.soak.faults import Faults, end_of_api_server, processes
from benchmarks.soak.judging import Judge
from benchmarks.soak.load import ALIKE, Load, result
from benchmarks.soak.memory import Memory, Sampler
from moescope.servers import Server, captured_command, stock_env
from moescope_service import bundled_model

_STOCK_SHARE = 20
"""One of so many requests is sent to a stock server as well, which counts its serving errors."""
_MIN_STOCK = 200
_CLOCK_EVERY_S = 30.0
_SAMPLE_EVERY_S = 2.0
_REPORT_EVERY_S = 30.0
_END_S = 60.0
_CALM = 200
"""Requests after the last fault."""
_TOKENS_A_STEP = 16
"""For each client: steps are so small that prompts are cut into chunks."""
_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    # On a GPU Triton rounds float32 to TF32 by default; the reference would choose other experts.
    "TRITON_F32_DEFAULT": "ieee",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is served, and how it is disturbed."""

    num_requests: int
    minutes: float
    """The most that the load takes."""
    seed: int
    fault_every_s: float
    concurrency: int = CONCURRENCY
    """Clients that send one request after the other."""
    workers: int = 1
    """Processes that compare traces."""
    flags: Sequence[str] = ()
    """Of vLLM, for both servers."""

    def server_flags(self) -> list[str]:
        """Return vLLM's flags, in proportion to the clients.

        KV blocks are few, so that they are hit, evicted and used again.
        """
        sizes = {
            "--api-server-count": 2,
            "--max-num-seqs": self.concurrency,
            "--max-num-batched-tokens": _TOKENS_A_STEP * self.concurrency,
            "--num-gpu-blocks-override": KV_BLOCKS * self.concurrency // CONCURRENCY,
        }
        given = [word for name, size in sizes.items() for word in (name, str(size))]
        return ["--enforce-eager", *given, *self.flags]


@contextlib.contextmanager
def _captured(directory: Path, plan: Plan) -> Iterator[Server]:
    found = directory / "plugin"
    plugin.install(found)
    command = captured_command([str(bundled_model.path())])
    command += ["--routes-weights-dtype", "float32", "--routes-memory", "4MiB"]
    command += ["--routes-log", str(directory / "routes.jsonl")]
    chances = {**CHANCES, "clock_every_s": _CLOCK_EVERY_S}
    env = {**plugin.environment(found, chances, plan.seed), **_ENV}
    with serving(command, env, directory / "soak.log", plan.server_flags()) as server:
        yield server


@contextlib.contextmanager
def _stock(directory: Path, plan: Plan) -> Iterator[Server]:
    command = [sys.executable, "-m", "benchmarks.soak.stock", str(bundled_model.path())]
    env = {**stock_env(os.environ), **_ENV}
    with serving(command, env, directory / "stock.log", plan.server_flags()) as server:
        yield server


async def _disturbed(
    server: Server, load: Load, faults: Faults, judge: Judge, plan: Plan
) -> collections.Counter[str]:
    """Send all requests while faults happen, and some afterwards; compare all traces.

    Returns:
        What the judge counted of those that came after the faults, each with a prompt of its own:
        what the faults cost cannot be missing there.
    """
    async with asyncio.TaskGroup() as group:
        beside = [faults.run(), _report(load, judge, faults)]
        tasks = [group.create_task(one) for one in beside]
        await load.run(_numbers(plan))
        for task in tasks:
            task.cancel()
    await judge.finish()
    during = judge.counts.copy()
    first = -(-plan.num_requests // ALIKE) * ALIKE
    await load.run(iter(range(first, first + _CALM * ALIKE, ALIKE)))
    await judge.finish()
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as http:
        await faults.account(http)
    return judge.counts - during


def _numbers(plan: Plan) -> Iterator[int]:
    """Yield the numbers of requests until the time is up."""
    deadline_s = time.monotonic() + 60 * plan.minutes
    for number in range(plan.num_requests):
        if time.monotonic() > deadline_s:
            return
        yield number


async def _report(load: Load, judge: Judge, faults: Faults) -> None:
    while True:
        await asyncio.sleep(_REPORT_EVERY_S)
        print(result(load), dict(judge.counts), dict(faults.counts), flush=True)


def run(plan: Plan) -> dict[str, Any]:
    """Serve, disturb and compare; then ask a stock server, and kill an API server of both."""
    memory = Memory(time.monotonic())
    with (
        tempfile.TemporaryDirectory(prefix="moescope-soak-") as name,
        contextlib.closing(Judge(plan.workers)) as judge,
    ):
        directory = Path(name)
        with _captured(directory, plan) as server:
            load = Load(server.url, random.Random(plan.seed), plan.concurrency, judge.take)
            faults = Faults(server, load, plan.fault_every_s)
            sampler = Sampler(memory, lambda: processes(server), _SAMPLE_EVERY_S)
            sampler.start()
            started_s = time.monotonic()
            calm = asyncio.run(_disturbed(server, load, faults, judge, plan))
            load_s = time.monotonic() - started_s
            sampler.stop()
            killed = {"moescope": end_of_api_server(server, _END_S)}
            left = [one.name for one in directory.glob("*") if one.is_socket()]
        with _stock(directory, plan) as server:
            stock = Load(server.url, random.Random(plan.seed), plan.concurrency)
            count = max(_MIN_STOCK, load.counts["requests"] // _STOCK_SHARE)
            asyncio.run(stock.run(iter(range(count))))
            killed["stock"] = end_of_api_server(server, _END_S)
    zeros = dict.fromkeys(["complete_and_wrong", "wrong_rows", "near_ties"], 0)
    return {
        **zeros,
        **dict(sorted(judge.counts.items())),
        "after_faults": {name: calm[name] for name in ("traces", "complete")},
        "load_s": round(load_s, 1),
        "flags": plan.server_flags(),
        "chances": CHANCES,
        "clock_step_s": plugin.CLOCK_STEP_S,
        "faults": dict(sorted(faults.counts.items())),
        "missing_rows_of_all_traces": faults.missing_rows,
        "missing_by_cause": dict(sorted(faults.missing_by_cause.items())),
        "load": result(load),
        "stock": result(stock),
        "api_server_killed": killed,
        "sockets_left": left,
        "grown_mib": memory.growth_mib(),
        "memory_mib": memory.thinned(),
    }
