"""The collector without its socket: messages in, answers out."""

from __future__ import annotations

import dataclasses

import numpy as np
import orjson
import pytest
from builders import (
    API,
    WORKER,
    Bench,
    admit,
    make_register,
    make_rows,
    make_spec,
    make_step,
    trace_size,
)

from moescope.trace import Source
from moescope.version_runs import MIXED
from moescope_service.collector import answers
from moescope_service.collector.sequences import API_TIMEOUT_S, WORKER_TIMEOUT_S
from moescope_service.messages import pack, pack_all, pack_introduction, pack_steps
from moescope_service.queries import (
    FINISHING_WAIT_S,
    ExpertsQuery,
    InfoQuery,
    MetricsQuery,
    RecentQuery,
    WaitReply,
    pack_cancel,
    pack_query,
)


@pytest.fixture
def bench():
    return Bench()


def test_a_request_from_start_to_trace(bench):
    assert bench.status("a") == "unknown"
    bench.start("a")
    assert bench.status("a") == "running"
    bench.finish("a-i")
    assert bench.status("a") == "running"
    bench.end()
    (trace,) = bench.traces("a")
    assert (trace.request_id, trace.model, trace.num_rows, trace.complete) == ("a", "tiny", 5, True)
    assert trace.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(trace.topk_ids, make_rows(0, 5)[0])
    np.testing.assert_array_equal(trace.topk_weights, make_rows(0, 5)[1])
    assert trace.versions == bench.spec.versions
    assert bench.traces("a-i")[0].request_id == "a"


def test_a_trace_says_which_weights_computed_its_rows(bench):
    bench.register("a", [1, 2, 3, 4])
    bench.step([(0, 0, 4)], admitted=[admit(0, "a-i", 4, [0, 1])])
    assert bench.answered(InfoQuery()).info.weights_version == 0
    bench.step(weights_version=1)
    assert bench.answered(InfoQuery()).info.weights_version == 1
    bench.step([(0, 4, 2)], weights_version=1)
    bench.step([(0, 6, 1)], weights_version=MIXED)
    bench.step([(0, 7, 1)], lost="paused", weights_version=2)
    bench.finish("a-i", output=[5, 6, 7, 8, 9])
    bench.end()
    (trace,) = bench.traces("a")
    assert trace.weights_versions.tolist() == [[0, 0], [4, 1], [6, MIXED]]
    assert trace.weights_version.tolist() == [0, 0, 0, 0, 1, 1, MIXED, MIXED]
    assert bench.answered(InfoQuery()).info.weights_version == 2
    found, reply = bench.routes("a", start=5)
    assert reply.traces()[found.traces[0]].weights_versions.tolist() == [[5, 1], [6, MIXED]]


@pytest.mark.parametrize(
    "order",
    [("register", "finish", "end"), ("register", "end", "finish"), ("end", "register", "finish")],
)
def test_reports_in_any_order(bench, order):
    """A finish follows its registration on one link; all other orders happen."""
    bench.step([(0, 0, 5)], admitted=[admit(0, "a-i", 4, [0, 1])])
    for what in order:
        {"register": lambda: bench.register("a"), "finish": lambda: bench.finish("a-i"),
         "end": bench.end}[what]()  # fmt: skip
        assert (bench.status("a") == "finished") == (what == order[-1])
    assert bench.traces("a")[0].complete


