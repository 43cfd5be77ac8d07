"""Sections about token ids and weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moescope import analysis
from moescope._style import BAR, SOFT, STYLE, TOP
from moescope.analyze import draw, of_pairs
from moescope.analyze.section import Section, Subject, lines_by_layer
from moescope.received import shown

_NUM_TOKENS = 20


def vocabulary(subject: Subject) -> Section | None:
    """Return how much token ids keep to one expert; None where no id occurs often enough."""
    counted, top_k = subject.profile.vocabulary, subject.model.top_k
    layers = subject.layers
    tokens = counted.tokens
    every = [counted.counts(place) for place in range(len(layers))]
    means = np.array([analysis.mean_specialization(one, top_k) for one in every])
    if np.isnan(means).all():
        return None
    busiest = np.array([one.sum(axis=0).max() / one.sum() * top_k for one in every])
    found = {
        layer: analysis.most_specialized(tokens, one, top_k, _NUM_TOKENS)
        for layer, one in zip(layers, every, strict=True)
    }
    highest = layers[int(np.nanargmax(means))]
    num_counted = int(every[0].sum()) // max(top_k, 1)
    left_out = counted.num_rows - num_counted
    note = f" {left_out:,} tokens of rarer ids are left out." if left_out else ""
    lines = [
        (layer, one.token_id, subject.token_texts.get(one.token_id, ""), one.expert, one.share,
         one.occurrences)
        for layer, some in found.items()
        for one in some
    ]  # fmt: skip
    header = ("layer", "token_id", "text", "expert", "share", "occurrences")
    return Section(
        name="vocabulary",
        title="Vocabulary specialization",
        about="Of a token id's occurrences, the share that go to its most frequent expert. 1: "
        "every occurrence. The gray line is what an id would have whose occurrences go where all "
        "tokens go. Ids that occur fewer than 10 times are left out, and many of those that occur "
        f"little more often look specialized by chance.{note}",
        picture=_vocabulary_picture(subject, means, busiest, highest, found[highest]),
        header=header,
        lines=lines,
        numbers={
            "layers": layers,
            "mean": means,
            "busiest_expert": busiest,
            "token_ids": len(tokens),
            "tokens_left_out": left_out,
            "most_specialized": [
                dict(zip(header, line, strict=True)) for line in lines if line[0] == highest
            ],
        },
    )  # fmt: skip


def _vocabulary_picture(
    subject: Subject,
    means: npt.NDArray[Any],
    busiest: npt.NDArray[Any],
    layer: int,
    found: list[analysis.SpecializedToken],
) -> Figure:
    with rc_context(STYLE):
        picture = draw.titled(5.6, "Vocabulary specialization", str(subject))
        grid = draw.grid(picture, 2, width_ratios=(1.3, 1), wspace=0.34)
        axes = picture.add_subplot(grid[0])
        draw.by_layer(axes, subject.layers, means, color=TOP, label="mean of the token ids")
        draw.by_layer(axes, subject.layers, busiest, color=SOFT, label="the layer's busiest expert")
        draw.from_zero(axes)
        draw.named(axes, "share of occurrences that go to one expert")
        draw.legend(axes)
        bars = picture.add_subplot(grid[1])
        _token_bars(bars, found, subject)
        draw.named(bars, f"layer {layer}, the highest mean: its most specialized tokens")
    return picture


def _token_bars(axes: Axes, found: list[analysis.SpecializedToken], subject: Subject) -> None:
    names = []
    for one in found:
        text = subject.token_texts.get(one.token_id)
        name = f"{one.token_id}" if text is None else f"{shown(repr(text), 18)}  {one.token_id}"
        names.append(name.replace("$", r"\$"))  # matplotlib would read it as mathematics
    places = np.arange(len(found))
    axes.barh(places, [one.share for one in found], height=0.7, color=BAR)
    for place, one in enumerate(found):
        axes.text(one.share + 0.02, place, f"{one.expert} ({one.occurrences})", va="center",
                  fontsize=8)  # fmt: skip
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(max(len(found), 5) - 0.4, -0.6)
    axes.set_xlim(0, 1.3)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_xlabel("share of occurrences; expert (occurrences)")


def similarity(subject: Subject) -> Section | None:
    """Return which experts of a layer are for the same token ids; None where that is unknown."""
    counted, layers, top_k = subject.profile.vocabulary, subject.layers, subject.model.top_k
    matrices = np.stack([
        analysis.expert_similarity(counted.counts(place), top_k) for place in range(len(layers))
    ])  # fmt: skip
    off = np.where(np.eye(matrices.shape[1], dtype=np.bool_), np.nan, matrices)
    if np.isnan(off).all():
        return None
    lines: list[tuple[Any, ...]] = []
    for layer, one in zip(layers, off, strict=True):
        upper = np.nan_to_num(np.triu(one, 1), nan=-2.0)
        order = np.argsort(-upper, axis=None, kind="stable")[:_NUM_TOKENS].tolist()
        pairs = [divmod(place, one.shape[1]) for place in order]
        lines += [(layer, i, j, float(one[i, j])) for i, j in pairs if upper[i, j] > 0]
    return Section(
        name="similarity",
        title="Experts for the same tokens",
        about="How alike two experts of a layer are in the token ids that they take, from -1 to "
        "1: the cosine of their shares of each id's occurrences, less their mean. 1: the same "
        "ids; 0: unrelated. Unlike co-activation it finds experts that do the same work for "
        "different tokens.",
        picture=of_pairs.maps(
            "Experts for the same tokens", str(subject), off,
            [f"layer {layer}" for layer in layers], ("expert", "expert"), "similarity",
            cmap="RdBu_r", lowest=-1.0,
        ),
        header=("layer", "expert_i", "expert_j", "similarity"),
        lines=lines,
        numbers={
            "most_similar": [
                {"layer": layer, "i": i, "j": j, "similarity": value}
                for layer, i, j, value in sorted(lines, key=lambda line: -line[3])[:50]
            ],
        },
    )  # fmt: skip


def effective_experts(subject: Subject) -> Section | None:
    """Return over how many experts a token's weights are spread; None without weights."""
    exponential, inverse = subject.profile.effective.means
    if np.isnan(exponential).all():
        return None
    low, high = (subject.profile.effective.quantile(q) for q in (0.1, 0.9))
    with rc_context(STYLE):
        picture = draw.titled(4.4, "Effective number of experts a token", str(subject))
        (axes,) = draw.grid(picture, 1).subplots(squeeze=False)[0]
        draw.by_layer(axes, subject.layers, exponential, np.stack([low, high]),
                      label="exp(entropy of the weights); bars: 80% of the tokens")  # fmt: skip
        draw.by_layer(axes, subject.layers, inverse, color=TOP, label="1 / sum of squares")
        draw.level(axes, subject.model.top_k, f"top-{subject.model.top_k}: equal weights")
        axes.set_ylim(1, subject.model.top_k + max(0.05 * subject.model.top_k, 0.2))
        draw.named(axes, "mean of the tokens")
        draw.legend(axes)
    return Section(
        name="effective_experts",
        title="Effective number of experts a token",
        about="Over how many experts a token's weights are really spread: top-k where they are "
        "equal, near 1 where one expert has almost everything and the others cost without saying "
        "much. Both figures count the same, the second one looks more at the largest weights.",
        picture=picture,
        header=("layer", "exp_entropy", "exp_entropy_10_percent", "exp_entropy_90_percent",
                "inverse_sum_of_squares"),
        lines=lines_by_layer(subject.layers, exponential, low, high, inverse),
        numbers={
            "layers": subject.layers,
            "exp_entropy": exponential,
            "exp_entropy_10_to_90_percent": np.stack([low, high]),
            "inverse_sum_of_squares": inverse,
        },
    )  # fmt: skip
