"""Counts of expert selections by phase, layer and expert."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moescope_service.collector.rows import Written
from moescope_service.histogram import PHASES, count_selections


class ExpertCounters:
    """Every routing computed, of all traffic, kept or not; recomputed rows count again.

    ``totals`` never go back, as Prometheus wants it; `since_reset` is what the analysis
    endpoints show.
    """

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self.layers = list(layers)
        self.num_experts = num_experts
        self.totals = np.zeros((len(PHASES), len(layers), num_experts), np.int64)
        """Selections, ``[num_phases, num_layers, num_experts]``."""
        self.rows = np.zeros(len(PHASES), np.int64)
        """Rows, ``[num_phases]``."""
        self._column = {layer: column for column, layer in enumerate(layers)}
        self.reset()

    def add(
        self, written: Written, layers: Sequence[int] | None = None, *, with_rows: bool = True
    ) -> npt.NDArray[np.int64]:
        """Count the selections of a step.

        Args:
            written: What was routed.
            layers: In which layers, those of one pipeline stage; None: in all.
            with_rows: Whether to count the rows too: every stage has the same ones.

        Returns:
            The step's own, ``[num_phases, num_layers, num_experts]``.
        """
        selections = count_selections(written.topk_ids, written.is_decode, self.num_experts)
        decode = int(np.count_nonzero(written.is_decode))
        rows = np.array([len(written.is_decode) - decode, decode]) * with_rows
        self.add_counted(selections, rows, layers or self.layers)
        return selections

    def add_counted(
        self, selections: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], layers: Sequence[int]
    ) -> None:
        """Add what a worker has counted itself.

        Args:
            selections: ``[num_phases, num_layers, num_experts]``, of some layers.
            rows: ``[num_phases]``.
            layers: Which layers.
        """
        self.totals[:, [self._column[layer] for layer in layers]] += selections
        self.rows += rows

    def reset(self) -> None:
        """Start `since_reset` anew."""
        self._totals_then, self._rows_then = self.totals.copy(), self.rows.copy()
        self.since_s = time.time()
        """Unix time of the last reset, in seconds."""

    def since_reset(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return selections ``[num_phases, num_layers, num_experts]`` and rows ``[num_phases]``."""
        return self.totals - self._totals_then, self.rows - self._rows_then
