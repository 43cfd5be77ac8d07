"""Sections about how the load differs: by phase, by position, by domain."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from moescope import analysis
from moescope._style import STYLE, TOP
from moescope.analyze import draw
from moescope.analyze.section import Section, Subject, lines_by_layer

_MAX_MAPS = 4


def phases(subject: Subject) -> Section | None:
    """Return the load in prompts and in outputs; None where only one has rows."""
    prompt, output, _ = subject.profile.load.by_phase
    if not (prompt.any() and output.any()):
        return None
    variation = analysis.total_variation(prompt, output)
    entropies = [analysis.normalized_entropy(one) for one in (prompt, output)]
    with rc_context(STYLE):
        picture = draw.titled(4.4, "Prompt and output", str(subject))
        left, right = draw.grid(picture, 2).subplots()
        draw.by_layer(left, subject.layers, entropies[0], label="prompt")
        draw.by_layer(left, subject.layers, entropies[1], color=TOP, label="output")
        draw.named(left, "normalized entropy")
        draw.legend(left)
        draw.by_layer(right, subject.layers, variation)
        draw.from_zero(right)
        draw.named(right, "total variation distance between the two loads")
    return Section(
        name="phases",
        title="Prompt and output",
        about="The balance of the load while prompts are read (prefill) and while outputs are "
        "written (decode), and how far the two loads are apart: the total variation distance is "
        "the share of selections that would have to go to other experts, 0 to 1. Few tokens "
        "differ by chance.",
        picture=picture,
        header=("layer", "normalized_entropy_prompt", "normalized_entropy_output",
                "max_violation_prompt", "max_violation_output", "total_variation"),
        lines=lines_by_layer(subject.layers, *entropies, analysis.max_violation(prompt),
             analysis.max_violation(output), variation),
        numbers={
            "rows": dict(zip(analysis.PHASES, _rows(subject), strict=True)),
            "normalized_entropy": dict(zip(analysis.PHASES, entropies, strict=False)),
            "total_variation": variation,
        },
    )  # fmt: skip


def _rows(subject: Subject) -> list[int]:
    by_phase = subject.profile.load.by_phase[:, 0].sum(axis=-1)
    rows: list[int] = (by_phase // max(subject.model.top_k, 1)).tolist()
    return rows


def positions(subject: Subject) -> Section:
    """Return how the load differs by the position of the token."""
    counts = subject.profile.load.by_position
    bins = np.flatnonzero(counts.any(axis=(1, 2)))
    counts = counts[bins]
    rows = counts[:, 0].sum(axis=-1) // max(subject.model.top_k, 1)
    variation = analysis.total_variation(counts, subject.profile.load.total).T
    names = [_range(int(one)) for one in bins]
    with rc_context(STYLE):
        picture = draw.titled(
            draw.heatmap_height_in(len(subject.layers)), "Load by position", str(subject)
        )
        cells = draw.grid(picture, 2, width_ratios=(60, 1), wspace=0.04, right=0.945)
        axes, bar = picture.add_subplot(cells[0]), picture.add_subplot(cells[1])
        highest = float(np.nanmax(variation)) or 1.0
        title = "total variation distance from the layer's load at all positions"
        norm = Normalize(0, highest)
        draw.heatmap(axes, variation, title, cmap="Blues", norm=norm)
        draw.layer_ticks(axes, subject.layers)
        axes.set_xticks(range(len(bins)), [
            f"{name}\n{draw.short(int(num))}" for name, num in zip(names, rows, strict=True)
        ], fontsize=8)  # fmt: skip
        axes.set_xlabel("position of the token, and how many tokens")
        draw.color_bar(axes, bar, "distance", (0, highest), ("0", f"{highest:.2g}"))
    entropy, violation = analysis.normalized_entropy(counts), analysis.max_violation(counts)
    return Section(
        name="positions",
        title="Load by position",
        about="Positions in bins that double, from the first token on. Dark cells have another "
        "load than their layer has over all positions. Few tokens differ by chance: mind their "
        "number.",
        picture=picture,
        header=("layer", "position_from", "position_to", "tokens", "normalized_entropy",
                "max_violation", "total_variation"),
        lines=[
            (layer, *analysis.bin_range(int(number)), int(rows[at]), float(entropy[at, place]),
             float(violation[at, place]), float(variation[place, at]))
            for place, layer in enumerate(subject.layers)
            for at, number in enumerate(bins)
        ],
        numbers={"positions": names, "tokens": rows, "total_variation": variation},
    )  # fmt: skip


def _range(number: int) -> str:
    first, last = analysis.bin_range(number)
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def domains(subject: Subject) -> Section | None:
    """Return the share of each domain's tokens that go to each expert; None without labels."""
    profile, labels = subject.profile, subject.profile.labels
    if len(labels) < 2:
        return None
    counts = np.stack([profile.loads[label].total for label in labels])
    tokens = np.array([profile.loads[label].num_rows for label in labels])
    share = analysis.domain_specialization(counts, tokens)
    uniform = analysis.uniform_share(subject.model.top_k, subject.model.num_experts)
    replicates = np.stack([profile.replicates[label].counts for label in labels])
    distances = analysis.total_variation(counts, counts.sum(axis=0) - counts)
    intervals = np.stack([
        analysis.interval(analysis.total_variation(one, replicates.sum(axis=0) - one))
        for one in replicates
    ])  # fmt: skip
    strongest = [_strongest(one, subject.layers) for one in share]
    return Section(
        name="domains",
        title="Domains",
        about="Of a domain's tokens, the share that go to an expert, over that of a uniform load, "
        f"top-{subject.model.top_k} of {subject.model.num_experts} = {uniform:.1%}: red experts "
        "take more tokens of the domain, blue ones fewer. Below: how far the domain's load is "
        "from that of all other domains together, with 95% of resampled requests.",
        picture=_domains_picture(subject, share / uniform, distances, intervals),
        header=("domain", "layer", "expert", "share_of_tokens", "over_uniform"),
        lines=[
            (label, layer, expert, float(value), float(value / uniform))
            for label, one in zip(labels, share, strict=True)
            for layer, values in zip(subject.layers, one, strict=True)
            for expert, value in enumerate(values)
        ],
        numbers={
            "uniform_share": uniform,
            "tokens": dict(zip(labels, tokens.tolist(), strict=True)),
            "total_variation": dict(zip(labels, distances, strict=True)),
            "total_variation_interval_95": dict(zip(labels, intervals, strict=True)),
            "highest_shares": dict(zip(labels, strongest, strict=True)),
        },
    )


