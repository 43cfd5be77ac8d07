"""The picture of a comparison.

This module imports matplotlib; import it where pictures are drawn, and nowhere else.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moescope._style import BAR, GRID, INK, SOFT, STYLE, TOP
from moescope.analyze import draw
from moescope.diff.comparing import Comparison
from moescope.diff.findings import Finding, first_changed
from moescope.diff.pairing import NEVER
from moescope.diff.result import Result
from moescope.received import escaped

_NAME_CHARS = 40


def picture(result: Result) -> Figure:
    """Return a picture of the figures by layer, and of where sequences first differ."""
    found, layers = result.found, result.layers
    title = " | ".join(_short(source.name) for source in result.sources[:2])
    subtitle = (
        f"{result.sides[0].model} · {len(result.comparison.pairs):,} sequences · "
        f"{result.comparison.num_rows:,} rows · near-ties up to {100 * result.near_tie:g}%"
    )
    with rc_context(STYLE):
        figure = draw.titled(7.6, title, subtitle)
        cells = figure.add_gridspec(
            2, 2, left=0.075, right=0.965, top=0.845, bottom=0.075, wspace=0.2, hspace=0.38
        )
        rows, weights, loads, sequences = (
            figure.add_subplot(cells[place]) for place in np.ndindex(2, 2)
        )
        _by_layer(rows, found["near_ties"], layers, color=BAR, label="near-ties", noise=False)
        _by_layer(rows, found["rows"], layers, label="others, near-ties apart")
        draw.named(rows, "share of the rows with other experts; bars: 95% of resampled requests")
        _by_layer(weights, found["weights"], layers, label="A | B")
        draw.named(weights, "mean difference of the weights of experts in both")
        _by_layer(loads, found["loads"], layers, label="A | B")
        draw.named(loads, "Jensen-Shannon divergence of the loads, in bits")
        for axes in (rows, weights, loads):
            draw.from_zero(axes)
            draw.legend(axes)
        _sequences(sequences, result.comparison)
    return figure


def _short(name: str) -> str:
    """Return the end of a name: the end of a path tells it from others."""
    return escaped(name if len(name) <= _NAME_CHARS else f"…{name[-_NAME_CHARS:]}")


def _by_layer(
    axes: Axes,
    finding: Finding,
    layers: tuple[int, ...],
    *,
    label: str,
    color: str = TOP,
    noise: bool = True,
) -> None:
    """Draw a figure, with that of the first server twice, and the first layer that changed."""
    if noise and finding.noise is not None:
        draw.by_layer(
            axes, layers, finding.noise, finding.noise_interval, color=SOFT, label="A | A again"
        )
    draw.by_layer(axes, layers, finding.values, finding.interval, color=color, label=label)
    layer = first_changed(finding, layers)
    if layer is not None:
        what = "first that changed" if finding.noise is not None else "first that differs"
        axes.axvline(
            layer, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label=f"{what}: layer {layer}"
        )


def _sequences(axes: Axes, comparison: Comparison) -> None:
    """Draw which share of the sequences differs up to a position."""
    curves = {
        "other experts": (comparison.first[:, 0], BAR),
        "other experts, near-ties apart": (comparison.first_beyond[:, 0], TOP),
        "another token": (comparison.pairs.divergence, INK),
    }
    end = max([1, *(int(one[one < NEVER].max(initial=0)) for one, _ in curves.values())])
    for label, (positions, color) in curves.items():
        x, y = _share_up_to(positions, end)
        axes.step(x, y, where="post", color=color, linewidth=1.6, label=label)
    axes.set_ylim(0, 1.03)
    axes.set_xlim(0, end)
    axes.set_xlabel("position of the token")
    axes.grid(color=GRID, linewidth=0.8)
    draw.named(axes, "share of the sequences that differ up to there")
    draw.legend(axes)


def _share_up_to(
    positions: npt.NDArray[np.int64], end: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    x = np.sort(positions[positions < NEVER])
    y = np.arange(1, len(x) + 1) / max(len(positions), 1)
    last = y[-1] if len(y) else 0.0
    return np.concatenate([[0], x, [end]]), np.concatenate([[0.0], y, [last]])
