"""What one core of collector holds: ``python -m benchmarks.cpu.collector --out result.json``.

Replays step messages to a real collector process through the real link, with reassembly, arena,
counters and store at work. The collector has one core, the replay the others. Each load runs at
the pace asked for, and then as fast as the collector takes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import psutil

from benchmarks import result
from benchmarks.cpu.traffic import DECODE, PREFILL, ROW_BYTES, SPEC, Load, Running, Traffic
from moescope import RouteTrace
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.link import Link
from moescope_service.messages import Frames, Register, Step, pack_all, pack_introduction
from moescope_service.queries import MetricsQuery, Query, Reply, RoutesQuery, WaitQuery, Wanted
from moescope_service.runtime import Supervisor
from moescope_service.settings import Settings

QUEUE_BYTES: int = Settings().queue_bytes
"""Beyond it a worker drops rows."""
ASK_EVERY_S = 0.05
CHECKED = 20
"""Of the last traces so many are compared with what was sent."""
_TIMEOUT_S = 60.0


class Message:
    """A step on its way; see `moescope_service.link.Outgoing`."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.size_bytes = 1024 + step.rows_bytes


def encode(messages: list[Message]) -> list[Frames]:
    """Make messages of steps, as the recorder does."""
    return pack_all([message.step for message in messages])


R = TypeVar("R", bound=Reply)


