"""Draws how evenly the experts of a model are used.

This module imports matplotlib; import it where pictures are drawn, and nowhere else.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from moescope import analysis, files, report, route_files, routes_log
from moescope._style import BAR, DPI, GRID, INK, SOFT, STYLE, TOP
from moescope.errors import CommandError
from moescope.run_dir import RunDir


def draw_run(run_dir: RunDir, routes: routes_log.LoggedRoutes | None = None) -> None:
    """Draw both pictures of a run's routes and save them in its directory.

    Args:
        run_dir: The directory.
        routes: What they are; read where None.

    Raises:
        FormatError: The routes cannot be read.
        CommandError: There is no selection to draw.
    """
    routes = routes or route_files.counted(run_dir.routes)
    subtitle = report.subtitle(routes)
    pictures = (
        (run_dir.histogram, expert_histogram(routes.counts, routes.layers, subtitle)),
        (run_dir.layers, layer_heatmap(routes.counts, routes.layers, subtitle)),
    )
    for path, figure in pictures:
        with files.replacing(path) as new:
            figure.savefig(new, dpi=DPI)


def expert_histogram(
    counts: npt.NDArray[np.int64], layers: list[int], subtitle: str = ""
) -> Figure:
    """Draw the selections of each expert in the layer with the highest MaxVio.

    Below them is the load of every layer's experts, the busiest first; beside them is the balance
    of the layers. Experts of the same number in different layers have nothing in common, so nothing
    is summed over layers.

    Args:
        counts: Selections, ``[num_layers, num_experts]``.
        layers: Global layer numbers, ``[num_layers]``.
        subtitle: What the counts are of.

    Raises:
        CommandError: There is no selection to draw.
    """
    _require_selections(counts)
    balance = analysis.Balance.of(counts)
    place = balance.max_violation.worst_place
    title = f"Selections per expert, layer {layers[place]}"
    if len(layers) > 1:
        title += f": the highest MaxVio of {len(layers)} layers"
    with rc_context(STYLE):
        height_in = 5.0 if len(layers) == 1 else 6.6
        figure = Figure(figsize=(11, height_in))
        _titles(figure, title, subtitle)
        grid = figure.add_gridspec(
            1, 2, width_ratios=(3.1, 1), left=0.065, right=0.975,
            top=1 - 0.95 / height_in, bottom=0.6 / height_in, wspace=0.06,
        )  # fmt: skip
        if len(layers) == 1:
            _bars(figure.add_subplot(grid[0]), counts[place])
        else:
            rows = grid[0].subgridspec(2, 1, height_ratios=(1.35, 1), hspace=0.42)
            _bars(figure.add_subplot(rows[0]), counts[place])
            _sorted_loads(figure.add_subplot(rows[1]), counts, place, layers[place])
        _balance_table(figure.add_subplot(grid[1]), counts[place], balance, layers)
    return figure


def layer_heatmap(counts: npt.NDArray[np.int64], layers: list[int], subtitle: str = "") -> Figure:
    """Draw the load of every expert in every layer, with each layer's entropy and MaxVio.

    A load is the expert's selections over the layer's mean: 1 is the uniform load.

    Args:
        counts: Selections, ``[num_layers, num_experts]``.
        layers: Global layer numbers, ``[num_layers]``.
        subtitle: What the counts are of.

    Raises:
        CommandError: There is no selection to draw.
    """
    _require_selections(counts)
    with rc_context(STYLE):
        height_in = min(max(2.3 + 0.3 * len(layers), 3.6), 14.0)
        figure = Figure(figsize=(11, height_in))
        _titles(figure, "Load of every expert in every layer", subtitle)
        grid = figure.add_gridspec(
            1,
            5,
            width_ratios=(4.8, 0.12, 0.18, 1.5, 1),
            left=0.065,
            right=0.975,
            top=1 - 0.95 / height_in,
            bottom=0.55 / height_in,
            wspace=0.09,
        )
        main = figure.add_subplot(grid[0])
        _heatmap(main, figure.add_subplot(grid[1]), counts, layers)
        balance = analysis.Balance.of(counts)
        bits, normalized = analysis.entropy_bits(counts), analysis.normalized_entropy(counts)
        _layer_bars(
            figure.add_subplot(grid[3]),
            bits,
            [f"{one:.2f} ({share:.3f})" for one, share in zip(bits, normalized, strict=True)],
            balance.entropy_bits.worst_place,
            f"entropy in bits, of {balance.max_entropy_bits:.2f}\n(normalized)",
            highest=balance.max_entropy_bits,
            room=0.9,
        )
        violations = analysis.max_violation(counts)
        _layer_bars(
            figure.add_subplot(grid[4]),
            violations,
            [f"{one:.2f}" for one in violations],
            balance.max_violation.worst_place,
            "MaxVio",
        )
    return figure


def _require_selections(counts: npt.NDArray[np.int64]) -> None:
    if not counts.any():
        raise CommandError("no expert was selected: there is nothing to draw")


def _titles(figure: Figure, title: str, subtitle: str) -> None:
    height_in = figure.get_size_inches()[1]
    figure.text(0.02, 1 - 0.3 / height_in, title, fontsize=15, weight="bold", va="center")
    figure.text(0.02, 1 - 0.58 / height_in, subtitle, fontsize=10, color=SOFT, va="center")


def _bars(axes: Axes, selections: npt.NDArray[np.int64]) -> None:
    top = {expert for expert, _, _ in analysis.top_experts(selections)}
    colors = [TOP if expert in top else BAR for expert in range(len(selections))]
    width = 0.8 if len(selections) <= 128 else 1.0
    axes.bar(np.arange(len(selections)), selections, width=width, color=colors, zorder=2)
    mean = selections.mean()
    _uniform(axes, mean, f"{mean:,.0f}" if mean >= 10 else f"{mean:.2g}")
    axes.set_xlim(-0.8, len(selections) - 0.2)
    axes.set_ylim(0, selections.max() * 1.06)
    axes.set_xlabel("expert")
    axes.set_title("selections", fontsize=9, color=SOFT, loc="left")
    axes.yaxis.set_major_formatter("{x:,.0f}" if selections.max() < 1e6 else EngFormatter(sep=""))
    axes.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    axes.tick_params(length=0)


def _uniform(axes: Axes, value: float, text: str) -> None:
    axes.axhline(value, color=INK, linewidth=1.1, linestyle=(0, (5, 3)), zorder=3)
    axes.text(
        1.0,
        value,
        f" uniform\n {text}",
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=9,
    )


def _sorted_loads(axes: Axes, counts: npt.NDArray[np.int64], worst: int, layer: int) -> None:
    """Draw a line a layer: the load of its busiest expert, its second busiest and so on."""
    loads = -np.sort(-_load(counts), axis=1)
    ranks = np.arange(1, counts.shape[1] + 1)
    lines = [np.column_stack((ranks, one)) for one in loads[~np.isnan(loads).any(axis=1)]]
    alpha = max(0.15, min(0.6, 6 / len(lines)))
    axes.add_collection(LineCollection(lines, colors=BAR, linewidths=1.2, alpha=alpha, zorder=2))
    axes.plot(ranks, loads[worst], color=TOP, linewidth=2, zorder=3)
    _uniform(axes, 1.0, "1")
    axes.set_xlim(0.2, len(ranks) + 0.8)
    axes.set_ylim(0, max(1.2, 1.06 * loads[worst, 0]))
    axes.set_xlabel("rank of the expert in its layer, the busiest first")
    axes.set_title(
        f"load (selections over the layer's mean), a line a layer; layer {layer} is red",
        fontsize=9, color=SOFT, loc="left",
    )  # fmt: skip
    axes.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    axes.tick_params(length=0)


def _balance_table(
    axes: Axes, selections: npt.NDArray[np.int64], balance: analysis.Balance, layers: list[int]
) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(axes.get_window_extent().height / axes.figure.dpi, 0)  # inches from the top
    y = 0.0
    if len(layers) > 1:
        for x, name in ((0.2, "mean"), (0.58, "worst (layer)")):
            axes.text(x, y, name, fontsize=9, va="center")
        y += 0.2
    for name, of_mean, of_worst, place in _figures(balance):
        axes.text(0.2, y, name, color=SOFT, fontsize=9, va="center")
        y += 0.2
        axes.text(0.2, y, of_mean, fontsize=12, weight="bold", va="center")
        if len(layers) > 1:
            axes.text(0.58, y, of_worst, fontsize=12, weight="bold", va="center")
        if of_worst != of_mean:
            axes.text(1, y, f"({layers[place]})", color=SOFT, fontsize=9, va="center", ha="right")
        y += 0.29
    _top_table(axes, y + 0.1, selections, layers[balance.max_violation.worst_place])


def _figures(balance: analysis.Balance) -> list[tuple[str, str, str, int]]:
    """Return names, means, values of the worst layer, and its place."""
    entropy, normalized = balance.entropy_bits, balance.normalized_entropy
    violation, active = balance.max_violation, balance.active_experts
    rows = (
        (f"entropy in bits, of {balance.max_entropy_bits:.2f}", entropy, ".2f"),
        ("normalized entropy", normalized, ".3f"),
        ("MaxVio", violation, ".2f"),
        (f"active experts, of {balance.num_experts}", active, ".4g"),
    )
    return [
        (name, format(one.mean, form), format(one.worst, form), one.worst_place)
        for name, one, form in rows
    ]


def _top_table(axes: Axes, y: float, selections: npt.NDArray[np.int64], layer: int) -> None:
    axes.text(0.2, y, f"busiest experts of layer {layer}", fontsize=9, va="center")
    y += 0.24
    columns = ((0.42, "expert"), (0.76, "selections"), (1.0, "share"))
    for x, name in columns:
        axes.text(x, y, name, color=SOFT, fontsize=9, ha="right", va="center")
    axes.plot((0.2, 1.0), (y + 0.15, y + 0.15), color=GRID, linewidth=1)
    for expert, number, share in analysis.top_experts(selections):
        y += 0.32
        cells = (f"{expert}", f"{number:,}", f"{share:.1%}")
        for (x, _), cell in zip(columns, cells, strict=True):
            axes.text(x, y, cell, fontsize=11, ha="right", va="center")
        axes.plot(0.22, y, marker="s", markersize=6, color=TOP)


def _load(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return every expert's load, ``[num_layers, num_experts]``: 1 is the layer's mean."""
    result: npt.NDArray[np.float64] = analysis.shares(counts) * counts.shape[1]
    return result


