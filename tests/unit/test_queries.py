"""What the collector answers about all requests: the list, the capture's state, the counts."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import orjson
import pytest
from builders import API, WORKER, Bench, make_spec, trace_size

from moescope import RouteTrace
from moescope.trace import Source
from moescope_service.collector import answers, pages, store
from moescope_service.collector.pages import TRACE_BYTES
from moescope_service.collector.sequences import WORKER_TIMEOUT_S
from moescope_service.collector.store import Kept
from moescope_service.messages import pack_introduction
from moescope_service.queries import (
    CaptureQuery,
    DeleteQuery,
    ExpertsQuery,
    ExpertsReply,
    InfoQuery,
    MetricsQuery,
    RecentQuery,
    ResetQuery,
    RoutesQuery,
    SettleQuery,
    Wanted,
    pack_cancel,
)


@pytest.fixture
def bench():
    return Bench()


def capture_messages(bench, peer=WORKER):
    sent = [orjson.loads(frames[0]) for to, frames in bench.collector.state.outbox if to == peer]
    return [message["on"] for message in sent if message["kind"] == "capture"]


class TestRecent:
    def test_newest_first_running_ones_too(self, bench):
        bench.run("a")
        bench.start("b")
        first, second = bench.answered(RecentQuery(limit=50)).sequences
        assert (first.request_id, first.status, first.complete) == ("b", "running", None)
        assert (second.request_id, second.status, second.complete) == ("a", "finished", True)
        assert (second.ids, second.num_tokens, second.coverage) == (("a", "a-i"), 6, 1.0)
        assert second.size_bytes == trace_size()

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
    def test_pages_hold_every_sequence_once(self, bench, limit):
        for name in "abcdefg":
            bench.run(name)
        names, before = [], None
        for _ in range(10):
            page = bench.answered(RecentQuery(limit=limit, before=before))
            assert len(page.sequences) <= limit
            names += [one.request_id for one in page.sequences]
            before = page.next_before
            if before is None:
                break
        assert names == list("gfedcba")

    def test_nothing_yet(self, bench):
        assert bench.answered(RecentQuery(limit=50)).sequences == []
        assert bench.answered(RecentQuery(limit=50)).next_before is None


class TestCapture:
    def test_pause_and_resume_reach_every_worker(self, bench):
        bench.collector.handle(b"second", pack_introduction(make_spec(engine=1)))
        assert bench.answered(CaptureQuery(on=False)).capture == "paused"
        assert bench.answered(InfoQuery()).info.capture == "paused"
        assert bench.answered(CaptureQuery(on=True)).capture == "on"
        for peer in (WORKER, b"second"):
            assert capture_messages(bench, peer) == [True, False, True]

    def test_a_worker_that_introduces_itself_while_paused_is_told_so(self, bench):
        bench.answered(CaptureQuery(on=False))
        bench.introduce_worker(b"late")
        assert capture_messages(bench, b"late") == [False]

    def test_rows_of_a_pause_are_missing_and_counted(self, bench):
        bench.start("a")
        bench.step([(0, 5, 1)], lost="paused")
        bench.step([(0, 6, 1)])
        bench.finish("a-i", [5, 6, 7, 8])
        bench.end()
        (trace,) = bench.traces("a")
        assert trace.source.tolist() == [0] * 5 + [Source.MISSING, 0]
        assert (trace.complete, trace.coverage) == (False, pytest.approx(6 / 7))
        metrics = bench.answered(MetricsQuery())
        assert (metrics.rows_lost, metrics.rows_captured) == ({"paused": 1}, 6)
        assert metrics.traces == {"incomplete": 1}


class TestGap:
    def test_running_requests_are_incomplete_and_later_ones_are_not(self, bench):
        bench.start("a")
        bench.lose_step()
        bench.step([(0, 5, 1)])
        bench.finish("a-i", [5, 6, 7])
        bench.end()
        bench.run("b")
        assert bench.traces("b")[0].complete
        bench.pass_s(WORKER_TIMEOUT_S)
        (trace,) = bench.traces("a")
        assert (trace.complete, trace.coverage) == (False, 0.0)


class TestAnIdThatWasUsedAgain:
    @pytest.fixture
    def keep(self, bench):
        """Keep a request under the id ``mine``."""
        bench.run("small", ids=["mine"], created_s=1.0)
        (small,) = bench.collector.state.store

        def keep(uid, created_s, index=0):
            trace = dataclasses.replace(small.trace, created_s=created_s, index=index)
            bench.collector.state.store.add(Kept(uid, trace, ("mine",)))

        return keep

    def found(self, bench):
        found, _ = bench.routes("mine")
        return [(one.created_s, one.index) for one in bench.traces("mine")], found.lacks_older

    def test_the_newest_requests_are_answered_and_the_rest_is_told_of(
        self, bench, keep, monkeypatch
    ):
        monkeypatch.setattr(store, "MAX_FOUND", 3)
        for uid, created_s in ((11, 2.0), (12, 3.0)):
            keep(uid, created_s)
        assert self.found(bench) == ([(3.0, 0), (2.0, 0), (1.0, 0)], False)
        keep(13, 4.0)
        assert self.found(bench) == ([(4.0, 0), (3.0, 0), (2.0, 0)], True)

    def test_a_request_is_found_as_a_whole_or_not_at_all(self, bench, keep, monkeypatch):
        monkeypatch.setattr(store, "MAX_FOUND", 3)
        for uid, index in ((11, 2), (12, 0), (13, 1)):
            keep(uid, 2.0, index)
        assert self.found(bench) == ([(2.0, 0), (2.0, 1), (2.0, 2)], True)
        keep(14, 3.0)
        assert self.found(bench) == ([(3.0, 0)], True)


class TestPages:
    """Rows of traces, as many as fit into one reply."""

    def row_bytes(self, bench):
        (trace,) = bench.traces("a")
        return 2 * 2 * (1 + trace.topk_weights.itemsize) + 1 + 4

    def test_pages_hold_every_row_and_token_once(self, bench):
        bench.run("a")
        (whole,) = bench.traces("a")
        for limit in range(1, 7):
            pages, start = [], 0
            while start is not None:
                found, reply = bench.routes("a", start, limit=limit)
                pages += reply.traces()
                assert found.next_start is None or found.next_start == start + limit
                start = found.next_start
            joined = RouteTrace.joined(pages)
            np.testing.assert_array_equal(joined.topk_ids, whole.topk_ids)
            np.testing.assert_array_equal(joined.topk_weights, whole.topk_weights)
            assert joined.token_ids.tolist() == whole.token_ids.tolist()
            assert len(pages) == -(-5 // limit)

    def test_a_reply_is_bounded_in_bytes(self, bench):
        bench.run("a")
        size = self.row_bytes(bench)
        for num_rows in (1, 2, 5):
            _, reply = bench.routes("a", max_bytes=TRACE_BYTES + num_rows * size + size - 1)
            (page,) = reply.traces()
            assert page.num_rows == num_rows

    def test_there_is_always_room_for_one_row(self, bench):
        bench.run("a")
        found, reply = bench.routes("a", max_bytes=1)
        assert (reply.traces()[0].num_rows, found.next_start) == (1, 1)

    def test_what_finds_no_room_is_left_for_the_next_reply(self, bench):
        for name in "ab":
            bench.run(name)
        wanted = [Wanted(request_id=name) for name in ("a", "b", "never-seen")]
        reply = bench.answered(RoutesQuery(wanted=wanted, max_bytes=1))
        assert [(one.status, one.next_start, one.traces) for one in reply.found] == [
            ("finished", 1, [0]), ("finished", 0, []), ("unknown", None, []),
        ]  # fmt: skip

    def test_ids_of_the_same_traces_share_them(self, bench):
        bench.run("a", ids=["a", "alias"])
        bench.run("b", ids=["b", "alias"])
        wanted = [Wanted(request_id=name) for name in ("a", "alias", "b", "a")]
        reply = bench.answered(RoutesQuery(wanted=wanted))
        names = [trace.request_id for trace in reply.traces()]
        found = [[names[number] for number in one.traces] for one in reply.found]
        assert len(names) == 2
        assert found == [["a"], ["a", "b"], ["b"], ["a"]]

    def test_behind_the_last_row_there_is_the_last_token(self, bench):
        bench.run("a")
        for start, tokens in ((4, [5, 6]), (5, [6]), (6, []), (99, [])):
            found, reply = bench.routes("a", start)
            (page,) = reply.traces()
            assert (page.start, page.num_rows) == (start, max(0, 5 - start))
            assert (page.token_ids.tolist(), found.next_start) == (tokens, None)

    def test_rows_of_several_stages_can_be_sent(self, bench):
        """Put together layer by layer, their arrays are not laid out row by row."""
        bench.run("a")
        (kept,) = bench.collector.state.store
        ids = np.asfortranarray(kept.trace.topk_ids)
        trace = dataclasses.replace(kept.trace, topk_ids=ids, request_id="b")
        bench.collector.state.store.add(dataclasses.replace(kept, uid=99, trace=trace, ids=("b",)))
        _, reply = bench.routes("b")
        assert all(memoryview(array).c_contiguous for array in reply.arrays)
        np.testing.assert_array_equal(reply.traces()[0].topk_ids, ids)

    def test_one_choice(self, bench):
        bench.run("a")
        assert bench.routes("a", index=0)[0].traces == [0]
        found, reply = bench.routes("a", index=3)
        assert (found.status, found.indices, reply.traces()) == ("finished", [0], [])


class TestDelete:
    def test_many_are_deleted_piece_by_piece(self, bench, monkeypatch):
        monkeypatch.setattr(answers, "DELETED_AT_ONCE", 2)
        for number in range(5):
            bench.run(f"r{number}", ids=["mine", f"r{number}"], internal_id=f"{number}-i")
        number = bench.ask(DeleteQuery(request_id="mine"))
        assert bench.reply(number) is None
        left = [len(bench.collector.state.store)]
        while bench.collector.work():
            left.append(len(bench.collector.state.store))
        assert left == [3, 1, 0]
        assert bench.reply(number).deleted == 5
        assert bench.status("mine") == "unknown"

    def test_what_ends_between_two_pieces_is_deleted_too(self, bench, monkeypatch):
        monkeypatch.setattr(answers, "DELETED_AT_ONCE", 1)
        for number in range(2):
            name = f"r{number}"
            bench.start(name, number, [2 * number, 2 * number + 1], ids=["mine", name])
        number = bench.ask(DeleteQuery(request_id="mine"))  # the first one is forgotten
        bench.finish("r1-i")
        bench.end(1)
        assert "r1" in bench.collector.state.store
        while bench.collector.work():
            pass
        assert bench.reply(number).deleted == 2
        assert len(bench.collector.state.store) == 0

    def test_other_queries_have_their_turn_between_two_pieces(self, bench, monkeypatch):
        monkeypatch.setattr(answers, "DELETED_AT_ONCE", 1)
        monkeypatch.setattr(pages, "AT_ONCE", 1)
        for number in range(9):
            bench.run(f"r{number}", ids=["mine", f"r{number}"], internal_id=f"{number}-i")
        bench.run("other")
        deleting = bench.ask(DeleteQuery(request_id="mine"))
        wanted = [Wanted(request_id=name) for name in ("other", "never-seen")]
        fetching = bench.ask(RoutesQuery(wanted=wanted))
        assert bench.collector.work()
        while bench.reply(fetching) is None:
            assert bench.collector.work()
        assert bench.reply(deleting) is None
        assert 1 < len(bench.collector.state.store) < 9

    def test_what_another_query_has_deleted_meanwhile_is_counted_once(self, bench):
        bench.run("a", ids=["a", "alias"])
        numbers = [bench.ask(DeleteQuery(request_id=name)) for name in ("a", "alias")]
        while bench.collector.work():
            pass
        assert [bench.reply(number).deleted for number in numbers] == [1, 0]


class TestPieces:
    """What takes long is done piece by piece, in a number of pieces that is bounded."""

    @pytest.fixture
    def shared(self, bench, monkeypatch):
        """An id that five requests share."""
        monkeypatch.setattr(pages, "AT_ONCE", 2)
        for number in range(5):
            bench.run(f"r{number}", ids=["mine", f"r{number}"], internal_id=f"{number}-i")
        return bench

    def test_a_query_that_is_taken_back_is_not_answered(self, shared):
        number = shared.ask(RoutesQuery(wanted=[Wanted(request_id="mine")]))
        shared.collector.handle(API, pack_cancel(number))
        assert not shared.collector.work()
        assert shared.reply(number) is None

    def test_many_ids_that_find_many_traces_each_are_left_for_the_next_reply(
        self, shared, monkeypatch
    ):
        monkeypatch.setattr(pages, "MAX_TRACES", 6)
        shared.run("alias", ids=["alias"])
        wanted = [Wanted(request_id=name) for name in ("mine", "alias", "mine", "alias", "none")]
        found = shared.answered(RoutesQuery(wanted=wanted)).found
        assert [len(one.traces) for one in found] == [5, 1, 0, 0, 0]
        assert [one.next_start for one in found] == [None, None, 0, 0, None]
        assert [one.status for one in found] == ["finished"] * 4 + ["unknown"]

    def test_the_first_id_always_has_its_traces(self, shared, monkeypatch):
        monkeypatch.setattr(pages, "MAX_TRACES", 0)
        shared.collector.state.outbox.clear()
        found, _ = shared.routes("mine")
        assert (found.next_start, len(found.traces)) == (None, 5)


class TestSettle:
    """A script that ends waits for the traces of what was answered."""

    def test_nothing_to_wait_for(self, bench):
        bench.run("a")
        bench.start("b")  # runs on, and nobody waits for it
        assert bench.answered(SettleQuery(wait_s=10.0)).unsettled == 0

    def test_waits_for_every_answered_request(self, bench):
        bench.start("a", 0, [0, 1])
        bench.start("b", 1, [2, 3])
        bench.finish("a-i")
        bench.finish("b-i")
        number = bench.ask(SettleQuery(wait_s=10.0))
        bench.end(0)
        assert bench.reply(number) is None
        bench.end(1)
        assert bench.reply(number).unsettled == 0

    def test_waits_for_requests_that_opted_out_as_well(self, bench):
        bench.start("a", keep=False)
        bench.finish("a-i")
        number = bench.ask(SettleQuery(wait_s=10.0))
        assert bench.reply(number) is None
        bench.end()
        assert bench.reply(number).unsettled == 0

    def test_says_what_did_not_come_in_time(self, bench):
        bench.start("a")
        bench.finish("a-i")
        number = bench.ask(SettleQuery(wait_s=10.0))
        bench.pass_s(9.0)
        assert bench.reply(number) is None
        bench.pass_s(2.0)
        assert bench.reply(number).unsettled == 1


class TestExperts:
    def test_totals_equal_the_traces(self, bench):
        bench.run("a")
        bench.run("b")
        reply = bench.answered(ExpertsQuery())
        counts = np.frombuffer(reply.arrays[0], np.int64).reshape(2, 2, 8)
        want = sum(trace.counts() for name in "ab" for trace in bench.traces(name))
        np.testing.assert_array_equal(counts.sum(axis=0), want)
        assert reply.rows == [8, 2]

    def test_windows(self, bench):
        """Marks stand every ten seconds; the answer says what a window really covers."""
        for name in "abc":
            bench.run(name)
            bench.pass_s(10.0)
        for window_s, covered_s, runs in ((5.0, 10.0, 1), (10.0, 10.0, 1), (15.0, 20.0, 2),
                                          (30.0, 30.0, 3), (3600.0, 30.0, 3)):  # fmt: skip
            reply = bench.answered(ExpertsQuery(window_s=window_s))
            assert reply.window_s == covered_s, window_s
            assert np.sum(reply.rows) == runs * 5, window_s
            assert np.frombuffer(reply.arrays[0], np.int64).sum() == runs * 5 * 4
            assert time.time() - reply.since_s == pytest.approx(covered_s, abs=1.0)
        assert bench.answered(ExpertsQuery()).window_s is None

    def test_a_window_reaches_behind_no_reset(self, bench):
        bench.run("a")
        bench.pass_s(10.0)
        bench.answered(ResetQuery())
        bench.pass_s(1.0)
        bench.run("b")
        reply = bench.answered(ExpertsQuery(window_s=60.0))
        assert (reply.window_s, sum(reply.rows)) == (1.0, 5)

    def test_they_say_whose_counts_they_are(self, bench):
        spec = bench.spec
        assert bench.answered(ExpertsQuery()).spec == spec
        assert bench.answered(ResetQuery()).spec == spec

    def test_reset(self, bench):
        bench.run("a")
        assert bench.answered(ResetQuery()).rows == [0, 0]
        reply = bench.answered(MetricsQuery())
        assert np.frombuffer(reply.arrays[0], np.int64).sum() == 5 * 2 * 2

    def test_before_any_introduction(self):
        bench = Bench(spec=False)
        assert bench.answered(ExpertsQuery()) == ExpertsReply(arrays=[])
        assert bench.answered(ResetQuery()).spec is None
        assert bench.answered(InfoQuery()).info.spec is None
        assert bench.answered(MetricsQuery()).arrays == []
