"""Where the GPU's time goes, kernel by kernel, in servers of their own.

Two starts of one and the same vLLM can differ by a percent in the time of a small step. vLLM's own
profiler, in each server, shows which kernels a difference lies in.
"""

from __future__ import annotations

import collections
import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import orjson

from benchmarks.gpu.loads import Workload
from benchmarks.gpu.throughput import SEED
from moescope.errors import FormatError
from moescope.overhead import arms, rounds
from moescope.overhead.arms import Arm
from moescope.overhead.hosting import Arrangement, StartedArms

SKIPPED, STEPS, PASSES = 60, 60, 3
"""Steps after a start that are left alone: prompts arrive; then how many are profiled, how often in
each server."""
STEP_KERNEL = "_prepare_pos_seq_lens_kernel"
"""What vLLM 0.32.0 launches once a step, ``v1/worker/gpu/input_batch.py``."""
_SHOWN = 6
_TIMEOUT_S = 60.0


def flags(directory: Path) -> list[str]:
    """Return vLLM's flags for servers that can be profiled.

    Args:
        directory: Where they leave the traces.
    """
    config = {
        "profiler": "torch",
        "torch_profiler_dir": str(directory),
        "torch_profiler_activities": ["CUDA"],
        "torch_profiler_with_stack": False,
        "torch_profiler_use_gzip": False,
        "torch_profiler_dump_cuda_time_total": False,
        "ignore_frontend": True,
    }
    return ["--profiler-config", orjson.dumps(config).decode()]


class Profiled:
    """An arrangement whose visits are profiled, except the first of each server: it warms it up.

    Args:
        arrangement: How the servers are reached, started with `flags`.
        directory: What `flags` was given.
    """

    stays_up: ClassVar[bool] = True

    def __init__(self, arrangement: Arrangement, directory: Path) -> None:
        self._arrangement, self._directory = arrangement, directory
        self.found: dict[str, list[dict[str, Any]]] = {}
        """By arm: what `summarize` found in each visit that was profiled."""

    @contextlib.contextmanager
    def visit(self, name: str) -> Iterator[str]:
        """Give an arm's address; profile what is asked there meanwhile."""
        with self._arrangement.visit(name) as url:
            if name not in self.found:
                self.found[name] = []
                yield url
                return
            prefix = f"{name}-{len(self.found[name]) + 1}"
            steps = {"delay_iterations": SKIPPED, "max_iterations": STEPS}
            _post(f"{url}/start_profile", {"profile_prefix": prefix, **steps})
            yield url
            _post(f"{url}/stop_profile", {})
        (trace,) = self._directory.glob(f"{prefix}_*.json")
        self.found[name].append(summarize(orjson.loads(trace.read_bytes())["traceEvents"]))


def measure(started: StartedArms, directory: Path, workload: Workload) -> dict[str, Any]:
    """Profile steps of each server under a load.

    Args:
        started: The servers; started with `flags`.
        directory: What `flags` was given.
        workload: A load of more than ``SKIPPED + STEPS`` steps.

    Returns:
        By arm: what `summarize` found in each pass.

    Raises:
        MoescopeError: An arm is not what it must be, or a request failed.
    """
    profiled = Profiled(started.arrangement, directory)
    for _ in rounds.measure(
        [workload.load()],
        profiled,
        started.names,
        rounds=PASSES,
        seed=SEED,
        hooks=rounds.Hooks(on_visit=lambda name, url: arms.bring_up(Arm(name=name), url)),
    ):
        pass  # the traces tell
    return {name: profiled.found[name] for name in started.names}


def _post(url: str, body: Mapping[str, Any]) -> None:
    httpx.post(url, json=body, timeout=_TIMEOUT_S).raise_for_status()


def summarize(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the GPU does in a step, in microseconds.

    Args:
        events: Those of a chrome trace.

    Returns:
        The number of whole steps, their mean ``period``, how long no kernel runs in it (``rest``),
        and of each kernel how often it runs (``runs``) and how long in all (``us``), the longest
        first. Kernels of several streams run at once.

    Raises:
        FormatError: There are less than two steps.
    """
    kernels = sorted((one for one in events if one.get("cat") == "kernel"), key=itemgetter("ts"))
    starts = [one["ts"] for one in kernels if STEP_KERNEL in one["name"]]
    if len(starts) < 2:
        raise FormatError(f"{STEP_KERNEL} ran {len(starts)} times: no step can be told")
    by_name: dict[str, list[float]] = collections.defaultdict(list)
    busy_us, busy_until = 0.0, starts[0]
    for one in kernels:
        if starts[0] <= one["ts"] < starts[-1]:
            by_name[short(one["name"])].append(one["dur"])
            end = one["ts"] + one["dur"]
            busy_us += max(0.0, end - max(one["ts"], busy_until))
            busy_until = max(busy_until, end)
    num_steps, whole_us = len(starts) - 1, starts[-1] - starts[0]
    return {
        "steps": num_steps,
        "period": whole_us / num_steps,
        "rest": (whole_us - busy_us) / num_steps,
        "kernels": {
            name: {"runs": len(durations) / num_steps, "us": sum(durations) / num_steps}
            for name, durations in sorted(by_name.items(), key=lambda item: -sum(item[1]))
        },
    }


def short(name: str) -> str:
    """Return a kernel's name without its template's and its own arguments."""
    bare = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", bare, maxsplit=1)[0]


def statements(found: Mapping[str, Any]) -> Iterator[str]:
    """Say by how much every arm differs from the first: medians of the passes."""
    first, *others = found
    base = _medians(found[first])
    yield f"{first}: a step of {base['period']:.1f} us"
    for name in others:
        medians = _medians(found[name])
        differences = {
            key: medians.get(key, 0.0) - base.get(key, 0.0) for key in medians.keys() | base
        }
        largest = sorted(differences.items(), key=lambda item: (-abs(item[1]), item[0]))
        yield f"{name}: " + ", ".join(f"{key} {us:+.2f} us" for key, us in largest[:_SHOWN])


def _medians(passes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    every = [
        {"period": one["period"], "rest": one["rest"]}
        | {name: kernel["us"] for name, kernel in one["kernels"].items()}
        for one in passes
    ]
    return {
        key: float(np.median([one.get(key, 0.0) for one in every]))
        for key in {key for one in every for key in one}
    }
