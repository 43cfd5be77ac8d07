"""Selections by phase, layer and expert."""

from __future__ import annotations

import time

import numpy as np
from builders import make_rows

from moescope_service.collector.counters import ExpertCounters
from moescope_service.collector.rows import Written


def written(first, is_decode):
    return Written(make_rows(first, len(is_decode))[0], np.array(is_decode, np.bool_))


def test_every_selection_counts_in_its_layer_and_phase():
    counters = ExpertCounters([1, 3], 8)
    counters.add(written(0, [False, True, False]))
    ids = make_rows(0, 3)[0]
    want = np.zeros((2, 2, 8), np.int64)
    for row, phase in enumerate([0, 1, 0]):
        for layer in range(2):
            for expert in ids[row, layer]:
                want[phase, layer, expert] += 1
    np.testing.assert_array_equal(counters.totals, want)
    assert counters.rows.tolist() == [2, 1]


def test_rows_add_up_and_an_empty_step_adds_nothing():
    counters = ExpertCounters([1, 3], 8)
    for _ in range(3):
        counters.add(written(0, [True] * 4))
        counters.add(written(0, []))
    assert counters.totals.sum() == counters.rows.sum() * 2 * 2 == 48


def test_reset_leaves_the_totals_alone():
    counters = ExpertCounters([1, 3], 8)
    counters.add(written(0, [False] * 3))
    before = time.time()
    counters.reset()
    assert before <= counters.since_s <= time.time()
    counts, rows = counters.since_reset()
    assert counts.sum() == rows.sum() == 0
    counters.add(written(5, [True]))
    counts, rows = counters.since_reset()
    assert (counts.sum(), rows.tolist()) == (4, [0, 1])
    assert (counters.totals.sum(), counters.rows.tolist()) == (16, [3, 1])


def test_the_highest_expert_of_the_last_layer_in_uint8_and_uint16():
    for num_experts, dtype in ((256, np.uint8), (512, np.uint16)):
        counters = ExpertCounters(range(3), num_experts)
        ids = np.full((1, 3, 1), num_experts - 1, dtype)
        counters.add(Written(ids, np.array([True])))
        assert counters.totals[1, :, -1].tolist() == [1, 1, 1]
        assert counters.totals.sum() == 3
