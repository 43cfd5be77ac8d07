"""Draws how the arms differ from the first, with their intervals and the noise of the run.

This module imports matplotlib; import it where pictures are drawn, and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moescope import files
from moescope._style import BAR, DPI, GRID, INK, SOFT, STYLE, TOP
from moescope.overhead import comparison
from moescope.overhead.arms import AGAIN

_COLORS = (TOP, BAR, "#54a24b", "#b279a2", "#9d755d")


def draw(path: Path, values: dict[str, Any]) -> None:
    """Draw those metrics of a timing.json that tell something.

    Args:
        path: The PNG to write.
        values: What the file holds.
    """
    differences = values["differences"]
    labels = comparison.telling(differences)
    left_out = comparison.left_out(differences)
    hardware = values["hardware"]
    draw_differences(
        path,
        {arm: {name: one[name] for name in labels} for arm, one in differences.items()},
        labels,
        xlabel=f"difference to {next(iter(values['arms']))} in percent, "
        f"{len(values['rounds'])} paired rounds" + (left_out and f"\n{left_out}"),
        title=f"{values['model']} on {hardware['cpu']}, {hardware['cores']} cores, "
        f"{values['date'][:10]}",
    )


def draw_differences(
    path: Path,
    differences: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str],
    *,
    xlabel: str,
    title: str,
) -> None:
    """Draw differences in lines with labels, a color for each arm.

    Args:
        path: The PNG to write.
        differences: By arm and name, as `comparison.Difference.as_json` has them; an arm may lack
            names.
        labels: The label of each name, from the top.
        xlabel: What the differences are.
        title: What they are of; that the intervals are 95% is added.
    """
    arms = list(differences)
    again = [arm for arm in arms if arm.endswith(AGAIN)]
    colors = dict(zip([a for a in arms if a not in again], itertools.cycle(_COLORS), strict=False))
    colors |= dict.fromkeys(again, SOFT)
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 1.7 + 0.42 * len(labels)), layout="constrained")
        axes = figure.subplots()
        for place, arm in enumerate(arms):
            offset = (place - (len(arms) - 1) / 2) * 0.8 / max(2, len(arms))
            _draw_arm(axes, differences[arm], list(labels), offset, colors[arm])
        is_cut = _limit(axes, differences)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(labels)), list(labels.values()))
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlabel(xlabel)
        axes.grid(visible=True, axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        handles = [Line2D([], [], color=colors[arm], marker="o", label=arm) for arm in arms]
        hollow = Line2D([], [], color=SOFT, marker="o", mfc="white", ls="", label="holds zero")
        axes.legend(handles=[*handles, hollow], frameon=False, loc="upper left",
                    bbox_to_anchor=(1.0, 1.0))  # fmt: skip
        every = [one for by_label in differences.values() for one in by_label.values()]
        has_floor = any(one["noise_percent"] is not None for one in every)
        floor = ", none narrower than those of the same again" if has_floor else ""
        cut = "; what reaches the edge goes on beyond it" if is_cut else ""
        axes.set_title(f"{title}\n95% intervals{floor}{cut}", fontsize=10, color=SOFT, loc="left")
        with files.replacing(path) as new:
            figure.savefig(new, dpi=DPI)


def _limit(axes: Axes, differences: Mapping[str, Mapping[str, Any]]) -> bool:
    """Cut off what would make all else invisible; return whether there is any of that."""
    ends: list[float] = [
        max(map(abs, one["claim_percent"]))
        for by_label in differences.values()
        for one in by_label.values()
    ]
    limit = 1.1 * min(max(ends), 3.0 * float(np.median(ends)))
    axes.set_xlim(-limit, limit)
    return limit < max(ends)


def _draw_arm(
    axes: Axes, by_label: Mapping[str, Any], labels: Sequence[str], offset: float, color: str
) -> None:
    for place, label in enumerate(labels):
        if label not in by_label:
            continue
        one = by_label[label]
        low, high = one["claim_percent"]
        y = place + offset
        axes.plot((low, high), (y, y), color=color, linewidth=2, solid_capstyle="butt")
        face = color if one["distinguishable"] else "white"
        axes.plot(one["percent"], y, "o", color=color, markerfacecolor=face, markersize=5)
