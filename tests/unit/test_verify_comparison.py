"""What `moescope verify` calls equal, a near-tie and a mismatch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from verify_fakes import reference, route, trace_of

from moescope import RouteTrace, Source
from moescope_service.verify.comparison import (
    MAX_DIFFERENCES,
    Counts,
    Difference,
    Expected,
    Tolerance,
    compare,
)


def judge(trace: RouteTrace, want: Expected, eps: float = 2e-7, *, shift: int = 0) -> Counts:
    return compare(trace, want, Tolerance.of([want], eps), route, shift=shift)


@pytest.mark.parametrize("weights_dtype", ["float32", "float16"])
def test_the_same_routes_in_any_order(weights_dtype):
    want = reference()
    counts = judge(trace_of(want.logits, weights_dtype), want)
    assert (counts.pairs, counts.equal, counts.near_ties, counts.mismatches) == (12, 12, 0, 0)
    assert counts.wrong_weights == 0
    assert counts.differences == []
    assert counts.is_good


def swapped(want: Expected, gap: float) -> tuple[Expected, RouteTrace]:
    """A server that swaps the third and fourth expert of one pair, if logits are off by that."""
    theirs, ours = want.logits.copy(), want.logits.copy()
    third, fourth = np.argsort(-ours[2, 1])[2:4]
    ours[2, 1, fourth] = ours[2, 1, third] - 2 * gap
    theirs[2, 1, third], theirs[2, 1, fourth] = ours[2, 1, fourth], ours[2, 1, third]
    return dataclasses.replace(want, logits=ours), trace_of(theirs)


@pytest.mark.parametrize("error", [1e-6, 0.01])
def test_a_near_tie_is_not_equal_and_no_mismatch(error):
    want, trace = swapped(reference(error), 0.45 * error)
    counts = judge(trace, want)
    assert (counts.equal, counts.near_ties, counts.mismatches) == (11, 1, 0)
    assert counts.largest_gap == pytest.approx(0.45)
    assert counts.is_good
    want, trace = swapped(reference(error), 1.1 * error)
    counts = judge(trace, want)
    assert (counts.equal, counts.near_ties, counts.mismatches) == (11, 0, 1)
    assert counts.largest_gap == pytest.approx(1.1)
    assert not counts.is_good


def test_the_tolerance_is_each_layers_own_and_that_of_all_sequences():
    one, other = reference(), reference()
    one.error[:], other.error[:] = (0.1, 0.2), (0.3, 0.1)
    assert Tolerance.of([one, other], 2**-8).logits.tolist() == [0.3, 0.2]
    in_float32 = Tolerance.of([one, other], 2**-23).logits
    assert in_float32 == pytest.approx([4.8, 3.2])  # whose kernels do more than round


def test_a_mismatch_says_where_and_what():
    want, trace = swapped(reference(0.01), 0.25)
    (difference,) = judge(trace, want).differences
    assert str(difference) == (
        "cmpl-1, position 2, layer 4: experts 0 2 5 served, 0 1 5 wanted, gap 0.25 (tolerance 0.01)"
    )


def test_ids_of_many_experts_are_shown_whole_and_what_a_server_sends_is_escaped():
    difference = Difference("a\x1b[2J", 7, 1, (65_535, 12_345), tuple(range(40)), 0.5, 0.01)
    assert str(difference).startswith(
        r"a\x1b[2J, position 7, layer 1: experts 12345 65535 served, 0 1 2 3 4"
    )
    assert " 30 31 … wanted" in str(difference)


def test_an_expert_twice_is_a_mismatch():
    want = reference(100.0)
    trace = trace_of(want.logits)
    trace.topk_ids[3, 0, 0] = trace.topk_ids[3, 0, 1]
    counts = judge(trace, want)
    assert (counts.equal, counts.near_ties, counts.mismatches) == (11, 0, 1)
    assert "gap inf" in str(counts.differences[0])


def test_pairs_of_the_next_token_are_mismatches():
    want = reference()
    counts = judge(trace_of(want.logits), want, shift=1)
    assert (counts.pairs, counts.mismatches) == (10, 10)


def test_missing_rows_are_missing_whatever_they_hold():
    want = reference()
    trace = trace_of(want.logits)
    trace.source[1:3] = Source.MISSING
    trace.topk_ids[1:3] = 255
    counts = judge(trace, want)
    assert (counts.pairs, counts.missing, counts.equal, counts.mismatches) == (12, 4, 8, 0)
    assert not counts.is_good


@pytest.mark.parametrize("factor", [1.01, 0.99, np.nan, -1.0, np.inf])
def test_weights_are_judged_by_the_tolerance(factor):
    want = reference()
    trace = trace_of(want.logits)
    trace.topk_weights[0, 0, 2] *= factor
    counts = judge(trace, want)
    assert (counts.equal, counts.wrong_weights, counts.is_good) == (12, 1, False)
    assert "cmpl-1, position 0, layer 3: weights 0." in str(counts.differences[0])
    is_near = 0.99 <= factor <= 1.01
    rougher = dataclasses.replace(want, error=np.full(2, 0.02))
    assert judge(trace, rougher).wrong_weights == (0 if is_near else 1)


def test_the_weights_of_near_ties_are_judged_too():
    want, trace = swapped(reference(0.01), 0.0045)
    trace.topk_weights[2, 1] *= 1.1
    counts = judge(trace, want)
    assert (counts.near_ties, counts.wrong_weights, counts.is_good) == (1, 1, False)


def test_a_weight_may_be_rounded_as_an_exponent_of_the_servers_dtype():
    want = reference()
    trace = trace_of(want.logits)
    trace.topk_weights[0, 0] *= np.exp(2**-6)  # half of a unit of bfloat16 from 4 to 8
    assert judge(trace, want, eps=2**-10).wrong_weights == 1
    assert judge(trace, want, eps=2**-7).wrong_weights == 0


NUM_ROWS, NUM_EXPERTS, ERROR = 10_000, 60, 0.01


@pytest.fixture(scope="module")
def many() -> tuple[Expected, np.ndarray]:
    """Logits of 10,000 rows, how far off such a server was seen to be, and those of another."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(NUM_ROWS, 1, NUM_EXPERTS))
    measured, theirs = ERROR * rng.normal(size=(2, *logits.shape))
    return Expected(logits, np.abs(measured).max((0, 2))), logits + theirs