class TestWaiting:
    def test_a_question_right_after_the_response_waits_for_the_end(self, bench):
        bench.start("a")
        bench.finish("a-i")
        number = bench.wait("a")
        assert bench.reply(number) is None
        bench.end()
        assert bench.reply(number) is not None
        assert bench.status("a") == "finished"

    def test_it_does_not_wait_for_a_running_request_unless_told(self, bench):
        bench.start("a")
        assert bench.reply(bench.wait("a")) is not None
        assert bench.status("a") == "running"
        number = bench.wait("a", wait_s=5.0)
        assert bench.reply(number) is None
        bench.finish("a-i")
        assert bench.reply(number) is None
        bench.end()
        assert bench.reply(number) is not None
        assert bench.status("a") == "finished"

    @pytest.mark.parametrize(("wait_s", "waits_s"), [(None, FINISHING_WAIT_S), (0.5, 0.5), (0, 0)])
    def test_it_waits_so_long(self, bench, wait_s, waits_s):
        bench.start("a")
        bench.finish("a-i")
        number = bench.wait("a", wait_s=wait_s)
        if waits_s:
            bench.pass_s(waits_s - 0.01)
            assert bench.reply(number) is None
            bench.pass_s(0.02)
        assert bench.reply(number) is not None
        assert bench.status("a") == "running"

    def test_news_of_a_request_may_come_after_a_question_to_another_server(self, bench):
        assert bench.reply(bench.wait("a", wait_s=5.0)) is not None  # there is no other server
        bench.collector.handle(b"other", pack("server"))
        number, impatient, late = (
            bench.wait("a", wait_s=5.0),
            bench.wait("a"),
            bench.wait("late", wait_s=5.0),
        )
        bench.start("a")
        bench.pass_s(answers.OTHER_SERVER_WAIT_S + 0.01)
        assert bench.reply(late) is not None  # nobody has told of it
        assert bench.status("late") == "unknown"
        assert [bench.reply(one) for one in (number, impatient)] == [None, None]
        bench.pass_s(answers.OTHER_SERVER_WAIT_S + 0.01)
        assert bench.reply(impatient) is not None
        bench.pass_s(4.0)
        assert bench.reply(number) is None
        bench.finish("a-i")
        bench.end()
        assert bench.reply(number) is not None
        assert bench.status("a") == "finished"

    def test_what_is_gone_is_not_waited_for(self, bench):
        bench.collector.handle(b"other", pack("server"))
        bench.run("a")
        bench.collector.state.store.limit_bytes = 0
        bench.run("b", blocks=[2, 3])
        assert bench.status("a") == "evicted"
        assert bench.reply(bench.wait("a", wait_s=5.0)) is not None

    def test_it_waits_for_every_choice(self, bench):
        for index in range(2):
            bench.start("a", handle=index, blocks=[2 * index, 2 * index + 1], index=index,
                        internal_id=f"{index}-i", ids=["a"])  # fmt: skip
        bench.finish("0-i")
        bench.end(0)
        number = bench.wait("a", wait_s=5.0)
        assert bench.reply(number) is None
        bench.finish("1-i")
        bench.end(1)
        assert bench.reply(number) is not None
        assert bench.status("a") == "finished"
        assert [trace.index for trace in bench.traces("a")] == [0, 1]

    def test_a_deleted_request_is_not_waited_for(self, bench):
        bench.start("a")
        number = bench.wait("a", wait_s=5.0)
        assert bench.reply(number) is None
        assert bench.delete("a").deleted == 1
        assert bench.reply(number) is not None
        assert bench.status("a") == "unknown"

    def test_one_end_answers_every_question_for_it_and_no_other(self, bench):
        bench.start("a")
        bench.start("b", handle=1, blocks=[2, 3])
        numbers = [bench.wait(i, wait_s=5.0) for i in ("a", "a-i", "b", "a")]
        bench.finish("a-i")
        bench.end(0)
        assert [bench.reply(n) is not None for n in numbers] == [True, True, False, True]

    def test_several_requests_are_waited_for_together(self, bench):
        for handle, name in enumerate("abc"):
            bench.start(name, handle=handle, blocks=[2 * handle, 2 * handle + 1])
        number = bench.wait("a", "b", "never-seen", wait_s=5.0)
        bench.finish("a-i")
        bench.end(0)
        assert bench.reply(number) is None
        bench.finish("b-i")
        bench.end(1)
        assert bench.reply(number) == WaitReply(arrays=[])

    def test_a_query_that_is_taken_back_is_not_answered(self, bench):
        bench.start("a")
        number = bench.wait("a", wait_s=5.0)
        other = bench.wait("a", wait_s=5.0)
        bench.collector.handle(API, pack_cancel(number))
        bench.collector.handle(API, pack_cancel(number))
        bench.finish("a-i")
        bench.end()
        assert bench.reply(number) is None
        assert bench.reply(other) is not None

    def test_no_more_wait_than_there_is_room_for(self, bench, monkeypatch):
        monkeypatch.setattr(answers, "MAX_WAITING", 2)
        bench.start("a")
        numbers = [bench.wait("a", wait_s=5.0) for _ in range(3)]
        assert [bench.reply(number) for number in numbers] == [
            None, None, WaitReply(arrays=[], is_refused=True),
        ]  # fmt: skip


