"""Intervals from resampled requests.

The tokens of a request are no independent draws, so requests are drawn, not tokens. A replicate
gives each request a weight from a Poisson distribution of mean 1, in place of the number of times
that a draw with replacement takes it: weights need not know how many requests there are, and so
add up over a stream. They follow from the seed and the `request_number` alone.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3 (percentile
intervals); Chamandy et al. 2012, "Estimating Uncertainty for Massive Data Streams" (Poisson);
Romano and Wolf 2005, "Exact and Approximate Stepdown Methods for Multiple Hypothesis Testing"
(bounds of many figures at once).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from moescope.analysis.rows import Rows

Floats = npt.NDArray[np.float64]
NUM_REPLICATES = 200
_PRODUCT_CELLS = 2**21


def request_weights(
    requests: npt.NDArray[np.uint64], num_replicates: int = NUM_REPLICATES, seed: int = 0
) -> npt.NDArray[np.float32]:
    """Return each request's weight in each replicate, ``[num_requests, num_replicates]``.

    Args:
        requests: Numbers of `request_number`, ``[num_requests]``.
        num_replicates: Replicates.
        seed: 0 to 2**64 - 1.
    """
    weights = np.empty((len(requests), num_replicates), np.float32)
    for place, request in enumerate(requests.tolist()):
        generator = np.random.Generator(np.random.Philox(key=[seed, request]))
        weights[place] = generator.poisson(1.0, num_replicates)
    return weights


def interval(replicates: npt.NDArray[Any], level: float = 0.95) -> Floats:
    """Return the percentile interval of a figure, ``[2, ...]``: from, to.

    Args:
        replicates: The figure of each replicate, ``[num_replicates, ...]``; NaN is left out. Where
            all are NaN the interval is NaN.
        level: The share of replicates within.
    """
    outside = (1 - level) / 2
    known = ~np.isnan(replicates).all(axis=0)
    filled = np.where(known, replicates, 0.0)
    found: Floats = np.nanquantile(filled, [outside, 1 - outside], axis=0)
    return np.where(known, found, np.nan)


def lower_bounds(values: Floats, replicates: npt.NDArray[Any], level: float = 0.95) -> Floats:
    """Return from where on figures lie, all of them at once, ``[num_figures]``.

    With ``s`` the standard deviation of a figure's replicates and ``c`` the quantile over
    replicates of the largest ``(replicate - value) / s`` of any figure: ``value - c * s``. With 94
    layers, intervals one by one would leave two or three of equal servers out. NaN where a figure
    is, or no replicate of it.

    Args:
        values: Figures, ``[num_figures]``, such as one a layer.
        replicates: Those of each replicate, ``[num_replicates, num_figures]``; NaN is left out.
        level: The probability that all of them lie above.
    """
    known = ~np.isnan(values) & ~np.isnan(replicates).all(axis=0)
    result: Floats = np.full(values.shape, np.nan)
    distance = replicates[:, known] - values[known]
    spread = np.nanstd(distance, axis=0)
    z = np.divide(distance, spread, out=np.zeros_like(distance), where=spread > 0)
    largest = np.nan_to_num(z).max(axis=1, initial=0.0)
    result[known] = values[known] - np.quantile(largest, level) * spread
    return result


class LoadReplicates:
    """Selections by layer and expert in each replicate of the bootstrap; adds up.

    Attributes:
        counts: Weighted selections, ``[num_replicates, num_layers, num_experts]``, float64.

    Args:
        num_layers: Layers.
        num_experts: Experts a layer.
        num_replicates: Replicates.
        seed: As of `request_weights`.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        num_replicates: int = NUM_REPLICATES,
        seed: int = 0,
    ) -> None:
        self.counts: Floats = np.zeros((num_replicates, num_layers, num_experts))
        self._seed = seed

    def add(self, rows: Rows) -> None:
        """Count rows."""
        num_replicates, num_layers, num_experts = self.counts.shape
        requests, places = rows.request_places
        weights = request_weights(requests, num_replicates, self._seed)
        offset = places * num_experts
        # Products of many layers at once: BLAS's threads are slow to begin.
        step = max(1, _PRODUCT_CELLS // max(1, len(requests) * num_experts))
        for start in range(0, num_layers, step):
            some = rows.ids_by_layer[start : start + step]
            found = [
                np.bincount((ids + offset).ravel(), minlength=len(requests) * num_experts)
                for ids in some
            ]
            cells = np.array(found, np.float32).reshape(len(some), len(requests), num_experts)
            flat = cells.transpose(1, 0, 2).reshape(len(requests), -1)
            product = (weights.T @ flat).reshape(num_replicates, len(some), num_experts)
            self.counts[:, start : start + step] += product

    def __add__(self, other: Self) -> Self:
        """Return both together."""
        num_replicates, num_layers, num_experts = self.counts.shape
        result = type(self)(num_layers, num_experts, num_replicates=num_replicates, seed=self._seed)
        result.counts = self.counts + other.counts
        return result

    def interval(self, figure: Callable[[Floats], Floats], level: float = 0.95) -> Floats:
        """Return the interval of a figure of the load, ``[2, ...]``: from, to.

        MaxVio and total variation are at least 0, and chance moves them up: their intervals may
        lie above the figure itself.

        Args:
            figure: A function of counts ``[..., num_layers, num_experts]``, such as
                `moescope.analysis.entropy_bits`.
            level: As of `interval`.
        """
        return interval(figure(self.counts), level)
