"""Draws how the arms differ from the first, with their intervals and the noise of the run.

This module imports matplotlib; import it where pictures are drawn, and nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moescope._style import BAR, DPI, GRID, INK, SOFT, STYLE, TOP
from moescope.overhead.arms import STOCK_AGAIN
from moescope.overhead.comparison import METRICS

_COLORS = (TOP, BAR, "#54a24b", "#b279a2", "#9d755d")


def draw(path: Path, values: dict[str, Any]) -> None:
    """Draw a timing.json.

    Args:
        path: The PNG to write.
        values: What the file holds.
    """
    arms = list(values["differences"])
    metrics = [name for name in METRICS if name in values["differences"][arms[0]]]
    colors = dict(zip([a for a in arms if a != STOCK_AGAIN], _COLORS, strict=False))
    colors[STOCK_AGAIN] = SOFT
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 1.7 + 0.42 * len(metrics)), layout="constrained")
        axes = figure.subplots()
        for place, arm in enumerate(arms):
            offset = (place - (len(arms) - 1) / 2) * 0.8 / max(2, len(arms))
            _draw_arm(axes, values["differences"][arm], metrics, offset, colors[arm])
        _limit(axes, values["differences"], metrics)
        first = next(iter(values["arms"]))
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(metrics)), [METRICS[name] for name in metrics])
        axes.set_ylim(len(metrics) - 0.4, -0.6)
        axes.set_xlabel(f"difference to {first} in percent, {len(values['rounds'])} paired rounds")
        axes.grid(visible=True, axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        handles = [Line2D([], [], color=colors[arm], marker="o", label=arm) for arm in arms]
        hollow = Line2D([], [], color=SOFT, marker="o", mfc="white", ls="", label="holds zero")
        axes.legend(handles=[*handles, hollow], frameon=False, loc="upper left",
                    bbox_to_anchor=(1.0, 1.0))  # fmt: skip
        hardware = values["hardware"]
        floor = ", none narrower than the stock pair's" if STOCK_AGAIN in arms else ""
        axes.set_title(
            f"{values['model']} on {hardware['cpu']}, {hardware['cores']} cores, "
            f"{values['date'][:10]}; 95% intervals{floor}",
            fontsize=10,
            color=SOFT,
            loc="left",
        )
        figure.savefig(path, dpi=DPI)


def _limit(axes: Axes, differences: dict[str, Any], metrics: list[str]) -> None:
    """Cut off what would make all else invisible; the figure in the file says it."""
    ends = [
        max(map(abs, by_metric[name]["claim_percent"]))
        for by_metric in differences.values()
        for name in metrics
    ]
    limit = 1.1 * min(max(ends), 3.0 * float(np.median(ends)))
    axes.set_xlim(-limit, limit)


def _draw_arm(
    axes: Axes, by_metric: dict[str, Any], metrics: list[str], offset: float, color: str
) -> None:
    for row, name in enumerate(metrics):
        one = by_metric[name]
        low, high = one["claim_percent"]
        y = row + offset
        axes.plot((low, high), (y, y), color=color, linewidth=2, solid_capstyle="butt")
        face = color if one["distinguishable"] else "white"
        axes.plot(one["percent"], y, "o", color=color, markerfacecolor=face, markersize=5)
