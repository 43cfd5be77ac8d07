"""Selections by layer, phase and position."""

from __future__ import annotations

import math
from typing import Self

import numpy as np
import numpy.typing as npt

from moescope.analysis.rows import PHASES, Rows

Counts = npt.NDArray[np.int64]
NUM_BINS = 32
"""Bins of positions: 0, 1, 2 to 3, 4 to 7, 8 to 15 and so on to 2**31 - 1."""


def position_bins(positions: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return the bin of each position: 0 for 0, else ``floor(log2(position)) + 1``."""
    _, exponents = np.frexp(positions.astype(np.float64))  # exact: positions have 31 bits
    bins: npt.NDArray[np.int64] = np.minimum(exponents, NUM_BINS - 1).astype(np.int64)
    return bins


def bin_range(number: int) -> tuple[int, int]:
    """Return the first and the last position of a bin."""
    return (2 ** (number - 1), 2**number - 1) if number else (0, 0)


class Loads:
    """Counts the selections of each expert by layer, phase and position; adds up.

    Attributes:
        counts: Selections, ``[len(PHASES), NUM_BINS, num_layers, num_experts]``, int64.
        num_rows: Rows counted.

    Args:
        num_layers: Layers.
        num_experts: Experts a layer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.counts: Counts = np.zeros((len(PHASES), NUM_BINS, num_layers, num_experts), np.int64)
        self.num_rows = 0

    def add(self, rows: Rows) -> None:
        """Count rows."""
        num_phases, num_bins, num_layers, num_experts = self.counts.shape
        group = rows.phases.astype(np.int64) * num_bins + position_bins(rows.positions)
        used, place = np.unique(group, return_inverse=True)
        offset = place.reshape(-1) * num_experts
        flat = self.counts.reshape(num_phases * num_bins, num_layers, num_experts)
        for layer, ids in enumerate(rows.ids_by_layer):
            found = np.bincount((ids + offset).ravel(), minlength=len(used) * num_experts)
            flat[used, layer] += found.reshape(len(used), num_experts)
        self.num_rows += rows.num_rows

    def __add__(self, other: Self) -> Self:
        """Return both together."""
        result = type(self)(*self.counts.shape[2:])
        result.counts = self.counts + other.counts
        result.num_rows = self.num_rows + other.num_rows
        return result

    @property
    def total(self) -> Counts:
        """All selections, ``[num_layers, num_experts]``."""
        total: Counts = self.counts.sum(axis=(0, 1))
        return total

    @property
    def by_phase(self) -> Counts:
        """Selections by phase, ``[len(PHASES), num_layers, num_experts]``."""
        by_phase: Counts = self.counts.sum(axis=1)
        return by_phase

    @property
    def by_position(self) -> Counts:
        """Selections by bin of positions, ``[NUM_BINS, num_layers, num_experts]``."""
        by_position: Counts = self.counts.sum(axis=0)
        return by_position


def domain_specialization(
    counts: npt.NDArray[np.integer], num_rows: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """Return the share of a domain's tokens that go to each expert: ``N_(e,d) / N_d``.

    A uniform load has `uniform_share`. Every layer's shares add up to top-k.

    Args:
        counts: Selections, ``[..., num_layers, num_experts]``.
        num_rows: Routed tokens that they are of, ``[...]``.

    Source: OLMoE (arXiv 2409.02060), section 5.3; Mixtral (arXiv 2401.04088), section 5, draws the
    same as the proportion of tokens assigned to each expert.
    """
    tokens = np.asarray(num_rows, np.float64)[..., None, None]
    nan = np.full(counts.shape, np.nan)
    result: npt.NDArray[np.float64] = np.divide(counts, tokens, out=nan, where=tokens > 0)
    return result


def uniform_share(top_k: int, num_experts: int) -> float:
    """Return the share of tokens that an expert has where all have as many."""
    return top_k / num_experts if num_experts else math.nan
