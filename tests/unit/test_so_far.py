"""The rows of running sequences: which are settled, and what a query that follows finds of them."""

from __future__ import annotations

import numpy as np
import pytest
from builders import Bench, admit, make_rows, make_spec, make_step

from moescope.trace import RouteTrace, Source
from moescope.version_runs import MIXED
from moescope_service.collector.reassembly import Reassembler
from moescope_service.collector.workers import Workers
from moescope_service.messages import Ongoing, WorkerState
from moescope_service.queries import RoutesQuery, Wanted

C, H, M = Source.COMPUTED, Source.CACHED, Source.MISSING


class Worker:
    """Steps in order."""

    def __init__(self, reassembler=None):
        self.reassembler = reassembler or Reassembler(make_spec())
        self.next_step = 0

    def step(self, spans=(), **changes):
        self.reassembler.apply(make_step(self.next_step, spans, **changes))
        self.next_step += not changes.get("has_more", False)

    def source(self, name="a", start=0):
        """The sources of a sequence's settled rows, each of which is that of its position."""
        end = self.reassembler.num_settled(name)
        rows = self.reassembler.rows_so_far(name, start, end)
        here = rows.source != M
        ids, weights = make_rows(start, len(here))
        np.testing.assert_array_equal(rows.topk_ids[here], ids[here])
        np.testing.assert_array_equal(rows.topk_weights[here], weights[here])
        return rows.source.tolist()


@pytest.fixture
def worker():
    return Worker()


class TestSettled:
    def test_chunks_of_a_prompt_and_then_tokens(self, worker):
        assert worker.reassembler.num_settled("a") == 0
        worker.step([(0, 0, 3)], admitted=[admit(0, "a", 6, [5])])
        assert worker.source() == [C] * 3
        worker.step([(0, 3, 3)], grown=[(0, [2])])
        worker.step([(0, 6, 1)])
        assert worker.source() == [C] * 7
        assert worker.source(start=5) == [C] * 2
        worker.step(finished=[0])
        assert worker.reassembler.num_settled("a") == 0

    def test_hits_are_settled_at_once(self, worker):
        worker.step([(0, 0, 8)], admitted=[admit(0, "a", 8, [1, 2])])
        worker.step(admitted=[admit(1, "b", 10, [1, 2, 3], cached=8)])
        assert worker.source("b") == [H] * 8
        worker.step([(1, 8, 2)])
        assert worker.source("b", start=6) == [H, H, C, C]

    def test_drafts_are_not_until_a_step_goes_on_behind_them(self, worker):
        worker.step([(0, 0, 4)], admitted=[admit(0, "a", 4, [1, 2, 3])])
        with_drafts = map(np.concatenate, zip(make_rows(4, 1), make_rows(90, 3), strict=True))
        worker.step([(0, 4, 4)], rows=tuple(with_drafts))
        assert worker.reassembler.num_settled("a") == 5
        worker.step([(0, 5, 3)])  # all of them were rejected
        assert worker.source(start=5) == [C]
        worker.step([(0, 8, 1)])  # both were taken
        assert worker.source() == [C] * 9

    def test_drafts_in_another_piece_of_the_step_are_not_either(self, worker):
        worker.step([(0, 0, 2), (1, 0, 2)],
                    admitted=[admit(0, "a", 2, [1, 2]), admit(1, "b", 2, [3, 4])])  # fmt: skip
        worker.step([(0, 2, 2)], has_more=True)
        worker.step([(0, 4, 2), (1, 2, 1)], part=1, has_more=True)
        worker.step([(1, 3, 2)], part=2)
        assert [worker.reassembler.num_settled(one) for one in "ab"] == [3, 3]
        worker.step([(0, 3, 1)], has_more=True)
        worker.step([(1, 3, 1)], part=1)  # a piece that begins with another sequence
        assert [worker.reassembler.num_settled(one) for one in "ab"] == [4, 4]

    def test_a_prompt_in_several_pieces_is_with_the_last_one(self, worker):
        worker.step([(0, 0, 3)], admitted=[admit(0, "a", 7, [1, 2])], has_more=True)
        assert worker.source() == []
        worker.step([(0, 3, 4)], part=1)
        assert worker.source() == [C] * 7

    def test_hits_on_what_another_piece_brings_are_with_that_one(self, worker):
        admitted = [admit(0, "a", 4, [1]), admit(1, "b", 5, [1, 2], cached=4)]
        worker.step([(1, 4, 1)], admitted=admitted, has_more=True)
        assert worker.source("b") == []
        worker.step([(0, 0, 4)], part=1)
        assert worker.source("b") == [H] * 4 + [C]

    def test_a_step_of_which_a_piece_is_lost_settles_nothing(self, worker):
        worker.step([(0, 0, 3)], admitted=[admit(0, "a", 7, [1, 2])], has_more=True)
        worker.next_step += 1
        worker.step([(0, 0, 1)], admitted=[admit(0, "b", 4, [3, 4])])
        assert worker.reassembler.num_settled("b") == 1

    def test_a_row_that_will_be_computed_again_is_not(self, worker):
        worker.step([(0, 0, 6)], admitted=[admit(0, "a", 6, [1, 2])])
        worker.step([(0, 6, 1)])
        worker.step([(1, 0, 1)], admitted=[admit(1, "b", 1, [2])])  # "a" was preempted
        assert worker.source() == [C] * 4
        worker.step([(0, 0, 3)], resumed=[admit(0, "a", 6, [3, 4])])
        assert worker.source() == [C] * 3
        worker.step([(0, 3, 5)])  # and the token that was sampled before
        assert worker.source() == [C] * 7
        worker.step([(0, 8, 1)], grown=[(0, [5])])
        assert worker.source() == [C] * 9

    def test_what_a_load_did_not_bring_is_not(self, worker):
        worker.step(admitted=[admit(0, "a", 9, [1, 2, 3], cached=8)])
        assert worker.source() == [M] * 8
        worker.step([(0, 4, 3)])
        assert worker.source() == [M] * 4 + [C] * 3

    def test_what_others_computed_meanwhile_is_settled(self, worker):
        worker.step([(0, 0, 4)], admitted=[admit(0, "a", 13, [1])])
        worker.step([(1, 0, 12)], admitted=[admit(1, "b", 12, [5, 6, 7])])
        worker.step([(0, 8, 1)], resumed=[admit(0, "a", 0, [1, 6, 3, 4], cached=8)])
        assert worker.source() == [C] * 4 + [H] * 4 + [C]

    def test_rows_that_were_lost_are_settled_and_missing(self, worker):
        worker.step([(0, 0, 4)], admitted=[admit(0, "a", 4, [1, 2])])
        worker.step([(0, 4, 1)], lost="paused")
        worker.step([(0, 5, 1)])
        assert worker.source() == [C] * 4 + [M, C]

    def test_after_a_gap_nothing_is(self, worker):
        worker.step([(0, 0, 4)], admitted=[admit(0, "a", 4, [1])])
        worker.next_step += 1
        worker.step()
        assert worker.reassembler.num_settled("a") == 0

    def test_a_handle_that_is_used_again_begins_anew(self, worker):
        worker.step([(0, 0, 4)], admitted=[admit(0, "a", 4, [1])])
        worker.step([(0, 0, 2)], finished=[0], admitted=[admit(0, "b", 4, [2])])
        assert [worker.reassembler.num_settled(one) for one in "ab"] == [0, 2]

    def test_a_handle_of_before_a_restart_begins_anew(self):
        ongoing = [Ongoing(admit(0, "a", 9, [1, 2], cached=8), 8)]
        worker = Worker(
            Reassembler(make_spec(), WorkerState(next_step=0, ongoing=ongoing, ended=[]))
        )
        worker.step([(0, 0, 2)], finished=[0], admitted=[admit(0, "b", 4, [3])])
        assert worker.reassembler.num_settled("b") == 2

    def test_more_handles_than_there_was_room_for(self, worker):
        worker.step([(70, 0, 4)], admitted=[admit(70, "a", 4, [1])])
        assert worker.source() == [C] * 4


