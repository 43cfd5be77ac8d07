"""Draws how evenly the experts of a model are used.

This module imports matplotlib; import it where pictures are drawn, and nowhere else.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from moescope import analysis, report, routes_log
from moescope._style import BAR, DPI, GRID, INK, SOFT, STYLE, TOP
from moescope.errors import CommandError
from moescope.run_dir import RunDir


def draw_run(run_dir: RunDir, num_experts: int | None = None) -> None:
    """Draw both pictures of a run's route log and save them in its directory.

    Args:
        run_dir: The directory.
        num_experts: Routed experts a layer, for a route log that does not say it.

    Raises:
        FormatError: The route log cannot be read.
        CommandError: There is not one selection to draw.
    """
    routes = routes_log.read(run_dir.routes, num_experts)
    subtitle = report.subtitle(routes)
    pictures = (
        (run_dir.histogram, expert_histogram(routes.counts, routes.layers, subtitle)),
        (run_dir.layers, layer_heatmap(routes.counts, routes.layers, subtitle)),
    )
    for path, figure in pictures:
        figure.savefig(path, dpi=DPI)


def expert_histogram(
    counts: npt.NDArray[np.int64], layers: list[int], subtitle: str = ""
) -> Figure:
    """Draw the selections of each expert, summed over layers, beside their balance.

    Args:
        counts: Selections, ``[num_layers, num_experts]``.
        layers: Global layer numbers, ``[num_layers]``.
        subtitle: What the counts are of.

    Raises:
        CommandError: There is not one selection to draw.
    """
    total = _total(counts)
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 5))
        where = f"layer {layers[0]}" if len(layers) == 1 else f"all {len(layers)} logged layers"
        _titles(figure, f"Selections per expert, {where}", subtitle)
        grid = figure.add_gridspec(
            1, 2, width_ratios=(3.1, 1), left=0.06, right=0.975, top=0.81, bottom=0.12, wspace=0.06
        )
        _bars(figure.add_subplot(grid[0]), total)
        _balance_table(figure.add_subplot(grid[1]), counts, total)
    return figure


def layer_heatmap(counts: npt.NDArray[np.int64], layers: list[int], subtitle: str = "") -> Figure:
    """Draw the load of every expert in every layer, with each layer's entropy and MaxVio.

    A load is the expert's selections over the layer's mean: 1 is the uniform load.

    Args:
        counts: Selections, ``[num_layers, num_experts]``.
        layers: Global layer numbers, ``[num_layers]``.
        subtitle: What the counts are of.

    Raises:
        CommandError: There is not one selection to draw.
    """
    _total(counts)
    with rc_context(STYLE):
        height_in = min(max(2.3 + 0.3 * len(layers), 3.6), 14.0)
        figure = Figure(figsize=(11, height_in))
        _titles(figure, "Load of every expert in every layer", subtitle)
        grid = figure.add_gridspec(
            1,
            5,
            width_ratios=(5.2, 0.12, 0.18, 1, 1),
            left=0.065,
            right=0.975,
            top=1 - 0.95 / height_in,
            bottom=0.55 / height_in,
            wspace=0.09,
        )
        main = figure.add_subplot(grid[0])
        _heatmap(main, figure.add_subplot(grid[1]), counts, layers)
        _layer_bars(
            figure.add_subplot(grid[3]), analysis.normalized_entropy(counts), "normalized\nentropy"
        )
        _layer_bars(figure.add_subplot(grid[4]), analysis.max_violation(counts), "MaxVio")
    return figure


def _total(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    total: npt.NDArray[np.int64] = counts.sum(axis=0)
    if not total.any():
        raise CommandError("nothing to draw: no expert was selected")
    return total


def _titles(figure: Figure, title: str, subtitle: str) -> None:
    height_in = figure.get_size_inches()[1]
    figure.text(0.02, 1 - 0.3 / height_in, title, fontsize=15, weight="bold", va="center")
    figure.text(0.02, 1 - 0.58 / height_in, subtitle, fontsize=10, color=SOFT, va="center")


def _bars(axes: Axes, total: npt.NDArray[np.int64]) -> None:
    top = {expert for expert, _, _ in analysis.top_experts(total)}
    colors = [TOP if expert in top else BAR for expert in range(len(total))]
    width = 0.8 if len(total) <= 128 else 1.0
    axes.bar(np.arange(len(total)), total, width=width, color=colors, zorder=2)
    uniform = total.mean()
    axes.axhline(uniform, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=3)
    axes.text(
        1.0,
        uniform,
        f" uniform\n {uniform:,.0f}",
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=9,
    )
    axes.set_xlim(-0.8, len(total) - 0.2)
    axes.set_ylim(0, total.max() * 1.06)
    axes.set_xlabel("expert")
    axes.set_title("selections", fontsize=9, color=SOFT, loc="left")
    axes.yaxis.set_major_formatter("{x:,.0f}" if total.max() < 1e6 else EngFormatter(sep=""))
    axes.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    axes.tick_params(length=0)


def _balance_table(axes: Axes, counts: npt.NDArray[np.int64], total: npt.NDArray[np.int64]) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    experts = len(total)
    facts = [
        ("entropy", f"{analysis.entropy(total):.3f} of {np.log(experts):.3f} nats"),
        ("normalized entropy", f"{analysis.normalized_entropy(total):.3f}"),
        ("active experts", f"{analysis.active_experts(total)} of {experts}"),
        ("MaxVio", f"{analysis.max_violation(total):.2f}"),
    ]
    if len(counts) > 1:  # experts of different layers even out in the sum
        mean = np.nanmean(analysis.normalized_entropy(counts))
        facts.insert(2, ("mean within layers", f"{mean:.3f}"))
    for row, (name, value) in enumerate(facts):
        y = 0.98 - row * 0.115
        axes.text(0.2, y, name, color=SOFT, fontsize=9, va="top")
        axes.text(0.2, y - 0.045, value, fontsize=12, weight="bold", va="top")
    y = 0.34
    columns = ((0.42, "expert"), (0.76, "selections"), (1.0, "share"))
    for x, name in columns:
        axes.text(x, y, name, color=SOFT, fontsize=9, ha="right", va="center")
    axes.plot((0.2, 1.0), (y - 0.045, y - 0.045), color=GRID, linewidth=1)
    for expert, selections, share in analysis.top_experts(total):
        y -= 0.09
        cells = (f"{expert}", f"{selections:,}", f"{share:.1%}")
        for (x, _), cell in zip(columns, cells, strict=True):
            axes.text(x, y, cell, fontsize=11, ha="right", va="center")
        axes.plot(0.22, y, marker="s", markersize=6, color=TOP)


def _heatmap(axes: Axes, bar_axes: Axes, counts: npt.NDArray[np.int64], layers: list[int]) -> None:
    load = analysis.shares(counts) * counts.shape[1]
    highest = max(2.0, float(np.nanmax(load)))
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=highest)
    image = axes.imshow(load, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    step = -(-len(layers) // 40)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_yticks(np.arange(-0.5, len(layers)), minor=True)
    axes.grid(which="minor", axis="y", color="white", linewidth=1.5 if len(layers) <= 40 else 0.4)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, cax=bar_axes)
    bar.outline.set_visible(False)
    bar.set_ticks([0.0, 1.0, highest], labels=["0", "1", f"{highest:.3g}"])
    bar.ax.tick_params(length=0, labelsize=8)
    bar.ax.set_title("load", fontsize=9, color=SOFT, loc="left")


def _layer_bars(axes: Axes, values: npt.NDArray[np.float64], title: str) -> None:
    drawn = np.nan_to_num(values)
    rows = np.arange(len(values))
    axes.barh(rows, drawn, height=0.62, color=BAR)
    right = max(1.0, float(drawn.max()))
    if len(values) <= 40:
        for row, value in enumerate(values.tolist()):
            axes.text(right * 1.04, row, f"{value:.2f}", va="center", fontsize=8.5)
    axes.set_xlim(0, right * 1.35)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_title(title, fontsize=9, color=SOFT, loc="left")
    axes.set_yticks([])
    axes.set_xticks([0, right], ["0", f"{right:.3g}"])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[["left", "bottom"]].set_visible(False)