class TestIds:
    def test_a_repeated_id_finds_all_newest_first(self, bench):
        for number in range(3):
            bench.run(f"r{number}", ids=["mine", f"r{number}"], internal_id=f"{number}-i",
                      created_s=float(number))  # fmt: skip
        assert [trace.request_id for trace in bench.traces("mine")] == ["r2", "r1", "r0"]

    def test_while_one_of_them_runs_the_id_is_running(self, bench):
        bench.run("a", ids=["mine"])
        bench.start("b", ids=["mine"])
        assert bench.status("mine") == "running"

    @pytest.mark.parametrize("when", ["running", "finished"])
    def test_an_alias_finds_every_choice(self, bench, when):
        for index in range(2):
            bench.start("a", handle=index, blocks=[2 * index, 2 * index + 1], index=index,
                        internal_id=f"{index}-i", ids=["a", f"{index}-i"])  # fmt: skip
        if when == "running":
            bench.alias("alias/1", "0-i", "1-i")
            assert bench.status("alias/1") == "running"
        for index in range(2):
            bench.finish(f"{index}-i")
            bench.end(index)
        if when == "finished":
            bench.alias("alias/1", "0-i", "1-i")
        assert [trace.index for trace in bench.traces("alias/1")] == [0, 1]
        assert bench.delete("alias/1").deleted == 2
        assert bench.status("a") == "unknown"

    def test_an_alias_of_an_opted_out_request_finds_nothing(self, bench):
        bench.start("a", keep=False)
        bench.alias("alias", "a-i")
        bench.finish("a-i")
        bench.end()
        assert bench.status("alias") == "unknown"


class TestOptOut:
    def test_nothing_is_kept_and_everything_is_counted(self, bench):
        bench.run("a", keep=False)
        assert bench.status("a") == "unknown"
        assert bench.answered(RecentQuery(limit=50)).sequences == []
        assert bench.answered(MetricsQuery()).running == 0
        assert sum(bench.answered(ExpertsQuery()).rows) == 5

    def test_others_still_hit_its_blocks(self, bench):
        bench.run("a", keep=False)
        bench.register("b", prompt=[1, 2, 3, 4, 5])
        bench.step([(0, 4, 2)], admitted=[admit(0, "b-i", 5, [0, 5], cached=4)])
        bench.finish("b-i")
        bench.end()
        (trace,) = bench.traces("b")
        assert trace.source.tolist() == [Source.CACHED] * 4 + [Source.COMPUTED] * 2
        assert (trace.complete, trace.cached_len) == (True, 4)


class TestDelete:
    def test_a_finished_request_gives_its_bytes_back(self, bench):
        bench.run("a")
        before = bench.answered(InfoQuery()).info.store.bytes
        bench.run("b")
        assert bench.answered(InfoQuery()).info.store.bytes > before
        assert bench.delete("b").deleted == 1
        assert bench.answered(InfoQuery()).info.store.bytes == before
        assert (bench.status("b"), bench.status("a")) == ("unknown", "finished")

    def test_a_running_request_leaves_nothing(self, bench):
        bench.start("a")
        assert bench.delete("a").deleted == 1
        assert bench.status("a") == "unknown"
        bench.finish("a-i")
        bench.end()
        assert bench.status("a") == "unknown"
        metrics = bench.answered(MetricsQuery())
        store = metrics.info.store
        assert (metrics.running, store.traces, store.bytes) == (0, 0, 0)

    def test_an_unknown_request(self, bench):
        assert bench.delete("a").deleted == 0


def test_an_evicted_request():
    bench = Bench(memory_bytes=trace_size() * 2)
    for name in "abc":
        bench.run(name)
    assert [bench.status(name) for name in "abc"] == ["evicted", "finished", "finished"]
    store = bench.answered(InfoQuery()).info.store
    assert (store.traces, store.evicted) == (2, 1)
    assert store.bytes <= store.limit_bytes


