"""The collector of workers that count and ship no routes."""

from __future__ import annotations

import pytest
from builders import (
    WORKER,
    Bench,
    make_spec,
)

from moescope_service.queries import ExpertsQuery, MetricsQuery


@pytest.fixture
def bench():
    return Bench()


def test_totals_of_a_worker_that_comes_again_are_counted_once(bench):
    bench.count(WORKER, 0, [0, 0])
    bench.count(WORKER, 2, [0, 2], lost={"paused": 1})
    bench.introduce_worker(b"another connection")
    bench.count(b"another connection", 2, [0, 2], lost={"paused": 1})
    bench.count(b"another connection", 3, [1, 2], lost={"paused": 1})
    assert bench.collector.state.counters.totals.sum(-1).tolist() == [[2, 2], [4, 4]]
    assert bench.collector.state.counters.rows.tolist() == [1, 2]
    assert bench.collector.state.stats.steps == 3
    assert bench.collector.state.stats.rows_lost == {"paused": 1, "hook_missed": 0}


def test_what_a_worker_counted_before_this_collector_came_is_in_no_count(bench):
    bench.count(WORKER, 1_000_000, [1_000_000, 0])
    bench.count(WORKER, 1_000_001, [1_000_000, 1])
    for window in ({}, {"window_s": 60.0}):
        assert bench.answered(ExpertsQuery(**window)).rows == [0, 1]
    metrics = bench.answered(MetricsQuery())
    assert (metrics.rows, metrics.steps, metrics.rows_captured) == ([0, 1], 1, 1)


def test_where_a_stage_stood_is_heard_before_the_others_are_there():
    bench = Bench(make_spec(num_stages=2, layers=[1]))
    bench.count(WORKER, 5, [5, 0])
    bench.count(WORKER, 6, [6, 0])
    bench.spec = make_spec(num_stages=2, stage=1, layers=[3])
    bench.introduce_worker(b"second")
    bench.count(b"second", 7, [7, 0])
    for peer in (WORKER, b"second"):
        bench.spec = bench.collector.state.workers.get(peer).spec
        bench.count(peer, 8, [8, 0])
    assert bench.collector.state.counters.totals.sum(-1).tolist() == [[6, 2], [0, 0]]
    assert bench.collector.state.counters.rows.tolist() == [3, 0]
