"""Counts of the last seconds, minutes, up to an hour."""

from __future__ import annotations

import collections
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from moescope_service.collector.counters import ExpertCounters
from moescope_service.queries import MAX_WINDOW_S

SLICE_S = 10.0
"""Windows begin on marks this far apart: one covers up to that much more than it was asked for."""
MAX_BYTES = 64 * 2**20
"""Bound of the marks' memory.

A mark is 238 kB for 58 layers of 256 experts: 46 minutes of them; smaller models have the hour."""

Counts = npt.NDArray[np.int64]


class CountWindows:
    """Marks of the totals every ten seconds; a window is what came since one of them.

    Args:
        counters: Whose totals are marked.
        clock: Monotonic seconds.
    """

    def __init__(self, counters: ExpertCounters, clock: Callable[[], float]) -> None:
        self._counters = counters
        self._clock = clock
        fitting = MAX_BYTES // counters.totals.nbytes
        num_marks = max(2, min(int(MAX_WINDOW_S / SLICE_S) + 1, fitting))
        self.kept_s = (num_marks - 1) * SLICE_S
        """The longest window that can be asked for, in seconds."""
        self._marks: collections.deque[tuple[float, Counts, Counts]]
        self._marks = collections.deque(maxlen=num_marks)
        self.begin()

    def begin(self) -> None:
        """Forget what was: no window reaches behind this moment."""
        self._marks.clear()
        self._mark()

    def tick(self) -> None:
        """Set a mark when one is due; called at least once a second."""
        if self._clock() - self._marks[-1][0] >= SLICE_S:
            self._mark()

    def last(self, window_s: float) -> tuple[Counts, Counts, float]:
        """Return what came in the last seconds.

        Args:
            window_s: The window, in seconds.

        Returns:
            Selections ``[num_phases, num_layers, num_experts]``, rows ``[num_phases]``, and the
            seconds that they really cover: less than asked for where that much is not known yet.
        """
        now_s = self._clock()
        time_s, totals, rows = self._marks[0]
        for mark in reversed(self._marks):
            if mark[0] <= now_s - window_s:
                time_s, totals, rows = mark
                break
        return self._counters.totals - totals, self._counters.rows - rows, now_s - time_s

    def _mark(self) -> None:
        counters = self._counters
        self._marks.append((self._clock(), counters.totals.copy(), counters.rows.copy()))
