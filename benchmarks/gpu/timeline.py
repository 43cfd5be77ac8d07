"""Where a step's time goes: the capture on the worker's thread, and its kernel among the model's.

A signal makes the server take the time of some steps' parts, then torch's profile of some more.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from benchmarks.gpu.loads import Workload
from moescope.errors import CommandError
from moescope.overhead import timing

SKIPPED, STEPS = 60, 60
"""Steps after the signal that are left alone: prompts arrive; then how many are timed, and how many
profiled."""
KERNEL = "pack_rows"
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_CALLS = ("cuda_runtime", "cuda_driver")
_TIMEOUT_S = 120.0
_CLOCKS = {"": time.perf_counter_ns, "_on_core": time.thread_time_ns}
"""What a part takes, and how much of that its thread runs: the rest it waits, most likely for the
interpreter."""


def make_profilable(directory: Path) -> None:
    """Let a signal begin the next measurement of this process's worker.

    Args:
        directory: Where to leave the process's id, and of each measurement the times and the trace.
    """
    from moescope_service.capture.install import WorkerCapture
    from moescope_service.vllm_contract.patching import followed_by, wrap_once

    wrap_once(WorkerCapture, "_record", followed_by(Steps(directory).wrap))


class Steps:
    """Counts the steps of a worker from a signal on; lives in the worker."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count()
        self._left = 0
        self._times_us: dict[str, list[float]] = {}
        self._profiler: Any = None

    def wrap(self, capture: Any) -> None:
        """Follow the steps of a `moescope_service.capture.install.WorkerCapture`."""
        recorder, sink, runner = capture._recorder, capture._sink, capture._runner
        parts = {
            "whole": (recorder, "record_step"),
            "read_batch": (recorder, "_read_batch"),
            "pack": (sink, "take"),
            "pack_launch": (sink, "_pack"),
            "put": (recorder._link, "put"),
        }
        for name, (target, attribute) in parts.items():
            if hasattr(target, attribute):  # no kernel is launched on the CPU
                setattr(target, attribute, self._timed(name, getattr(target, attribute)))
        execute_model = runner.execute_model

        @functools.wraps(execute_model)
        def execute_and_count(*args: Any, **kwargs: Any) -> Any:
            if self._left:
                self._next()
            return execute_model(*args, **kwargs)

        runner.execute_model = execute_and_count
        signal.signal(signal.SIGUSR1, lambda *_: self._begin())
        (self._directory / "pid").write_text(str(os.getpid()))

    def _begin(self) -> None:
        self._times_us, self._left = {}, SKIPPED + 2 * STEPS + 1

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started_ns = [clock() for clock in _CLOCKS.values()]
            result = function(*args, **kwargs)
            if STEPS < self._left <= 2 * STEPS:
                for (kind, clock), started in zip(_CLOCKS.items(), started_ns, strict=True):
                    self._times_us.setdefault(name + kind, []).append((clock() - started) / 1e3)
            return result

        return timed

    def _next(self) -> None:
        self._left -= 1
        if self._left == STEPS:
            import torch

            self._profiler = torch.profiler.profile()
            self._profiler.start()
        elif self._left == 0:
            self._profiler.stop()
            number = next(self._numbers)
            self._profiler.export_chrome_trace(str(self._directory / f"{number}.trace"))
            timing.write(self._directory / f"{number}.times", self._times_us)


def measure(url: str, model: str, directory: Path, workloads: Iterable[Workload]) -> dict[str, Any]:
    """Measure steps of a server under loads.

    Args:
        url: The server's address.
        model: The name that it serves.
        directory: What `make_profilable` was given.
        workloads: Loads of more than ``SKIPPED + 2 * STEPS`` steps.

    Returns:
        By the name of the load, what `summarize` returns.
    """
    pid, found = int((directory / "pid").read_text()), {}
    for number, one in enumerate(workloads):
        one.put(0, url, model)
        os.kill(pid, signal.SIGUSR1)
        one.put(1, url, model)
        times = directory / f"{number}.times"
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not times.exists():
            if time.monotonic() > deadline_s:
                raise CommandError(f"{one.name}: the steps were not profiled in {_TIMEOUT_S:g} s")
            time.sleep(0.1)
        trace = orjson.loads((directory / f"{number}.trace").read_bytes())
        found[one.name] = summarize(orjson.loads(times.read_bytes()), trace["traceEvents"])
    return found


def summarize(
    times_us: Mapping[str, list[float]], events: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what steps consist of, in microseconds: median, mean and largest.

    Args:
        times_us: Of the parts on the worker's thread, without the profiler.
        events: Those of a chrome trace.

    Returns:
        ``host``: by part; ``gpu``: of the packing kernel how long it runs, how long its stream
        rests before and after it, how long its launch takes on the host, and the time from one to
        the next; empty where no such kernel ran.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    return {
        "steps": STEPS,
        "host": {name: _statistics(values) for name, values in times_us.items()},
        "gpu": _of_kernel(whole),
    }


def _of_kernel(events: list[Mapping[str, Any]]) -> dict[str, Any]:
    streams = {e["args"].get("stream") for e in events if KERNEL in e["name"]}
    on_gpu = sorted(
        (e for e in events if e.get("cat") in _ON_GPU and e["args"].get("stream") in streams),
        key=lambda e: e["ts"],
    )
    calls = {e["args"]["correlation"]: e for e in events if e.get("cat") in _CALLS}
    places = [i for i, e in enumerate(on_gpu) if KERNEL in e["name"]]
    inner = [i for i in places if 0 < i < len(on_gpu) - 1]
    if not inner:
        return {}
    starts = [on_gpu[i]["ts"] for i in places]
    launches = [calls.get(on_gpu[i]["args"]["correlation"]) for i in places]
    return {
        "kernel": _statistics([on_gpu[i]["dur"] for i in places]),
        "rest_before": _statistics([_rest(on_gpu[i - 1], on_gpu[i]) for i in inner]),
        "rest_after": _statistics([_rest(on_gpu[i], on_gpu[i + 1]) for i in inner]),
        "launch": _statistics([call["dur"] for call in launches if call]),
        "period": _statistics(np.diff(starts).tolist()),
    }


def _rest(one: Mapping[str, Any], following: Mapping[str, Any]) -> float:
    return float(following["ts"] - one["ts"] - one["dur"])


def _statistics(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": float(np.median(values)), "mean": float(np.mean(values)), "max": max(values)}
