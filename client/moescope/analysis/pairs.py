"""Pairs of experts: within a layer, and from one layer to the next."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

from moescope.analysis.rows import Rows

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_CHUNK_ROWS = 4096  # the codes of a chunk's pairs stay in the processor's cache


def _shares(counts: npt.NDArray[np.integer], of: npt.NDArray[np.integer]) -> Floats:
    """Divide; NaN where there is nothing to divide by."""
    nan = np.full(counts.shape, np.nan)
    result: Floats = np.divide(counts, of, out=nan, where=np.broadcast_to(of > 0, counts.shape))
    return result


class CoActivation:
    """Counts the tokens that go to two experts of a layer; adds up.

    Attributes:
        counts: Tokens, ``[num_layers, num_experts, num_experts]``, int64, symmetric; on the
            diagonal are those that go to the expert at all.

    Args:
        num_layers: Layers.
        num_experts: Experts a layer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.counts: Counts = np.zeros((num_layers, num_experts, num_experts), np.int64)

    def add(self, rows: Rows) -> None:
        """Count rows."""
        num_experts = self.counts.shape[1]
        first, second = np.triu_indices(rows.top_k, 1)
        for layer, ids in enumerate(rows.ids_by_layer):
            for start in range(0, rows.num_rows, _CHUNK_ROWS):
                part = ids[:, start : start + _CHUNK_ROWS].astype(np.int64)
                once = np.bincount(part.ravel(), minlength=num_experts)
                codes = part[first] * num_experts + part[second]
                pairs = np.bincount(codes.ravel(), minlength=num_experts**2)
                pairs = pairs.reshape(num_experts, num_experts)
                self.counts[layer] += pairs + pairs.T + np.diag(once)

    def __add__(self, other: Self) -> Self:
        """Return both together."""
        result = type(self)(*self.counts.shape[:2])
        result.counts = self.counts + other.counts
        return result


def co_activation(counts: npt.NDArray[np.integer]) -> Floats:
    """Return, of the tokens that go to expert i, the share that also go to j: ``N_ij / N_i``.

    NaN in the row of an expert without tokens; 1.0 on the diagonal.

    Args:
        counts: `CoActivation.counts`, ``[..., num_experts, num_experts]``.

    Source: OLMoE (arXiv 2409.02060), section 5.2.
    """
    return _shares(counts, np.diagonal(counts, axis1=-2, axis2=-1)[..., None])


def co_activation_lift(counts: npt.NDArray[np.integer], num_rows: int) -> Floats:
    """Return how often two experts share a token, over how often independent ones would.

    ``N_ij * num_rows / (N_i * N_j)``: 1.0 is independence, NaN where an expert has no token. Busy
    experts share many tokens by their load alone; this says what is beyond it. Since a token has
    k different experts, its mean is below 1: ``(k - 1) / k * num_experts / (num_experts - 1)``
    for a uniform router.

    Args:
        counts: `CoActivation.counts`, ``[..., num_experts, num_experts]``.
        num_rows: Rows that they are of.
    """
    of_one = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    expected = of_one[..., :, None] * of_one[..., None, :]
    nan = np.full(counts.shape, np.nan)
    result: Floats = np.divide(counts * float(num_rows), expected, out=nan, where=expected > 0)
    return result


class Transitions:
    """Counts pairs of an expert and one of the next layer that a token goes to; adds up.

    Attributes:
        counts: Tokens that go to expert i of layer l and to expert j of layer l + 1,
            ``[num_layers - 1, num_experts, num_experts]``, int64. Layers without experts between
            them are passed over.

    Args:
        num_layers: Layers.
        num_experts: Experts a layer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.counts: Counts = np.zeros((max(num_layers - 1, 0), num_experts, num_experts), np.int64)

    def add(self, rows: Rows) -> None:
        """Count rows."""
        num_experts = self.counts.shape[1]
        for start in range(0, rows.num_rows, _CHUNK_ROWS):
            part = rows.ids_by_layer[:, :, start : start + _CHUNK_ROWS].astype(np.int64)
            for layer in range(len(part) - 1):
                codes = part[layer, :, None] * num_experts + part[layer + 1, None]
                found = np.bincount(codes.ravel(), minlength=num_experts**2)
                self.counts[layer] += found.reshape(num_experts, num_experts)

    def __add__(self, other: Self) -> Self:
        """Return both together."""
        result = type(self)(len(self.counts) + 1, self.counts.shape[1])
        result.counts = self.counts + other.counts
        return result


def transition(counts: npt.NDArray[np.integer]) -> Floats:
    """Return, of the selections in layer l + 1 of tokens that go to i in layer l, j's share.

    ``T_ij / sum_j(T_ij)``, a row adds up to 1; NaN in that of an expert without tokens.

    Args:
        counts: `Transitions.counts`, ``[..., num_experts, num_experts]``.
    """
    return _shares(counts, counts.sum(axis=-1, keepdims=True))


def mutual_information_bits(counts: npt.NDArray[np.integer]) -> Floats:
    """Return how many bits an expert of a layer tells of one in the next layer, ``[...]``.

    ``sum(p_ij * log2(p_ij / (p_i * p_j)))``, where a token gives each of its pairs the same weight.
    0 is independence. Few tokens look dependent by chance: the excess is about
    ``(num_experts - 1)**2 / (2 * ln(2) * pairs)`` bits for independent pairs.

    Args:
        counts: `Transitions.counts`, ``[..., num_experts, num_experts]``.

    Source: Cover and Thomas, "Elements of Information Theory", equation 2.28; the excess by Miller
    1955, "Note on the Bias of Information Estimates".
    """
    total = counts.sum(axis=(-2, -1), keepdims=True).astype(np.float64)
    nan = np.full(counts.shape, np.nan)
    joint = np.divide(counts, total, out=nan, where=total > 0)
    independent = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
    result: Floats = (joint * np.log2(ratio)).sum(axis=(-2, -1))
    return result
