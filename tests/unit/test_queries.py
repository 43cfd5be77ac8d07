"""What the collector answers about all requests: the list, the capture's state, the counts."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import orjson
import pytest
from builders import WORKER, Bench, make_hello, trace_size

from moescope import formats
from moescope.trace import Source
from moescope_service.collector.sequences import WORKER_TIMEOUT_S
from moescope_service.collector.store import Kept
from moescope_service.messages import pack_hello


@pytest.fixture
def bench():
    return Bench()


def capture_messages(bench, peer=WORKER):
    sent = [orjson.loads(frames[0]) for to, frames in bench.collector.outbox if to == peer]
    return [message["on"] for message in sent if message["kind"] == "capture"]


class TestRecent:
    def test_newest_first_running_ones_too(self, bench):
        bench.run("a")
        bench.start("b")
        first, second = bench.answered("recent").values["sequences"]
        assert (first["request_id"], first["status"], first["complete"]) == ("b", "running", None)
        assert (second["request_id"], second["status"], second["complete"]) == (
            "a",
            "finished",
            True,
        )
        assert (second["ids"], second["num_tokens"], second["coverage"]) == (["a", "a-i"], 6, 1.0)
        assert second["size_bytes"] == trace_size()
        assert first.keys() == second.keys()

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
    def test_pages_hold_every_sequence_once(self, bench, limit):
        for name in "abcdefg":
            bench.run(name)
        names, before = [], None
        for _ in range(10):
            page = bench.answered("recent", limit=limit, before=before).values
            assert len(page["sequences"]) <= limit
            names += [one["request_id"] for one in page["sequences"]]
            before = page["next_before"]
            if before is None:
                break
        assert names == list("gfedcba")

    def test_nothing_yet(self, bench):
        assert bench.answered("recent").values["sequences"] == []
        assert bench.answered("recent").values["next_before"] is None


class TestCapture:
    def test_pause_and_resume_reach_every_worker(self, bench):
        bench.collector.handle(b"second", pack_hello(make_hello(engine=1)))
        assert bench.answered("capture", on=False).values["capture"] == "paused"
        assert bench.answered("info").values["capture"] == "paused"
        assert bench.answered("capture", on=True).values["capture"] == "on"
        for peer in (WORKER, b"second"):
            assert capture_messages(bench, peer) == [True, False, True]

    def test_a_worker_that_says_hello_while_paused_is_told_so(self, bench):
        bench.answered("capture", on=False)
        bench.say_hello(b"late")
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
        values = bench.answered("metrics").values
        assert (values["rows_lost"], values["rows_captured"]) == ({"paused": 1}, 6)
        assert values["traces"] == {"incomplete": 1}


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
        """Keep a request of 30 MiB a choice under the id ``mine``."""
        bench.run("small", ids=["mine"], created_s=1.0)
        (small,) = bench.collector.store.find("mine")
        num_rows = 6 * 2**20
        large = dataclasses.replace(
            small.trace, topk_ids=np.zeros((num_rows, 2, 2), np.uint8), topk_weights=None,
            source=np.zeros(num_rows, np.uint8), num_tokens=num_rows + 1, token_ids=None,
        )  # fmt: skip

        def keep(uid, created_s, index=0):
            trace = dataclasses.replace(large, created_s=created_s, index=index)
            bench.collector.store.add(Kept(uid, trace, ("mine",)))

        return keep

    def answer(self, bench):
        reply = bench.answered("routes", request_id="mine", wait_s=0)
        traces = formats.load_npz(bytes(reply.arrays[0]))
        found = [(trace.created_s, trace.index) for trace in traces]
        assert ("truncated" in formats.read_npz(bytes(reply.arrays[0]))) == (
            reply.values["truncated"]
        )
        return found, reply.values["truncated"]

    def test_the_newest_requests_are_answered_and_the_rest_is_told_of(self, bench, keep):
        assert self.answer(bench) == ([(1.0, 0)], False)
        bench.collector.store.remove(bench.collector.store.find("mine")[0])
        for uid, created_s in ((11, 2.0), (12, 3.0), (13, 4.0)):
            keep(uid, created_s)
        assert self.answer(bench) == ([(4.0, 0), (3.0, 0)], True)

    def test_the_newest_one_is_always_whole(self, bench, keep):
        bench.collector.store.remove(bench.collector.store.find("mine")[0])
        for uid, index in ((11, 2), (12, 0), (13, 1)):
            keep(uid, 2.0, index)
        assert self.answer(bench) == ([(2.0, 0), (2.0, 1), (2.0, 2)], False)
        keep(14, 1.0)
        assert self.answer(bench) == ([(2.0, 0), (2.0, 1), (2.0, 2)], True)


class TestSettle:
    """A script that ends waits for the traces of what was answered."""

    def test_nothing_to_wait_for(self, bench):
        bench.run("a")
        bench.start("b")  # runs on, and nobody waits for it
        assert bench.answered("settle", wait_s=10.0).values["unsettled"] == 0

    def test_waits_for_every_answered_request(self, bench):
        bench.start("a", 0, [0, 1])
        bench.start("b", 1, [2, 3])
        bench.finish("a-i")
        bench.finish("b-i")
        number = bench.ask("settle", wait_s=10.0)
        bench.end(0)
        assert bench.answer(number) is None
        bench.end(1)
        assert bench.answer(number).values["unsettled"] == 0

    def test_waits_for_requests_that_opted_out_as_well(self, bench):
        bench.start("a", keep=False)
        bench.finish("a-i")
        number = bench.ask("settle", wait_s=10.0)
        assert bench.answer(number) is None
        bench.end()
        assert bench.answer(number).values["unsettled"] == 0

    def test_says_what_did_not_come_in_time(self, bench):
        bench.start("a")
        bench.finish("a-i")
        number = bench.ask("settle", wait_s=10.0)
        bench.pass_s(9.0)
        assert bench.answer(number) is None
        bench.pass_s(2.0)
        assert bench.answer(number).values["unsettled"] == 1


class TestExperts:
    def test_totals_equal_the_traces(self, bench):
        bench.run("a")
        bench.run("b")
        reply = bench.answered("experts")
        counts = np.frombuffer(reply.arrays[0], np.int64).reshape(2, 2, 8)
        want = sum(trace.counts() for name in "ab" for trace in bench.traces(name))
        np.testing.assert_array_equal(counts.sum(axis=0), want)
        assert reply.values["rows"] == [8, 2]

    def test_windows(self, bench):
        """Marks stand every ten seconds; the answer says what a window really covers."""
        for name in "abc":
            bench.run(name)
            bench.pass_s(10.0)
        for window_s, covered_s, runs in ((5.0, 10.0, 1), (10.0, 10.0, 1), (15.0, 20.0, 2),
                                          (30.0, 30.0, 3), (3600.0, 30.0, 3)):  # fmt: skip
            reply = bench.answered("experts", window_s=window_s)
            assert reply.values["window_s"] == covered_s, window_s
            assert np.sum(reply.values["rows"]) == runs * 5, window_s
            assert np.frombuffer(reply.arrays[0], np.int64).sum() == runs * 5 * 4
            assert time.time() - reply.values["since_s"] == pytest.approx(covered_s, abs=1.0)
        assert bench.answered("experts").values["window_s"] is None

    def test_a_window_reaches_behind_no_reset(self, bench):
        bench.run("a")
        bench.pass_s(10.0)
        bench.answered("reset")
        bench.pass_s(1.0)
        bench.run("b")
        reply = bench.answered("experts", window_s=60.0)
        assert (reply.values["window_s"], sum(reply.values["rows"])) == (1.0, 5)

    def test_they_say_whose_counts_they_are(self, bench):
        hello = dataclasses.asdict(bench.hello)
        assert bench.answered("experts").values["hello"] == hello
        assert bench.answered("reset").values["hello"] == hello

    def test_reset(self, bench):
        bench.run("a")
        assert bench.answered("reset").values["rows"] == [0, 0]
        reply = bench.answered("metrics")
        assert np.frombuffer(reply.arrays[0], np.int64).sum() == 5 * 2 * 2

    def test_before_hello(self):
        bench = Bench(hello=False)
        assert bench.answered("experts").values == {"kind": "reply", "number": 1, "hello": None}
        assert bench.answered("reset").values["hello"] is None
        assert bench.answered("info").values["hello"] is None
        assert bench.answered("metrics").arrays == []
