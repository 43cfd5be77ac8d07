"""A collector that is not the deployment's first."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import API, WORKER, Bench, admit, make_register, make_rows, make_spec, make_step

from moescope.trace import Source
from moescope_service.collector.core import Collector
from moescope_service.collector.workers import STAGE_TIMEOUT_S
from moescope_service.frontend.journal import Journal
from moescope_service.messages import (
    Ongoing,
    RequestKey,
    WorkerState,
    pack,
    pack_introduction,
    unpack,
)
from moescope_service.processes import Process
from moescope_service.queries import CaptureQuery, InfoQuery, MetricsQuery
from moescope_service.settings import Settings


def make_worker_state(**changes):
    values = {"next_step": 7, "ongoing": [], "ended": []}
    return WorkerState(**(values | changes))


def introduce(bench, peer=WORKER, **changes):
    bench.collector.handle(
        peer, pack_introduction(bench.spec, worker_state=make_worker_state(**changes))
    )
    bench._next_step = changes.get("next_step", 7)


@pytest.fixture
def bench():
    return Bench(spec=False, epoch=1)


def cause_counts(bench):
    return {k: v for k, v in bench.answered(MetricsQuery()).missing.items() if v}


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
    assert bench.answered(MetricsQuery()).gaps == 0


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
    assert bench.answered(MetricsQuery()).unclaimed == 0


def test_an_end_that_was_told_counts_though_it_is_told_again(bench):
    """The same collector, on another connection."""
    bench.introduce_worker()
    bench.start("a")
    bench.end()
    introduce(bench, b"worker again", ended=["a-i"])
    bench.finish("a-i")
    assert bench.traces("a")[0].complete


class TestLinkThatBroke:
    """A worker comes again to the same collector: what it had told stays, the rest is missing."""

    def test_rows_of_before_are_missing_with_their_cause(self, bench):
        bench.introduce_worker()
        bench.start("a")
        introduce(bench, b"again", next_step=5, ongoing=[Ongoing(admit(0, "a-i", 4, [0, 1]), 6)])
        bench.send(make_step(5, [(0, 6, 1)]), b"again")
        bench.finish("a-i", output=[1, 2, 3, 4])
        bench.send(make_step(6, finished=[0]), b"again")
        (trace,) = bench.traces("a")
        assert trace.source.tolist() == [Source.MISSING] * 6 + [Source.COMPUTED]
        assert cause_counts(bench) == {"link_broken": 6}
        assert bench.answered(MetricsQuery()).gaps == 1

    def test_where_no_step_was_lost_there_is_no_gap(self, bench):
        bench.introduce_worker()
        bench.start("a")
        introduce(bench, b"again", next_step=2)
        assert bench.answered(MetricsQuery()).gaps == 0

    def test_an_end_that_one_stage_tells_again_costs_nothing(self, bench):
        """Whether the other stage has told it before, or tells it later."""
        stages = [make_spec(stage=n, num_stages=2, layers=[n]) for n in range(2)]

        def tell(number, *names):
            for name in names:
                step = make_step(
                    numbers[number],
                    [(0, 0, 5)],
                    rows=tuple(one[:, :1] for one in make_rows(0, 5)),
                    admitted=[admit(0, f"{name}-i", 4, [0, 1])],
                )
                bench.send(step, peers[number])
                bench.send(make_step(numbers[number] + 1, finished=[0]), peers[number])
                numbers[number] += 2

        peers, numbers = [b"0", b"1"], [0, 0]
        for peer, spec in zip(peers, stages, strict=True):
            bench.collector.handle(peer, pack_introduction(spec))
        for name in "ab":
            bench.register(name)
        tell(1, "a", "b")
        tell(0, "a")
        state = make_worker_state(next_step=4, ended=["a-i", "b-i"])
        bench.collector.handle(b"1 again", pack_introduction(stages[1], worker_state=state))
        peers[1] = b"1 again"
        tell(0, "b")
        bench.pass_s(STAGE_TIMEOUT_S - 1)
        for name in "ab":
            bench.finish(f"{name}-i")
            (trace,) = bench.traces(name)
            assert trace.complete, name
        bench.pass_s(1000)
        assert bench.answered(MetricsQuery()).unclaimed == 0


class TestPause:
    """The order of the collector before is kept until there is a newer one."""

    def spec(self, bench, engine, **values):
        """An engine introduces itself that was told to ship rows or to hold them back."""
        spec = make_spec(engine=engine, num_engines=2)
        bench.collector.handle(b"%d" % engine, pack_introduction(spec, **values))

    def told(self, bench):
        """By engine: what it was told last."""
        told = {}
        for peer, frames in bench.collector.state.outbox:
            kind, values = unpack(frames)
            if kind == "capture":
                told[int(peer)] = values["on"]
        return told

    @pytest.mark.parametrize("worker_state", [None, make_worker_state()])
    def test_it_is_kept_by_whoever_says_so_first(self, bench, worker_state):
        """An engine that was idle so far has no steps to tell of, one that counts never has."""
        self.spec(bench, 0, is_capturing=False, worker_state=worker_state)
        assert bench.answered(InfoQuery()).info.capture == "paused"
        self.spec(bench, 1, is_capturing=False)
        assert self.told(bench) == {0: False, 1: False}

    def test_all_do_as_the_first(self, bench):
        """An order that reached one of them alone, because the collector ended."""
        self.spec(bench, 0, is_capturing=False)
        self.spec(bench, 1, is_capturing=True)
        assert self.told(bench) == {0: False, 1: False}
        assert bench.answered(InfoQuery()).info.capture == "paused"

    def test_a_worker_that_missed_an_order_pauses_nobody(self, bench):
        for engine in range(2):
            self.spec(bench, engine, is_capturing=False)
        bench.ask(CaptureQuery(on=True))
        self.spec(bench, 1, is_capturing=False, worker_state=make_worker_state())
        assert self.told(bench) == {0: True, 1: True}
        assert bench.answered(InfoQuery()).info.capture == "on"

    def test_an_order_before_any_introduction_is_the_newest(self, bench):
        bench.ask(CaptureQuery(on=True))
        self.spec(bench, 0, is_capturing=False)
        assert self.told(bench) == {0: True}


def test_steps_of_a_worker_that_was_replaced_are_left_out(bench):
    bench.introduce_worker()
    introduce(bench, b"again", next_step=0)
    bench.start("a")
    assert bench.answered(MetricsQuery()).steps == 0


def test_a_second_worker_is_left_out_while_the_first_one_runs(bench, caplog):
    """Such as one of another deployment that took this one's directory for its own."""
    first, second = Process.current(), dataclasses.replace(Process.current(), start_ticks=1)
    for peer, process in ((WORKER, first), (b"second", second), (b"again", first)):
        bench.collector.handle(peer, pack_introduction(bench.spec, process=str(process)))
        if peer == b"second":
            bench.start("a")
            bench.finish("a-i")
            bench.end()
            assert bench.traces("a")[0].complete
            bench.send(make_step(0, [(0, 0, 4)]), peer)
            assert bench.answered(MetricsQuery()).steps == 3
    assert f"a second worker of engine 0, stage 0 introduced itself (process {second.pid})" in (
        caplog.text
    )
    assert list(bench.collector.state.workers) == [b"again"]


