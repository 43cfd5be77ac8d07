"""How the routes of the same tokens differ between two servers.

The functions take expert ids of the same rows from both sides, ``[..., top_k]``, each expert of a
row once.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np
import numpy.typing as npt

from moescope.analysis.balance import jensen_shannon_bits
from moescope.analysis.bootstrap import NUM_REPLICATES, LoadReplicates, request_weights
from moescope.analysis.loads import Loads
from moescope.analysis.rows import Rows

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.integer]
Slots = npt.NDArray[np.int16]
Weights = npt.NDArray[np.floating]

FIGURES = ("rows", "near_ties", "order", "first", "jaccard", "weights", "loads")
"""What `Differences.values` returns."""
_QUANTITIES = ("all", "rows", "near_ties", "order", "first", "jaccard", "weights", "num_weights")


def slots_in(ids: Ids, others: Ids) -> Slots:
    """Return where each expert stands on the other side, ``[..., top_k]``; -1 where it does not.

    Args:
        ids: Expert ids, ``[..., top_k]``.
        others: Those of the other side, the same shape.
    """
    slots = np.full(ids.shape, -1, np.int16)
    for slot in range(others.shape[-1]):
        slots[ids == others[..., slot : slot + 1]] = slot
    return slots


def jaccard(ids: Ids, others: Ids) -> Floats:
    """Return how many experts both have over those that any has, ``[...]``: 1 is the same set.

    Args:
        ids: As of `slots_in`.
        others: As of `slots_in`.

    Source: Jaccard 1912, "The Distribution of the Flora in the Alpine Zone".
    """
    return _jaccard(slots_in(ids, others))


def _jaccard(slots: Slots) -> Floats:
    num_common = (slots >= 0).sum(axis=-1)
    result: Floats = num_common / (2 * slots.shape[-1] - num_common)
    return result


def weight_differences(ids: Ids, weights: Weights, others: Ids, other_weights: Weights) -> Floats:
    """Return ``abs(w - v)`` of each expert that both sides have, ``[..., top_k]``; NaN elsewhere.

    Args:
        ids: As of `slots_in`.
        weights: Routing weights, of the same shape.
        others: As of `slots_in`.
        other_weights: Those of the other side.
    """
    return _weight_differences(slots_in(ids, others), weights, other_weights)


def _weight_differences(slots: Slots, weights: Weights, other_weights: Weights) -> Floats:
    theirs = np.take_along_axis(other_weights, np.maximum(slots, 0).astype(np.intp), axis=-1)
    return np.where(slots >= 0, np.abs(weights.astype(np.float64) - theirs), np.nan)


def exchange_gap(ids: Ids, weights: Weights, others: Ids, other_weights: Weights) -> Floats:
    """Return how far above the cut the exchanged experts are, ``[...]``; 0 where none is.

    Infinite where a weight is NaN, so that a broken router is no near-tie.

    With ``c`` the lowest weight that either side selected, and ``w`` the heaviest expert of either
    side that the other one lacks: ``w / c - 1``. Of a softmax that is, nearly, a distance of
    logits. It is the least that must have changed, not all that did: routes lack the weights of
    experts that were not selected. Of top-1 it is no more than how the two weights differ; and
    where a bias takes part in the selection (DeepSeek-V3), the cut is not one of weights.

    Args:
        ids: As of `slots_in`.
        weights: Routing weights, of the same shape, none negative.
        others: As of `slots_in`.
        other_weights: Those of the other side.
    """
    mine, theirs = weights.astype(np.float64), other_weights.astype(np.float64)
    heaviest = np.maximum(
        np.where(slots_in(ids, others) < 0, mine, 0).max(axis=-1),
        np.where(slots_in(others, ids) < 0, theirs, 0).max(axis=-1),
    )
    cut = np.minimum(mine.min(axis=-1), theirs.min(axis=-1))
    infinite = np.where((heaviest == 0) & ~np.isnan(cut), 1.0, np.inf)
    ratio: Floats = np.divide(heaviest, cut, out=infinite, where=(heaviest > 0) & (cut > 0))
    return ratio - 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Differing:
    """Which of the rows that were compared differ, ``[num_rows, num_layers]`` each."""

    sets: Flags
    """Whether the experts are others."""
    near_ties: Flags
    """Whether they are, and by no more than a near-tie."""
    gaps: Floats
    """The `exchange_gap`; infinite where the experts are others and weights are not known."""


class Differences:
    """Adds up how the same rows of two servers differ, by layer; with a bootstrap of the requests.

    Attributes:
        loads: The selections of each side.
        largest_gap: The largest `exchange_gap` of any row, ``[num_layers]``.
        requests: The numbers of the requests.

    Args:
        num_layers: Layers.
        num_experts: Experts a layer.
        near_tie: The `exchange_gap` up to which a row with other experts is a near-tie.
        num_replicates: Replicates.
        seed: As of `request_weights`.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        near_tie: float = 0.0,
        num_replicates: int = NUM_REPLICATES,
        seed: int = 0,
    ) -> None:
        self._near_tie, self._seed = near_tie, seed
        self._sums: Floats = np.zeros((len(_QUANTITIES), num_layers))
        self._resampled: Floats = np.zeros((num_replicates, len(_QUANTITIES), num_layers))
        self.largest_gap: Floats = np.zeros(num_layers)
        self.loads = tuple(Loads(num_layers, num_experts) for _ in range(2))
        self._load_replicates = tuple(
            LoadReplicates(num_layers, num_experts, num_replicates=num_replicates, seed=seed)
            for _ in range(2)
        )
        self.requests: set[int] = set()

    def add(self, rows: Rows, others: Rows) -> Differing:
        """Compare rows.

        Args:
            rows: Of one side; requests are told apart by its numbers.
            others: The same tokens on the other side, in the same order.

        Raises:
            ValueError: The two have not as many rows, layers or experts a token.
        """
        if rows.topk_ids.shape != others.topk_ids.shape:
            raise ValueError(
                f"rows must be of one shape, got {rows.topk_ids.shape} and {others.topk_ids.shape}"
            )
        found, differing = _compared(rows, others, self._near_tie)
        if rows.num_rows:
            self._resample(rows, found)
            np.maximum(self.largest_gap, differing.gaps.max(axis=0), out=self.largest_gap)
            sides = (rows, dataclasses.replace(others, requests=rows.requests))
            for side, load, replicates in zip(
                sides, self.loads, self._load_replicates, strict=True
            ):
                load.add(side)
                replicates.add(side)
        return differing

    def _resample(self, rows: Rows, found: Floats) -> None:
        """Add up ``[len(_QUANTITIES), num_rows, num_layers]`` by request, and weigh that."""
        requests, places = rows.request_places
        self.requests.update(requests.tolist())
        starts = np.concatenate([[0], np.cumsum(np.bincount(places))[:-1]])
        in_order = found[:, np.argsort(places, kind="stable")]
        by_request = np.add.reduceat(in_order, starts, axis=1)
        self._sums += by_request.sum(axis=1)
        weights = request_weights(requests, len(self._resampled), self._seed).astype(np.float64)
        self._resampled += np.einsum("nr,qnl->rql", weights, by_request, optimize=True)

    def __add__(self, other: Self) -> Self:
        """Return both together.

        Raises:
            ValueError: They are of other near-ties, or of another seed.
        """
        if (self._near_tie, self._seed) != (other._near_tie, other._seed):
            raise ValueError("differences of other near-ties, or of another seed, do not add up")
        num_replicates, _, num_layers = self._resampled.shape
        result = type(self)(
            num_layers, self.loads[0].counts.shape[-1], near_tie=self._near_tie,
            num_replicates=num_replicates, seed=self._seed,
        )  # fmt: skip
        result._sums = self._sums + other._sums
        result._resampled = self._resampled + other._resampled
        result.largest_gap = np.maximum(self.largest_gap, other.largest_gap)
        result.requests = self.requests | other.requests
        for name in ("loads", "_load_replicates"):
            pairs = zip(getattr(self, name), getattr(other, name), strict=True)
            setattr(result, name, tuple(one + another for one, another in pairs))
        return result

    @property
    def num_rows(self) -> int:
        """Rows that were compared."""
        return self.loads[0].num_rows

    @property
    def values(self) -> dict[str, Floats]:
        """The figures of each layer, ``[num_layers]`` each, NaN where there is nothing of it.

        ===========  ==============================================================================
        `rows`       Share of the rows with other experts, near-ties left out.
        `near_ties`  Share of the rows with other experts whose `exchange_gap` is a near-tie's.
        `order`      Share of the rows with the same experts in another order.
        `first`      Share of the rows with other experts here, and in no layer before.
        `jaccard`    Mean of `jaccard`.
        `weights`    Mean of `weight_differences`; NaN where a weight is.
        `loads`      `moescope.analysis.jensen_shannon_bits` of the two loads.
        ===========  ==============================================================================
        """
        return _figures(self._sums, *(one.total for one in self.loads))

    @property
    def replicates(self) -> dict[str, Floats]:
        """The same in each replicate, ``[num_replicates, num_layers]`` each."""
        return _figures(self._resampled, *(one.counts for one in self._load_replicates))


