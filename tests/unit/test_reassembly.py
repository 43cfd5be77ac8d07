"""Steps in, rows by (sequence, position) out; random schedules are in ``test_engine``."""

from __future__ import annotations

import numpy as np
import pytest
from builders import admit, make_rows, make_spec, make_step

from moescope.trace import Source
from moescope.version_runs import MIXED
from moescope_service.collector.arena import FILLED
from moescope_service.collector.reassembly import Reassembler
from moescope_service.collector.rows import CAUSES, Rows

C, H, M, R = Source.COMPUTED, Source.CACHED, Source.MISSING, Source.RECALLED


class Worker:
    """Steps in order, and the last one's ends."""

    def __init__(self, *, prefix_bytes=0, **spec):
        self.reassembler = Reassembler(make_spec(**spec), prefix_bytes=prefix_bytes)
        self.next_step = 0

    def step(self, spans=(), **changes):
        self.ended, self.written = self.reassembler.apply(
            make_step(self.next_step, spans, **changes)
        )
        self.next_step += 1
        return self.written

    def end(self, handle=0):
        self.step(finished=[handle])
        assert len(self.ended) == 1
        return self.ended[0][1]


@pytest.fixture
def worker():
    return Worker()


def check(rows, source, first=0):
    """The sources are these, every row that is there belongs to its position, others are zero."""
    assert rows.source.tolist() == [*source]
    here = rows.source != M
    ids, weights = make_rows(first, len(source))
    np.testing.assert_array_equal(rows.topk_ids[here], ids[here])
    np.testing.assert_array_equal(rows.topk_weights[here], weights[here])
    assert not rows.topk_ids[~here].any()
    assert not rows.topk_weights[~here].any()


def test_chunks_then_decodes(worker):
    worker.step([(0, 0, 3)], admitted=[admit(0, "a", 6, [5])])
    worker.step([(0, 3, 3)], grown=[(0, [2])])
    worker.step([(0, 6, 1)])
    check(worker.end(), [C] * 7)
    assert worker.ended[0][0] == "a"


def test_rows_of_a_step_belong_to_their_spans(worker):
    worker.step([(1, 0, 2), (0, 0, 3)], admitted=[admit(0, "a", 3, [1]), admit(1, "b", 2, [2])])
    worker.step([(0, 3, 1), (1, 2, 1)])
    worker.step(finished=[1, 0])
    assert [name for name, _ in worker.ended] == ["b", "a"]
    check(worker.ended[0][1], [C] * 3)
    check(worker.ended[1][1], [C] * 4)


def test_phases(worker):
    written = worker.step([(0, 0, 3)], admitted=[admit(0, "a", 2, [1])])
    assert written.is_decode.tolist() == [False, False, True]
    assert worker.step() is None
    assert worker.step([(0, 3, 1)], lost="paused") is None


def test_a_hit_finds_the_rows_of_the_sequence_that_ended(worker):
    worker.step([(0, 0, 8)], admitted=[admit(0, "a", 8, [1, 2])])
    worker.end()
    worker.step([(0, 8, 1)], admitted=[admit(0, "b", 9, [1, 2, 3], cached=8)])
    rows = worker.end()
    check(rows, [H] * 8 + [C])
    assert rows.cached_len == 8


def test_blocks_that_were_given_on_hold_nobodys_rows(worker):
    worker.step([(0, 0, 8)], admitted=[admit(0, "a", 8, [1, 2])])
    worker.end()
    worker.step([(0, 0, 2)], admitted=[admit(0, "b", 4, [1])])
    check(worker.end(), [C] * 2)
    # Block 2 still holds a's rows, block 1 does not.
    worker.step(admitted=[admit(0, "c", 9, [1, 2, 3], cached=8)])
    check(worker.end(), [H] * 2 + [M] * 2 + [H] * 4)


def test_a_block_may_change_hands_in_the_step_that_ends_its_sequence(worker):
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 4, [1])])
    worker.step([(0, 0, 2)], finished=[0], admitted=[admit(0, "b", 2, [1])])
    check(worker.ended[0][1], [C] * 4)
    check(worker.end(), [C] * 2)


@pytest.mark.parametrize("kind", ["grown", "resumed"])
def test_a_hit_on_a_block_that_another_sequence_gets_in_the_same_step(worker, kind):
    """vLLM caches a block when it is scheduled, and lists new sequences before all others."""
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 9, [1])])
    other = {"grown": [(0, [2])]} if kind == "grown" else {"resumed": [admit(0, "a", 0, [1, 2], 4)]}
    worker.step([(0, 4, 4), (1, 8, 1)], admitted=[admit(1, "b", 9, [1, 2, 3], cached=8)], **other)
    check(worker.end(1), [H] * 8 + [C])


