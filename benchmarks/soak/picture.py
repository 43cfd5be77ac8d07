"""Draws the memory of a soak's processes over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt


def draw(parts: dict[str, dict[str, Any]], out: Path) -> None:
    """Draw one panel a part, and write a PNG.

    Args:
        parts: Results by name, with ``memory_mib``.
        out: The file.
    """
    figure, axes = plt.subplots(
        1, len(parts), figsize=(6 * len(parts), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (name, part) in zip(axes[0], parts.items(), strict=True):
        for process, samples in part["memory_mib"].items():
            times, values = zip(*samples, strict=True)
            axis.plot([time_s / 60 for time_s in times], values, label=process, linewidth=1)
        axis.set(title=name, xlabel="minutes", ylabel="resident memory, MiB")
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # the legend has a place of its own
        axis.legend(fontsize="x-small", ncols=2)
    figure.savefig(out, dpi=150)
    plt.close(figure)
