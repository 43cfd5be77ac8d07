"""Rows that other weights computed than a query wants are missing in its reply."""

from __future__ import annotations

import numpy as np
import pytest
from builders import Bench, admit
from client_fakes import make_trace

from moescope import version_runs
from moescope.trace import RouteTrace
from moescope.version_runs import MIXED
from moescope_service.collector.staleness import Staleness
from moescope_service.queries import MetricsQuery, RecentQuery, RoutesQuery


def expected(trace: RouteTrace, only: int | None, oldest: int | None) -> list[bool]:
    """Which rows are there, by a plain loop."""
    numbers = [] if trace.weights_version is None else trace.weights_version.tolist()
    return [
        bool(here)
        and (only is None or number == only)
        and (oldest is None or (number != MIXED and number >= oldest))
        for number, here in zip(numbers, trace.present, strict=True)
    ]


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize(
    ("only", "staleness"), [(1, None), (None, 0), (None, 1), (None, 5), (2, 1), (9, None)]
)
def test_rows_of_other_versions_are_missing(seed, only, staleness):
    trace = make_trace(seed, num_rows=1 + seed % 15, missing=0.3 * (seed % 2))
    if not trace.present.any():
        return
    query = RoutesQuery(wanted=[], weights_version=only, max_staleness=staleness)
    page = trace.page(seed % 3, 7)
    got = Staleness(query, 2).page(page, trace).check_values()
    oldest = None if staleness is None else 2 - staleness
    here = expected(trace, only, oldest)
    assert got.present.tolist() == here[seed % 3 : seed % 3 + 7]
    assert got.complete == (trace.complete and all(here))
    assert np.array_equal(got.topk_ids[got.present], page.topk_ids[got.present])
    assert np.array_equal(got.source[got.present], page.source[got.present])
    assert not got.topk_ids[~got.present & page.present].any()
    assert not got.topk_weights[~got.present & page.present].any()
    assert np.array_equal(got.weights_versions, page.weights_versions)
    assert np.array_equal(trace.present, make_trace_again(seed).present)


def make_trace_again(seed):
    return make_trace(seed, num_rows=1 + seed % 15, missing=0.3 * (seed % 2))


def test_without_a_stale_row_the_page_is_the_same_object():
    trace = make_trace()
    assert Staleness(RoutesQuery(wanted=[]), 9).page(trace, trace) is trace


@pytest.fixture
def bench():
    """Requests of weights 0 alone, of 0 and 2, and of mixed ones; the present ones are 2."""
    bench = Bench()
    bench.run("old")
    bench.start("both")
    bench.step(weights_version=1)
    bench.step([(0, 5, 2)], weights_version=2)
    bench.finish("both-i", output=[5, 6, 7, 8])
    bench.end()
    bench.register("mixed", [1, 2, 3, 4])
    bench.step([(0, 0, 5)], admitted=[admit(0, "mixed-i", 4, [4, 5])], weights_version=MIXED)
    bench.finish("mixed-i")
    bench.end()
    return bench


def present(bench, name, **limits):
    found, reply = bench.routes(name, **limits)
    trace = reply.traces()[found.traces[0]]
    return trace.present.tolist(), trace.complete


def test_a_query_names_the_weights(bench):
    assert present(bench, "old") == ([True] * 5, True)
    assert present(bench, "old", max_staleness=2) == ([True] * 5, True)
    assert present(bench, "old", max_staleness=1) == ([False] * 5, False)
    assert present(bench, "both", max_staleness=0) == ([False] * 5 + [True] * 2, False)
    assert present(bench, "both", weights_version=0) == ([True] * 5 + [False] * 2, False)
    assert present(bench, "mixed") == ([True] * 5, True)
    assert present(bench, "mixed", max_staleness=10) == ([False] * 5, False)


def test_every_page_of_a_trace_with_a_stale_row_is_incomplete(bench):
    assert present(bench, "both", start=5, max_staleness=0) == ([True] * 2, False)
    assert present(bench, "both", limit=2, weights_version=0) == ([True] * 2, False)
    assert present(bench, "both") == ([True] * 7, True)  # what is kept is as it was


def test_joined_pages_are_complete_where_all_of_them_are():
    first, last = make_trace().page(0, 6), make_trace().page(6, 6)
    object.__setattr__(last, "complete", False)  # the weights changed meanwhile
    assert not RouteTrace.joined([first, last]).complete
    assert RouteTrace.joined([first, make_trace().page(6, 6)]).complete


def test_the_list_has_the_oldest_and_the_newest_number(bench):
    listed = bench.answered(RecentQuery(limit=9)).sequences
    assert [
        (one.request_id, one.oldest_weights_version, one.newest_weights_version) for one in listed
    ] == [("mixed", None, None), ("both", 0, 2), ("old", 0, 0)]


def test_stale_rows_of_finished_traces_are_counted(bench):
    assert bench.answered(MetricsQuery()).stale == 5 + 5


@pytest.mark.parametrize("seed", range(50))
def test_rows_are_stale_that_are_older_than_the_newest(seed):
    trace = make_trace(seed, num_rows=20, missing=0.3 * (seed % 2))
    numbers = trace.weights_version[trace.present].tolist()
    newest = max(numbers)
    count = sum(number < newest or number == MIXED for number in numbers)
    assert version_runs.num_stale(trace.weights_versions, trace.present) == count
    assert version_runs.num_stale(version_runs.unknown(), trace.present) == 0
    real = [number for number in numbers if number != MIXED]
    assert version_runs.span(trace.weights_versions) == (min(real), max(real))
