"""Where the GPU's time goes, kernel by kernel, in servers of their own.

Two starts of one and the same vLLM can differ by a percent in the time of a small step. vLLM's own
profiler, in each server, shows which kernels a difference lies in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson

from moescope.errors import FormatError
from moescope.overhead.hosting import Hosted
from tests.gpu.loads import Workload

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


def measure(hosted: Hosted, model: str, directory: Path, workload: Workload) -> dict[str, Any]:
    """Profile steps of each server under a load.

    Args:
        hosted: The servers; started with `flags`.
        model: The name that they serve.
        directory: What `flags` was given.
        workload: A load of more than ``SKIPPED + STEPS`` steps.

    Returns:
        By arm: what `summarize` found in each pass.
    """
    found: dict[str, Any] = {name: [] for name in hosted.names}
    for number in range(PASSES + 1):  # the first one warms up
        for name in hosted.names:
            prefix = f"{name}-{number}"
            with hosted.host.visit(name) as url:
                if not number:
                    workload.put(number, url, model)
                    continue
                body = {
                    "profile_prefix": prefix,
                    "delay_iterations": SKIPPED,
                    "max_iterations": STEPS,
                }
                _post(f"{url}/start_profile", body)
                workload.put(number, url, model)
                _post(f"{url}/stop_profile", {})
            (trace,) = directory.glob(f"{prefix}_*.json")
            found[name].append(summarize(orjson.loads(trace.read_bytes())["traceEvents"]))
    return found


def _post(url: str, body: Mapping[str, Any]) -> None:
    httpx.post(url, json=body, timeout=_TIMEOUT_S).raise_for_status()


def summarize(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the GPU does in a step, in microseconds.

    Args:
        events: Those of a chrome trace.

    Returns:
        The number of whole steps, their mean ``period``, how long no kernel of the model's stream
        runs in it (``rest``), and the time of each kernel, the longest first.

    Raises:
        FormatError: There are less than two steps.
    """
    kernels = [event for event in events if event.get("cat") == "kernel"]
    first = [event for event in kernels if STEP_KERNEL in event["name"]]
    starts = sorted(event["ts"] for event in first)
    if len(starts) < 2:
        raise FormatError(f"{STEP_KERNEL} ran {len(starts)} times: no step can be told")
    num_steps, streams = len(starts) - 1, {event["args"]["stream"] for event in first}
    by_name: dict[str, float] = {}
    for event in kernels:
        if event["args"]["stream"] in streams and starts[0] <= event["ts"] < starts[-1]:
            name = short(event["name"])
            by_name[name] = by_name.get(name, 0.0) + event["dur"] / num_steps
    period = (starts[-1] - starts[0]) / num_steps
    return {
        "steps": num_steps,
        "period": period,
        "rest": period - sum(by_name.values()),
        "kernels": dict(sorted(by_name.items(), key=lambda item: -item[1])),
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
        largest = sorted(differences.items(), key=lambda item: -abs(item[1]))[:_SHOWN]
        yield f"{name}: " + ", ".join(f"{key} {us:+.2f} us" for key, us in largest)


def _medians(passes: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for one in passes:
        for key, us in {"period": one["period"], "rest": one["rest"], **one["kernels"]}.items():
            values.setdefault(key, []).append(us)
    return {key: float(np.median(us)) for key, us in values.items()}
