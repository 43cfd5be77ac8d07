"""Registration, finish and end come from different processes, in any order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from builders import Clock, make_register, make_rows, make_spec

from moescope.trace import Source
from moescope_service.collector.arena import FILLED
from moescope_service.collector.rows import Rows
from moescope_service.collector.sequences import API_TIMEOUT_S, WORKER_TIMEOUT_S, Sequences

SPEC = make_spec()
PROMPT, OUTPUT = np.array([1, 2, 3, 4], np.int32), np.array([5, 6], np.int32)


def make_sequence_rows(num_rows=5):
    ids, weights = make_rows(0, num_rows)
    return Rows(
        SPEC.layers,
        ids,
        weights,
        np.zeros(num_rows, np.uint8),
        np.full(num_rows, FILLED, np.uint8),
        0,
        np.zeros(num_rows, np.int32),
    )


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sequences(clock):
    return Sequences(clock)


def trace(sequence, **changes):
    return sequence.trace(SPEC, **{"timed_out": False, "with_token_ids": True} | changes)[0]


@pytest.mark.parametrize(
    "order",
    [o for o in itertools.permutations(["register", "finish", "end"])
     if o.index("register") < o.index("finish")],
)  # fmt: skip
def test_a_sequence_is_ready_when_all_have_reported(sequences, order):
    found = []
    for what in order:
        match what:
            case "register":
                found.append(sequences.register(make_register("a"), PROMPT))
            case "finish":
                found.append(sequences.finish("a-i", "stop", OUTPUT))
            case "end":
                found.append(sequences.end("a-i", make_sequence_rows()))
        assert [bool(s and s.is_ready) for s in found][-1] == (what == order[-1])
    built = trace(found[-1])
    assert (built.num_tokens, built.num_rows, built.finish_reason) == (6, 5, "stop")
    assert built.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert built.complete
    assert len(sequences) == 1
    sequences.close(found[-1])
    assert (len(sequences), list(sequences.ids.any("a").values()), len(sequences.ids)) == (0, [], 0)


def test_surplus_rows_are_cut_and_absent_ones_are_missing(sequences):
    for name, num_rows, coverage in (("a", 7, 1.0), ("b", 5, 1.0), ("c", 3, 0.6), ("d", 0, 0.0)):
        sequences.register(make_register(name), PROMPT)
        sequences.finish(f"{name}-i", "length", OUTPUT)
        built = trace(sequences.end(f"{name}-i", make_sequence_rows(num_rows)))
        assert (built.num_rows, built.coverage, built.complete) == (5, coverage, coverage == 1.0)


def test_a_missing_row_makes_a_trace_incomplete(sequences):
    rows = make_sequence_rows()
    rows.source[2] = Source.MISSING
    sequences.register(make_register("a"), PROMPT)
    sequences.finish("a-i", "stop", OUTPUT)
    built = trace(sequences.end("a-i", rows))
    assert (built.complete, built.coverage) == (False, 0.8)


def test_a_prompt_of_one_token_without_output_has_no_rows(sequences):
    sequences.register(make_register("a", prompt_len=1), PROMPT[:1])
    sequences.finish("a-i", "abort", OUTPUT[:0])
    built = trace(sequences.end("a-i", Rows.nothing(SPEC)))
    assert (built.num_rows, built.coverage) == (0, 1.0)


def test_token_ids_are_left_out_where_unknown_or_unwanted(sequences):
    sequences.register(make_register("a"), None)
    sequences.finish("a-i", "stop", OUTPUT)
    assert trace(sequences.end("a-i", make_sequence_rows())).token_ids is None
    sequences.register(make_register("b"), PROMPT)
    sequences.finish("b-i", "stop", OUTPUT)
    sequence = sequences.end("b-i", make_sequence_rows())
    assert trace(sequence).token_ids is not None
    assert trace(sequence, with_token_ids=False).token_ids is None


def test_a_worker_that_does_not_report_is_waited_for_so_long(sequences, clock):
    sequence = sequences.register(make_register("a"), PROMPT)
    clock.now_s += 1e6  # a running request has all the time it wants
    assert sequences.overdue() == []
    sequences.finish("a-i", "stop", OUTPUT)
    clock.now_s += WORKER_TIMEOUT_S - 0.1
    assert sequences.overdue() == []
    clock.now_s += 0.1
    assert sequences.overdue() == [sequence]
    built = trace(sequence, timed_out=True)
    assert (built.complete, built.coverage, built.num_rows) == (False, 0.0, 5)


def test_an_api_server_that_does_not_report_is_waited_for_so_long(sequences, clock):
    sequence = sequences.register(make_register("a"), PROMPT)
    sequences.end("a-i", make_sequence_rows(7))
    clock.now_s += API_TIMEOUT_S - 0.1
    assert sequences.overdue() == []
    clock.now_s += 0.1
    assert sequences.overdue() == [sequence]
    built = trace(sequence, timed_out=True)
    assert (built.complete, built.num_rows, built.num_tokens) == (
        False,
        len(PROMPT) - 1,
        len(PROMPT),
    )
    assert (built.token_ids, built.finish_reason) == (None, None)


def test_an_api_server_is_waited_for_as_long_where_the_end_came_first(sequences, clock):
    sequences.end("a-i", make_sequence_rows())
    sequence = sequences.register(make_register("a"), PROMPT)
    clock.now_s += API_TIMEOUT_S + 1
    assert sequences.overdue() == [sequence]


def test_rows_that_nobody_asks_for_are_dropped_and_counted(sequences, clock):
    assert sequences.end("nobody", make_sequence_rows()) is None
    clock.now_s += API_TIMEOUT_S - 0.1
    assert (sequences.overdue(), sequences.num_unclaimed) == ([], 0)
    clock.now_s += 0.2
    assert (sequences.overdue(), sequences.num_unclaimed) == ([], 1)
    sequence = sequences.register(make_register("n", internal_id="nobody"), PROMPT)
    assert sequence.rows is None


def test_a_finish_of_nobody_is_nothing(sequences):
    assert sequences.finish("nobody", "stop", OUTPUT) is None


def test_ids_find_a_sequence_until_it_is_let_go(sequences):
    first = sequences.register(make_register("a"), PROMPT)
    second = sequences.register(make_register("b", ids=["a", "b-i"]), PROMPT)
    assert list(sequences.ids.any("a").values()) == [first, second]
    sequences.add_id(first, "alias")
    sequences.add_id(first, "alias")
    assert list(sequences.ids.any("alias").values()) == [first]
    sequences.discard_ids(first)
    assert (list(sequences.ids.any("a").values()), list(sequences.ids.any("alias").values())) == (
        [second],
        [],
    )
    sequences.add_id(first, "again")
    assert list(sequences.ids.any("again").values()) == []
    assert len(sequences) == 2
    sequences.close(first)
    sequences.close(second)
    assert len(sequences.ids) == 0


def test_an_opted_out_sequence_is_found_by_nobody(sequences):
    sequence = sequences.register(make_register("a", keep=False), PROMPT)
    assert list(sequences.ids.any("a").values()) == []
    sequences.finish("a-i", "stop", OUTPUT)
    sequences.end("a-i", make_sequence_rows())
    sequences.close(sequence)
    assert len(sequences) == 0


def test_uids_grow(sequences):
    uids = [sequences.register(make_register(name), PROMPT).uid for name in "abc"]
    assert uids == sorted(set(uids))


def test_all_that_is_held_is_counted_and_let_go(sequences, clock):
    ids = [f"{'x' * 500}{number}" for number in range(3)]
    sequence = sequences.register(make_register("a", ids=ids), np.zeros(1000, np.int32))
    assert sequences.size_bytes > 1500 + 4000
    sequences.add_id(sequence, "y" * 500)
    registered = sequences.size_bytes
    assert registered > 2000 + 4000
    sequences.finish("a-i", "stop", np.zeros(1000, np.int32))
    assert sequences.size_bytes == registered + 4000
    sequences.end("a-i", make_sequence_rows(1000))
    assert sequences.size_bytes == registered + 4000 + make_sequence_rows(1000).size_bytes
    sequences.discard_ids(sequence)
    sequences.close(sequence)
    assert sequences.size_bytes == 0
    for _ in range(2):
        sequences.end("nobody", make_sequence_rows(1000))
    sequences.end("late-i", make_sequence_rows(1000))
    assert sequences.size_bytes > 2 * make_sequence_rows(1000).size_bytes
    sequences.close(sequences.register(make_register("late"), PROMPT))
    clock.now_s += API_TIMEOUT_S + 1
    sequences.overdue()
    assert sequences.size_bytes == 0


def test_a_sequence_is_overdue_once(sequences, clock):
    """It was told twice how it ended, in the same moment."""
    sequence = sequences.register(make_register("a"), None)
    for _ in range(2):
        sequences.finish("a-i", "stop", np.array([5], np.int32))
    clock.now_s += WORKER_TIMEOUT_S
    assert sequences.overdue() == [sequence]
    assert sequences.overdue() == []