def test_recomputation_after_a_preemption(worker):
    worker.step([(0, 0, 6)], admitted=[admit(0, "a", 4, [1, 2])])
    worker.step([(0, 0, 5)], resumed=[admit(0, "a", 0, [3, 4])])
    worker.step([(0, 5, 2)])
    check(worker.end(), [C] * 7)


def test_a_sequence_that_ends_while_preempted_keeps_what_nobody_took(worker):
    worker.step([(0, 0, 8)], admitted=[admit(0, "a", 8, [1, 2])])
    worker.step([(1, 0, 1)], admitted=[admit(1, "b", 1, [2])])
    check(worker.end(0), [C] * 4 + [M] * 4)


def test_what_others_computed_beyond_our_last_row_is_cached(worker):
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 13, [1])])
    worker.step([(1, 0, 12)], admitted=[admit(1, "b", 12, [5, 6, 7])])
    worker.step([(0, 8, 5)], resumed=[admit(0, "a", 0, [1, 6, 3, 4], cached=8)])
    rows = worker.end()
    check(rows, [C] * 4 + [H] * 4 + [C] * 5)
    assert rows.cached_len == 0


def test_the_last_write_wins(worker):
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 2, [1])])
    worker.step([(0, 2, 2)], rows=make_rows(50, 2))
    rows = worker.end()
    np.testing.assert_array_equal(rows.topk_ids[2:], make_rows(50, 2)[0])
    check(rows.resized(2), [C] * 2)


@pytest.mark.parametrize("lost", ["queue_full", "paused", "hook_missed"])
def test_lost_rows_are_missing_for_whoever_hits_them(worker, lost):
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 8, [1, 2])])
    worker.step([(0, 4, 4)], lost=lost)
    check(worker.end(), [C] * 4 + [M] * 4)
    worker.step([(0, 8, 1)], admitted=[admit(0, "b", 9, [1, 2, 3], cached=8)])
    check(worker.end(), [H] * 4 + [M] * 4 + [C])


def test_a_lost_overwrite_is_no_old_row(worker):
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 2, [1])])
    worker.step([(0, 2, 1)], lost="queue_full")
    check(worker.end(), [C, C, M, C])


def test_a_copied_block(worker):
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 4, [1])])
    worker.step([(1, 2, 3)], admitted=[admit(1, "b", 5, [7, 8], cached=2)], block_copies=[(1, 7)])
    check(worker.end(1), [H] * 2 + [C] * 3)


def test_a_copied_block_gives_the_cached_tokens_alone(worker):
    """What stands behind them in the source is of another sequence, until it is routed anew."""
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 4, [1])])
    worker.step([(1, 0, 4)], admitted=[admit(1, "b", 8, [2])])
    # "b" was preempted: its rows are in a block that another one has by now.
    worker.step([(1, 2, 1)], resumed=[admit(1, "b", 8, [7], cached=2)], block_copies=[(1, 7)])
    check(worker.end(1), [C, C, C, M])


def test_a_copied_block_is_missing_where_hits_are_not_trusted():
    worker = Worker(trust_prefix_hits=False)
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 4, [1])])
    worker.step([(1, 2, 3)], admitted=[admit(1, "b", 5, [7, 8], cached=2)], block_copies=[(1, 7)])
    check(worker.end(1), [M] * 2 + [C] * 3)


def test_hits_are_missing_where_they_are_not_trusted():
    worker = Worker(trust_prefix_hits=False)
    worker.step([(0, 0, 8)], admitted=[admit(0, "a", 8, [1, 2])])
    check(worker.end(), [C] * 8)
    worker.step([(0, 8, 1)], admitted=[admit(0, "b", 9, [1, 2, 3], cached=8)])
    check(worker.end(), [M] * 8 + [C])


def test_a_sequence_that_was_never_scheduled(worker):
    worker.step(finished_unseen=["a"])
    name, rows = worker.ended[0]
    assert (name, rows.source.tolist(), rows.topk_ids.shape) == ("a", [], (0, 2, 2))


