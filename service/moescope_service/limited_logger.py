"""Messages that come in floods, logged in part."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class LimitedLogger:
    """Logs one message an interval, and how many were left out; for one thread.

    Args:
        logger: Where to.
        interval_s: Shortest time between two messages, in seconds.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        logger: logging.Logger,
        interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._next_s = float("-inf")
        self._num_left_out = 0

    def exception(self, message: str, *args: object) -> None:
        """Log what was caught, with its traceback."""
        self._log(logging.ERROR, message, args, with_traceback=True)

    def warning(self, message: str, *args: object) -> None:
        """Log a warning."""
        self._log(logging.WARNING, message, args, with_traceback=False)

    def tick(self) -> None:
        """Say how many messages were left out, if any, once the interval has passed."""
        if self._num_left_out and self._clock() >= self._next_s:
            self._logger.warning("left out %d messages like the last one", self._num_left_out)
            self._num_left_out = 0

    def _log(
        self, level: int, message: str, args: tuple[object, ...], *, with_traceback: bool
    ) -> None:
        self.tick()
        if self._clock() < self._next_s:
            self._num_left_out += 1
            return
        self._next_s = self._clock() + self._interval_s
        self._logger.log(level, message, *args, exc_info=with_traceback)
