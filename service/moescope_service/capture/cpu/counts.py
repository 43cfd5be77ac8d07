"""Counts the routing of steps in host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moescope_service.capture.counting import Totals
from moescope_service.capture.cpu.sink import CpuSink
from moescope_service.histogram import PHASES, count_selections


class CpuCounts:
    """Adds up what a `CpuSink` holds; see `moescope_service.capture.counting.CountSink`.

    Args:
        sink: Holds the rows of the step that runs.
        num_layers: Columns of the rows.
        num_experts: Routed experts a layer.
    """

    def __init__(self, sink: CpuSink, num_layers: int, num_experts: int) -> None:
        self._sink = sink
        self._num_experts = num_experts
        self._selections = np.zeros((len(PHASES), num_layers, num_experts), np.int64)
        self._rows_missed = 0

    def hook(self, column: int, router: Any) -> None:
        """Let one router hand over its results."""
        self._sink.hook(column, router)

    def start_step(self) -> None:
        """Forget earlier rows."""
        self._sink.start_step()

    def count(self, first_row: npt.NDArray[np.int32], is_decode: npt.NDArray[np.bool_]) -> None:
        """Add the step that just ran."""
        rows = self._sink.take(int(first_row[-1]))
        if isinstance(rows, str):
            self._rows_missed += int(first_row[-1])
            return
        by_row = np.repeat(is_decode, np.diff(first_row))
        self._selections += count_selections(rows.topk_ids, by_row, self._num_experts)

    def skip(self, num_rows: int) -> None:
        """Leave out the step that just ran."""

    def totals(self) -> Totals:
        """Return what was counted so far."""
        return Totals(self._selections.copy(), self._rows_missed)
