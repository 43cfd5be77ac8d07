"""Counts which tokens went to an expert, from rows of traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from moescope.trace import RouteTrace


@dataclasses.dataclass(frozen=True, slots=True)
class TokenAtExpert:
    """How often a token went to an expert, and where the newest trace has that first."""

    token_id: int
    count: int
    """Rows of this token that have the expert."""
    total: int
    """Rows of this token."""
    share: float
    """The one over the other."""
    request_id: str
    index: int
    position: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Taken:
    """The rows of a trace that are not missing."""

    request_id: str
    index: int
    token_ids: npt.NDArray[np.int32]
    has_expert: npt.NDArray[np.bool_]
    positions: npt.NDArray[np.int64]


class ExpertTokens:
    """Takes rows of one layer, and counts the tokens of those that have an expert.

    Args:
        expert: Its number.
        max_requests: Requests that are taken.
        max_rows: Rows after which no more traces are taken.
    """

    def __init__(self, expert: int, max_requests: int, max_rows: int) -> None:
        self._expert, self._max_requests, self._max_rows = expert, max_requests, max_rows
        self._requests: set[tuple[str, float]] = set()
        self._taken: list[_Taken] = []
        self.num_rows = 0
        """Rows taken that are not missing."""
        self.num_missing = 0
        """Rows taken that are."""
        self.is_full = False
        """Whether no more is taken."""

    @property
    def num_requests(self) -> int:
        """Requests of which rows were taken."""
        return len(self._requests)

    @property
    def num_selected(self) -> int:
        """Rows that have the expert."""
        return sum(int(np.count_nonzero(one.has_expert)) for one in self._taken)

    def add(self, traces: list[RouteTrace]) -> None:
        """Take rows in, until there are enough.

        Args:
            traces: Of one layer, with token ids; the newest first, and pages of one in their order.
        """
        for trace in traces:
            request = (trace.request_id, trace.created_s)
            is_enough = self.num_rows + self.num_missing >= self._max_rows
            is_one_more = request not in self._requests
            self.is_full = is_enough or (is_one_more and self.num_requests == self._max_requests)
            if self.is_full:
                return
            self._requests.add(request)
            self._take(trace)

    def _take(self, trace: RouteTrace) -> None:
        if trace.token_ids is None:
            raise ValueError(f"the trace of {trace.request_id!r} has no token ids")
        (there,) = np.nonzero(trace.present)
        self.num_rows += len(there)
        self.num_missing += trace.num_rows - len(there)
        has_expert = (trace.topk_ids[there, 0] == self._expert).any(axis=-1)
        ids, positions = trace.token_ids[there], trace.start + there
        self._taken.append(_Taken(trace.request_id, trace.index, ids, has_expert, positions))

    def top(self, limit: int) -> list[TokenAtExpert]:
        """Return the tokens that went to the expert most often; of equal ones the lowest id first.

        Args:
            limit: How many at most.
        """
        if not self._taken:
            return []
        ids = np.concatenate([one.token_ids for one in self._taken])
        has_expert = np.concatenate([one.has_expert for one in self._taken])
        unique, number = np.unique(ids, return_inverse=True)
        totals = np.bincount(number, minlength=len(unique))
        counts = np.bincount(number[has_expert], minlength=len(unique))
        (rows,) = np.nonzero(has_expert)
        selected, first = np.unique(ids[rows], return_index=True)
        order = np.lexsort((unique, -counts))[: min(limit, len(selected))]
        first_rows = rows[first[np.searchsorted(selected, unique[order])]]
        return [
            TokenAtExpert(
                int(unique[at]),
                int(counts[at]),
                int(totals[at]),
                float(counts[at] / totals[at]),
                *place,
            )
            for at, place in zip(order, self._places(first_rows), strict=True)
        ]

    def _places(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[str, int, int]]:
        """Yield the request, the choice and the position of rows, counted over all traces."""
        ends = np.cumsum([len(one.positions) for one in self._taken])
        for row, trace in zip(rows, np.searchsorted(ends, rows, "right"), strict=True):
            one = self._taken[trace]
            yield one.request_id, one.index, int(one.positions[row - ends[trace]])
