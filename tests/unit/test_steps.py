"""What steps read: distinct experts and the busiest one's tokens, by kind and size."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from benchmarks.simulation.parts import make_spec
from moescope_service.collector.counters import ExpertCounters
from moescope_service.collector.rows import Written
from moescope_service.collector.steps import Steps
from moescope_service.histogram import KINDS, MIN_TOKENS, expert_bounds
from moescope_service.messages import Step

SPEC = make_spec()
NUM_EXPERTS, TOP_K = SPEC.num_experts, SPEC.top_k


def step(number=0, part=0, has_more=False):
    return Step(number=number, part=part, has_more=has_more, spans=np.empty((0, 3), np.int32))


def routed(random, num_rows, decode, spec=SPEC):
    """Some rows of a step, of which a share is generated."""
    order = np.argsort(random.random((num_rows, len(spec.layers), NUM_EXPERTS)), axis=-1)
    return Written(order[..., :TOP_K].astype(np.uint8), random.random(num_rows) < decode)


def add(steps, rows, one=None, spec=SPEC, is_first=True):
    counters = ExpertCounters(spec.layers, NUM_EXPERTS)
    steps.add(spec, one or step(), counters.add(rows), is_first=is_first)


def slow(rows):
    """Return kind, size, distinct experts and the busiest one's tokens, by plain loops."""
    generated = {bool(one) for one in rows.is_decode}
    kind = "mixed" if len(generated) == 2 else "decode" if True in generated else "prefill"
    size = max(place for place, least in enumerate(MIN_TOKENS) if least <= len(rows.is_decode))
    by_layer = [rows.topk_ids[:, layer].ravel().tolist() for layer in range(len(SPEC.layers))]
    distinct = [len(set(ids)) for ids in by_layer]
    return kind, size, distinct, [max(map(ids.count, ids)) for ids in by_layer]


@pytest.mark.parametrize("seed", range(20))
def test_figures_are_those_of_plain_loops(seed):
    random, steps = np.random.default_rng(seed), Steps(SPEC)
    want = {name: {} for name in ("steps", "tokens", "distinct", "busiest")}
    histogram = np.zeros((len(KINDS), len(expert_bounds(NUM_EXPERTS))), int)
    for _ in range(30):
        rows = routed(random, int(random.integers(1, 9)), random.choice([0.0, 0.5, 1.0]))
        add(steps, rows)
        kind, size, distinct, busiest = slow(rows)
        place = KINDS.index(kind), size
        for name, value in (
            ("steps", 1), ("tokens", len(rows.is_decode)),
            ("distinct", np.array(distinct)), ("busiest", np.array(busiest)),
        ):  # fmt: skip
            want[name][place] = want[name].get(place, 0) + value
        for one in distinct:
            bound = next(p for p, b in enumerate(expert_bounds(NUM_EXPERTS)) if one <= b)
            histogram[place[0], bound] += 1
    (figures,) = steps.totals.values()
    for name, by_place in want.items():
        array = getattr(figures, name)
        assert array.sum() == sum(np.sum(value) for value in by_place.values())
        for place, value in by_place.items():
            np.testing.assert_array_equal(array[place], value)
    np.testing.assert_array_equal(figures.histogram, histogram)


def test_pieces_are_one_step():
    random, steps, whole = np.random.default_rng(0), Steps(SPEC), Steps(SPEC)
    rows = routed(random, 7, 0.5)
    add(whole, rows)
    for part, some in enumerate((slice(0, 3), slice(3, 4), slice(4, 7))):
        piece = Written(rows.topk_ids[some], rows.is_decode[some])
        add(steps, piece, step(4, part, has_more=part < 2))
    for name in ("steps", "tokens", "distinct", "busiest", "histogram"):
        np.testing.assert_array_equal(
            getattr(steps.totals[0], name), getattr(whole.totals[0], name)
        )


def test_the_beginning_of_a_step_whose_end_is_lost_is_none():
    random, steps = np.random.default_rng(0), Steps(SPEC)
    add(steps, routed(random, 5, 1.0), step(4, has_more=True))
    add(steps, routed(random, 2, 1.0), step(6))
    assert (steps.totals[0].steps.sum(), steps.totals[0].tokens.sum()) == (1, 2)


def test_stages_and_engines_have_their_own():
    random = np.random.default_rng(0)
    first = dataclasses.replace(SPEC, layers=SPEC.layers[:1], num_stages=2)
    second = dataclasses.replace(SPEC, layers=SPEC.layers[1:], num_stages=2, stage=1)
    other = dataclasses.replace(SPEC, engine=1)
    steps = Steps(SPEC)
    rows = [routed(random, 4, 1.0, spec) for spec in (first, second)]
    add(steps, rows[0], spec=first)
    add(steps, rows[1], spec=second, is_first=False)
    add(steps, routed(random, 1, 0.0), spec=other)
    assert [*steps.totals] == [0, 1]
    figures = steps.totals[0]
    assert (figures.steps.sum(), figures.tokens.sum()) == (1, 4)
    want = [
        len(np.unique(one.topk_ids[:, layer]))
        for one in rows
        for layer in range(len(one.topk_ids[0]))
    ]
    assert figures.distinct.sum((0, 1)).tolist() == want
    assert figures.histogram.sum() == len(SPEC.layers)


def test_a_reset_leaves_the_totals_alone():
    random, steps = np.random.default_rng(0), Steps(SPEC)
    add(steps, routed(random, 2, 1.0))
    before_s = time.time()
    steps.reset()
    assert before_s <= steps.since_s <= time.time()
    assert steps.since_reset == {}
    add(steps, routed(random, 3, 1.0))
    assert steps.since_reset[0].tokens.sum() == 3
    assert steps.totals[0].tokens.sum() == 5


@pytest.mark.parametrize("num_experts", [1, 8, 60, 512])
def test_bounds_rise_to_all_experts(num_experts):
    bounds = expert_bounds(num_experts)
    assert bounds == sorted(set(bounds))
    assert (bounds[0] >= 1, bounds[-1]) == (True, num_experts)
    assert len(bounds) == min(16, num_experts)
