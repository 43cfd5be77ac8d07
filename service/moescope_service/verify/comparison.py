"""Counts in how many rows a trace has the experts of the reference, and judges the others.

A *row* here is one token in one layer. A server that computes in bfloat16 or float16 sees other
logits than the reference, off by the roundings of all layers before; where two experts are as good
as equal it may then select the other one. How much that is in each layer is measured, not guessed:
it is the largest difference of any logit between the reference and HF transformers in the server's
dtype. A row is a *near-tie* if, by the reference's logits, every expert that only the server
selected is within `TIE_FACTOR` times that of every expert that only the reference selected. Any
other difference is a mismatch, also where two *groups* of experts are as good as equal, and a
near-tie is never counted as equal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope import RouteTrace

Floats = npt.NDArray[np.float64]

TIE_FACTOR = 1.0
"""The largest difference of any logit is some five times what different kernels in bfloat16 were
seen to exchange; four times it would let most wrong rows of a small model pass as near-ties."""


@dataclasses.dataclass(frozen=True, slots=True)
class Routes:
    """What the reference gives for a sequence."""

    topk_ids: npt.NDArray[np.int64]
    """``[num_tokens, num_layers, top_k]``."""
    topk_weights: Floats
    """``[num_tokens, num_layers, top_k]``."""
    scores: Floats
    """What the experts were ranked by, in units of the logits,
    ``[num_tokens, num_layers, num_experts]``."""
    noise: Floats
    """How far the server's dtype moves a logit, ``[num_layers]``."""


@dataclasses.dataclass(slots=True)
class Counts:
    """What came of a comparison, in rows."""

    rows: int = 0
    missing: int = 0
    equal: int = 0
    """The set of experts is the reference's."""
    near_ties: int = 0
    mismatches: int = 0
    wrong_weights: int = 0
    """Rows among the equal ones in which a weight is off by more than the tolerance allows."""
    largest_weight_error: float = 0.0
    """Of all equal rows."""
    largest_gap: float = 0.0
    """Of all different rows: how far apart the experts' logits are, over the tolerance."""

    def add(self, other: Counts) -> None:
        """Add the counts of another sequence."""
        for field in dataclasses.fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, max(a, b) if field.name.startswith("largest") else a + b)

    @property
    def is_good(self) -> bool:
        """Whether something was compared, and nothing is missing or wrong."""
        return self.rows > 0 and not (self.missing or self.mismatches or self.wrong_weights)


def compare(trace: RouteTrace, want: Routes, *, shift: int = 0) -> Counts:
    """Compare a trace with the reference's routes of the same tokens.

    Args:
        trace: The trace.
        want: The reference's.
        shift: Compare each row with that of so many tokens later: a control, which must fail.
    """
    here = trace.present[: trace.num_rows - shift]
    counts = Counts(
        rows=len(here) * trace.num_layers, missing=int((~here).sum()) * trace.num_layers
    )
    there = np.flatnonzero(here) + shift
    got, ids = trace.topk_ids[: len(here)][here].astype(np.int64), want.topk_ids[there]
    scores = want.scores[there]
    got_set, want_set = (_members(one, scores.shape) for one in (got, ids))
    same = (got_set == want_set).all(-1)
    tolerance = TIE_FACTOR * np.maximum(want.noise, np.finfo(np.float64).tiny)
    lost = np.where(want_set & ~got_set, scores, -np.inf).max(-1)
    taken = np.where(got_set & ~want_set, scores, np.inf).min(-1)
    taken[(got_set <= want_set).all(-1)] = -np.inf  # an expert twice is no tie
    lost[same] = taken[same] = 0.0
    gap = np.maximum(lost - taken, 0.0) / tolerance
    counts.equal = int(same.sum())
    counts.near_ties = int((~same & (gap <= 1.0)).sum())
    counts.mismatches = int((gap > 1.0).sum())
    counts.largest_gap = float(gap.max(initial=0.0))
    if trace.topk_weights is not None:
        found = trace.topk_weights[: len(here)][here]
        _judge_weights(
            counts,
            same,
            _by_expert(got, found),
            _by_expert(ids, want.topk_weights[there]),
            tolerance,
        )
    return counts


def _members(ids: npt.NDArray[np.int64], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    members = np.zeros(shape, np.bool_)
    np.put_along_axis(members, ids, True, -1)
    return members


def _by_expert(ids: npt.NDArray[np.int64], weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.take_along_axis(weights, np.argsort(ids, -1), -1)


def _judge_weights(
    counts: Counts,
    same: npt.NDArray[np.bool_],
    got: npt.NDArray[Any],
    want: npt.NDArray[np.float64],
    tolerance: npt.NDArray[np.float64],
) -> None:
    """Count rows whose weights are off.

    Logits that are off by ``d`` change a softmax's or sigmoid's weight by a factor of at most
    ``exp(2 d)``; renormalizing does not add to it. The trace then rounds the weight to its dtype.
    """
    error = np.abs(got.astype(np.float64) - want)
    allowed = want * np.expm1(2.0 * tolerance)[:, None]
    allowed += np.spacing(np.abs(want).astype(got.dtype)).astype(np.float64)
    counts.wrong_weights = int((same & (error > allowed).any(-1)).sum())
    counts.largest_weight_error = float(error[same].max(initial=0.0))
