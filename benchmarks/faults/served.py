"""Requests to a real vLLM server whose transport fails, their traces compared with HF's routing."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.faults import plugin
from benchmarks.fidelity.reference import reference_of
from benchmarks.simulation.server import API_KEY, MODEL, serving
from moescope import RouteTrace, Source, formats
from moescope.servers import Server, captured_command
from moescope_service import bundled_model

CHANCES = {"rows_lost": 0.003, "given_up": 0.0005, "delay": 0.05}
"""Of each fault, a message."""
CONCURRENCY = 8
SENTENCE = "Leo reads 9 pages a day for 8 days. "
KV_BLOCKS = 80
"""Of 32 tokens: few, so that blocks are hit, evicted and used again."""
ROUNDING = 1e-5
"""How far a float32 weight may be from float64's; without any fault 2e-6 were seen."""
_BACK_TIMEOUT_S = 60.0

Reference = tuple[Any, Any]
"""HF's ids (sorted) and their weights, ``[num_rows, num_layers, top_k]``."""


@dataclasses.dataclass
class Outcome:
    """What a run of requests came to."""

    counts: collections.Counter[str]
    traces: list[RouteTrace]


@contextlib.contextmanager
def faulty_server(directory: Path, seed: int, chances: dict[str, float]) -> Any:
    """A server with the bundled model in float32 and the fault plugin in all its processes."""
    found = directory / "plugin"
    plugin.install(found)
    command = captured_command([str(bundled_model.path()), "--enforce-eager"])
    command += ["--routes-weights-dtype", "float32", "--num-gpu-blocks-override", str(KV_BLOCKS)]
    env = {
        **plugin.environment(found, chances, seed),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with serving(command, env, directory / "faulty.log") as server:
        yield server


def collector_pid(server: Server) -> int | None:
    """Return the process id of a server's collector, if it runs."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
            command = stat.with_name("cmdline").read_bytes()
            if int(parent) == server.pid and state != "Z" and b"moescope_service.coll" in command:
                return int(stat.parent.name)
    return None


class Load:
    """Requests with shared beginnings, some aborted, while the service is disturbed.

    Args:
        server: Whom to ask.
        num_requests: How many to send.
        seed: Of what is asked.
        kill_every: Requests after which the collector is killed once more.
    """

    def __init__(self, server: Server, num_requests: int, seed: int, *, kill_every: int) -> None:
        self._server, self._kill_every = server, kill_every
        self._numbers = iter(range(num_requests))
        self._rng = random.Random(seed)
        self.outcome = Outcome(collections.Counter(), [])
        self._is_over = asyncio.Event()

    async def run(self, *, pause_every_s: float) -> Outcome:
        """Send all requests and fetch the trace of each at once."""
        headers = {"Authorization": f"Bearer {API_KEY}"}
        async with httpx.AsyncClient(
            base_url=self._server.url, headers=headers, timeout=120
        ) as http:
            pauses = asyncio.create_task(self._pauses(http, pause_every_s))
            await asyncio.gather(*(self._client(http) for _ in range(CONCURRENCY)))
            self._is_over.set()
            await pauses
        return self.outcome

    async def _pauses(self, http: httpx.AsyncClient, every_s: float) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), every_s)
            if self._is_over.is_set():
                return
            await self._pause(http)

    def _kill(self) -> None:
        pid = collector_pid(self._server)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            self.outcome.counts["collector_kills"] += 1

    async def _pause(self, http: httpx.AsyncClient) -> None:
        answer = await http.post("/routes/pause")
        self.outcome.counts["pauses"] += answer.status_code == 200
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_over.wait(), 0.5)
        await until(200, http, "POST", "/routes/resume")

    async def _client(self, http: httpx.AsyncClient) -> None:
        for number in self._numbers:
            request_id = f"f{number}"
            body = {
                "model": MODEL,
                "prompt": self._prompt(),
                "max_tokens": self._rng.randint(1, 48),
                "temperature": 0,
                "ignore_eos": True,
            }
            aborts = self._rng.random() < 0.05
            timeout_s = self._rng.uniform(0.01, 0.3) if aborts else 120
            try:
                answer = await http.post(
                    "/v1/completions",
                    json=body,
                    headers={"X-Request-Id": request_id},
                    timeout=timeout_s,
                )
                answer.raise_for_status()
            except httpx.TimeoutException:
                self.outcome.counts["aborted"] += 1
            self.outcome.counts["requests"] += 1
            if self.outcome.counts["requests"] % self._kill_every == 0:
                self._kill()
            await self._fetch(http, request_id)

    def _prompt(self) -> str:
        rng = self._rng
        start = rng.choice(["", "A book has many pages. ", "Mia has a garden. "])
        return start + SENTENCE * rng.randint(1, 16) + f"How many in {rng.randrange(3)} weeks?"

    async def _fetch(self, http: httpx.AsyncClient, request_id: str) -> None:
        answer = await http.get(f"/routes/{request_id}?format=npz&wait_s=5")
        self.outcome.counts[f"answer_{answer.status_code}"] += 1
        if answer.status_code == 200:
            self.outcome.traces += formats.load_npz(answer.content)


async def until(status: int, http: httpx.AsyncClient, method: str, path: str) -> None:
    """Ask until the answer is this: the collector may have just been killed."""
    deadline_s = time.monotonic() + _BACK_TIMEOUT_S
    while (await http.request(method, path)).status_code != status:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{method} {path} is not answered with {status}")
        await asyncio.sleep(0.02)


def judge(traces: list[RouteTrace]) -> collections.Counter[str]:
    """Compare every row of every trace with HF's routing of the same tokens in float64."""
    counts: collections.Counter[str] = collections.Counter()
    # Long sequences first: `reference` knows their beginnings then.
    for trace in sorted(traces, key=lambda trace: tokens(trace).tolist(), reverse=True):
        wrong = wrong_rows(trace, counts)
        here = trace.source != Source.MISSING
        counts.update(Source(source).name.lower() for source in trace.source.tolist())
        counts["traces"] += 1
        counts["complete"] += trace.complete
        counts["wrong_rows"] += wrong
        counts["complete_and_wrong"] += trace.complete and bool(wrong or not here.all())
    return counts


def tokens(trace: RouteTrace) -> Any:
    """Return a trace's tokens, ``[num_tokens]``."""
    if trace.token_ids is None:
        raise ValueError(f"{trace.request_id} has no tokens to compare the rows of")
    return trace.token_ids


def wrong_rows(trace: RouteTrace, counts: collections.Counter[str]) -> int:
    """Return how many rows are there and are not the reference's."""
    if trace.topk_weights is None:
        raise ValueError(f"{trace.request_id} has no weights to compare")
    here = trace.present
    if not here.any():
        return 0
    want = reference_of(trace)
    order = np.argsort(trace.topk_ids, axis=-1)
    ids = np.take_along_axis(trace.topk_ids, order, -1)[here]
    weights = np.take_along_axis(trace.topk_weights, order, -1)[here]
    wrong = (ids != want.topk_ids[here]) | (np.abs(weights - want.topk_weights[here]) > ROUNDING)
    counts["comparisons"] += ids[..., 0].size
    counts["near_ties"] += want.ties
    return int(wrong.any((-1, -2)).sum())


def run(num_requests: int, seed: int, *, kill_every: int = 150) -> dict[str, Any]:
    """Serve, disturb, compare; return the figures."""
    with tempfile.TemporaryDirectory() as name, faulty_server(Path(name), seed, CHANCES) as server:
        load = Load(server, num_requests, seed, kill_every=kill_every)
        started_s = time.perf_counter()
        outcome = asyncio.run(load.run(pause_every_s=8.0))
        served_s = time.perf_counter() - started_s
    judged = judge(outcome.traces)
    zeros = dict.fromkeys(["complete_and_wrong", "wrong_rows", "near_ties"], 0)
    return {
        "chances": CHANCES,
        "kill_every": kill_every,
        "served_s": round(served_s, 1),
        **dict(sorted((zeros | outcome.counts | judged).items())),
    }
