"""Counts expert selections, and how many experts of a step are distinct."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

PHASES = ("prefill", "decode")
"""A row's phase: ``prefill`` for tokens of the prompt, ``decode`` for generated ones."""

KINDS = ("prefill", "decode", "mixed")
"""Of what phase a step's tokens are: of one, or of both."""
MIN_TOKENS = tuple(2**power for power in range(15))
"""Steps are told apart by their tokens: as many as this and more, below the next number."""
_BOUNDS = 16


def expert_bounds(num_experts: int) -> list[int]:
    """Return the upper bounds of a histogram of distinct experts: the last one is all of them."""
    steps = range(1, _BOUNDS + 1)
    return sorted({max(1, num_experts * step // _BOUNDS) for step in steps})


def count_selections(
    topk_ids: npt.NDArray[Any], is_decode: npt.NDArray[np.bool_], num_experts: int
) -> npt.NDArray[np.int64]:
    """Return how often each expert was selected.

    Args:
        topk_ids: ``[num_rows, num_layers, top_k]``, integer, below ``num_experts``.
        is_decode: Whether each row's token was generated, ``[num_rows]``.
        num_experts: Routed experts a layer.

    Returns:
        ``[num_phases, num_layers, num_experts]``.
    """
    num_layers = topk_ids.shape[1]
    shape = (len(PHASES), num_layers, num_experts)
    flat = topk_ids + np.arange(num_layers, dtype=np.int64)[None, :, None] * num_experts
    flat += is_decode[:, None, None] * (num_layers * num_experts)
    return np.bincount(flat.ravel(), minlength=int(np.prod(shape))).reshape(shape)