def test_only_rows_that_all_stages_have_settled():
    specs = [make_spec(stage=n, num_stages=2, layers=one) for n, one in enumerate(([1], [3, 4]))]
    workers = Workers(lambda: 0.0)
    first = Worker(workers.add(b"0", specs[0], None))
    assert workers.so_far("a", 0, 9) is None
    first.step([(0, 0, 4)], admitted=[admit(0, "a", 4, [1, 2])], rows=make_rows(0, 4, specs[0]))
    assert workers.so_far("a", 0, 9) is None  # the other stage is yet to come
    second = Worker(workers.add(b"1", specs[1], None))
    assert workers.so_far("a", 0, 9) is None
    second.step([(0, 0, 3)], admitted=[admit(0, "a", 4, [1, 2])], rows=make_rows(0, 3, specs[1]))
    rows, num_settled = workers.so_far("a", 1, 9)
    assert (num_settled, rows.layers, rows.source.tolist()) == (3, [1, 3, 4], [C] * 2)
    np.testing.assert_array_equal(rows.topk_ids[:, :1], make_rows(1, 2, specs[0])[0])
    np.testing.assert_array_equal(rows.topk_ids[:, 1:], make_rows(1, 2, specs[1])[0])
    assert len(workers.so_far("a", 0, 2)[0].source) == 2
    assert len(workers.so_far("a", 7, 2)[0].source) == 0
    first.step(finished=[0])
    assert workers.so_far("a", 0, 9) is None


def test_the_engine_that_has_a_sequence_is_asked():
    workers = Workers(lambda: 0.0)
    engines = [
        Worker(workers.add(b"%d" % number, make_spec(engine=number, num_engines=2), None))
        for number in range(2)
    ]
    engines[1].step([(0, 0, 4)], admitted=[admit(0, "a", 4, [1])])
    assert workers.so_far("a", 0, 9)[1] == 4


