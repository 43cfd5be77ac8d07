"""Counts in how many rows a trace has the experts of the reference, and judges the others.

A *row* here is one token in one layer. A server that computes in bfloat16 or float16 sees other
logits than the reference, off by a rounding in each layer before; where two experts are as good as
equal it may then select the other one. Such a row is a *near-tie*: every expert that only one of
the two selected is, by the reference's logits, within the tolerance of the others. The tolerance is
`TIE_ROUNDINGS` roundings of the dtype at the size of the row's largest logit. Any other difference
is a mismatch, also where two *groups* of experts are as good as equal, and a near-tie is never
counted as equal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope import RouteTrace

Floats = npt.NDArray[np.float64]

TIE_ROUNDINGS = 8.0
ROUNDING = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""The relative distance of neighboring numbers, by dtype."""


@dataclasses.dataclass(frozen=True, slots=True)
class Routes:
    """What the reference gives for a sequence."""

    topk_ids: npt.NDArray[np.int64]
    """``[num_tokens, num_layers, top_k]``."""
    topk_weights: Floats
    """``[num_tokens, num_layers, top_k]``."""
    logits: Floats
    """Of the routers, the selection bias left out, ``[num_tokens, num_layers, num_experts]``."""
    scores: Floats
    """What the experts were ranked by, on the scale of the logits, of the same shape."""


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
    """Of all different rows: by how many roundings the reference prefers another expert."""

    def add(self, other: Counts) -> None:
        """Add the counts of another sequence."""
        for field in dataclasses.fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, max(a, b) if field.name.startswith("largest") else a + b)

    @property
    def is_good(self) -> bool:
        """Whether something was compared, and nothing is missing or wrong."""
        return self.rows > 0 and not (self.missing or self.mismatches or self.wrong_weights)


def compare(trace: RouteTrace, want: Routes, dtype: str, *, shift: int = 0) -> Counts:
    """Compare a trace with the reference's routes of the same tokens.

    Args:
        trace: The trace.
        want: The reference's.
        dtype: What the server computes in.
        shift: Compare each row with that of so many tokens later: a control, which must fail.
    """
    here = trace.present[: trace.num_rows - shift]
    counts = Counts(
        rows=len(here) * trace.num_layers, missing=int((~here).sum()) * trace.num_layers
    )
    there = np.flatnonzero(here) + shift
    got, ids = trace.topk_ids[: len(here)][here].astype(np.int64), want.topk_ids[there]
    logits, scores = want.logits[there], want.scores[there]
    got_set, want_set = (_members(one, logits.shape) for one in (got, ids))
    same = (got_set == want_set).all(-1)
    rounding = ROUNDING[dtype] * np.maximum(np.abs(logits).max(-1), np.finfo(np.float64).tiny)
    lost = np.where(want_set & ~got_set, scores, -np.inf).max(-1)
    taken = np.where(got_set & ~want_set, scores, np.inf).min(-1)
    taken[(got_set <= want_set).all(-1)] = -np.inf  # an expert twice is no tie
    lost[same] = taken[same] = 0.0
    gap = np.maximum(lost - taken, 0.0) / rounding
    counts.equal = int(same.sum())
    counts.near_ties = int((~same & (gap <= TIE_ROUNDINGS)).sum())
    counts.mismatches = int((gap > TIE_ROUNDINGS).sum())
    counts.largest_gap = float(gap.max(initial=0.0))
    if trace.topk_weights is not None:
        found = trace.topk_weights[: len(here)][here]
        _judge_weights(
            counts,
            same,
            _by_expert(got, found),
            _by_expert(ids, want.topk_weights[there]),
            rounding,
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
    rounding: npt.NDArray[np.float64],
) -> None:
    """Count rows whose weights are off.

    Logits that are off by ``d`` change a softmax's or sigmoid's weight by a factor of at most
    ``exp(2 d)``; renormalizing does not add to it. The trace then rounds the weight to its dtype.
    """
    error = np.abs(got.astype(np.float64) - want)
    allowed = want * np.expm1(2.0 * TIE_ROUNDINGS * rounding)[..., None]
    allowed += np.spacing(np.abs(want).astype(got.dtype)).astype(np.float64)
    counts.wrong_weights = int((same & (error > allowed).any(-1)).sum())
    counts.largest_weight_error = float(error[same].max(initial=0.0))
