"""What a comparison says on the terminal."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.table import Table

from moescope.diff.comparing import Comparison
from moescope.diff.findings import CHANGES, MIN_REQUESTS, WORDS, Finding, first_changed, largest
from moescope.diff.result import Result

_SHARES = ("rows", "near_ties", "order", "first")


def lines(result: Result) -> list[str]:
    """Return in words what was compared, where texts diverge and which layers changed."""
    pairs, one = result.comparison.pairs, result.comparison
    num_a, num_b = (len(side.sequences) for side in result.sides[:2])
    numbers = {"id": pairs.num_by_id, "prompt": len(pairs) - pairs.num_by_id}
    how = " and ".join(f"{number:,} by {what}" for what, number in numbers.items() if number)
    return [
        f"{len(pairs):,} of {num_a:,} and {num_b:,} sequences are paired: {how}",
        f"{one.num_rows:,} rows compared; not compared: {one.num_after:,} after a divergence of "
        + "texts, {:,} and {:,} that one side alone has".format(*one.num_alone),
        _texts(one),
        *(
            f"{what}: {_change(result.found[name], result.layers)}"
            for name, what in CHANGES.items()
        ),
    ]


def _texts(comparison: Comparison) -> str:
    pairs = comparison.pairs
    num_known = int(pairs.has_texts.sum())
    text = f"texts: {int(pairs.diverged.sum()):,} of {num_known:,} diverge"
    if pairs.diverged.any():
        where = pairs.divergence[pairs.diverged]
        text += (
            f", the first at token {int(where.min())}, half of them up to {int(np.median(where))}"
        )
    if num_known < len(pairs):
        text += (
            f"; the token ids of {len(pairs) - num_known:,} are not known: where their texts "
            "diverge, rows of other tokens are compared"
        )
    return text


def _change(finding: Finding, layers: tuple[int, ...]) -> str:
    changed = finding.changed
    if finding.beyond is None or changed is None:
        return f"fewer than {MIN_REQUESTS} requests: too few to tell a change from chance"
    if np.isnan(finding.beyond).all():
        return "not known"
    has_noise = finding.noise is not None
    layer = first_changed(finding, layers)
    if layer is None:
        return "no layer changed by more than the noise" if has_noise else "no layer differs surely"
    number = f"{int(changed.sum())} of {len(layers)} layers"
    if has_noise:
        return f"changed from layer {layer} on, {number} by more than the noise"
    return f"differ from layer {layer} on, {number}; --again tells noise from change"


def table(result: Result) -> Table:
    """Return the figures of the layers where they are largest, beside the noise."""
    made = Table(box=box.SIMPLE)
    made.add_column("where it is largest", no_wrap=True)
    for head in ("A | B", "95% interval", "layer", "noise"):
        made.add_column(head, justify="right", no_wrap=True)
    for name, words in WORDS.items():
        one = result.found[name]
        values = one.values
        if np.isnan(values).all():
            continue
        place = int(np.nanargmax(values))
        low, high = one.interval[:, place]
        made.add_row(
            words,
            shown(name, values[place]),
            f"{shown(name, low)} to {shown(name, high)}",
            str(result.layers[place]),
            "" if one.noise is None else shown(name, largest(one.noise)),
        )
    return made


def shown(name: str, value: float) -> str:
    """Return the value of a figure in few characters."""
    return f"{100 * value:.2f}%" if name in _SHARES else f"{value:.2g}"
