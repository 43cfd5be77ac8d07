"""Leaves rows out of a reply that other weights computed than a query wants."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope.trace import RouteTrace, Source
from moescope_service.queries import RoutesQuery


class Staleness:
    """Tells which rows are stale for a query.

    Args:
        query: Says which weights may have computed the rows.
        present: Number of the engine's weights.
    """

    def __init__(self, query: RoutesQuery, present: int) -> None:
        self._only = query.weights_version
        staleness = query.max_staleness
        self._oldest = None if staleness is None else max(0, present - staleness)

    def page(self, page: RouteTrace, trace: RouteTrace) -> RouteTrace:
        """Return a page whose stale rows are missing; it is incomplete where the trace has any."""
        if not self._are_stale(trace.weights_versions[:, 1]).any():
            return page
        numbers = page.weights_version
        stale = np.zeros(page.num_rows, np.bool_) if numbers is None else self._are_stale(numbers)
        changes: dict[str, Any] = {"topk_ids": page.topk_ids.copy(), "source": page.source.copy()}
        changes["topk_ids"][stale] = 0
        changes["source"][stale] = Source.MISSING
        if page.topk_weights is not None:
            changes["topk_weights"] = page.topk_weights.copy()
            changes["topk_weights"][stale] = 0
        return dataclasses.replace(page, complete=False, **changes)

    def _are_stale(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        stale = np.zeros(len(numbers), np.bool_)
        if self._only is not None:
            stale |= numbers != self._only
        if self._oldest is not None:
            stale |= numbers < self._oldest  # and so those of mixed rows
        return stale
