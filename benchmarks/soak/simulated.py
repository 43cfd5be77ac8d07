"""Requests on the simulated engine with every fault of `benchmarks.simulation`, by the million."""

from __future__ import annotations

import collections
import dataclasses
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks.faults.__main__ import SIMULATED
from benchmarks.simulation.deployment import Deployment
from benchmarks.soak.memory import Memory

REQUESTS_A_RUN = 50
"""Of one deployment, which is then checked and forgotten."""
_SAMPLE_EVERY_S = 2.0


class Accounted(Deployment):
    """A deployment whose collectors, the killed ones too, say why which rows are missing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.missing_by_cause: collections.Counter[str] = collections.Counter()
        super().__init__(*args, **options)

    def account(self) -> None:
        """Add what the collector counts.

        Raises:
            AssertionError: A row of a trace is missing, and no cause has it.
        """
        stats = self.collector.state.stats
        if sum(stats.missing.values()) != stats.trace_rows["missing"]:
            raise AssertionError(f"{stats.trace_rows} rows are missing, {stats.missing} by cause")
        self.missing_by_cause += stats.missing

    def _begin_collector(self) -> None:
        if self.epoch >= 0:
            self.account()
        super()._begin_collector()


@dataclasses.dataclass
class Outcome:
    """What one process found."""

    memory: Memory
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    causes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def run(num_requests: int, minutes: float, seed: int, workers: int) -> dict[str, Any]:
    """Run requests until there are so many, or the time is up.

    Args:
        num_requests: How many, in runs of `REQUESTS_A_RUN`.
        minutes: The most that it takes.
        seed: Of the first run; each has its own, so that the workers' number changes no run.
        workers: Processes, each with a range of the runs.

    Raises:
        AssertionError: A row is wrong, or a trace claims rows that it has not.
    """
    started_s, num_runs = time.monotonic(), -(-num_requests // REQUESTS_A_RUN)
    bounds = [seed + num_runs * number // workers for number in range(workers + 1)]
    ranges = map(range, bounds, bounds[1:])
    total = Outcome(Memory(started_s))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        started = [pool.submit(_run, one, started_s, started_s + 60 * minutes) for one in ranges]
        for number, future in enumerate(started, 1):
            found = future.result()
            total.counts += found.counts
            total.causes += found.causes
            for samples in found.memory.samples.values():
                total.memory.samples[f"simulated deployment {number}"] = samples
    del total.counts["nothing"]
    zeros = {"complete_and_wrong": 0, "wrong_rows": 0}  # or `check` had failed
    return {
        **zeros,
        "took_s": round(time.monotonic() - started_s, 1),
        "workers": workers,
        **dict(sorted(total.counts.items())),
        "missing_by_cause": dict(sorted(total.causes.items())),
        "grown_mib": total.memory.growth_mib(),
        "memory_mib": total.memory.thinned(),
    }


def _run(seeds: range, started_s: float, deadline_s: float) -> Outcome:
    found, next_sample_s = Outcome(Memory(started_s)), 0.0
    for seed in seeds:
        if time.monotonic() > deadline_s:
            break
        try:
            _run_one(seed, found)
        except AssertionError as error:
            error.add_note(f"in the deployment of seed {seed}")
            raise
        if time.monotonic() >= next_sample_s:
            found.memory.take({"own": os.getpid()})
            next_sample_s = time.monotonic() + _SAMPLE_EVERY_S
    return found


def _run_one(seed: int, found: Outcome) -> None:
    chances = SIMULATED[seed % len(SIMULATED)]
    deployment = Accounted(random.Random(seed), REQUESTS_A_RUN, chances)
    deployment.run()
    found.counts += deployment.check()
    deployment.check_missing(exactly=not chances.given_up)
    deployment.account()
    found.counts += deployment.happened
    found.counts["preemptions"] += deployment.engine.num_preemptions
    found.counts["loads"] += deployment.engine.num_loads
    found.counts["requests"] += REQUESTS_A_RUN
    found.causes += deployment.missing_by_cause