class Replay:
    """A worker and an API server that replay traffic to a collector.

    Args:
        load: What to replay.
        address: Where the collector is bound.
    """

    def __init__(self, load: Load, address: str) -> None:
        self._traffic = Traffic(load)
        self._steps = iter(self._traffic)
        self._answered: list[Running] = []
        self.api = CollectorClient(address)
        self._worker = Link(
            address,
            lambda frames: None,
            max_bytes=2 * QUEUE_BYTES,
            name="replay",
            encode=encode,
            join=True,
            introduce=lambda: [pack_introduction(SPEC)],
        )
        self.num_steps = self.num_rows = self.dropped_steps = self.most_waiting_bytes = 0
        self.num_answered = 0

    def run(self, seconds: float, steps_per_s: float | None) -> float:
        """Replay for so long at a pace, or as fast as half a queue allows; return the seconds."""
        start_s = time.perf_counter()
        number = 0
        while (now_s := time.perf_counter() - start_s) < seconds:
            if steps_per_s is None:
                if self._worker.waiting_bytes > QUEUE_BYTES // 2:
                    time.sleep(0.001)
                    continue
            elif (early_s := number / steps_per_s - now_s) > 0:
                time.sleep(early_s)
            self.send()
            number += 1
        self.settle()
        return time.perf_counter() - start_s

    def settle(self) -> None:
        """Wait until the collector has taken everything in."""
        deadline_s = time.monotonic() + _TIMEOUT_S
        while self.ask(MetricsQuery()).steps < self.num_steps:
            if time.monotonic() > deadline_s:
                raise TimeoutError("the collector does not take everything in")
            time.sleep(0.005)

    def ask(self, query: Query[R]) -> R:
        """Send the collector a query."""
        return self.api.ask_and_wait(query, timeout_s=_TIMEOUT_S)

    def check(self) -> int:
        """Compare the last finished traces with what was sent; return how many."""
        checked = self._answered[-2 * CHECKED : -CHECKED]  # the last steps' ends were not sent yet
        for one in checked:
            self.ask(WaitQuery(request_ids=[one.request_id], wait_s=5.0))
            reply = self.ask(RoutesQuery(wanted=[Wanted(request_id=one.request_id)]))
            (trace,) = reply.traces()
            self._compare(one, trace)
        return len(checked)

    def _compare(self, one: Running, trace: RouteTrace) -> None:
        here = trace.present
        if trace.topk_weights is None:
            raise ValueError(f"{trace.request_id} has no weights to compare")
        for got, sent in (
            (trace.topk_ids, self._traffic.topk_ids),
            (trace.topk_weights, self._traffic.topk_weights),
        ):
            want = np.concatenate([sent[rows] for rows in one.rows])
            np.testing.assert_array_equal(got[here], want[here])

    def send(self) -> None:
        """Send the next step, and what the API server tells before and after it."""
        happening = next(self._steps)
        for one in happening.started:
            self._register(one)
        step = happening.step
        waiting = self._worker.waiting_bytes
        self.most_waiting_bytes = max(self.most_waiting_bytes, waiting)
        if waiting > QUEUE_BYTES:
            self.dropped_steps += 1
            step.lost, step.topk_ids, step.topk_weights = "queue_full", None, None
        self._worker.put(Message(step), at_once=waiting > QUEUE_BYTES // 4)
        self.num_steps += 1
        self.num_rows += int(step.spans[:, 2].sum())
        for one in happening.answered:
            output_ids = np.zeros(one.output_len, np.int32)
            self.api.tell("finish", [output_ids], internal_id=one.internal_id, reason="length")
        self.num_answered += len(happening.answered)
        self._answered = [*self._answered[-2 * CHECKED :], *happening.answered]

    def _register(self, one: Running) -> None:
        register = Register(
            internal_id=one.internal_id, request_id=one.request_id, ids=[one.request_id], index=0,
            model=SPEC.model, lora=None, prompt_len=one.prompt_len, created_s=time.time(),
            keep=True,
        )  # fmt: skip
        prompt_ids = np.zeros(one.prompt_len, np.int32)
        self.api.tell("register", [prompt_ids], **dataclasses.asdict(register))

    def close(self) -> None:
        """End both connections."""
        self._worker.close()
        self.api.close()


@contextlib.contextmanager
def collector(address: str, cores: set[int]) -> Iterator[psutil.Process]:
    """Run a collector on these cores, as a deployment does."""
    supervisor = Supervisor(address)
    if supervisor.start() is not None or supervisor.pid is None:
        raise RuntimeError("the collector does not start")
    try:
        process = psutil.Process(supervisor.pid)
        for thread in process.threads():
            os.sched_setaffinity(thread.id, cores)
        yield process
    finally:
        supervisor.stop()


@contextlib.contextmanager
def asked_meanwhile(address: str) -> Iterator[list[float]]:
    """Ask the collector all the while what `/metrics` asks; collect the seconds that it takes."""
    took_s: list[float] = []
    is_over = threading.Event()
    client = CollectorClient(address)

    def ask() -> None:
        while not is_over.wait(ASK_EVERY_S):
            started_s = time.perf_counter()
            client.ask_and_wait(MetricsQuery(), timeout_s=_TIMEOUT_S)
            took_s.append(time.perf_counter() - started_s)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield took_s
    finally:
        is_over.set()
        asking.join()
        client.close()


def measure(load: Load, seconds: float, *, paced: bool) -> dict[str, Any]:
    """Replay one load to a new collector; return the figures."""
    first, *others = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/collector.sock"
        with collector(address, {first}) as process:
            os.sched_setaffinity(0, others or {first})
            replay = Replay(load, address)
            replay.api.wait_for_workers()
            before = process.cpu_times()
            with asked_meanwhile(address) as took_s:
                wall_s = replay.run(seconds, load.steps_per_s if paced else None)
            after = process.cpu_times()
            metrics = replay.ask(MetricsQuery())
            figures = {
                "asked_steps_per_s": load.steps_per_s if paced else None,
                "seconds": wall_s,
                "steps_per_s": replay.num_steps / wall_s,
                "rows_per_step": replay.num_rows / replay.num_steps,
                "mb_per_s": replay.num_rows * ROW_BYTES / wall_s / 1e6,
                "core_busy": (after.user + after.system - before.user - before.system) / wall_s,
                "steps_without_rows": replay.dropped_steps,
                "most_waiting_mb": replay.most_waiting_bytes / 1e6,
                "answer_ms": dict(
                    zip(
                        ("p50", "p99", "max"),
                        (1e3 * np.quantile(took_s, (0.5, 0.99, 1.0))).tolist(),
                        strict=True,
                    )
                ),
                "requests_answered": replay.num_answered,
                "traces": metrics.traces,
                "missing_rows": metrics.missing,
                "traces_kept": metrics.info.store.traces,
                "store_mb": metrics.info.store.bytes / 1e6,
                "collector_rss_mb": process.memory_info().rss / 1e6,
                "traces_checked": replay.check(),
            }
            replay.close()
            os.sched_setaffinity(0, {first, *others})
    return figures


def main() -> None:
    """Measure, print and write."""
    parser = result.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="Of each replay.")
    args = parser.parse_args()
    figures = {
        load.name: {
            name: measure(load, args.seconds, paced=name == "paced")
            for name in ("paced", "flooded")
        }
        for load in (PREFILL, DECODE)
    }
    result.write(args.out, "benchmarks.cpu.collector", **figures)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
