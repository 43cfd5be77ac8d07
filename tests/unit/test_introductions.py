"""A collector that is not the deployment's first."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import API, WORKER, Bench, admit, make_hello, make_register

from moescope.trace import Source
from moescope_service.api.journal import Journal
from moescope_service.collector.core import Collector
from moescope_service.messages import Ongoing, RequestKey, Snapshot, pack, pack_hello, unpack
from moescope_service.settings import Settings


def make_snapshot(**changes):
    values = {"next_seq": 7, "ongoing": [], "ended": []}
    return Snapshot(**(values | changes))


def introduce(bench, peer=WORKER, **changes):
    bench.collector.handle(peer, pack_hello(bench.hello, snapshot=make_snapshot(**changes)))
    bench._seq = changes.get("next_seq", 7)


@pytest.fixture
def bench():
    return Bench(hello=False, epoch=1)


def cause_counts(bench):
    return {k: v for k, v in bench.answered("metrics").values["missing"].items() if v}


def test_a_running_sequence_goes_on(bench):
    introduce(bench, ongoing=[Ongoing(admit(3, "a-i", 4, [5, 6], cached=2), 5)])
    bench.register("a")
    bench.step([(3, 5, 1)])
    bench.finish("a-i", output=[1, 2, 3])
    bench.end(3)
    (trace,) = bench.traces("a")
    assert trace.source.tolist() == [Source.MISSING] * 5 + [Source.COMPUTED]
    assert (trace.complete, trace.cached_len) == (False, 2)
    assert cause_counts(bench) == {"restart": 5}
    assert bench.answered("metrics").values["gaps"] == 0


def test_one_that_is_preempted_and_lost_blocks(bench):
    """It has more rows than its table: they are missing, whoever has the blocks."""
    introduce(bench, ongoing=[Ongoing(admit(0, "a-i", 4, [5]), 100)])
    bench.register("a")
    bench.finish("a-i", output=range(97))
    bench.end(0)
    assert bench.traces("a")[0].coverage == 0
    assert cause_counts(bench) == {"restart": 100}


def test_hits_on_blocks_of_before_are_missing_until_they_are_filled_again(bench):
    introduce(bench)
    for name, block, source in (("a", 8, Source.MISSING), ("b", 9, Source.CACHED)):
        if name == "b":
            bench.step([(0, 0, 4)], admitted=[admit(0, "filler", 4, [9])])
        bench.register(name, prompt=range(5))
        bench.step([(1, 4, 1)], admitted=[admit(1, f"{name}-i", 5, [block, 10], cached=4)])
        bench.finish(f"{name}-i", output=[1])
        bench.end(1)
        (trace,) = bench.traces(name)
        assert trace.source.tolist() == [source] * 4 + [Source.COMPUTED]


def test_an_end_that_was_told_to_nobody(bench):
    bench.register("a")
    introduce(bench, ended=["a-i", "b-i", "long-ago"])
    bench.finish("a-i")
    bench.register("b")
    bench.finish("b-i")
    for name in "ab":
        (trace,) = bench.traces(name)
        assert (trace.coverage, trace.num_rows) == (0, 5)
    assert cause_counts(bench) == {"restart": 10}
    bench.pass_s(1000)
    assert bench.answered("metrics").values["unclaimed"] == 0


def test_an_end_that_was_told_counts_though_it_is_told_again(bench):
    """The same collector, on another connection."""
    bench.say_hello()
    bench.start("a")
    bench.end()
    introduce(bench, b"worker again", ended=["a-i"])
    bench.finish("a-i")
    assert bench.traces("a")[0].complete


class TestPause:
    """The order of the collector before is kept until there is a newer one."""

    def hello(self, bench, engine, **values):
        """An engine says hello that was told to ship rows or to hold them back."""
        hello = make_hello(engine=engine, num_engines=2)
        bench.collector.handle(b"%d" % engine, pack_hello(hello, **values))

    def told(self, bench):
        """By engine: what it was told last."""
        told = {}
        for peer, frames in bench.collector.outbox:
            kind, values = unpack(frames)
            if kind == "capture":
                told[int(peer)] = values["on"]
        return told

    @pytest.mark.parametrize("snapshot", [None, make_snapshot()])
    def test_it_is_kept_by_whoever_says_so_first(self, bench, snapshot):
        """An engine that was idle so far has no steps to tell of, one that counts never has."""
        self.hello(bench, 0, is_capturing=False, snapshot=snapshot)
        assert bench.answered("info").values["capture"] == "paused"
        self.hello(bench, 1, is_capturing=False)
        assert self.told(bench) == {0: False, 1: False}

    def test_all_do_as_the_first(self, bench):
        """An order that reached one of them alone, because the collector ended."""
        self.hello(bench, 0, is_capturing=False)
        self.hello(bench, 1, is_capturing=True)
        assert self.told(bench) == {0: False, 1: False}
        assert bench.answered("info").values["capture"] == "paused"

    def test_a_worker_that_missed_an_order_pauses_nobody(self, bench):
        for engine in range(2):
            self.hello(bench, engine, is_capturing=False)
        bench.ask("capture", on=True)
        self.hello(bench, 1, is_capturing=False, snapshot=make_snapshot())
        assert self.told(bench) == {0: True, 1: True}
        assert bench.answered("info").values["capture"] == "on"

    def test_an_order_before_any_hello_is_the_newest(self, bench):
        bench.ask("capture", on=True)
        self.hello(bench, 0, is_capturing=False)
        assert self.told(bench) == {0: True}


def test_steps_of_a_worker_that_was_replaced_are_left_out(bench):
    bench.say_hello()
    introduce(bench, b"again", next_seq=0)
    bench.start("a")
    assert bench.answered("metrics").values["steps"] == 0


def test_who_has_not_said_who_it_is_is_not_listened_to():
    collector = Collector(Settings(), epoch=3)
    register = pack("register", **dataclasses.asdict(make_register("a")))
    collector.handle(API, register)
    assert not list(collector.sequences)
    collector.handle(API, pack("server"))
    collector.handle(API, register)
    collector.handle(API, register)  # it was in the pipe, and in the introduction
    assert len(list(collector.sequences)) == len(collector.sequences.find("a")) == 1


def note_register(journal, name, request="", created_s=1.0):
    """Note that a sequence was registered; returns the message."""
    frames = pack("register", **dataclasses.asdict(make_register(name)))
    journal.register(f"{name}-i", RequestKey(request or name, created_s), frames)
    return frames


def note_finish(journal, name):
    frames = pack("finish", internal_id=f"{name}-i")
    journal.note("finish", [f"{name}-i"], frames)
    return frames


def test_the_journal_tells_of_what_runs_and_of_nothing_else():
    journal = Journal()
    told = {name: note_register(journal, name) for name in ("runs", "over", "deleted")}
    alias = pack("alias", internal_ids=["runs-i", "over-i"], alias="other")
    journal.note("alias", ["runs-i", "over-i"], alias)
    note_finish(journal, "over")
    journal.note("query", (), pack("query"))
    journal.forget(["deleted-i", "unknown"])
    assert [*journal.introduce()] == [pack("server"), told["runs"], alias]
    assert [name in journal for name in ("runs-i", "over-i", "deleted-i")] == [True, False, False]
    note_finish(journal, "runs")
    assert len(journal) == 0


def test_the_journal_tells_of_ended_choices_of_a_request_that_runs():
    journal = Journal()
    told = [note_register(journal, name, "r") for name in ("a", "b", "c")]
    # The same id, but another request: it does not hold the first.
    note_register(journal, "later", "r", created_s=2.0)
    told.insert(1, note_finish(journal, "a"))
    note_finish(journal, "later")
    assert [*journal.introduce()] == [pack("server"), *told]
    journal.forget(["b-i"])
    note_finish(journal, "c")
    assert len(journal) == 0
    assert "a-i" not in journal


def test_a_choice_that_ended_before_is_missing_not_left_out(bench):
    journal = Journal()
    for index, name in enumerate(("a", "b")):
        register = dataclasses.asdict(dataclasses.replace(make_register(name), index=index))
        register["ids"] = ["r", f"{name}-i"]
        register["request_id"] = "r"
        frames = pack("register", [np.zeros(4, np.int32)], **register)
        journal.register(f"{name}-i", RequestKey("r", 1.0), frames)
    output = np.ones(3, np.int32)
    finish = pack("finish", [output], internal_id="a-i", reason="stop")
    journal.note("finish", ["a-i"], finish)
    for frames in journal.introduce():
        bench.collector.handle(API, frames)
    introduce(bench, ongoing=[Ongoing(admit(3, "b-i", 4, [5, 6]), 5)], ended=["a-i"])
    (gone,) = bench.collector.store
    assert gone.trace.index == 0
    assert gone.trace.num_rows == 4 + 3 - 1
    assert set(gone.trace.source) == {Source.MISSING}
    for frames in journal.introduce():  # its connection broke off, and the collector is the same
        bench.collector.handle(API, frames)
    assert [s.register.internal_id for s in bench.collector.sequences] == ["b-i"]


def test_a_deleted_request_is_forgotten_by_every_server(bench):
    bench.collector.handle(b"other", pack("server"))
    bench.say_hello()
    bench.start("a")
    assert bench.answered("delete", request_id="a").values["deleted"] == 1
    told = [(p, unpack(f)) for p, f in bench.collector.outbox if unpack(f)[0] == "forget"]
    assert sorted(told) == [(p, ("forget", {"internal_ids": ["a-i"]})) for p in (API, b"other")]


def test_another_shape_is_refused_with_its_snapshot(bench):
    bench.say_hello()
    bench.collector.handle(
        b"x", pack_hello(make_hello(top_k=3, engine=1), snapshot=make_snapshot())
    )
    assert bench.collector.hello == make_hello()