class Followed(Bench):
    """What a query that follows finds."""

    def follow(self, request_id, start=0, uid=None, index=0, **limits):
        wanted = [Wanted(request_id=request_id, start=start, uid=uid)]
        reply = self.answered(RoutesQuery(wanted=wanted, index=index, follows=True, **limits))
        return reply.found[0], reply.traces()


@pytest.fixture
def bench():
    return Followed()


class TestAQueryThatFollows:
    def test_finds_the_pages_of_the_trace_to_come(self, bench):
        bench.register("a")
        found, (first,) = bench.follow("a")
        assert (found.status, first.num_rows, first.num_tokens) == ("running", 0, 4)
        bench.step([(0, 0, 4)], admitted=[admit(0, "a-i", 4, [0, 1])], weights_version=1)
        _, (second,) = bench.follow("a", uid=found.uid)
        assert (second.num_rows, second.num_tokens, second.finish_reason) == (4, 5, None)
        assert (second.complete, second.token_ids) == (False, None)
        assert bench.follow("a", start=4, uid=found.uid)[1] == []
        bench.step([(0, 4, 1)], weights_version=2)
        bench.step([(0, 5, 1)], weights_version=MIXED)
        _, (third,) = bench.follow("a", start=4, uid=found.uid)
        bench.finish("a-i", [5, 6, 7])
        bench.end()
        found, (last,) = bench.follow("a", start=6, uid=found.uid)
        assert (found.status, found.next_start, last.finish_reason) == ("finished", None, "stop")
        (trace,) = bench.traces("a")
        joined = RouteTrace.joined([first, second, third, last])
        np.testing.assert_array_equal(joined.topk_ids, trace.topk_ids)
        assert joined.weights_versions.tolist() == trace.weights_versions.tolist()
        assert (joined.complete, joined.num_tokens) == (True, trace.num_tokens)

    def test_has_as_many_rows_as_fit(self, bench):
        bench.start("a")
        row_bytes = 2 * 2 * 3 + 5
        found, (page,) = bench.follow("a", max_bytes=1024 + 3 * row_bytes)
        assert (page.num_rows, found.next_start, page.num_tokens) == (3, 3, 6)
        found, (page,) = bench.follow("a", start=3, max_bytes=1024 + 3 * row_bytes)
        assert (page.num_rows, found.next_start) == (2, None)
        found, (page,) = bench.follow("a", start=2, max_bytes=1024 + 3 * row_bytes)
        assert (page.num_rows, found.next_start) == (3, None)
        assert bench.follow("a", max_bytes=1)[1][0].num_rows == 1

    def test_has_no_row_behind_the_tokens_that_are_known(self, bench):
        """The engine routes the last token too, before it knows that it is the last one."""
        bench.start("a")
        bench.step([(0, 5, 1)])
        bench.finish("a-i", [5, 6])
        (page,) = bench.follow("a")[1]
        assert (page.num_rows, page.num_tokens) == (5, 6)
        assert bench.follow("a", start=6)[1][0].num_rows == 0

    def test_finds_the_newest_request_and_one_choice(self, bench):
        for number, name in enumerate(("x", "y")):
            for index in range(2):
                internal_id = f"{name}-{index}"
                bench.register(name, created_s=100.0 + number, ids=["shared"], index=index,
                               internal_id=internal_id)  # fmt: skip
        for index in range(2):
            found, (page,) = bench.follow("shared", index=index)
            assert (page.request_id, page.index) == ("y", index)
            assert bench.follow("y", uid=found.uid, index=index)[0].uid == found.uid
        assert bench.follow("shared", index=5)[0].indices == [0, 1]
        assert bench.follow("x", uid=found.uid)[0].status == "unknown"
        bench.step(finished_unseen=["y-0"])
        bench.finish("y-0", [5])
        found, (page,) = bench.follow("shared")
        assert (found.status, page.index, page.finish_reason) == ("finished", 0, "stop")
        assert bench.follow("shared", index=1)[0].status == "running"

    def test_finds_nothing_of_others_or_of_what_was_deleted(self, bench):
        bench.start("a", owner="alice")
        found, _ = bench.follow("a", owner="alice")
        assert found.status == "running"
        assert bench.follow("a", owner="bob")[0].status == "unknown"
        bench.delete("a")
        assert bench.follow("a", uid=found.uid)[0].status == "unknown"

    def test_says_what_was_evicted(self):
        bench = Followed(memory_bytes=1)
        bench.start("a")
        found, _ = bench.follow("a")
        bench.finish("a-i")
        bench.end()
        assert bench.follow("a", uid=found.uid)[0].status == "evicted"

    def test_before_the_workers_came(self):
        bench = Followed(spec=False)
        bench.register("a")
        assert bench.follow("a")[1] == []
        bench.introduce_worker()
        assert bench.follow("a")[1][0].num_rows == 0

    def test_another_query_finds_a_running_request_as_before(self, bench):
        bench.start("a")
        assert bench.routes("a", index=0) == (bench.routes("a")[0], bench.routes("a")[1])
        assert bench.routes("a")[1].traces() == []
