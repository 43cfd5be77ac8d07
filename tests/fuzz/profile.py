"""How long the tests of this folder go on, and the unit in which they measure time."""

from __future__ import annotations

import time

from tests.examples import made_up

fuzzed = made_up(60)


def unit_s() -> float:
    """Return the time on the processor that a loop takes, 4 ms on an idle machine of 2026.

    It is what times are bounded in: a machine that is slower, or busy, is so for both.
    """
    taken = []
    for _ in range(5):
        started_s, known = time.thread_time(), {}
        for number in range(40_000):
            known[number] = str(number)
        taken.append(time.thread_time() - started_s)
    return min(taken)
