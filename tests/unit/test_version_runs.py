"""Runs of rows that the same weights computed: made, cut, joined."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from client_fakes import make_trace, same

from moescope import version_runs
from moescope.trace import RouteTrace
from moescope.version_runs import MIXED


def expected_by_row(numbers, present):
    """What each row's number is, by a plain loop: a missing row has that of the row before it."""
    known = [number for number, here in zip(numbers, present, strict=True) if here]
    last, expected = known[0], []
    for number, here in zip(numbers, present, strict=True):
        last = number if here else last
        expected.append(last)
    return expected


@pytest.mark.parametrize("seed", range(200))
def test_every_row_has_its_number(seed):
    random = np.random.default_rng(seed)
    num_rows, start = int(random.integers(1, 40)), int(random.integers(0, 9))
    numbers = random.integers(MIXED, 3, num_rows).astype(np.int32)
    present = random.random(num_rows) < random.choice([0.3, 0.9, 1.0])
    runs = version_runs.runs_of(numbers, present, start)
    version_runs.check(runs, start, num_rows)
    if not present.any():
        assert runs.shape == (0, 2)
        return
    assert (runs[1:, 1] != runs[:-1, 1]).all()  # as few as can be
    by_row = version_runs.by_row(runs, start, num_rows).tolist()
    assert by_row == expected_by_row(numbers, present)
    first, end = sorted(random.integers(start, start + num_rows + 1, 2).tolist())
    part = version_runs.cut(runs, first, end)
    version_runs.check(part, first, end - first)
    assert (
        version_runs.by_row(part, first, end - first).tolist()
        == (by_row[first - start : end - start])
    )


@pytest.mark.parametrize("seed", range(50))
def test_pages_of_a_trace_have_its_numbers_and_are_joined_again(seed):
    trace = make_trace(seed, num_rows=20, missing=0.2 * (seed % 3))
    size = 1 + seed % 7
    pages = [trace.page(start, size) for start in range(0, 20, size)]
    for page in pages:
        page.check_values()
        rows = slice(page.start, page.start + page.num_rows)
        np.testing.assert_array_equal(page.weights_version, trace.weights_version[rows])
    assert same(RouteTrace.joined(pages), trace)
    later = RouteTrace.joined(pages[1:])
    assert same(later, trace.page(size, 20))


def test_a_page_behind_the_last_row_has_no_run():
    page = make_trace(num_rows=5).page(5, 10)
    assert page.weights_versions.shape == (0, 2)
    assert page.check_values().weights_version.tolist() == []


def test_a_page_whose_rows_are_all_missing_continues_the_run_before_it():
    trace = dataclasses.replace(
        make_trace(num_rows=6, versions=False),
        source=np.array([0, 0, 2, 2, 0, 0], np.uint8),
        weights_versions=np.array([[0, 3], [5, 4]]),
        complete=False,
    )
    assert trace.page(2, 2).weights_versions.tolist() == [[2, 3]]
    first, last = trace.page(0, 2), trace.page(4, 2)
    unknown = dataclasses.replace(trace.page(2, 2), weights_versions=version_runs.unknown())
    assert same(RouteTrace.joined([first, unknown, last]), trace)
    assert RouteTrace.joined([unknown, last]).weights_versions.tolist() == [[2, 3], [5, 4]]


def test_without_runs_the_numbers_are_unknown():
    trace = make_trace(versions=False).check_values()
    assert trace.weights_version is None
    assert make_trace(num_rows=0).weights_version.tolist() == []


def test_runs_have_two_columns_of_int64():
    trace = make_trace()
    with pytest.raises(ValueError, match=r"weights_versions must be \[num_runs, 2\]"):
        dataclasses.replace(trace, weights_versions=np.zeros((1, 3), np.int64))
    narrow = dataclasses.replace(trace, weights_versions=np.zeros((1, 2), np.int32))
    with pytest.raises(TypeError, match="weights_versions must be int64"):
        narrow.check_values()
