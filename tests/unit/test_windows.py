"""Windows of the counts: bounded marks, oldest dropped."""

from __future__ import annotations

import numpy as np
import pytest
from builders import Clock, make_rows

from moescope_service.collector import windows
from moescope_service.collector.counters import ExpertCounters
from moescope_service.collector.rows import Written
from moescope_service.collector.windows import MAX_WINDOW_S, SLICE_S, CountWindows


def make(num_layers=2, num_experts=8):
    clock = Clock()
    counters = ExpertCounters(list(range(num_layers)), num_experts)
    return clock, counters, CountWindows(counters, clock)


def route(counters, num_rows):
    counters.add(Written(make_rows(0, num_rows)[0], np.zeros(num_rows, np.bool_)))


def test_an_hour_is_kept_and_not_more():
    clock, counters, kept = make()
    for _ in range(500):
        route(counters, 1)
        clock.now_s += SLICE_S
        kept.tick()
    counts, rows, covered_s = kept.last(MAX_WINDOW_S)
    assert covered_s == MAX_WINDOW_S
    assert rows.tolist() == [MAX_WINDOW_S / SLICE_S, 0]
    assert counts.sum() == rows.sum() * 2 * 2
    assert kept.last(1e9)[2] == kept.kept_s == MAX_WINDOW_S


def test_marks_are_set_when_they_are_due():
    clock, counters, kept = make()
    for _ in range(50):
        clock.now_s += 1.0
        route(counters, 1)
        kept.tick()
    assert kept.last(20.0)[1].tolist() == [20, 0]
    assert kept.last(25.0)[2] == 30.0


@pytest.mark.parametrize(("num_layers", "num_experts"), [(58, 256), (94, 512)])
def test_the_marks_of_a_big_model_fit(num_layers, num_experts, monkeypatch):
    monkeypatch.setattr(windows, "MAX_BYTES", 8 * 2**20)
    clock, _, kept = make(num_layers, num_experts)
    for _ in range(100):
        clock.now_s += SLICE_S
        kept.tick()
    held = sum(totals.nbytes for _, totals, _ in kept._marks)
    assert held <= 8 * 2**20
    assert kept.last(MAX_WINDOW_S)[2] == kept.kept_s > 0
