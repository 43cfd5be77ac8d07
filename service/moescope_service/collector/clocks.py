"""How old messages are, by clocks that may differ."""

from __future__ import annotations

import math


class SenderClock:
    """The clock of a worker, compared with the collector's.

    Of another machine's clock nobody knows how far it is off: the message that came fastest counts
    as one that took no time, and the others are as old as they came later than that.

    Args:
        is_ours: Whether it is the clock of this machine.
    """

    def __init__(self, *, is_ours: bool) -> None:
        self._ahead_s = 0.0 if is_ours else math.inf
        self._is_ours = is_ours

    def age_s(self, sent_s: float, now_s: float) -> float:
        """Return how many seconds ago a message was made; at least 0.

        Args:
            sent_s: When, by the worker's clock, in Unix seconds.
            now_s: The present time by the collector's.
        """
        late_s = now_s - sent_s
        if not self._is_ours:
            self._ahead_s = min(self._ahead_s, late_s)
        return max(0.0, late_s - self._ahead_s)
