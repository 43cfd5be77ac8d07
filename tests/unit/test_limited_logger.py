"""A flood of messages is logged in part, and its size is told."""

from __future__ import annotations

import logging

import pytest

from benchmarks.simulation.parts import Clock
from moescope_service.limited_logger import LimitedLogger

logger = logging.getLogger("moescope.test")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_one_a_second_and_how_many_were_left_out(clock, caplog):
    limited_logger = LimitedLogger(logger, clock=clock)
    for number in range(1000):
        try:
            int("bad")
        except ValueError:
            limited_logger.exception("bad %d", number)
    assert [record.getMessage() for record in caplog.records] == ["bad 0"]
    assert caplog.records[0].exc_info is not None
    limited_logger.tick()
    assert len(caplog.records) == 1
    clock.now_s += 1
    limited_logger.tick()
    limited_logger.tick()
    assert [record.getMessage() for record in caplog.records[1:]] == [
        "left out 999 messages like the last one"
    ]


def test_the_next_one_tells_it_too(clock, caplog):
    limited_logger = LimitedLogger(logger, clock=clock)
    for _ in range(3):
        limited_logger.warning("slow")
    clock.now_s += 1
    limited_logger.warning("slow")
    assert [record.getMessage() for record in caplog.records] == [
        "slow", "left out 2 messages like the last one", "slow",
    ]  # fmt: skip
