"""Judges the routes of a trace by the logits of the reference.

A *pair* is one token in one layer. A server that computes in bfloat16 or float16 sees other logits
than the reference, by its roundings, and two experts that are as good as equal may change places.
From then on the token has other hidden states, and so have the tokens that attend to it: no longer
by a rounding, but by an expert's output. So each pair is judged by the logits that the reference
has *after the experts that were served*, in all layers and tokens before. What is left between the
two is rounding, and that is measured (`Expected.error`).

One rule judges experts and weights: logits that are each off by at most the layer's tolerance
must lead the model's formula to what was served. A pair is *equal* if the reference's own logits
do, a *near-tie* if only such others do, and a mismatch if none do.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope import RouteTrace
from moescope.received import shown

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

Route = Callable[[int, Floats, Ids | None], tuple[Ids, Floats]]
"""The model's formula: (column of the layer, logits ``[num_tokens, num_experts]``, the experts, or
None to select them) -> (ids, weights), ``[num_tokens, top_k]`` both."""

MAX_DIFFERENCES = 10
"""Differences of a comparison that are kept to be shown."""
_MAX_SHOWN = 32
_FLOAT32_SLACK = 16.0
"""How much more than measured float32 may move a logit."""
_HALVINGS = 50
"""The gap of two experts is found to the precision of float64."""


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """What the reference computes for a sequence, after the experts that were served."""

    logits: Floats
    """Of the routers, ``[num_tokens, num_layers, num_experts]``."""
    error: Floats
    """By how much the server's dtype moves a logit of the sequence at most, ``[num_layers]``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tolerance:
    """What the server's dtype may do."""

    logits: Floats
    """To a logit, ``[num_layers]``."""
    eps: float
    """To a number near 1 that is rounded to it."""

    @classmethod
    def of(cls, sequences: Sequence[Expected], eps: float) -> Tolerance:
        """Return the largest error of any logit of a layer, in all rows of all sequences.

        The roundings of a server are others than those that were measured, but as many and as
        large. That its own ones exceed the tolerance takes two experts at the border of the
        selection, each as far off as the farthest of all experts and rows, in opposite directions.

        In float32 machines differ by more than they round: on one with AVX-512 DeepSeek-V2's
        logits were off by up to 8 times what was measured, on another by less than it. Either is
        thousands of times less than what tells experts apart.

        Args:
            sequences: At least one.
            eps: Of the server's dtype.
        """
        slack = _FLOAT32_SLACK if eps <= np.finfo(np.float32).eps else 1.0
        return cls(slack * np.max([one.error for one in sequences], axis=0), eps)


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """A pair that is not the model's."""

    request_id: str
    position: int
    layer: int
    served: tuple[int, ...]
    wanted: tuple[int, ...]
    gap: float
    """By how much logits must be off for the formula to select what was served; 0 where only the
    weights differ."""
    tolerance: float
    served_weights: tuple[float, ...] = ()
    wanted_weights: tuple[float, ...] = ()

    def __str__(self) -> str:
        """Say it in one line."""
        where = f"{shown(self.request_id)}, position {self.position}, layer {self.layer}"
        if self.served_weights:
            return (
                f"{where}: weights {_joined(self.served_weights)} served, "
                f"{_joined(self.wanted_weights)} wanted, of experts {_joined(self.served)}"
            )
        return (
            f"{where}: experts {_joined(sorted(self.served))} served, "
            f"{_joined(sorted(self.wanted))} wanted, "
            f"gap {self.gap:.3g} (tolerance {self.tolerance:.3g})"
        )


@dataclasses.dataclass(slots=True)
class Counts:
    """The outcome of a comparison, in pairs of a token and a layer."""

    pairs: int = 0
    missing: int = 0
    equal: int = 0
    """The set of experts is the reference's."""
    near_ties: int = 0
    mismatches: int = 0
    wrong_weights: int = 0
    """Pairs among the equal ones and the near-ties with a weight that is off."""
    largest_weight_error: float = 0.0
    """Of the same pairs."""
    largest_gap: float = 0.0
    """Of all pairs, over the tolerance."""
    differences: list[Difference] = dataclasses.field(default_factory=list)
    """The first `MAX_DIFFERENCES` of the mismatches and wrong weights, by layer: what is wrong in
    one may make others seem wrong that come after it."""

    def add(self, other: Counts) -> None:
        """Add the counts of another sequence."""
        for field in dataclasses.fields(self):
            a: Any = getattr(self, field.name)
            b: Any = getattr(other, field.name)
            setattr(self, field.name, max(a, b) if field.name.startswith("largest") else a + b)
        self.differences.sort(key=lambda one: one.layer)
        del self.differences[MAX_DIFFERENCES:]

    @property
    def is_good(self) -> bool:
        """Whether something was compared, and nothing is missing or wrong."""
        return self.pairs > 0 and not (self.missing or self.mismatches or self.wrong_weights)


def compare(
    trace: RouteTrace, want: Expected, tolerance: Tolerance, route: Route, *, shift: int = 0
) -> Counts:
    """Compare a trace with what the reference computes for its tokens.

    Args:
        trace: The trace.
        want: The reference's.
        tolerance: What the server's dtype may do.
        route: The model's formula.
        shift: Compare each pair with that of so many tokens later: a control, which must fail.
    """
    rows = np.flatnonzero(trace.present[: trace.num_rows - shift])
    missing = trace.num_rows - shift - len(rows)
    total = Counts(missing=missing * trace.num_layers, pairs=missing * trace.num_layers)
    for column in range(trace.num_layers):
        total.add(_compare_layer(trace, column, rows, want.logits[rows + shift, column],
                                 tolerance, route))  # fmt: skip
    return total


