"""Sections about the load: by layer, balance and coverage."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.collections import LineCollection

from moescope import analysis, plot
from moescope._style import BAR, GRID, STYLE, TOP
from moescope.analyze import draw
from moescope.analyze.section import Section, Subject


def load(subject: Subject) -> Section:
    """Return the load of every expert in every layer."""
    counts = subject.profile.load.total
    share = analysis.shares(counts)
    by_phase = subject.profile.load.by_phase
    lines = [
        (
            *(layer, expert, int(counts[place, expert]), float(share[place, expert])),
            *(int(one[place, expert]) for one in by_phase),
        )
        for place, layer in enumerate(subject.layers)
        for expert in range(counts.shape[1])
    ]
    return Section(
        name="load",
        title="Load of every expert in every layer",
        about="An expert's selections over the mean of its layer: 1 is the uniform load, 2 twice "
        "that. Experts of the same number in different layers have nothing in common.",
        picture=plot.layer_heatmap(counts, subject.layers, str(subject)),
        header=("layer", "expert", "selections", "share", *analysis.PHASES),
        lines=lines,
        numbers={
            "layers": subject.layers,
            "busiest_experts": [
                [
                    {"expert": expert, "selections": number, "share": part}
                    for expert, number, part in analysis.top_experts(one)
                ]
                for one in counts
            ],
            "active_experts": analysis.active_experts(counts),
        },
    )


def balance(subject: Subject) -> Section:
    """Return entropy and MaxVio by layer, with their intervals."""
    counts, replicate = subject.profile.load.total, subject.profile.replicate
    figures = {
        "entropy_bits": analysis.entropy_bits,
        "normalized_entropy": analysis.normalized_entropy,
        "max_violation": analysis.max_violation,
    }
    values = {name: figure(counts) for name, figure in figures.items()}
    intervals = {name: replicate.interval(figure) for name, figure in figures.items()}
    with rc_context(STYLE):
        picture = draw.titled(4.4, "Balance of the layers", str(subject))
        left, right = draw.grid(picture, 2).subplots()
        for axes, name, title in (
            (left, "normalized_entropy", "normalized entropy: 1 is the uniform load"),
            (right, "max_violation", "MaxVio: the busiest expert's load, less 1"),
        ):
            draw.by_layer(axes, subject.layers, values[name], intervals[name])
            draw.named(axes, f"{title}; bars: 95% of resampled requests")
    return Section(
        name="balance",
        title="Balance of the layers",
        about="Entropy of the selections, of "
        f"{analysis.max_entropy_bits(counts.shape[1]):.2f} bits "
        "where all experts have as many; normalized, it is divided by that. MaxVio is the busiest "
        "expert's load over the mean, less 1: what a step waits for. Intervals are of 95%, by "
        f"{len(replicate.counts)} resamples of the {subject.profile.num_requests:,} requests. Few "
        "tokens look less even than they are: that moves the intervals too.",
        picture=picture,
        header=(
            "layer",
            *(f"{name}{end}" for name in figures for end in ("", "_from", "_to")),
        ),
        lines=[
            (
                layer,
                *(
                    float(one)
                    for name in figures
                    for one in (values[name][place], *intervals[name][:, place])
                ),
            )
            for place, layer in enumerate(subject.layers)
        ],
        numbers={
            "max_entropy_bits": analysis.max_entropy_bits(counts.shape[1]),
            **values,
            **{f"{name}_interval_95": one for name, one in intervals.items()},
        },
    )


def coverage(subject: Subject) -> Section:
    """Return which share of the selections the k busiest experts take."""
    curves = analysis.coverage(subject.profile.load.total)
    num_experts = curves.shape[1]
    x = np.arange(1, num_experts + 1)
    mean = np.nanmean(curves, axis=0)
    alpha = max(0.3, min(0.6, 6 / len(curves)))
    with rc_context(STYLE):
        picture = draw.titled(4.6, "Selections that the busiest experts take", str(subject))
        (axes,) = draw.grid(picture, 1).subplots(squeeze=False)[0]
        axes.add_collection(
            LineCollection(
                [np.column_stack((x, one)) for one in curves],
                colors=BAR, linewidths=1.2, alpha=alpha, label="a layer",
            )
        )  # fmt: skip
        axes.plot(x, mean, color=TOP, linewidth=2, label="mean of the layers")
        axes.plot(x, x / num_experts, color="black", linewidth=1.1, linestyle=(0, (5, 3)),
                  label="uniform load")  # fmt: skip
        axes.set_xlim(0.5, num_experts + 0.5)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("k, the busiest experts of a layer")
        axes.grid(color=GRID, linewidth=0.8)
        draw.named(axes, "share of the layer's selections")
        draw.legend(axes, loc="lower right")
    return Section(
        name="coverage",
        title="Selections that the busiest experts take",
        about="The share of a layer's selections that its k busiest experts have. The higher a "
        "curve stands above the dashed line, the fewer experts do the work.",
        picture=picture,
        header=("layer", "k", "share"),
        lines=[
            (layer, k, float(curve[k - 1]))
            for layer, curve in zip(subject.layers, curves, strict=True)
            for k in x.tolist()
        ],
        numbers={
            "mean": mean,
            "experts_for_half": (curves < 0.5).sum(axis=1) + 1,
            "experts_for_90_percent": (curves < 0.9).sum(axis=1) + 1,
        },
    )
