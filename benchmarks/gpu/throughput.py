"""Puts loads on stock vLLM and on servers with moescope, in paired rounds of shuffled order.

A sitting is one start of servers. What it measured stands in the result file by load and sitting,
so that later sittings, of other arms or loads, add to it.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import numpy as np

from benchmarks.gpu.loads import Workload
from moescope.errors import CommandError
from moescope.overhead import arms, comparison, engine, rounds
from moescope.overhead.arms import Arm
from moescope.overhead.hosting import StartedArms
from moescope.overhead.rounds import Pass, Round

SEED = 0
STEPS, HOOK_S = "moescope_steps_total", "moescope_hook_seconds_total"
CAPTURED, LOST = "moescope_rows_captured_total", "moescope_rows_lost_total"
COUNTERS = (STEPS, HOOK_S, CAPTURED, LOST, *engine.COUNTERS)
METRICS_TIMEOUT_S = 30.0
SETTLE_S = 0.15
"""One process runs a model on one GPU: nothing spins on when all is answered, as it does on CPUs
(see `moescope.overhead.hosting`); the last rows are with the collector after 0.1 s. Short, since
short rounds cancel what slows a machine for seconds."""

OnRound = Callable[[Workload, dict[str, Any]], object]
"""Takes what was measured of a workload so far, after every round."""


def now() -> str:
    """Return the date and time."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


class Sitting:
    """Measures workloads on arms that are ready.

    Args:
        chosen: The arms.
        started: The same arms, up. They get no rest but the one here, after each pass.
        settle_s: How long a server is given to come to rest before its counters are read and the
            next one's turn comes.
    """

    def __init__(
        self, chosen: Sequence[Arm], started: StartedArms, settle_s: float = SETTLE_S
    ) -> None:
        self._arms = {arm.name: arm for arm in chosen}
        self._started, self._settle_s = started, settle_s

    def measure(self, workloads: Sequence[Workload], on_round: OnRound) -> None:
        """Measure all workloads.

        Servers that stay up are visited for one workload after the other, those that are started
        anew in every visit for all of them, in as many rounds as the shortest has.

        Raises:
            MoescopeError: An arm is not what it must be, or a request failed, or an answer is not
                as long as it was asked to be, or a load is put on less than two arms.
        """
        if self._started.arrangement.stays_up:
            for one in workloads:
                self._measure([one], on_round)
        else:
            self._measure(workloads, on_round)

    def _measure(self, workloads: Sequence[Workload], on_round: OnRound) -> None:
        measured: list[list[Round]] = [[] for _ in workloads]
        num_rounds = min(one.rounds for one in workloads)
        names = self._names(workloads)
        for items in rounds.measure(
            [one.load() for one in workloads],
            self._started.arrangement,
            names,
            rounds=num_rounds,
            seed=SEED,
            hooks=rounds.Hooks(on_visit=self._check, counters=self._counters),
        ):
            for one, item, done in zip(workloads, items, measured, strict=True):
                done.append(engine.with_itl(item))
                on_round(one, {"complete": len(done) == num_rounds, **summarize(done)})

    def _names(self, workloads: Sequence[Workload]) -> list[str]:
        first = self._started.names[0]
        always = {first, first + arms.AGAIN, arms.MOESCOPE, arms.ROUTED_EXPERTS}
        every_arm = any(one.every_arm for one in workloads)
        names = [name for name in self._started.names if every_arm or name in always]
        if len(names) < 2:
            raise CommandError(
                f"{workloads[0].name} is not put on {', '.join(self._started.names[1:])}"
            )
        return names

    def _check(self, name: str, url: str) -> None:
        arms.bring_up(self._arms[name], url)

    def _counters(self, name: str, url: str) -> dict[str, float]:
        time.sleep(self._settle_s)  # the last steps are on their way to the collector, too
        reply = httpx.get(f"{url}/metrics", timeout=METRICS_TIMEOUT_S).raise_for_status()
        return engine.counters(reply.text, COUNTERS)


def summarize(measured: Sequence[Round]) -> dict[str, Any]:
    """Return what the rounds of a workload say.

    Returns:
        The date, medians and the capture's work on the host by arm, differences to the first arm
        by arm and metric, and every pass.
    """
    names = list(measured[0].passes)
    return {
        "date": now(),
        "rounds": len(measured),
        "arms": {name: _arm([item.passes[name] for item in measured]) for name in names},
        "differences": {
            name: {metric: one.as_json() for metric, one in by_metric.items()}
            for name, by_metric in comparison.differences(measured, SEED).items()
        },
        "passes": [
            {"order": item.order, **{name: _made(item.passes[name]) for name in names}}
            for item in measured
        ],
    }


def _arm(passes: Sequence[Pass]) -> dict[str, Any]:
    counted = {name: sum(made.counted.get(name, 0.0) for made in passes) for name in COUNTERS}
    steps, hook_s = counted[STEPS], counted[HOOK_S]
    every = [
        {"wall_s": made.wall_s, "prompt_throughput": made.prompt_tokens / made.wall_s}
        | made.metrics
        for made in passes
    ]
    return {
        "median": {
            key: float(np.median([one[key] for one in every]))
            for key in every[0]
            if all(key in one for one in every)
        },
        "steps": int(steps),
        "hook_us_per_step": 1e6 * hook_s / steps if steps else None,
        "rows_captured": int(counted[CAPTURED]),
        "rows_lost": int(counted[LOST]),
    }


def _made(made: Pass) -> dict[str, Any]:
    return {
        "wall_s": made.wall_s,
        "prompt_tokens": made.prompt_tokens,
        "completion_tokens": made.completion_tokens,
        "metrics": made.metrics,
        "counted": made.counted,
    }


def add(values: dict[str, Any], workload: Workload, sitting: str, measured: Any) -> dict[str, Any]:
    """Return a result's loads with what a sitting measured of one, in place of what it had.

    Args:
        values: By name of the workload and sitting; left as it is.
        workload: The workload.
        sitting: The sitting's name.
        measured: What to put there.
    """
    return {**values, workload.name: {**values.get(workload.name, {}), sitting: measured}}


def statements(workload: Workload, measured: dict[str, Any]) -> Iterator[str]:
    """Say the differences of every arm in words: what is compared, and the engine's."""
    for name, by_metric in measured["differences"].items():
        for metric in (workload.compared, engine.ITL):
            if metric not in by_metric:
                continue
            difference = comparison.Difference.from_json(by_metric[metric])
            said = comparison.statement(name, metric, difference, measured["rounds"])
            yield f"{workload.name}: {said}"
