"""Pictures of a load test: how latencies are distributed, and how they and throughput went.

This module imports matplotlib; import it where pictures are drawn, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moescope._style import BAR, DPI, GRID, STYLE, TOP
from moescope.bench import latency
from moescope.bench.record import Record

_COLORS = {"ttft": BAR, "e2el": TOP}


def draw(path: Path, records: Sequence[Record], duration_s: float, subtitle: str) -> None:
    """Draw a run's picture.

    Args:
        path: The PNG to write.
        records: Its requests.
        duration_s: Its seconds.
        subtitle: What it was.
    """
    good = [record for record in records if record.error is None]
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 8), layout="constrained")
        figure.suptitle(subtitle, fontsize=11, x=0.01, ha="left")
        rows = figure.subplots(3, 1, height_ratios=(1.4, 1, 1))
        _distributions(rows[0], good)
        _throughput(rows[1], good, duration_s)
        _over_time(rows[2], good, duration_s)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)


def _distributions(axes: Axes, good: Sequence[Record]) -> None:
    samples = latency.samples(good)
    for name in latency.METRICS:
        values = [value * 1e3 for value in samples[name] if value > 0]
        if values:
            axes.ecdf(values, label=name.upper(), linewidth=1.8)
    axes.set(
        xscale="log", xlabel="milliseconds", ylabel="share at or below", title="Latencies",
        ylim=(0, 1.01),
    )  # fmt: skip
    axes.grid(visible=True, which="both", color=GRID, linewidth=0.6)
    if good:
        axes.legend(frameon=False, loc="lower right")


def _throughput(axes: Axes, good: Sequence[Record], duration_s: float) -> None:
    tokens = latency.tokens_by_second(good)
    axes.stairs(tokens, np.arange(len(tokens) + 1), fill=True, color=BAR, alpha=0.85)
    axes.set(
        xlim=(0, max(duration_s, 1e-9)), xlabel="seconds since the start", ylabel="tokens/s",
        title="Output tokens by second",
    )  # fmt: skip
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.6)


def _over_time(axes: Axes, good: Sequence[Record], duration_s: float) -> None:
    sent_s = [record.sent_s for record in good]
    for name, values in (
        ("ttft", [record.ttft_s for record in good]),
        ("e2el", [record.e2el_s for record in good]),
    ):
        milliseconds = [value * 1e3 for value in values]
        axes.scatter(
            sent_s, milliseconds, s=9, alpha=0.6, color=_COLORS[name], label=name.upper(), lw=0
        )
    axes.set(
        xlim=(0, max(duration_s, 1e-9)), xlabel="sent at, seconds since the start",
        ylabel="milliseconds", yscale="log" if good else "linear",
        title="Latency of each request",
    )  # fmt: skip
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.6)
    if good:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