def _compared(rows: Rows, others: Rows, near_tie: float) -> tuple[Floats, Differing]:
    """Return what `_QUANTITIES` name of each row and layer, and which of them differ."""
    slots = slots_in(rows.topk_ids, others.topk_ids)
    sets: Flags = np.any(slots < 0, axis=-1)
    in_order = (slots == np.arange(slots.shape[-1])).all(axis=-1)
    gaps = np.where(sets, np.inf, 0.0)
    weights = num_weights = np.zeros(sets.shape)
    if rows.topk_weights is not None and others.topk_weights is not None:
        gaps[sets] = exchange_gap(
            rows.topk_ids[sets], rows.topk_weights[sets],
            others.topk_ids[sets], others.topk_weights[sets],
        )  # fmt: skip
        differences = _weight_differences(slots, rows.topk_weights, others.topk_weights)
        weights = differences.sum(axis=-1, where=slots >= 0)
        num_weights = (slots >= 0).sum(axis=-1).astype(np.float64)
    near_ties = sets & (gaps <= near_tie)
    found = np.stack(
        (
            *(np.ones(sets.shape), sets & ~near_ties, near_ties, ~sets & ~in_order),
            *(sets & (np.cumsum(sets, axis=1) == 1), _jaccard(slots), weights, num_weights),
        )
    ).astype(np.float64)
    return found, Differing(sets=sets, near_ties=near_ties, gaps=gaps)


def _figures(
    sums: Floats, load: npt.NDArray[np.number], other_load: npt.NDArray[np.number]
) -> dict[str, Floats]:
    """Return figures ``[..., num_layers]`` of sums ``[..., len(_QUANTITIES), num_layers]``."""
    of = {name: sums[..., place, :] for place, name in enumerate(_QUANTITIES)}
    figures = {
        name: _ratio(of[name], of["num_weights" if name == "weights" else "all"])
        for name in FIGURES[:-1]
    }
    return figures | {"loads": jensen_shannon_bits(load, other_load)}


def _ratio(value: Floats, total: Floats) -> Floats:
    ratio: Floats = np.divide(value, total, out=np.full(value.shape, np.nan), where=total > 0)
    return ratio