def test_tables_grow(worker):
    worker = Worker(num_blocks=400)
    admitted = [admit(h, str(h), 4, [h + 1]) for h in range(200)]
    worker.step([(h, 0, 4) for h in range(200)], admitted=admitted)
    for block in range(300, 340):
        position = 4 * (block - 299)
        worker.step([(150, position, 4)], grown=[(150, [block])])
    check(worker.end(150), [C] * 164)
    check(worker.end(199), [C] * 4)


def test_a_lost_step_gives_up_what_was_known(worker):
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 8, [1, 2])])
    worker.next_step += 1
    assert worker.step([(0, 5, 1)]).topk_ids.shape[0] == 0
    assert worker.reassembler.gaps == 1
    worker.step([(1, 4, 1)], admitted=[admit(1, "b", 5, [1, 3], cached=4)])
    check(worker.end(1), [M] * 4 + [C])


def test_what_was_given_up_ends_with_nothing(worker):
    """Its worker may know of no gap: nobody else would say that it has ended."""
    worker.step([(0, 0, 4), (1, 0, 4)], admitted=[admit(0, "a", 4, [1]), admit(1, "b", 4, [2])])
    worker.next_step += 1
    worker.step([(2, 0, 4)], admitted=[admit(2, "c", 4, [3])])
    worker.next_step += 1
    check(worker.end(0), [])
    assert worker.ended[0][0] == "a"
    assert worker.ended[0][1].cause_beyond == CAUSES["not_captured"]
    worker.step(finished=[1, 2])
    assert [name for name, _ in worker.ended] == ["b", "c"]
    worker.step(finished=[0, 1, 2])
    assert worker.ended == []


def test_a_handle_of_a_sequence_that_was_given_up_belongs_to_its_next_one(worker):
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 4, [1])])
    worker.next_step += 1  # its end was in there
    worker.step([(0, 0, 4)], admitted=[admit(0, "b", 4, [1])])
    check(worker.end(0), [C] * 4)
    assert worker.ended[0][0] == "b"
    worker.step(finished=[0])
    assert worker.ended == []


