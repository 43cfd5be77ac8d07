"""What a comparison says: figures by layer beside the noise, and the layers that changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope.analysis import FIGURES, interval, lower_bounds
from moescope.diff.comparing import Comparison

Floats = npt.NDArray[np.float64]

WORDS = {
    "rows": "rows with other experts",
    "near_ties": "near-ties beside them",
    "order": "same experts, other order",
    "first": "first other experts here",
    "weights": "weights, mean difference",
    "loads": "loads, divergence in bits",
}
"""What figures are called on the terminal."""
CHANGES = {"rows": "experts", "weights": "weights", "loads": "loads"}
"""Figures that tell whether a layer changed, and what of it."""
MIN_REQUESTS = 8
"""Of fewer, resampling says nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finding:
    """A figure of every layer, ``[num_layers]`` each."""

    values: Floats
    interval: Floats
    """Of 95%, each layer by itself, ``[2, num_layers]``: from, to."""
    noise: Floats | None
    """The figure of the first server twice; None where it was not measured."""
    noise_interval: Floats | None
    beyond: Floats | None
    """From where on the figure less the noise lies, in 95% of cases in all layers; None of figures
    that do not tell a change, and of too few requests."""

    @property
    def changed(self) -> npt.NDArray[np.bool_] | None:
        """Which layers changed by more than the noise."""
        return None if self.beyond is None else self.beyond > 0

    def as_json(self) -> dict[str, Any]:
        """Return it as the file has it."""
        return {
            "values": self.values,
            "interval_95": self.interval,
            "noise": self.noise,
            "noise_interval_95": self.noise_interval,
            "beyond_noise_from": self.beyond,
            "changed": self.changed,
        }


def find(comparison: Comparison, again: Comparison | None) -> dict[str, Finding]:
    """Return the figures of a comparison by their names.

    Args:
        comparison: Of the two servers.
        again: Of the first server and the same again.
    """
    values, replicates = comparison.differences.values, comparison.differences.replicates
    noise = again.differences.values if again else {}
    noise_replicates = again.differences.replicates if again else {}
    is_enough = min(_num_requests(one) for one in (comparison, again) if one) >= MIN_REQUESTS
    found = {}
    for name in FIGURES:
        beyond = None
        if name in CHANGES and is_enough:
            # Both are resampled with the same weights, those of the first server's requests.
            beyond = lower_bounds(
                values[name] - noise.get(name, 0.0),
                replicates[name] - noise_replicates.get(name, 0.0),
            )
        found[name] = Finding(
            values=values[name],
            interval=interval(replicates[name]),
            noise=noise.get(name),
            noise_interval=interval(noise_replicates[name]) if again else None,
            beyond=beyond,
        )
    return found


def _num_requests(comparison: Comparison) -> int:
    return len(comparison.differences.requests)


def first_changed(finding: Finding, layers: tuple[int, ...]) -> int | None:
    """Return the first layer that changed by more than the noise; None where none did."""
    changed = finding.changed
    return layers[int(changed.argmax())] if changed is not None and changed.any() else None


def totals(comparison: Comparison, found: Mapping[str, Finding]) -> dict[str, float]:
    """Return the numbers that ``--fail-above`` bounds, by name.

    ===================  ==========================================================================
    `rows`, `near-ties`  The figures in the layer where they are largest; NaN where one is.
    `order`, `weights`,  The same.
    `loads`
    `texts`              Share of the sequences whose texts diverge, of those with known texts.
    `changed`            Layers whose experts changed; NaN of too few requests.
    ===================  ==========================================================================
    """
    worst = {
        name.replace("_", "-"): float(found[name].values.max())
        for name in ("rows", "near_ties", "order", "weights", "loads")
    }
    num_texts = int(comparison.pairs.has_texts.sum())
    num_diverged = int(comparison.pairs.diverged.sum())
    changed = found["rows"].changed
    return worst | {
        "texts": num_diverged / num_texts if num_texts else float("nan"),
        "changed": float("nan") if changed is None else float(changed.sum()),
    }


def largest(values: Floats) -> float:
    """Return the largest value of any layer; NaN where none has one."""
    return float(np.nanmax(values)) if not np.isnan(values).all() else float("nan")
