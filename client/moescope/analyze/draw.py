"""What the pictures of an analysis share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moescope._style import BAR, GRID, INK, SOFT, TOP

WIDTH_IN = 11.0
COLORS = (BAR, TOP, "#54a24b", "#b279a2", "#eeca3b", "#72b7b2", "#9d755d", "#ff9da6")
"""Of lines that a legend names; of more labels the first ones have a color."""


def titled(height_in: float, title: str, subtitle: str) -> Figure:
    """Return an empty figure with its titles."""
    figure = Figure(figsize=(WIDTH_IN, height_in))
    options: Any = {"va": "center", "parse_math": False}  # names may have dollar signs
    figure.text(0.02, 1 - 0.3 / height_in, title, fontsize=15, weight="bold", **options)
    figure.text(0.02, 1 - 0.58 / height_in, subtitle, fontsize=10, color=SOFT, **options)
    return figure


def grid(figure: Figure, num_columns: int, **options: Any) -> Any:  # noqa: ANN401 - matplotlib's
    """Return a grid below the titles."""
    height_in = figure.get_size_inches()[1]
    places = {"left": 0.065, "right": 0.965, "wspace": 0.25} | options
    top, bottom = 1 - 1.05 / height_in, 0.6 / height_in
    return figure.add_gridspec(1, num_columns, top=top, bottom=bottom, **places)


def heatmap_height_in(num_layers: int) -> float:
    """Return the height of a picture whose rows are layers."""
    return min(max(2.3 + 0.3 * num_layers, 3.6), 14.0)


def named(axes: Axes, title: str) -> None:
    """Put a small title above axes, and take the ticks' marks away."""
    axes.set_title(title, fontsize=9, color=SOFT, loc="left")
    axes.tick_params(which="both", length=0)


def heatmap(
    axes: Axes, values: npt.NDArray[Any], title: str, *, cmap: str, norm: Normalize
) -> None:
    """Draw a matrix; what is NaN stays gray."""
    axes.set_facecolor(GRID)
    axes.imshow(values, aspect="auto", cmap=cmap, norm=norm, interpolation="nearest")
    axes.spines[:].set_visible(False)
    named(axes, title)


def color_bar(
    axes: Axes, bar_axes: Axes, title: str, ticks: Sequence[float], labels: Sequence[str]
) -> None:
    """Draw the bar of the colors of a heatmap."""
    bar = axes.figure.colorbar(axes.images[0], cax=bar_axes)
    bar.outline.set_visible(False)
    bar.set_ticks(list(ticks), labels=list(labels))
    bar.ax.tick_params(length=0, labelsize=8)
    bar.ax.set_title(title, fontsize=9, color=SOFT, loc="right")


def layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    """Name the rows of a heatmap by their layers; of more than 40 rows some."""
    every = -(-len(layers) // 40)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_yticks(np.arange(-0.5, len(layers)), minor=True)
    axes.grid(which="minor", axis="y", color="white", linewidth=1.5 if len(layers) <= 40 else 0.4)
    axes.set_ylabel("layer")
    axes.tick_params(which="both", length=0)


def by_layer(
    axes: Axes,
    layers: Sequence[int],
    values: npt.NDArray[Any],
    interval: npt.NDArray[Any] | None = None,
    *,
    color: str = BAR,
    label: str | None = None,
) -> None:
    """Draw a figure of each layer as points on a line, with its interval.

    Args:
        axes: Where.
        layers: Global layer numbers, ``[num_layers]``.
        values: ``[num_layers]``.
        interval: From, to, ``[2, num_layers]``.
        color: Of the line.
        label: Its name in the legend.
    """
    size = 4.5 if len(layers) <= 40 else 2.5
    axes.plot(layers, values, color=color, marker="o", markersize=size, linewidth=1.2, label=label)
    if interval is not None:
        axes.vlines(layers, interval[0], interval[1], color=color, linewidth=2.2, alpha=0.4)
    axes.set_xlabel("layer")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if len(layers) <= 16:
        axes.set_xticks(list(layers))
    margin = max(0.03 * (layers[-1] - layers[0]), 0.4)
    axes.set_xlim(layers[0] - margin, layers[-1] + margin)


def from_zero(axes: Axes) -> None:
    """Let the y axis begin at 0, with room above the highest value."""
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def level(axes: Axes, value: float, text: str) -> None:
    """Draw a dashed line, such as that of a uniform load, and name it."""
    axes.axhline(value, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label=text)


def legend(axes: Axes, **options: Any) -> None:  # noqa: ANN401 - matplotlib's
    """Draw the legend, over the lines that there is no room beside."""
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.9, fontsize=9, **options)


def some_places(num: int) -> list[int]:
    """Return the first, the middle and the last of some places, each once."""
    return sorted({0, (num - 1) // 2, num - 1}) if num > 0 else []


def short(number: int) -> str:
    """Return a number in few characters: 950, 12k, 3.4M."""
    for factor, unit in ((10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)
