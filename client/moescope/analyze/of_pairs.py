"""Sections about pairs of experts: within a layer, and from one layer to the next."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moescope import analysis
from moescope._style import SOFT, STYLE, TOP
from moescope.analyze import draw
from moescope.analyze.section import Section, Subject, lines_by_layer

_TOP_PAIRS = 20
_MIN_TOKENS = 10


def co_activation(subject: Subject) -> Section | None:
    """Return which experts of a layer share tokens; None for top-1 models."""
    counts = subject.profile.co_activation.counts
    if subject.model.top_k < 2:
        return None
    share = analysis.co_activation(counts)
    lift = analysis.co_activation_lift(counts, subject.num_rows)
    off = share * np.where(np.eye(share.shape[1], dtype=np.bool_), np.nan, 1.0)
    pairs = [_top(one, counts[place]) for place, one in enumerate(off)]
    layers = subject.layers
    picture = maps(
        "Co-activation", str(subject), off, [f"layer {layer}" for layer in layers],
        ("expert j", "expert i"), "N_ij / N_i",
    )  # fmt: skip
    lines = [
        (layer, i, j, float(share[place, i, j]), float(lift[place, i, j]),
         int(counts[place, i, j]), int(counts[place, i, i]))
        for place, layer in enumerate(layers)
        for i, j in pairs[place]
    ]  # fmt: skip
    return Section(
        name="co_activation",
        title="Co-activation",
        about="Of the tokens that go to expert i (row), the share that also go to j (column) of "
        "the same layer. A column that is dark throughout is a busy expert; a single dark cell "
        "is a pair. The table has the strongest pairs of each layer, with the lift: how much more "
        f"often they share a token than independent experts would. Experts of fewer than "
        f"{_MIN_TOKENS} tokens are left out there.",
        picture=picture,
        header=("layer", "expert_i", "expert_j", "share", "lift", "tokens_of_both", "tokens_of_i"),
        lines=lines,
        numbers={
            "strongest_pairs": [
                {"layer": layer, "i": i, "j": j, "share": part, "lift": more}
                for layer, i, j, part, more, *_ in sorted(lines, key=lambda line: -line[3])[:50]
            ],
        },
    )


def _top(share: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the pairs with the highest shares, of experts that have tokens enough."""
    enough = counts.diagonal() >= _MIN_TOKENS
    ranked = np.nan_to_num(np.where(enough[:, None], share, 0.0))
    order = np.argsort(-ranked, axis=None, kind="stable")[:_TOP_PAIRS].tolist()
    pairs = [divmod(one, share.shape[1]) for one in order]
    return [(i, j) for i, j in pairs if ranked[i, j] > 0]


def maps(
    title: str,
    subtitle: str,
    matrices: npt.NDArray[Any],
    names: Sequence[str],
    axis_names: tuple[str, str],
    bar_name: str,
    *,
    cmap: str = "Blues",
    lowest: float = 0.0,
) -> Figure:
    """Draw the first, the middle and the last of some matrices of experts in the same colors.

    Args:
        title: Of the picture.
        subtitle: What it is of.
        matrices: ``[num, num_experts, num_experts]``.
        names: One a matrix.
        axis_names: Of the columns and the rows.
        bar_name: Of the colors.
        cmap: matplotlib's name of the colors.
        lowest: The value of the first color; where it is below 0 the colors are symmetric.
    """
    places = draw.some_places(len(matrices))
    shown = matrices[places]
    highest = float(np.nanquantile(shown, 0.999)) if not np.isnan(shown).all() else 1.0
    highest = highest if highest > 0 else 1.0
    bottom = -highest if lowest < 0 else 0.0
    with rc_context(STYLE):
        picture = draw.titled(4.9, title, subtitle)
        grid = draw.grid(picture, len(places) + 1, width_ratios=(*[30] * len(places), 1),
                         wspace=0.16, right=0.945)  # fmt: skip
        for column, place in enumerate(places):
            axes = picture.add_subplot(grid[column])
            norm = Normalize(bottom, highest)
            draw.heatmap(axes, matrices[place], names[place], cmap=cmap, norm=norm)
            axes.set_xlabel(axis_names[0])
            if column == 0:
                axes.set_ylabel(axis_names[1])
        bar = picture.add_subplot(grid[len(places)])
        ticks = sorted({bottom, 0.0, highest})
        draw.color_bar(axes, bar, bar_name, ticks, [f"{one:.2g}" for one in ticks])
    return picture


