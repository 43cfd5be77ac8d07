"""Numbers of a load test while it runs."""

from __future__ import annotations

import asyncio
import contextlib
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

    Twice a second in place; where the output is no terminal, a line every ten seconds.
    """

    def elapsed_s() -> float:
        return time.perf_counter() - run.start_s if run.start_s else 0.0  # it warms up before

    async def in_place() -> None:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(Text(status(run, elapsed_s())), refresh=True)
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


def status(run: Run, now_s: float) -> str:
    """Return one line about a run: totals, and rates and latencies of the last seconds.

    Args:
        run: The run.
        now_s: Seconds since its start.
    """
    failed = sum(record.error is not None for record in run.records)
    line = (
        f"{now_s:6.1f} s  {len(run.records)} of {run.num_requests} requests, {run.in_flight} in "
        f"flight, {failed} failed"
    )
    since_s = max(0.0, now_s - _WINDOW_S)
    recent = []
    for record in reversed(run.records):
        if record.sent_s + record.e2el_s < since_s:
            break
        if record.error is None:
            recent.append(record)
    if not recent or now_s <= since_s:
        return line
    span_s = now_s - since_s
    tokens = sum(record.completion_tokens for record in recent)
    ttft_ms = 1e3 * float(np.median([record.ttft_s for record in recent]))
    tpots = [tpot for record in recent if (tpot := record.tpot_s) is not None]
    tpot_text = f", TPOT {1e3 * float(np.median(tpots)):.2f} ms" if tpots else ""
    return (
        f"{line}; last {span_s:.0f} s: {len(recent) / span_s:.1f} requests/s, "
        f"{tokens / span_s:,.0f} tokens/s, TTFT {ttft_ms:.1f} ms{tpot_text}"
    )