def test_who_has_not_said_who_it_is_is_not_listened_to():
    collector = Collector(Settings(), epoch=3)
    register = pack("register", **dataclasses.asdict(make_register("a")))
    collector.handle(API, register)
    assert not list(collector.state.sequences)
    collector.handle(API, pack("server"))
    collector.handle(API, register)
    collector.handle(API, register)  # it was in the pipe, and in the introduction
    assert len(list(collector.state.sequences)) == len(collector.state.find("a")[0]) == 1


def introduced(journal):
    return [journal.introduce(), *iter(journal.take, None)]


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
    journal.finish("a-i", finish)
    for frames in introduced(journal):
        bench.collector.handle(API, frames)
    introduce(bench, ongoing=[Ongoing(admit(3, "b-i", 4, [5, 6]), 5)], ended=["a-i"])
    (gone,) = bench.collector.state.store
    assert gone.trace.index == 0
    assert gone.trace.num_rows == 4 + 3 - 1
    assert set(gone.trace.source) == {Source.MISSING}
    for frames in introduced(journal):  # its connection broke off, and the collector is the same
        bench.collector.handle(API, frames)
    assert [s.register.internal_id for s in bench.collector.state.sequences] == ["b-i"]


def test_a_deleted_request_is_forgotten_by_every_server(bench):
    bench.collector.handle(b"other", pack("server"))
    bench.introduce_worker()
    bench.start("a")
    assert bench.delete("a").deleted == 1
    told = [(p, unpack(f)) for p, f in bench.collector.state.outbox if unpack(f)[0] == "forget"]
    assert sorted(told) == [(p, ("forget", {"internal_ids": ["a-i"]})) for p in (API, b"other")]


def test_another_shape_is_refused_with_its_snapshot(bench):
    bench.introduce_worker()
    bench.collector.handle(
        b"x", pack_introduction(make_spec(top_k=3, engine=1), worker_state=make_worker_state())
    )
    assert bench.collector.state.spec == make_spec()


def received(bench):
    """What API servers were told since the last call."""
    bench.collector.tick()
    told = [(peer, unpack(frames)) for peer, frames in bench.collector.state.outbox]
    bench.collector.state.outbox.clear()
    return [(peer, values["count"]) for peer, (kind, values) in told if kind == "received"]


def test_an_api_server_of_another_node_is_told_what_arrived(bench):
    register = pack("register", **dataclasses.asdict(make_register("a")))
    bench.collector.handle(b"one", pack("server", name="it"))
    assert received(bench) == []
    for message in (register, register, pack("alias", internal_ids=["a-i"], alias="x")):
        bench.collector.handle(b"one", message)
    assert received(bench) == [(b"one", 3)]
    with pytest.raises(TypeError):  # what makes no sense arrived, too
        bench.collector.handle(b"one", pack("alias", nonsense=1))
    assert received(bench) == [(b"one", 4)]
    servers = set(bench.collector.state.servers)
    bench.collector.handle(b"two", pack("server", name="it"))
    assert bench.collector.state.servers == servers - {b"one"} | {b"two"}
    bench.collector.handle(b"one", register)  # it is gone
    bench.collector.handle(b"two", register)
    bench.collector.handle(API, register)  # it wants none
    assert received(bench) == [(b"two", 1)]
