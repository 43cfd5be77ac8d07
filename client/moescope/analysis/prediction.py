"""How well a layer's experts are predicted from those of the layer before it."""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np
import numpy.typing as npt

from moescope.analysis import bootstrap
from moescope.analysis.rows import Rows

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer]
SAMPLE_ROWS = 16_384


class RowSample:
    """Keeps the rows whose `row_numbers` are lowest: a sample that does not depend on the order.

    Args:
        max_rows: How many; more only where rows of one request and position are equal.
    """

    def __init__(self, max_rows: int = SAMPLE_ROWS) -> None:
        self._max_rows = max_rows
        self._parts: list[Rows] = []

    def add(self, rows: Rows) -> None:
        """Take rows."""
        if rows.num_rows:
            kept = rows[_lowest(row_numbers(rows), self._max_rows)]
            joined = Rows.joined([*self._parts, kept])
            self._parts = [joined[_lowest(row_numbers(joined), self._max_rows)]]

    def __add__(self, other: Self) -> Self:
        """Return the sample of both."""
        result = type(self)(self._max_rows)
        for part in (*self._parts, *other._parts):
            result.add(part)
        return result

    @property
    def rows(self) -> Rows | None:
        """The rows, in the order of their numbers; None where there is none."""
        if not self._parts:
            return None
        (rows,) = self._parts
        return rows


def row_numbers(rows: Rows) -> npt.NDArray[np.uint64]:
    """Return 64 bits for each row's request and position, ``[num_rows]``, as if at random.

    Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators", figure 16.
    """
    mixed: npt.NDArray[np.uint64] = rows.requests + (
        rows.positions.astype(np.uint64) + np.uint64(1)
    ) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _lowest(numbers: npt.NDArray[np.uint64], max_rows: int) -> npt.NDArray[np.intp]:
    order = np.argsort(numbers, kind="stable")
    if len(order) <= max_rows:
        return order
    return order[: np.searchsorted(numbers[order], numbers[order[max_rows - 1]], side="right")]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NextLayer:
    """How often predictions of the next layer's experts are right, ``[num_layers - 1]``.

    Place ``l`` is the prediction of layer ``l + 1`` from layer ``l``. NaN where one half of the
    requests has no row.
    """

    hit_rate: Floats
    """Share of a token's experts that are among the top-k predicted from its experts before."""
    marginal_hit_rate: Floats
    """The same, of the top-k that the layer selects most, whatever came before."""
    hit_rate_interval: Floats
    """From, to, ``[2, num_layers - 1]``: 95%, by resampled requests."""
    marginal_hit_rate_interval: Floats
    gain_interval: Floats
    """That of the difference of the two."""
    num_rows: int
    """Tokens that were predicted."""


def next_layer(rows: Rows, *, seed: int = 0) -> NextLayer:
    """Predict each layer's experts from those of the layer before it.

    Requests are halved by the lowest bit of their number. Each half is predicted from counts of the
    other half alone, and the hits of both are taken together. With ``N_ij`` tokens that go to i and
    then to j, ``N_i`` to i, and ``p_j`` the share of all tokens that go to j,
    ``P(j|i) = (N_ij + p_j) / (N_i + 1)``: one token of the layer's own share keeps what was never
    seen from 0 and 1. A token of experts S goes to j with ``1 - prod(1 - P(j|i) for i in S)``; the
    top-k of that are predicted. The marginal prediction is the top-k of ``p_j``. The hit rate is
    the share of a token's k experts that were predicted, the mean over tokens; by chance it is
    ``top_k / num_experts``.

    Args:
        rows: At most some ten thousand, such as those of a `RowSample`.
        seed: That of the intervals.

    Source: noisy-or, Pearl 1988, "Probabilistic Reasoning in Intelligent Systems", section 4.3.
    """
    half = (rows.requests & np.uint64(1)).astype(np.bool_)
    hits = np.full((2, rows.num_rows, max(rows.num_layers - 1, 0)), np.nan)
    for test in (half, ~half):
        if test.any() and not test.all():
            for layer in range(rows.num_layers - 1):
                before, after = rows.topk_ids[:, layer], rows.topk_ids[:, layer + 1]
                fitted = _fit(before[~test], after[~test], rows.num_experts)
                hits[:, test, layer] = _hits(*fitted, before[test], after[test])
    requests, places = rows.request_places
    weights = bootstrap.request_weights(requests, seed=seed)
    sums = np.stack([_by_request(one, places, len(requests)) for one in hits])
    sizes = np.bincount(places, minlength=len(requests))
    rates = (
        np.einsum("rb,hrl->bhl", weights, sums)
        / np.maximum(weights.T.astype(np.float64) @ sizes, 1e-9)[:, None, None]
    )
    rates[(weights.T @ sizes) == 0] = np.nan
    mean = hits.mean(axis=1) if rows.num_rows else np.full(hits[:, 0].shape, np.nan)
    conditional, marginal = mean
    return NextLayer(
        hit_rate=conditional,
        marginal_hit_rate=marginal,
        hit_rate_interval=bootstrap.interval(rates[:, 0]),
        marginal_hit_rate_interval=bootstrap.interval(rates[:, 1]),
        gain_interval=bootstrap.interval(rates[:, 0] - rates[:, 1]),
        num_rows=rows.num_rows,
    )


def _fit(before: Ids, after: Ids, num_experts: int) -> tuple[Floats, Floats]:
    """Return ``log(1 - P(j|i))``, ``[num_experts, num_experts]``, and ``p_j``."""
    codes = before[:, :, None].astype(np.int64) * num_experts + after[:, None]
    pairs = np.bincount(codes.ravel(), minlength=num_experts**2)
    pairs = pairs.reshape(num_experts, num_experts)
    of_one = np.bincount(before.ravel(), minlength=num_experts)
    marginal: Floats = np.bincount(after.ravel(), minlength=num_experts) / len(after)
    p = (pairs + marginal) / (of_one[:, None] + 1)
    return np.log1p(-np.minimum(p, 1 - 1e-9)), marginal


def _hits(absent: Floats, marginal: Floats, before: Ids, after: Ids) -> Floats:
    """Return the shares of hits of both predictions, ``[2, num_rows]``."""
    top_k = after.shape[1]
    absence = np.zeros((len(before), len(marginal)), np.float32)
    table = absent.astype(np.float32)
    for ids in before.T:
        absence += table[ids]
    predicted = np.argpartition(absence, top_k - 1, axis=1)[:, :top_k]
    usual = np.argsort(-marginal, kind="stable")[:top_k]
    return np.stack(
        [
            (after[:, :, None] == predicted[:, None]).any(axis=2).mean(axis=1),
            np.isin(after, usual).mean(axis=1),
        ]
    )


def _by_request(hits: Floats, places: npt.NDArray[np.intp], num_requests: int) -> Floats:
    """Add up the hits of each request, ``[num_requests, num_layers - 1]``."""
    sums = np.zeros((num_requests, hits.shape[1]))
    np.add.at(sums, places, hits)
    return sums