def _compare_layer(
    trace: RouteTrace,
    column: int,
    rows: npt.NDArray[np.intp],
    logits: Floats,
    tolerance: Tolerance,
    route: Route,
) -> Counts:
    """Compare some rows of one layer, with the logits ``[len(rows), num_experts]`` of each."""
    ids = trace.topk_ids[rows, column].astype(np.int64)
    allowed = float(tolerance.logits[column])
    own, _ = route(column, logits, None)
    is_equal = _same_sets(ids, own)
    gap = np.zeros(len(rows))
    gap[~is_equal] = _gaps(logits[~is_equal], ids[~is_equal], lambda x: route(column, x, None)[0])
    is_mismatch = gap > allowed
    layer = _Layer(trace, column, rows, ids, own, gap, allowed)
    counts = Counts(
        pairs=len(rows),
        equal=int(is_equal.sum()),
        near_ties=int((~is_equal & ~is_mismatch).sum()),
        mismatches=int(is_mismatch.sum()),
        largest_gap=float(gap.max(initial=0.0)) / max(allowed, sys.float_info.min),
        differences=layer.differences(is_mismatch),
    )
    if trace.topk_weights is not None:
        served = trace.topk_weights[rows, column]
        wanted, is_off = _judge_weights(
            served, logits, ids, allowed, tolerance.eps, lambda x: route(column, x, ids)[1]
        )
        is_off &= ~is_mismatch
        error = np.abs(served - wanted)[~is_mismatch]
        counts.wrong_weights = int(is_off.sum())
        counts.largest_weight_error = float(error.max(initial=0.0))
        counts.differences += layer.differences(is_off, (served, wanted))
    return counts


@dataclasses.dataclass(frozen=True, slots=True)
class _Layer:
    """Some rows of a layer, and what was found of them."""

    trace: RouteTrace
    column: int
    rows: npt.NDArray[np.intp]
    served: Ids
    wanted: Ids
    gap: Floats
    tolerance: float

    def differences(
        self, which: npt.NDArray[np.bool_], weights: Sequence[npt.NDArray[Any]] = ()
    ) -> list[Difference]:
        """Return the first of these rows, with the weights served and wanted where they differ."""
        return [
            Difference(
                self.trace.request_id,
                self.trace.start + int(self.rows[row]),
                int(self.trace.layers[self.column]),
                tuple(self.served[row].tolist()),
                tuple(self.wanted[row].tolist()),
                float(self.gap[row]),
                self.tolerance,
                *(tuple(values[row].tolist()) for values in weights),
            )
            for row in np.flatnonzero(which)[:MAX_DIFFERENCES]
        ]


def _gaps(logits: Floats, ids: Ids, select: Callable[[Floats], Ids]) -> Floats:
    """Return by how much logits must be off for the formula to select these experts.

    Raising these experts and lowering all others by the same amount is the shortest way there. For
    plain top-k that is half of the distance between the best expert left out and the worst taken.

    Args:
        logits: ``[num_rows, num_experts]``.
        ids: ``[num_rows, top_k]``.
        select: The formula.

    Returns:
        ``[num_rows]``; infinite where no logits lead there, such as to an expert twice.
    """
    direction = np.full(logits.shape, -1.0)
    np.put_along_axis(direction, ids, 1.0, -1)

    def is_reached(by: Floats) -> npt.NDArray[np.bool_]:
        return _same_sets(ids, select(logits + by[:, None] * direction))

    low, high = np.zeros(len(logits)), np.ptp(logits, axis=-1) + 1.0
    can_be = is_reached(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = is_reached(middle)
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(can_be, high, np.inf)


def _judge_weights(
    served: npt.NDArray[Any],
    logits: Floats,
    ids: Ids,
    allowed: float,
    eps: float,
    weigh: Callable[[Floats], Floats],
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return the weights of the reference's logits, and in which rows one that was served is off.

    An expert's weight is largest where its own logit is as high and all others are as low as the
    tolerance allows, and smallest the other way round. Then it is rounded: by the trace, and by a
    router that computes ``exp(logit - logsumexp(logits))`` in the server's dtype, whose exponents
    are as large as logits are (vLLM 0.32.0, ``fused_moe/router/cpu_router.py``).
    """
    off = np.zeros(len(ids), np.bool_)
    dtype = np.finfo(served.dtype)
    exponent = np.abs(logits).max(-1) + np.log(logits.shape[-1])
    rounding = eps * exponent + float(dtype.eps)
    for slot in range(ids.shape[1]):
        move = np.full(logits.shape, -allowed)
        np.put_along_axis(move, ids[:, slot : slot + 1], allowed, -1)
        lowest, highest = weigh(logits - move)[:, slot], weigh(logits + move)[:, slot]
        margin = rounding * highest + float(dtype.smallest_subnormal)
        weight = served[:, slot].astype(np.float64)
        off |= ~((weight >= lowest - margin) & (weight <= highest + margin))  # a NaN is off too
    return weigh(logits), off


def _same_sets(ids: Ids, own: Ids) -> npt.NDArray[np.bool_]:
    """Return which rows have the same experts, each once."""
    same: npt.NDArray[np.bool_] = (np.sort(ids, -1) == np.sort(own, -1)).all(-1)
    return same


def _joined(values: Sequence[float]) -> str:
    """Return the values of a row; the first of them, where they are very many."""
    words = [str(one) if isinstance(one, int) else f"{one:.4g}" for one in values[:_MAX_SHOWN]]
    return " ".join(words) + (" …" if len(values) > _MAX_SHOWN else "")