def test_a_server_that_is_off_by_its_rounding_is_right(many):
    want, logits = many
    counts = judge(trace_of(logits), want)
    assert counts.is_good
    assert counts.near_ties > 50
    assert counts.equal + counts.near_ties == NUM_ROWS
    assert 0.1 < counts.largest_gap < 0.8


def test_one_wrong_expert_in_10_000_rows_is_told(many):
    want, logits = many
    trace = trace_of(logits)
    taken = trace.topk_ids[6_789, 0].tolist()
    trace.topk_ids[6_789, 0, 1] = min(set(range(NUM_EXPERTS)) - set(taken))
    counts = judge(trace, want)
    assert (counts.mismatches, counts.is_good) == (1, False)
    (difference,) = counts.differences
    assert (difference.request_id, difference.position, difference.layer) == ("cmpl-1", 6_789, 3)
    assert difference.wanted == tuple(reversed(taken))


@pytest.fixture
def fewer(many) -> tuple[Expected, np.ndarray]:
    want, logits = many
    return dataclasses.replace(want, logits=want.logits[:1000]), logits[:1000]


def test_most_wrong_experts_would_be_told(fewer):
    want, logits = fewer
    trace = trace_of(logits)
    others = np.argsort(-logits, -1)[..., 3:]
    rng = np.random.default_rng(1)
    trace.topk_ids[..., 0] = rng.permuted(others, axis=-1)[..., 0]
    assert judge(trace, want).mismatches > 970


def test_swapped_weights_are_told(many):
    want, logits = many
    trace = trace_of(logits)
    trace.topk_weights[123, 0, :2] = trace.topk_weights[123, 0, 1::-1]
    counts = judge(trace, want)
    assert (counts.mismatches, counts.wrong_weights, counts.is_good) == (0, 1, False)
    assert counts.differences[0].position == 123


def test_rows_that_are_shifted_by_one_are_told(fewer):
    want, logits = fewer
    trace = trace_of(np.roll(logits, 1, axis=0))
    counts = judge(trace, want)
    assert counts.mismatches > 990
    assert len(counts.differences) == MAX_DIFFERENCES
    assert [one.position for one in counts.differences] == list(range(MAX_DIFFERENCES))
