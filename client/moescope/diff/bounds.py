"""``--fail-above NAME=NUMBER``: what a comparison must not exceed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

NAMES = ("rows", "near-ties", "order", "weights", "loads", "texts", "changed")
"""What can be bounded; `moescope.diff.findings.totals` says what each is."""


def parse(texts: Iterable[str]) -> dict[str, float]:
    """Return the bounds by their names.

    Raises:
        ValueError: One is no bound, or of what there is not.
    """
    bounds = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if name not in NAMES or not bound >= 0:
            raise ValueError(
                f"got {text!r}, expected NAME=NUMBER, such as rows=0.01, with one of the names "
                f"{', '.join(NAMES)} and a number of 0 or more"
            )
        bounds[name] = bound
    return bounds


def exceeded(bounds: Mapping[str, float], totals: Mapping[str, float]) -> list[str]:
    """Return in words which bounds are exceeded, or cannot be held to.

    Args:
        bounds: By name.
        totals: What they bound, by name; NaN where it is not known.
    """
    words = []
    for name, bound in bounds.items():
        value = totals[name]
        if math.isnan(value):
            words.append(f"{name} is not known, so it cannot be held to {bound:g}")
        elif value > bound:
            words.append(f"{name} is {value:.4g}, above {bound:g}")
    return words