class TestTimeouts:
    def test_a_worker_that_never_reports(self, bench):
        bench.start("a")
        bench.finish("a-i")
        bench.pass_s(WORKER_TIMEOUT_S - 0.1)
        assert bench.status("a") == "running"
        bench.pass_s(0.2)
        (trace,) = bench.traces("a")
        assert (trace.complete, trace.coverage, trace.finish_reason) == (False, 0.0, "stop")
        bench.end()  # too late, and harmless
        assert bench.status("a") == "finished"

    def test_an_api_server_that_never_reports(self, bench):
        bench.start("a")
        bench.end()
        bench.pass_s(API_TIMEOUT_S + 0.1)
        (trace,) = bench.traces("a")
        assert (trace.complete, trace.coverage, trace.finish_reason) == (False, 1.0, None)
        bench.finish("a-i")  # too late, and harmless
        assert len(bench.traces("a")) == 1

    def test_a_question_that_waits_is_answered_by_the_timeout(self, bench):
        bench.start("a")
        bench.finish("a-i")
        number = bench.wait("a", wait_s=60.0)
        bench.pass_s(WORKER_TIMEOUT_S)
        assert bench.reply(number) is not None
        assert bench.status("a") == "finished"


class TestBrokenTraces:
    """A sequence whose trace cannot be made: its API server named more tokens than it sent."""

    @pytest.fixture
    def bench(self):
        bench = Bench()
        prompt = np.array([1, 2, 3, 4], np.int32)
        register = make_register("a", prompt_len=9)
        bench.collector.handle(API, pack("register", [prompt], **dataclasses.asdict(register)))
        bench.step([(0, 0, 5)], admitted=[admit(0, "a-i", 4, [0, 1])])
        bench.finish("a-i")
        return bench

    def test_whoever_waits_for_it_is_answered(self, bench):
        number = bench.wait("a", wait_s=60.0)
        bench.end()
        assert bench.reply(number) is not None
        assert bench.status("a") == "unknown"

    @pytest.mark.parametrize("when", ["in one step", "too late"])
    def test_others_are_made_all_the_same(self, bench, when, caplog):
        bench.start("b", handle=1, blocks=[2, 3])
        bench.finish("b-i")
        if when == "in one step":
            bench.step(finished=[0, 1])
        else:
            bench.pass_s(WORKER_TIMEOUT_S)
        assert [bench.status(name) for name in "ab"] == ["unknown", "finished"]
        assert caplog.text.count("left out a trace that cannot be made") == 1
        assert caplog.text.count("ValueError: token_ids must be") == 1


def test_token_ids_are_kept_out():
    bench = Bench(keeps_token_ids=False)
    bench.run("a")
    (trace,) = bench.traces("a")
    assert (trace.token_ids, trace.num_tokens) == (None, 6)


def test_a_step_of_nobody_is_left_out(bench):
    bench.collector.handle(b"stranger", pack_steps([make_step(0, [(0, 0, 2)])]))
    assert bench.collector.state.stats.steps == 0


def test_a_worker_with_another_model_is_left_out(bench):
    other = dataclasses.replace(bench.collector.state.spec, num_experts=3)
    bench.collector.state.outbox.clear()
    bench.collector.handle(b"stranger", pack_introduction(other))
    assert bench.collector.state.outbox == []
    assert bench.collector.state.spec.num_experts == 8


@pytest.mark.parametrize(("num_layers", "warned"), [(2, False), (58, True)])
def test_a_metrics_window_longer_than_is_kept_is_warned_of(num_layers, warned, caplog):
    spec = make_spec(layers=list(range(num_layers)), num_experts=256)
    Bench(spec, metrics_window_s=3600.0)
    assert ("look back 2810 s instead of 3600" in caplog.text) == warned


@pytest.mark.parametrize("frames", [pack("what"), pack("query", query="what", number=1)])
def test_a_message_that_nobody_knows_is_an_error(bench, frames):
    with pytest.raises(ValueError, match=r"unknown .*'what'"):
        bench.collector.handle(API, frames)


def test_answers_go_to_who_asked(bench):
    bench.collector.handle(b"other", pack_query(9, InfoQuery()))
    (peer, frames) = bench.collector.state.outbox[-1]
    assert (peer, orjson.loads(frames[0])["number"]) == (b"other", 9)


def test_a_step_in_pieces_is_counted_once(bench):
    step = make_step(0, [(0, 0, 8)], admitted=[admit(0, "a-i", 8, [1, 2])])
    messages = pack_all([step], step.rows_bytes // 4)
    assert len(messages) == 4
    for frames in messages:
        bench.collector.handle(WORKER, frames)
    stats = bench.collector.state.stats
    assert (stats.steps, stats.rows_captured) == (1, 8)
    assert stats.hook_s == pytest.approx(0.001)
