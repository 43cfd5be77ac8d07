"""Load balance of experts, from counts of selections.

Every function takes counts ``[..., num_experts]`` and works along the last axis; an axis without
any selection gives NaN.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def shares(counts: Counts) -> Floats:
    """Return each expert's share of the selections, ``[..., num_experts]``."""
    total = counts.sum(axis=-1, keepdims=True, dtype=np.float64)
    nan = np.full(counts.shape, np.nan)
    result: Floats = np.divide(counts, total, out=nan, where=total > 0)
    return result


def entropy_bits(counts: Counts) -> Floats:
    """Return the Shannon entropy of the selections in bits, ``[...]``: ``-sum(p * log2(p))``.

    ``p`` are the experts' shares of the selections. It is 0 where one expert has them all, and
    `max_entropy_bits` where all experts have as many.

    Source: Shannon 1948, "A Mathematical Theory of Communication", section 6.
    """
    p = shares(counts)
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    result: Floats = np.abs((p * logs).sum(axis=-1))  # a sum of terms <= 0; never -0.0
    return result


def max_entropy_bits(num_experts: int) -> float:
    """Return the entropy of a uniform load in bits, ``log2(num_experts)``."""
    return math.log2(num_experts)


def normalized_entropy(counts: Counts) -> Floats:
    """Return `entropy_bits` over `max_entropy_bits`, in [0, 1]: 1.0 is uniform."""
    result: Floats = entropy_bits(counts) / max_entropy_bits(max(counts.shape[-1], 2))
    return result


def entropy(counts: Counts) -> Floats:
    """Return `entropy_bits` in nats, ``[...]``."""
    result: Floats = entropy_bits(counts) * math.log(2)
    return result


def max_violation(counts: Counts) -> Floats:
    """Return MaxVio, the busiest expert's load over the mean load, less one, ``[...]``.

    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    equation 4.
    """
    result: Floats = shares(counts).max(axis=-1) * counts.shape[-1] - 1.0
    return result


def active_experts(counts: Counts) -> npt.NDArray[np.int64]:
    """Return how many experts were selected at least once, ``[...]``."""
    result: npt.NDArray[np.int64] = np.count_nonzero(counts, axis=-1)
    return result


def coverage(counts: Counts) -> Floats:
    """Return which share of the selections the k busiest experts take, ``[..., num_experts]``.

    Place ``k - 1`` is that of the k busiest: it rises to 1.0, and is ``k / num_experts`` where the
    load is uniform.
    """
    result: Floats = np.cumsum(-np.sort(-shares(counts), axis=-1), axis=-1)
    return result


def total_variation(counts: Counts, others: Counts) -> Floats:
    """Return how far two loads are from each other, ``[...]``: ``sum(abs(p - q)) / 2``.

    ``p`` and ``q`` are the experts' shares. 0 is the same load, 1 one without a common expert: it
    is the share of the selections that would have to go elsewhere. Few selections differ by chance.

    Args:
        counts: Selections, ``[..., num_experts]``.
        others: Selections of a shape that fits.

    Source: Levin, Peres and Wilmer, "Markov Chains and Mixing Times", proposition 4.2.
    """
    result: Floats = np.abs(shares(counts) - shares(others)).sum(axis=-1) / 2
    return result


def jensen_shannon_bits(counts: Counts, others: Counts) -> Floats:
    """Return the Jensen-Shannon divergence of two loads in bits, ``[...]``.

    With ``p`` and ``q`` the experts' shares and ``m = (p + q) / 2``:
    ``sum(p * log2(p / m) + q * log2(q / m)) / 2``. 0 is the same load, 1 one without a common
    expert. Few selections differ by chance.

    Args:
        counts: Selections, ``[..., num_experts]``.
        others: Selections of a shape that fits.

    Source: Lin 1991, "Divergence Measures Based on the Shannon Entropy", section IV.
    """
    p, q = shares(counts), shares(others)
    middle = (p + q) / 2
    total: Floats = np.zeros(middle.shape[:-1])
    for one in (p, q):
        ratio = np.divide(one, middle, out=np.ones_like(middle), where=one != 0)  # NaN stays
        total = total + (one * np.log2(ratio)).sum(axis=-1) / 2
    return np.maximum(total, 0.0)  # equal loads round to less


def top_experts(counts: Counts, k: int = 3) -> list[tuple[int, int, float]]:
    """Return the k busiest experts of one layer.

    Args:
        counts: Selections, ``[num_experts]``.
        k: How many.

    Returns:
        (expert, selections, share), busiest first; equal counts in order of the expert's number.
    """
    order = np.argsort(-counts.astype(np.int64), kind="stable")[:k]
    share = shares(counts)
    return [(int(expert), int(counts[expert]), float(share[expert])) for expert in order]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OverLayers:
    """A figure of the balance over layers; those without any selection are left out."""

    mean: float
    """Of the layers."""
    worst: float
    """Of the layer whose load is the least even."""
    worst_place: int
    """That layer's place in the order given; the first of equal ones."""

    @classmethod
    def lowest(cls, values: npt.NDArray[Any]) -> Self:
        """Make it of a figure that is low where the load is uneven, such as the entropy.

        Args:
            values: One a layer, ``[num_layers]``; NaN in a layer without any selection.

        Raises:
            ValueError: No layer has a selection.
        """
        place = int(np.nanargmin(values))
        return cls(mean=float(np.nanmean(values)), worst=float(values[place]), worst_place=place)

    @classmethod
    def highest(cls, values: npt.NDArray[Any]) -> Self:
        """Make it of a figure that is high where the load is uneven, such as MaxVio.

        Args:
            values: As of `lowest`.

        Raises:
            ValueError: No layer has a selection.
        """
        place = int(np.nanargmax(values))
        return cls(mean=float(np.nanmean(values)), worst=float(values[place]), worst_place=place)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """The balance of a model's layers in a few figures."""

    num_experts: int
    """Routed experts a layer."""
    max_entropy_bits: float
    """As `max_entropy_bits` returns it."""
    entropy_bits: OverLayers
    normalized_entropy: OverLayers
    max_violation: OverLayers
    active_experts: OverLayers

    @classmethod
    def of(cls, counts: Counts) -> Self:
        """Sum up the layers' figures.

        Args:
            counts: Selections, ``[num_layers, num_experts]``.

        Raises:
            ValueError: No layer has a selection.
        """
        active = np.where(counts.any(axis=-1), active_experts(counts), np.nan)
        return cls(
            num_experts=counts.shape[-1],
            max_entropy_bits=max_entropy_bits(counts.shape[-1]),
            entropy_bits=OverLayers.lowest(entropy_bits(counts)),
            normalized_entropy=OverLayers.lowest(normalized_entropy(counts)),
            max_violation=OverLayers.highest(max_violation(counts)),
            active_experts=OverLayers.lowest(active),
        )
