"""Draws a load test: distributions of latencies, and latencies and throughput over time.

This module imports matplotlib; import it where pictures are drawn, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moescope import files
from moescope._style import BAR, DPI, GRID, STYLE, TOP
from moescope.bench import latency
from moescope.bench.measured_request import MeasuredRequest
from moescope.errors import CommandError

_COLORS = {"ttft": BAR, "tpot": "#54a24b", "itl": "#b279a2", "e2el": TOP}
_TICKS = (1.0, 2.0, 5.0)
"""The digits that a logarithmic axis has labels at."""
_LOG_FROM = 5.0
"""Latest over earliest; a smaller range is drawn on a linear axis."""
_LEFT_OF_AXIS = 0.05
"""Part of the TTFTs, TPOTs and E2ELs that may lie left of the axis of latencies."""


def check_format(path: Path) -> None:
    """Check that a picture can be drawn in the format that a file's suffix names.

    Raises:
        CommandError: It cannot; the message says which can.
    """
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise CommandError(f"invalid --plot '{path}': expected a file named .{', .'.join(known)}")


def draw(path: Path, requests: Sequence[MeasuredRequest], duration_s: float, subtitle: str) -> None:
    """Draw a run's picture.

    Args:
        path: The file to write: a PNG, unless its suffix names another format.
        requests: Its requests.
        duration_s: Its seconds.
        subtitle: What the load was.

    Raises:
        OSError: The file cannot be written.
    """
    with rc_context(STYLE), files.replacing(path) as new:
        figure = make_figure(requests, duration_s, subtitle)
        figure.savefig(new, dpi=DPI, format=path.suffix[1:].lower() or "png")


def make_figure(requests: Sequence[MeasuredRequest], duration_s: float, subtitle: str) -> Figure:
    """Return the figure that `draw` saves."""
    good = [request for request in requests if request.error is None]
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(subtitle, fontsize=11, x=0.01, ha="left", parse_math=False)
    panels = figure.subplots(3, 1, height_ratios=(1.4, 1, 1))
    _distributions(panels[0], good)
    _throughput(panels[1], good, duration_s)
    _over_time(panels[2], good, duration_s)
    return figure


def _distributions(axes: Axes, good: Sequence[MeasuredRequest]) -> None:
    samples = {
        name: 1e3 * np.asarray([value for value in values if value > 0])
        for name, values in latency.samples(good).items()
    }
    drawn = {name: samples[name] for name in latency.METRICS if len(samples[name])}
    for name, values in drawn.items():
        axes.ecdf(values, label=name.upper(), linewidth=1.8, color=_COLORS[name])
    axes.set(
        xlabel="milliseconds", ylabel="share at or below", title="Latencies", ylim=(0, 1.01)
    )  # fmt: skip
    if drawn:
        # Chunks that arrive together have an ITL of microseconds: decades that say nothing.
        whole = [values for name, values in drawn.items() if name != "itl"]
        low = min(float(np.quantile(values, _LEFT_OF_AXIS)) for values in whole) / 2
        high = max(float(values.max()) for values in drawn.values())
        _scale(axes, "x", low, high)
        _legend(axes)
    axes.grid(visible=True, color=GRID, linewidth=0.6)


def _throughput(axes: Axes, good: Sequence[MeasuredRequest], duration_s: float) -> None:
    tokens = latency.tokens_by_second(good)
    axes.stairs(tokens, np.arange(len(tokens) + 1), fill=True, color=BAR, alpha=0.85)
    axes.set(
        xlim=(0, max(duration_s, 1e-9)), xlabel="seconds since the start", ylabel="tokens/s",
        title="Output tokens by second",
    )  # fmt: skip
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.6)


def _over_time(axes: Axes, good: Sequence[MeasuredRequest], duration_s: float) -> None:
    sent_s = [request.sent_s for request in good]
    series = {
        "ttft": [1e3 * request.ttft_s for request in good],
        "e2el": [1e3 * request.e2el_s for request in good],
    }
    for name, values in series.items():
        axes.scatter(sent_s, values, s=9, alpha=0.6, color=_COLORS[name], label=name.upper(), lw=0)
    axes.set(
        xlim=(0, max(duration_s, 1e-9)), xlabel="sent at, seconds since the start",
        ylabel="milliseconds", title="Latency of each request",
    )  # fmt: skip
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.6)
    if good:
        every = [value for values in series.values() for value in values]
        _scale(axes, "y", min(every), max(every))
        _legend(axes)


def _scale(axes: Axes, which: Literal["x", "y"], low: float, high: float) -> None:
    """Scale an axis for values of a range, with labels in plain numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if low <= 0 or high < _LOG_FROM * low:
        axes.set(**{f"{which}lim": (0.0, 1.05 * high)})
    else:
        axes.set(**{f"{which}scale": "log", f"{which}lim": (low / 1.15, 1.15 * high)})
        axis.set_major_locator(LogLocator(subs=_TICKS))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _legend(axes: Axes) -> None:
    """Put the legend beside the axes, where it covers nothing."""
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