def _heatmap(axes: Axes, bar_axes: Axes, counts: npt.NDArray[np.int64], layers: list[int]) -> None:
    load = _load(counts)
    highest = max(2.0, float(np.nanmax(load)))
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=highest)
    image = axes.imshow(load, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    every = -(-len(layers) // 40)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
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


def _layer_bars(
    axes: Axes,
    values: npt.NDArray[np.float64],
    texts: list[str],
    worst: int,
    title: str,
    *,
    highest: float = 1.0,
    room: float = 0.35,
) -> None:
    """Draw a bar a layer; the worst stands out, and has its text where not every layer has."""
    drawn = np.nan_to_num(values)
    bars = axes.barh(np.arange(len(values)), drawn, height=0.62, color=BAR)
    if len(values) > 1:
        bars[worst].set_color(TOP)
    right = max(highest, float(drawn.max())) or 1.0
    for place, text in enumerate(texts):
        if place == worst or (len(values) <= 40 and not np.isnan(values[place])):
            axes.text(right * 1.04, place, text, va="center", fontsize=8.5)
    axes.set_xlim(0, right * (1 + room))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_title(title, fontsize=9, color=SOFT, loc="left")
    axes.set_yticks([])
    axes.set_xticks([0, right], ["0", f"{right:.3g}"])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[["left", "bottom"]].set_visible(False)
