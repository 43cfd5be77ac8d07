"""Effective number of experts a token: how many the weights are really spread over."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

from moescope.analysis.rows import Rows

Floats = npt.NDArray[np.float64]
_NUM_STEPS = 256


def effective_experts(weights: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
    """Return two effective numbers of experts, ``[...]`` each, from 1 to top-k.

    With ``p = w / sum(w)``: ``exp(-sum(p * ln(p)))`` and ``1 / sum(p**2)``. Both are k where k
    weights are equal, and 1 where one has everything; the second one looks more at the largest
    weights. NaN where the weights add up to nothing.

    Args:
        weights: Routing weights, ``[..., top_k]``, none negative.

    Source: Hill 1973, "Diversity and Evenness: A Unifying Notation and Its Consequences", the
    numbers of order 1 and 2.
    """
    exponential, inverse = _along_first(np.moveaxis(weights, -1, 0).astype(np.float64))
    return exponential, inverse


def _along_first(weights: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
    """Return both numbers of weights ``[top_k, ...]``, which is fast where they are contiguous."""
    total = weights.sum(axis=0)
    p = np.divide(weights, total, out=np.full_like(weights, np.nan), where=total > 0)
    logs = np.log(p, out=np.zeros_like(p), where=p != 0)
    entropy = -np.einsum("k...,k...->...", p, logs)
    return np.exp(entropy), 1 / np.einsum("k...,k...->...", p, p)


class EffectiveExperts:
    """Adds up the effective numbers of tokens by layer.

    Args:
        num_layers: Layers.
        top_k: Experts a token.
    """

    def __init__(self, num_layers: int, top_k: int) -> None:
        self._top_k = top_k
        self._num = np.zeros(num_layers, np.int64)
        self._sums = np.zeros((2, num_layers))
        self._steps = np.zeros((num_layers, _NUM_STEPS), np.int64)

    def add(self, rows: Rows) -> None:
        """Take rows; those without weights are passed over."""
        if rows.weights_by_layer is None:
            return
        for layer, weights in enumerate(rows.weights_by_layer):
            exponential, inverse = _along_first(weights.astype(np.float32))
            known = ~np.isnan(exponential)
            if not known.all():
                exponential, inverse = exponential[known], inverse[known]
            self._num[layer] += len(exponential)
            self._sums[0, layer] += exponential.sum(dtype=np.float64)
            self._sums[1, layer] += inverse.sum(dtype=np.float64)
            step = (exponential - 1) * (_NUM_STEPS / max(self._top_k - 1, 1))
            step = np.clip(step, 0, _NUM_STEPS - 1).astype(np.int64)
            self._steps[layer] += np.bincount(step, minlength=_NUM_STEPS)

    def __add__(self, other: Self) -> Self:
        """Return both together."""
        result = type(self)(len(self._num), self._top_k)
        result._num = self._num + other._num
        result._sums = self._sums + other._sums
        result._steps = self._steps + other._steps
        return result

    @property
    def means(self) -> tuple[Floats, Floats]:
        """The means over tokens of both numbers of `effective_experts`, ``[num_layers]`` each."""
        nan = np.full(self._sums.shape, np.nan)
        exponential, inverse = np.divide(self._sums, self._num, out=nan, where=self._num > 0)
        return exponential, inverse

    def quantile(self, q: float) -> Floats:
        """Return a quantile over tokens of the first number, ``[num_layers]``.

        It is exact to ``(top_k - 1) / 256``.

        Args:
            q: 0 to 1.
        """
        passed = np.cumsum(self._steps, axis=1)
        step = (passed < q * self._num[:, None]).sum(axis=1)
        value = 1 + (step + 0.5) * (max(self._top_k - 1, 1) / _NUM_STEPS)
        return np.where(self._num > 0, np.minimum(value, self._top_k), np.nan)
