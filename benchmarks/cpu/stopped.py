"""Serving while the collector hangs: ``python -m benchmarks.cpu.stopped --out result.json``.

One client sends completions to the bundled model, one after the other, before, while and after the
collector is stopped (SIGSTOP), and asks for the routes of all of them in the end. The same load to
vLLM's own server, of which nothing is stopped, says what phases differ by.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks import result
from benchmarks.faults.served import collector_pid
from benchmarks.simulation.server import API_KEY, MODEL, serving
from moescope.servers import Server, captured_command, stock_command, stock_env
from moescope_service import bundled_model

PHASES = ("before", "stopped", "after")
BODY = {
    "model": MODEL, "prompt": "Tom has 3 apples and buys 4 more. How many has he?",
    "max_tokens": 16, "temperature": 0, "ignore_eos": True,
}  # fmt: skip
_TIMEOUT_S = 120.0
_MODEL_ARGS = (str(bundled_model.path()), "--enforce-eager")


def complete(http: httpx.Client, name: str, seconds: float) -> tuple[list[float], list[str]]:
    """Send completions for so long; return the seconds of each, and their ids."""
    took_s: list[float] = []
    ids: list[str] = []
    end_s = time.perf_counter() + seconds
    while (started_s := time.perf_counter()) < end_s:
        request_id = f"{name}-{len(ids)}"
        answer = http.post("/v1/completions", json=BODY, headers={"X-Request-Id": request_id})
        answer.raise_for_status()
        took_s.append(time.perf_counter() - started_s)
        ids.append(request_id)
    return took_s, ids


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[None]:
    """The server's collector takes nothing in; where it has none nothing happens."""
    pid = collector_pid(server)
    if pid is None:
        yield
        return
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def routes_of(http: httpx.Client, ids: list[str]) -> dict[str, int]:
    """Return how many requests have complete routes, or which other answer there was."""
    counts: collections.Counter[str] = collections.Counter()
    for request_id in ids:
        answer = http.get(f"/routes/{request_id}", params={"wait_s": 10})
        if answer.status_code == 200:
            (trace,) = answer.json()["traces"]
            counts["complete" if trace["complete"] else "incomplete"] += 1
        else:
            counts[str(answer.status_code)] += 1
    return dict(counts)


def measure(server: Server, seconds: float, *, has_routes: bool) -> dict[str, Any]:
    """Measure one server: each phase, and what came of its requests."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    figures: dict[str, Any] = {}
    with httpx.Client(base_url=server.url, headers=headers, timeout=_TIMEOUT_S) as http:
        complete(http, "warm-up", min(seconds, 10.0))
        ids: dict[str, list[str]] = {}
        for phase in PHASES:
            with stopped(server) if phase == "stopped" else contextlib.nullcontext():
                took_s, ids[phase] = complete(http, phase, seconds)
            p50, p99 = 1e3 * np.quantile(took_s, (0.5, 0.99))
            figures[phase] = {
                "requests": len(took_s), "p50_ms": p50, "p99_ms": p99, "max_ms": 1e3 * max(took_s),
            }  # fmt: skip
        for phase in PHASES if has_routes else ():
            figures[phase]["routes"] = routes_of(http, ids[phase])
    return figures


def main() -> None:
    """Measure, print and write."""
    parser = result.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="Of each phase.")
    args = parser.parse_args()
    arms = {
        "stock": (stock_command(["--model", *_MODEL_ARGS]), stock_env(os.environ)),
        "moescope": (captured_command(_MODEL_ARGS), {}),
    }
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, (command, env) in arms.items():
            with serving(command, env, Path(directory) / f"{name}.log") as server:
                figures[name] = measure(server, args.seconds, has_routes=name == "moescope")
    result.write(args.out, "benchmarks.cpu.stopped", seconds=args.seconds, **figures)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
