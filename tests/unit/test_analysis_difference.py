"""Differences of two servers' routes, against plain loops and by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from analysis_reference import (
    NUM_EXPERTS,
    jensen_shannon,
    make_trace,
    random_trace,
    row_difference,
    tokens_of,
)

from moescope import analysis
from moescope.analysis import Differences, Rows

LAYERS, TOP_K, NEAR_TIE = 3, 2, 0.5


def changed(trace, number):
    """The trace on another server: some experts and weights are others, some in another order."""
    random = np.random.default_rng(1000 + number)
    ids, weights = trace.topk_ids.copy(), trace.topk_weights.copy()
    some = random.random(ids.shape[:2]) < 0.4
    ids[some, -1] = (ids[some].max(axis=-1) + 1) % NUM_EXPERTS
    again = ids[..., 0] == ids[..., 1]
    ids[again, 1] = (ids[again, 0] + 3) % NUM_EXPERTS
    swapped = random.random(ids.shape[:2]) < 0.3
    ids[swapped], weights[swapped] = ids[swapped][:, ::-1], weights[swapped][:, ::-1]
    weights *= 1 + 0.3 * random.random(weights.shape, np.float32)
    return dataclasses.replace(trace, topk_ids=ids, topk_weights=weights)


TRACES = [random_trace(number) for number in range(9)]
OTHERS = [changed(trace, number) for number, trace in enumerate(TRACES)]
TOKENS, OTHER_TOKENS = tokens_of(TRACES), tokens_of(OTHERS)


def differences_of(traces, others, **options):
    total = Differences(traces[0].num_layers, NUM_EXPERTS, near_tie=NEAR_TIE, **options)
    for trace, other in zip(traces, others, strict=True):
        total.add(Rows.of(trace), Rows.of(other))
    return total


def expected_of(layer, tokens=TOKENS, others=OTHER_TOKENS):
    """The figures of a layer."""
    pairs = list(zip(tokens, others, strict=True))
    every = [
        [row_difference(*(one[name][each] for one in pair for name in ("ids", "weights")))
         for each in range(LAYERS)]
        for pair in pairs
    ]  # fmt: skip
    here = [row[layer] for row in every]
    near = [one["differs"] and one["gap"] <= NEAR_TIE for one in here]
    weights = [value for one in here for value in one["weights"]]
    loads = [Counter(e for one in side for e in one["ids"][layer]) for side in (tokens, others)]
    shares = [[load[e] / load.total() for e in range(NUM_EXPERTS)] for load in loads]
    return {
        "rows": np.mean([one["differs"] for one in here]) - np.mean(near),
        "near_ties": np.mean(near),
        "order": np.mean([one["order"] for one in here]),
        "first": np.mean([
            row[layer]["differs"] and not any(one["differs"] for one in row[:layer])
            for row in every
        ]),
        "jaccard": np.mean([one["jaccard"] for one in here]),
        "weights": np.mean(weights),
        "loads": jensen_shannon(*shares),
    }  # fmt: skip


def test_the_figures_are_those_of_plain_loops():
    found = differences_of(TRACES, OTHERS)
    assert found.num_rows == len(TOKENS)
    assert tuple(found.values) == analysis.FIGURES
    for layer in range(LAYERS):
        expected = expected_of(layer)
        assert 0.05 < expected["near_ties"] < 0.4, "the traces try little"
        assert 0.05 < expected["rows"] < 0.4
        for name, values in found.values.items():
            assert values[layer] == pytest.approx(expected[name], rel=1e-6), name
        gaps = [
            row_difference(*(one[what][layer] for one in pair for what in ("ids", "weights")))[
                "gap"
            ]
            for pair in zip(TOKENS, OTHER_TOKENS, strict=True)
        ]
        assert found.largest_gap[layer] == pytest.approx(max(gaps))


def test_a_replicate_is_the_figure_of_requests_by_their_weights():
    found = differences_of(TRACES, OTHERS)
    numbers = np.array([analysis.request_number(one.request_id) for one in TRACES], np.uint64)
    weights = analysis.request_weights(numbers)
    for replicate in (0, 7):
        times = {one.request_id: int(weights[place, replicate]) for place, one in enumerate(TRACES)}
        tokens = [one for one in TOKENS for _ in range(times[one["request"]])]
        others = [one for one in OTHER_TOKENS for _ in range(times[one["request"]])]
        for layer in range(LAYERS):
            expected = expected_of(layer, tokens, others)
            for name, values in found.replicates.items():
                assert values[replicate, layer] == pytest.approx(expected[name], rel=1e-6), name


def test_parts_add_up():
    whole = differences_of(TRACES, OTHERS)
    parts = differences_of(TRACES[:4], OTHERS[:4]) + differences_of(TRACES[4:], OTHERS[4:])
    at_once = Differences(LAYERS, NUM_EXPERTS, near_tie=NEAR_TIE)
    at_once.add(*(Rows.joined([Rows.of(one) for one in side]) for side in (TRACES, OTHERS)))
    for other in (parts, at_once):
        assert other.requests == whole.requests
        assert other.largest_gap.tolist() == whole.largest_gap.tolist()
        assert len(other.requests) == len(TRACES)
        for name in analysis.FIGURES:
            assert other.values[name] == pytest.approx(whole.values[name])
            assert other.replicates[name] == pytest.approx(whole.replicates[name])


def test_others_do_not_add_up():
    one = differences_of(TRACES, OTHERS)
    with pytest.raises(ValueError, match="do not add up"):
        one + differences_of(TRACES, OTHERS, seed=1)


def test_equal_rows_differ_in_nothing():
    found = differences_of(TRACES, TRACES)
    for name, values in found.values.items():
        assert values.tolist() == [1.0 if name == "jaccard" else 0.0] * LAYERS, name


def test_rows_of_other_shapes_are_refused():
    rows = Rows.of(TRACES[0])
    with pytest.raises(ValueError, match=r"of one shape, got \(.*, 3, 2\) and \(5, 3, 2\)"):
        Differences(LAYERS, NUM_EXPERTS).add(rows, rows[:5])


def test_without_rows_there_is_no_figure():
    nothing = Differences(LAYERS, NUM_EXPERTS)
    rows = Rows.of(TRACES[0])[:0]
    nothing.add(rows, rows)
    assert all(np.isnan(values).all() for values in nothing.values.values())


def test_without_weights_no_row_is_a_near_tie():
    bare = [dataclasses.replace(one, topk_weights=None) for one in OTHERS]
    found, whole = differences_of(TRACES, bare), differences_of(TRACES, OTHERS)
    assert np.isnan(found.values["weights"]).all()
    assert found.values["near_ties"].tolist() == [0.0] * LAYERS
    assert found.values["rows"] == pytest.approx(whole.values["rows"] + whole.values["near_ties"])


def test_which_rows_differ_is_said():
    one = make_trace("a", [[[0, 1], [2, 3]]], weights=[[[0.6, 0.4], [0.6, 0.4]]])
    other = make_trace("a", [[[0, 2], [4, 3]]], weights=[[[0.6, 0.41], [0.6, 0.4]]])
    found = Differences(2, NUM_EXPERTS, near_tie=0.1).add(Rows.of(one), Rows.of(other))
    assert found.sets.tolist() == [[True, True]]
    # In layer 0 the lowest of both was exchanged, in layer 1 one half again as heavy.
    assert found.near_ties.tolist() == [[True, False]]
    assert found.gaps == pytest.approx(np.array([[0.41 / 0.4 - 1, 0.5]]))


def test_functions_by_hand():
    ids, others = np.array([[3, 1, 7], [3, 1, 7]]), np.array([[7, 3, 1], [3, 0, 2]])
    assert analysis.slots_in(ids, others).tolist() == [[1, 2, 0], [0, -1, -1]]
    assert analysis.jaccard(ids, others).tolist() == [1.0, 1 / 5]
    weights = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    other_weights = np.array([[0.2, 0.4, 0.4], [0.45, 0.3, 0.25]])
    found = analysis.weight_differences(ids, weights, others, other_weights)
    assert found[0] == pytest.approx([0.1, 0.1, 0.0])
    assert found[1, 0] == pytest.approx(0.05)
    assert np.isnan(found[1, 1:]).all()
    # 1 and 7 went, 0 and 2 came: the heaviest has 0.3, the lowest selected 0.2.
    assert analysis.exchange_gap(ids, weights, others, other_weights) == pytest.approx([0.0, 0.5])
    nothing = np.zeros_like(weights)
    assert analysis.exchange_gap(ids, nothing, others, nothing).tolist() == [0.0, 0.0]
    assert analysis.exchange_gap(ids, weights, others, nothing).tolist() == [0.0, np.inf]


def test_of_top_1_the_gap_is_that_of_the_two_weights():
    one, other = np.array([[0]]), np.array([[1]])
    gap = analysis.exchange_gap(one, np.array([[0.9]]), other, np.array([[0.6]]))
    assert gap == pytest.approx([0.5])


def test_jensen_shannon_divergence():
    counts = np.array([[4, 4, 0, 0], [1, 2, 3, 4], [3, 1, 0, 0], [0, 0, 0, 0]])
    others = np.array([[0, 0, 5, 1], [2, 4, 6, 8], [1, 3, 0, 0], [1, 1, 1, 1]])
    found = analysis.jensen_shannon_bits(counts, others)
    assert found[:2].tolist() == [1.0, 0.0]  # no common expert: one bit; the same shares
    assert found[2] == pytest.approx(jensen_shannon([0.75, 0.25], [0.25, 0.75]))
    assert np.isnan(found[3])


def test_bounds_of_many_figures_hold_all_at_once():
    random = np.random.default_rng(3)
    values = np.array([0.0, 5.0, np.nan, 1.0])
    replicates = values + np.array([1.0, 1.0, 1.0, 0.0]) * random.standard_normal((4000, 4))
    low = analysis.lower_bounds(values, replicates)
    # Of two normal figures at once: the 0.95 ** (1 / 2) quantile, 1.955, not 1.645.
    assert low[[0, 1]] == pytest.approx([-1.955, 3.045], abs=0.1)
    assert np.isnan(low[2])
    assert low[3] == 1.0  # never another value
    assert np.isnan(analysis.lower_bounds(values, np.full((9, 4), np.nan))).all()


def test_of_equal_servers_few_have_a_layer_that_changed():
    """Requests are noisy, each in its own measure, and no layer is another one."""
    random = np.random.default_rng(0)
    num_servers, num_requests, num_layers = 100, 100, 94
    at_once = one_by_one = 0
    for _ in range(num_servers):
        num_rows = random.integers(20, 120, num_requests)[:, None]
        chance = random.beta(2, 400, (num_requests, 1))
        ours, noise = (random.binomial(num_rows, chance, (num_requests, num_layers)) for _ in "ab")
        numbers = random.integers(0, 2**63, num_requests).astype(np.uint64)
        weights = analysis.request_weights(numbers).astype(np.float64)
        replicates = (weights.T @ (ours - noise)) / (weights.T @ num_rows)
        values = (ours - noise).sum(axis=0) / num_rows.sum()
        at_once += bool((analysis.lower_bounds(values, replicates) > 0).any())
        one_by_one += bool((analysis.interval(replicates)[0] > 0).any())
    assert at_once <= 0.1 * num_servers
    assert one_by_one >= 0.8 * num_servers, "the bounds are tried on too little noise"
