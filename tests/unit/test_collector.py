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
    make_hello,
    make_register,
    make_rows,
    make_step,
    trace_size,
)

from moescope.trace import Source
from moescope_service.collector.queries import FINISHING_WAIT_S
from moescope_service.collector.sequences import API_TIMEOUT_S, WORKER_TIMEOUT_S
from moescope_service.messages import pack, pack_all, pack_hello, pack_steps


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
    assert trace.versions == bench.hello.versions
    assert bench.traces("a-i")[0].request_id == "a"


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
        number = bench.ask("routes", request_id="a")
        assert bench.answer(number) is None
        bench.end()
        assert bench.answer(number).values["status"] == "finished"

    def test_it_does_not_wait_for_a_running_request_unless_told(self, bench):
        bench.start("a")
        assert bench.answer(bench.ask("routes", request_id="a")).values["status"] == "running"
        number = bench.ask("routes", request_id="a", wait_s=5.0)
        assert bench.answer(number) is None
        bench.finish("a-i")
        assert bench.answer(number) is None
        bench.end()
        assert bench.answer(number).values["status"] == "finished"

    @pytest.mark.parametrize(("wait_s", "waits_s"), [(None, FINISHING_WAIT_S), (0.5, 0.5), (0, 0)])
    def test_it_waits_so_long(self, bench, wait_s, waits_s):
        bench.start("a")
        bench.finish("a-i")
        number = bench.ask("routes", request_id="a", wait_s=wait_s)
        if waits_s:
            bench.pass_s(waits_s - 0.01)
            assert bench.answer(number) is None
            bench.pass_s(0.02)
        assert bench.answer(number).values["status"] == "running"

    def test_it_waits_for_every_choice(self, bench):
        for index in range(2):
            bench.start("a", handle=index, blocks=[2 * index, 2 * index + 1], index=index,
                        internal_id=f"{index}-i", ids=["a"])  # fmt: skip
        bench.finish("0-i")
        bench.end(0)
        number = bench.ask("routes", request_id="a", wait_s=5.0)
        assert bench.answer(number) is None
        bench.finish("1-i")
        bench.end(1)
        assert bench.answer(number).values["status"] == "finished"
        assert [trace.index for trace in bench.traces("a")] == [0, 1]

    def test_a_deleted_request_is_not_waited_for_beyond_its_end(self, bench):
        bench.start("a")
        number = bench.ask("routes", request_id="a", wait_s=5.0)
        assert bench.answered("delete", request_id="a").values["deleted"] == 1
        bench.pass_s(5.0)
        assert bench.answer(number).values["status"] == "unknown"

    def test_one_end_answers_every_question_for_it_and_no_other(self, bench):
        bench.start("a")
        bench.start("b", handle=1, blocks=[2, 3])
        numbers = [bench.ask("routes", request_id=i, wait_s=5.0) for i in ("a", "a-i", "b", "a")]
        bench.finish("a-i")
        bench.end(0)
        assert [bench.answer(n) is not None for n in numbers] == [True, True, False, True]


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
        assert bench.answered("delete", request_id="alias/1").values["deleted"] == 2
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
        assert bench.answered("recent").values["sequences"] == []
        assert bench.answered("metrics").values["running"] == 0
        assert sum(bench.answered("experts").values["rows"]) == 5

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
        before = bench.answered("info").values["store"]["bytes"]
        bench.run("b")
        assert bench.answered("info").values["store"]["bytes"] > before
        assert bench.answered("delete", request_id="b").values["deleted"] == 1
        assert bench.answered("info").values["store"]["bytes"] == before
        assert (bench.status("b"), bench.status("a")) == ("unknown", "finished")

    def test_a_running_request_leaves_nothing(self, bench):
        bench.start("a")
        assert bench.answered("delete", request_id="a").values["deleted"] == 1
        assert bench.status("a") == "unknown"
        bench.finish("a-i")
        bench.end()
        assert bench.status("a") == "unknown"
        values = bench.answered("metrics").values
        assert (values["running"], values["store"]["traces"], values["store"]["bytes"]) == (0, 0, 0)

    def test_an_unknown_request(self, bench):
        assert bench.answered("delete", request_id="a").values["deleted"] == 0


def test_an_evicted_request():
    bench = Bench(memory=trace_size() * 2)
    for name in "abc":
        bench.run(name)
    assert [bench.status(name) for name in "abc"] == ["evicted", "finished", "finished"]
    store = bench.answered("info").values["store"]
    assert (store["traces"], store["evicted"]) == (2, 1)
    assert store["bytes"] <= store["limit_bytes"]


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
        number = bench.ask("routes", request_id="a", wait_s=60.0)
        bench.pass_s(WORKER_TIMEOUT_S)
        assert bench.answer(number).values["status"] == "finished"


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
        number = bench.ask("routes", request_id="a", wait_s=60.0)
        bench.end()
        assert bench.answer(number).values["status"] == "unknown"

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
        assert caplog.text.count("token_ids must be") == 1


def test_token_ids_are_kept_out():
    bench = Bench(token_ids="off")
    bench.run("a")
    (trace,) = bench.traces("a")
    assert (trace.token_ids, trace.num_tokens) == (None, 6)


def test_a_step_of_nobody_is_left_out(bench):
    bench.collector.handle(b"stranger", pack_steps([make_step(0, [(0, 0, 2)])]))
    assert bench.collector.stats.steps == 0


def test_a_worker_with_another_model_is_left_out(bench):
    other = dataclasses.replace(bench.collector.hello, num_experts=3)
    bench.collector.outbox.clear()
    bench.collector.handle(b"stranger", pack_hello(other))
    assert bench.collector.outbox == []
    assert bench.collector.hello.num_experts == 8


@pytest.mark.parametrize(("num_layers", "warned"), [(2, False), (58, True)])
def test_a_metrics_window_longer_than_is_kept_is_warned_of(num_layers, warned, caplog):
    hello = make_hello(layers=list(range(num_layers)), num_experts=256)
    Bench(hello, metrics_window=3600.0)
    assert ("look back 2810 s instead of 3600" in caplog.text) == warned


@pytest.mark.parametrize("frames", [pack("what"), pack("query", op="what", number=1)])
def test_a_message_that_nobody_knows_is_an_error(bench, frames):
    with pytest.raises(ValueError, match=r"unknown .*'what'"):
        bench.collector.handle(API, frames)


def test_answers_go_to_who_asked(bench):
    bench.collector.handle(b"other", pack("query", op="info", number=9))
    (peer, frames) = bench.collector.outbox[-1]
    assert (peer, orjson.loads(frames[0])["number"]) == (b"other", 9)


def test_a_step_in_pieces_is_counted_once(bench):
    step = make_step(0, [(0, 0, 8)], admitted=[admit(0, "a-i", 8, [1, 2])])
    messages = pack_all([step], step.rows_bytes // 4)
    assert len(messages) == 4
    for frames in messages:
        bench.collector.handle(WORKER, frames)
    stats = bench.collector.stats
    assert (stats.steps, stats.rows_captured) == (1, 8)
    assert stats.hook_seconds == pytest.approx(0.001)
