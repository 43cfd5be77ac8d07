"""Shows the numbers of a load test while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import AsyncIterator

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from moescope.bench.driver import Run

_PERIOD_S = 0.5
_WINDOW_S = 5.0
_QUIET_PERIOD_S = 10.0


@contextlib.asynccontextmanager
async def shown(console: Console, run: Run) -> AsyncIterator[None]:
    """Show a run's numbers while it goes on.

    Twice a second in place; where the output is not a terminal, a line every ten seconds.
    """

    def elapsed_s() -> float:
        return time.perf_counter() - run.start_s if run.start_s else 0.0  # it warms up before

    async def in_place() -> None:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(Text(status(run, elapsed_s(), console.width)), refresh=True)
                await asyncio.sleep(_PERIOD_S)

    async def in_lines() -> None:
        while True:
            await asyncio.sleep(_QUIET_PERIOD_S)
            console.print(status(run, elapsed_s()))

    task = asyncio.create_task(in_place() if console.is_terminal else in_lines())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def status(run: Run, now_s: float, width: int | None = None) -> str:
    """Return one line about a run: totals, and rates and latencies of the last seconds.

    Args:
        run: The run.
        now_s: Seconds since its start.
        width: Characters at most; what does not fit is left out from the end. No limit where None.
    """
    failed = sum(request.error is not None for request in run.requests)
    parts = [
        f"{now_s:6.1f} s",
        f"  {len(run.requests)} of {run.num_requests} requests",
        f", {failed} failed",
        *_recent(run, now_s),
        f"; {run.in_flight} in flight",
    ]
    lines = itertools.accumulate(parts)
    return max((line for line in lines if width is None or len(line) <= width), key=len, default="")


def _recent(run: Run, now_s: float) -> list[str]:
    """Return the parts of the line about the last seconds, in the order of their importance."""
    since_s = max(0.0, now_s - _WINDOW_S)
    recent = []
    for request in reversed(run.requests):
        if request.sent_s + request.e2el_s < since_s:
            break
        if request.error is None:
            recent.append(request)
    if not recent or now_s <= since_s:
        return []
    span_s = now_s - since_s
    tokens = sum(request.completion_tokens for request in recent)
    ttft_ms = 1e3 * float(np.median([request.ttft_s for request in recent]))
    tpots = [tpot for request in recent if (tpot := request.tpot_s) is not None]
    return [
        f"; last {math.ceil(span_s)} s: TTFT {ttft_ms:.1f} ms",
        *([f", TPOT {1e3 * float(np.median(tpots)):.2f} ms"] if tpots else ()),
        f", {tokens / span_s:,.0f} tokens/s",
        f", {len(recent) / span_s:.1f} requests/s",
    ]
