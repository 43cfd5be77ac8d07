"""Load balance of experts, from counts of selections.

Every function takes counts ``[..., num_experts]`` and works along the last axis; an axis without
any selection gives NaN.
"""

from __future__ import annotations

from typing import Any

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


def entropy(counts: Counts) -> Floats:
    """Return the Shannon entropy of the selections in nats, ``[...]``."""
    p = shares(counts)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    result: Floats = -(p * logs).sum(axis=-1)
    return result


def normalized_entropy(counts: Counts) -> Floats:
    """Return the entropy over its maximum ``ln(num_experts)``, in [0, 1]; 1.0 is uniform."""
    result: Floats = entropy(counts) / np.log(max(counts.shape[-1], 2))
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