def cut(worker):
    """A step of 8 rows in four pieces, which follows one of 4."""
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 8, [1, 2])])
    step = make_step(1, [(0, 4, 4), (1, 0, 4)], admitted=[admit(1, "b", 4, [3])])
    return [*step.pieces(step.rows_bytes // 4)]


def test_a_step_in_pieces_is_the_same(worker):
    for piece in cut(worker):
        _, written = worker.reassembler.apply(piece)
        assert len(written.topk_ids) == 2
    worker.next_step += 1
    check(worker.end(0), [C] * 8)
    check(worker.end(1), [C] * 4)
    assert worker.reassembler.gaps == 0


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_lost_piece_gives_up_what_was_known(worker, lost):
    """Its rows may have been written before: what stands in their slots is not to be believed."""
    pieces = cut(worker)
    del pieces[lost]
    for piece in pieces:
        worker.reassembler.apply(piece)
    worker.next_step += 1
    worker.step(finished=[0, 1])
    assert all(not len(rows.source) for _, rows in worker.ended)
    assert worker.reassembler.gaps > 0


def test_a_gap_with_more_sequences_than_the_table_holds(worker):
    """The admission of handle 64 was lost: its rows are nobody's, the others' are kept."""
    worker.next_step += 1
    worker.step([(63, 0, 4)], admitted=[admit(63, "a", 8, [1, 2])])
    worker.step([(63, 4, 2), (64, 9, 1)])
    check(worker.end(63), [C] * 6)


def test_a_resumed_sequence_whose_admission_was_lost_keeps_its_rows_from_there(worker):
    worker.next_step += 1
    worker.step([(0, 0, 5)], resumed=[admit(0, "a", 0, [1, 2])])
    check(worker.end(), [C] * 5)


def test_describe(worker):
    step = make_step(0, [(0, 0, 3), (9, 1, 1)], admitted=[admit(0, "a", 6, [5])])
    worker.reassembler.apply(step)
    assert worker.reassembler.describe(step) == [("a", 0, 3, 6)]


def test_an_update_within_a_sequence_is_right_to_the_row(worker):
    worker.step([(0, 0, 3)], admitted=[admit(0, "a", 6, [5])])
    worker.step(weights_version=1)
    worker.step([(0, 3, 2)], grown=[(0, [2])], weights_version=1)
    worker.step([(0, 5, 2)], weights_version=MIXED)
    worker.step([(0, 7, 1)], weights_version=2)
    assert worker.end().weights_version.tolist() == [0, 0, 0, 1, 1, MIXED, MIXED, 2]
    assert worker.reassembler.weights_version == 2


def test_a_hit_and_a_copy_bring_the_version_of_the_weights_that_computed_them(worker):
    worker.step([(0, 0, 8)], admitted=[admit(0, "a", 8, [1, 2])], weights_version=1)
    worker.end()
    copied = {"block_copies": [(2, 3)], "weights_version": 4}
    worker.step([(0, 6, 2)], admitted=[admit(0, "b", 8, [1, 3], cached=6)], **copied)
    assert worker.end().weights_version.tolist() == [1] * 6 + [4] * 2
    # What is computed again, is of the weights that compute it again.
    worker.step([(0, 2, 3)], admitted=[admit(0, "c", 8, [1, 4], cached=4)], weights_version=5)
    assert worker.end().weights_version.tolist() == [1, 1, 5, 5, 5]


def test_rows_that_come_back_have_the_version_that_they_had():
    worker = Worker(prefix_bytes=2**16)
    worker.step(
        [(0, 0, 4)], admitted=[admit(0, "a", 4, [5])], filled=[(5, "five")], weights_version=3
    )
    worker.end()
    other = make_rows(100, 4)
    worker.step([(1, 0, 4)], admitted=[admit(1, "b", 4, [5])], rows=other, weights_version=4)
    worker.step(loaded=[(7, "five")])
    worker.step([(2, 4, 1)], admitted=[admit(2, "c", 5, [7, 9], 4)], weights_version=5)
    rows = worker.end(2)
    check(rows, [R] * 4 + [C])
    assert rows.weights_version.tolist() == [3] * 4 + [5]


def test_rows_are_cut_and_filled_up():
    ids, weights = make_rows(0, 3)
    source, cause = np.array([C, H, C], np.uint8), np.full(3, FILLED, np.uint8)
    rows = Rows([1, 3], ids, weights, source, cause, 1, np.array([4, 5, 6], np.int32))
    assert rows.resized(2).weights_version.tolist() == [4, 5]
    assert len(rows.resized(5).weights_version) == 5
    check(rows.resized(2), [C, H])
    check(rows.resized(3), [C, H, C])
    check(rows.resized(5), [C, H, C, M, M])
    assert rows.resized(0).topk_ids.shape == (0, 2, 2)
    assert rows.resized(5).topk_ids.dtype == np.uint8


@pytest.fixture
def recalling():
    """A worker with a sequence of two full blocks that has ended, and whose blocks were taken."""

    def run(**of_the_second_step):
        worker = Worker(prefix_bytes=2**16)
        worker.step([(0, 0, 4)], admitted=[admit(0, "a", 8, [5, 6])], filled=[(5, "five")])
        worker.step([(0, 4, 4)], filled=[(6, "six")], **of_the_second_step)
        worker.end()
        worker.step([(1, 0, 8)], admitted=[admit(1, "b", 8, [5, 6])], rows=make_rows(100, 8))
        return worker

    return run


def load(worker, *blocks):
    """Load blocks, and run a sequence on them."""
    worker.step(loaded=blocks)
    numbers = [block for block, _ in blocks]
    worker.step([(2, 8, 1)], admitted=[admit(2, "c", 9, [*numbers, 9], 8)])
    return worker.end(2)


def test_rows_come_back_with_their_prefix(recalling):
    worker = recalling()
    check(load(worker, (7, "five"), (8, "six")), [R] * 8 + [C])
    worker.step([(3, 8, 1)], admitted=[admit(3, "d", 9, [7, 8, 4], 8)])
    check(worker.end(3), [R] * 8 + [C])  # as a hit, too


def test_other_prefixes_and_blocks_that_end_within_a_load_have_no_rows(recalling):
    check(load(recalling(), (7, "five"), (8, "")), [R] * 4 + [M] * 4 + [C])
    check(load(recalling(), (7, "other"), (8, "six")), [M] * 4 + [R] * 4 + [C])


def test_a_block_that_lacks_a_row_is_not_kept(recalling):
    check(load(recalling(lost="paused"), (7, "five"), (8, "six")), [R] * 4 + [M] * 4 + [C])


def test_blocks_of_before_a_gap_are_not_kept():
    worker = Worker(prefix_bytes=2**16)
    worker.step([(0, 0, 4)], admitted=[admit(0, "a", 4, [5])], filled=[(5, "five")])
    worker.next_step += 1
    worker.step([(1, 0, 4)], admitted=[admit(1, "b", 4, [5])], rows=make_rows(100, 4))
    check(load(worker, (7, "five"), (8, "")), [M] * 8 + [C])