def _strongest(share: npt.NDArray[Any], layers: list[int]) -> list[dict[str, Any]]:
    """Return the ten highest shares of a domain."""
    order = np.argsort(-np.nan_to_num(share), axis=None)[:10]
    return [
        {"layer": layers[place], "expert": expert, "share": float(share[place, expert])}
        for place, expert in (divmod(int(one), share.shape[1]) for one in order)
    ]


def _domains_picture(
    subject: Subject,
    over_uniform: npt.NDArray[Any],
    distances: npt.NDArray[Any],
    intervals: npt.NDArray[Any],
) -> Figure:
    labels, layers = subject.profile.labels, subject.layers
    shown = min(len(labels), _MAX_MAPS)
    map_in = min(max(0.9 + 0.2 * len(layers), 2.0), 8.0)
    rows = math.ceil(shown / 2)
    height_in = 1.9 + rows * (map_in + 0.6) + 3.0
    with rc_context(STYLE):
        picture = draw.titled(height_in, "Domains", str(subject))
        cells = picture.add_gridspec(
            rows + 1, 3, width_ratios=(30, 30, 1), height_ratios=(*[map_in] * rows, 2.6),
            left=0.065, right=0.945, top=1 - 1.05 / height_in, bottom=0.6 / height_in,
            hspace=0.35, wspace=0.14,
        )  # fmt: skip
        highest = max(2.0, float(np.nanmax(over_uniform)))
        norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=highest)
        for place in range(shown):
            axes = picture.add_subplot(cells[place // 2, place % 2])
            title = f"{labels[place]}: share of its tokens over the uniform share"
            draw.heatmap(axes, over_uniform[place], title, cmap="RdBu_r", norm=norm)
            draw.layer_ticks(axes, layers)
            axes.set_xlabel("expert")
        bar = picture.add_subplot(cells[:rows, 2])
        draw.color_bar(axes, bar, "", (0, 1, highest), ("0", "1", f"{highest:.3g}"))
        axes = picture.add_subplot(cells[rows, :2])
        # Of two domains each is as far from the other.
        num_lines = 1 if len(labels) == 2 else len(draw.COLORS)
        for place, label in enumerate(labels[:num_lines]):
            draw.by_layer(axes, layers, distances[place], intervals[place],
                          color=draw.COLORS[place], label=label)  # fmt: skip
        draw.from_zero(axes)
        draw.named(axes, "total variation distance from the load of the other domains")
        if num_lines > 1:
            draw.legend(axes, ncols=4)
    return picture
