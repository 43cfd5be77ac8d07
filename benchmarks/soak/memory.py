"""The memory of processes over time, and whether it grows."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping

import psutil

MIB = 2**20
_MIN_SAMPLES = 8
"""Fewer say nothing of growth."""


class Memory:
    """Samples of resident memory, in MiB, by the name of a process.

    Args:
        started_s: `time.monotonic` at the beginning.
    """

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self.samples: dict[str, list[tuple[float, float]]] = {}
        """(seconds since the beginning, MiB), by name."""

    def take(self, pids: Mapping[str, int]) -> None:
        """Take one sample of each process that still runs."""
        now_s = time.monotonic() - self._started_s
        for name, pid in pids.items():
            try:
                rss = psutil.Process(pid).memory_info().rss
            except psutil.NoSuchProcess:
                continue
            self.samples.setdefault(name, []).append((round(now_s, 1), round(rss / MIB, 1)))

    def growth_mib(self) -> dict[str, float]:
        """Return by how much the last quarter's median is above that of the second quarter.

        In the first quarter caches fill and stores reach their limit.
        """
        grown = {}
        for name, samples in self.samples.items():
            quarter = len(samples) // 4
            if len(samples) >= _MIN_SAMPLES:
                values = [mib for _, mib in samples]
                second, last = values[quarter : 2 * quarter], values[-quarter:]
                grown[name] = round(statistics.median(last) - statistics.median(second), 1)
        return grown

    def thinned(self, count: int = 1000) -> dict[str, list[tuple[float, float]]]:
        """Return at most so many samples in all, evenly spread."""
        count = max(2, count // max(1, len(self.samples)))
        return {
            name: samples[:: max(1, -(-len(samples) // count))]
            for name, samples in self.samples.items()
        }


class Sampler(threading.Thread):
    """Takes samples every now and then, until it is stopped.

    Args:
        memory: Takes them.
        pids: Says which processes there are, by name.
        every_s: Seconds between two samples.
    """

    def __init__(
        self, memory: Memory, pids: Callable[[], Mapping[str, int]], every_s: float
    ) -> None:
        super().__init__(name="soak-memory", daemon=True)
        self._memory, self._pids, self._every_s = memory, pids, every_s
        self._is_over = threading.Event()

    def run(self) -> None:
        """Take samples; in a thread of its own."""
        while not self._is_over.wait(self._every_s):
            self._memory.take(self._pids())

    def stop(self) -> None:
        """End the thread."""
        self._is_over.set()
        self.join()