def transitions(subject: Subject) -> Section | None:
    """Return where tokens go in the next layer; None for one layer."""
    counts, layers = subject.profile.transitions.counts, subject.layers
    if not len(counts):
        return None
    share = analysis.transition(counts)
    marginal = analysis.shares(counts.sum(axis=1))
    bits = analysis.mutual_information_bits(counts)
    steps = list(itertools.pairwise(layers))
    lines = [
        (*step, i, j, float(share[place, i, j]), float(marginal[place, j]),
         int(counts[place, i, j]))
        for place, step in enumerate(steps)
        for i, j in _top_transitions(share[place], counts[place], subject.model.top_k)
    ]  # fmt: skip
    return Section(
        name="transitions",
        title="From a layer to the next",
        about="Of the selections in the next layer of tokens that went to expert i (row), the "
        "share of expert j (column). Equal rows would say that the next layer does not care where "
        "a token was. The table has the strongest transitions beside the expert's share of all "
        "tokens; the mutual information in analysis.json says in bits how much one selected "
        "expert tells of one in the next layer.",
        picture=maps(
            "From a layer to the next", str(subject), share,
            [f"layer {a} to layer {b}" for a, b in steps],
            ("expert in the next layer", "expert in the layer"), "share",
        ),
        header=("layer", "next_layer", "expert_i", "expert_j", "share", "share_of_all", "tokens"),
        lines=lines,
        numbers={"layers": steps, "mutual_information_bits": bits},
    )  # fmt: skip


def _top_transitions(
    share: npt.NDArray[Any], counts: npt.NDArray[np.int64], top_k: int
) -> list[tuple[int, int]]:
    enough = counts.sum(axis=1) >= _MIN_TOKENS * top_k
    ranked = np.nan_to_num(np.where(enough[:, None], share, 0.0))
    order = np.argsort(-ranked, axis=None, kind="stable")[:_TOP_PAIRS].tolist()
    pairs = [divmod(one, share.shape[1]) for one in order]
    return [(i, j) for i, j in pairs if ranked[i, j] > 0]


def next_layer(subject: Subject) -> Section | None:
    """Return how well a layer is predicted from the one before; None where that cannot be told."""
    rows = subject.profile.sample.rows
    if rows is None or rows.num_layers < 2:
        return None
    found = analysis.next_layer(rows, seed=subject.profile.seed)
    if np.isnan(found.hit_rate).all():
        return None
    layers, uniform = subject.layers, subject.model.top_k / subject.model.num_experts
    with rc_context(STYLE):
        picture = draw.titled(4.6, "Predicting the next layer's experts", str(subject))
        (axes,) = draw.grid(picture, 1).subplots(squeeze=False)[0]
        draw.by_layer(axes, layers[1:], found.hit_rate, found.hit_rate_interval, color=TOP,
                      label="from the experts of the layer before")  # fmt: skip
        draw.by_layer(axes, layers[1:], found.marginal_hit_rate, found.marginal_hit_rate_interval,
                      color=SOFT, label="the busiest experts, whatever came before")  # fmt: skip
        draw.level(axes, uniform, f"chance, {uniform:.1%}")
        draw.from_zero(axes)
        axes.set_xlabel("layer that is predicted")
        draw.named(axes, "hit rate: share of a token's experts that were predicted; bars: 95% of "
                   "resampled requests")  # fmt: skip
        draw.legend(axes)
    arrays = (found.hit_rate, *found.hit_rate_interval, found.marginal_hit_rate,
              *found.marginal_hit_rate_interval, *found.gain_interval)  # fmt: skip
    return Section(
        name="next_layer",
        title="Predicting the next layer's experts",
        about=f"From the {found.num_rows:,} tokens of a sample: half of the requests are "
        "predicted from counts of the other half, and the other way round. As many experts are "
        f"predicted as a token has ({subject.model.top_k}). Where the red line is above the gray "
        "one, a layer's experts tell more of the next layer's than its load does.",
        picture=picture,
        header=("layer", "hit_rate", "hit_rate_from", "hit_rate_to", "marginal_hit_rate",
                "marginal_from", "marginal_to", "gain_from", "gain_to"),
        lines=lines_by_layer(layers[1:], *arrays),
        numbers={
            "layers": layers[1:],
            "rows": found.num_rows,
            "chance": uniform,
            "hit_rate": found.hit_rate,
            "hit_rate_interval_95": found.hit_rate_interval,
            "marginal_hit_rate": found.marginal_hit_rate,
            "marginal_hit_rate_interval_95": found.marginal_hit_rate_interval,
            "gain_interval_95": found.gain_interval,
        },
    )  # fmt: skip
