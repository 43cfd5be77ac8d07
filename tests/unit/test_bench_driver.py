"""The load test's client against a server whose timing is known."""

import asyncio
import itertools

import pytest
from stream_server import CLOSE, DONE, RESET, WAIT, answer, chunk, delta, event, serving, usage

from moescope import CommandError
from moescope.bench import latency
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.workload import Ask, Turn

BUSY_S = 5.0
"""What a machine that is busy with other things may add to a moment; most are within 1 ms."""


def conversations(num=1, *texts):
    return [tuple(Turn(text, 16) for text in texts or ("hello",))] * num


def run(server, convs, *, pace=None, stop=None, timeout_s=30.0, on_record=None, **ask):
    ask = Ask(model="m", **{"endpoint": "completions", **ask})

    async def go():
        target = Target(base_url=server.url, api_key="key", timeout_s=timeout_s)
        one = Run(convs, ask, target, pace or Pace(max_concurrency=1))
        await one.go(stop(one) if stop else None, on_record)
        return one

    return asyncio.run(asyncio.wait_for(go(), 60))


def one_record(script, **options):
    with serving(lambda number, body: script) as server:
        (record,) = run(server, conversations(), **options).records
    return record


def test_times_are_those_of_the_server():
    gaps = (0.08, 0.03, 0.05, 0.02)
    script = [*((gap, chunk()) for gap in gaps), (0.05, usage(completion=4) + DONE)]
    with serving(lambda number, body: list(script)) as server:
        runs = [run(server, conversations()) for _ in range(5)]
    late = []
    for one, seen in zip(runs, server.seen, strict=True):
        (record,) = one.records
        sent_s = one.start_s + record.sent_s
        assert 0 <= seen.arrived_s - sent_s < BUSY_S
        arrivals = [read_s + sent_s for read_s in record.chunk_s]
        late += [read - sent for read, sent in zip(arrivals, seen.sent_s[:4], strict=True)]
        assert record.ttft_s == record.chunk_s[0]
        assert record.e2el_s == record.chunk_s[-1]  # not the usage's chunk, 50 ms later
        assert record.tpot_s == pytest.approx((record.chunk_s[3] - record.chunk_s[0]) / 3)
        assert record.itls_s == pytest.approx(
            [after - before for before, after in itertools.pairwise(record.chunk_s)]
        )
        assert one.start_s + one.duration_s >= seen.sent_s[4]  # that of the usage's chunk
    assert min(late) >= 0
    assert min(late) < 0.01
    assert max(late) < BUSY_S


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk("a") + chunk("b") + chunk("c") + chunk("d")],  # several events in one part
        [chunk("abcd")],  # several tokens in one event, as speculation gives
        [chunk("ab"), chunk("cd")],
        [b"".join([chunk("a")])[:7], chunk("a")[7:] + chunk("bcd")],  # an event in two parts
    ],
)
def test_tokens_are_the_usages_however_chunks_are_cut(chunks):
    record = one_record([*((0.01, data) for data in chunks), (0, usage(7, 4) + DONE)])
    assert record.error is None
    assert record.text == "abcd"
    assert (record.prompt_tokens, record.completion_tokens) == (7, 4)
    expected = (record.e2el_s - record.ttft_s) / 3
    assert record.tpot_s == pytest.approx(expected)


def test_usage_beside_every_chunk_is_taken_from_the_last():
    def chunk_with(completion):
        return event({
            "choices": [{"index": 0, "text": "x"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": completion},
        })  # fmt: skip

    record = one_record([(0, chunk_with(2)), (0.01, chunk_with(5)), (0, DONE)])
    assert record.completion_tokens == 5


def test_a_role_sent_ahead_is_no_token():
    script = [
        (0, delta(role="assistant", content="")),
        (0.08, delta(content="4")),
        (0.01, delta(content="2")),
        (0, usage(completion=2) + DONE),
    ]
    record = one_record(script, endpoint="chat")
    assert record.text == "42"
    assert len(record.chunk_s) == 2
    assert record.ttft_s >= 0.08


def test_comments_other_fields_and_carriage_returns_are_understood():
    data = b": ping\r\n\r\nevent: x\r\nid: 3\r\n" + chunk().replace(b"\n", b"\r\n")
    record = one_record([(0, data), (0, usage(completion=1).replace(b"data: ", b"data:") + DONE)])
    assert record.error is None
    assert len(record.chunk_s) == 1
    assert record.tpot_s is None


BROKEN = {
    "http_429": [429, b'{"error": {"message": "slow down"}}'],
    "http_500": [500, b"oops"],
    "reset": [(0, chunk()), (0.05, RESET)],
    "timeout": [(0, chunk()), (0, WAIT)],
    "server_error": [(0, chunk()), (0, event({"error": {"message": "out of memory"}}))],
}
MALFORMED = {
    "not JSON": [(0, b"data: {\n\n"), (0, DONE)],
    "no object": [(0, b"data: 3\n\n"), (0, DONE)],
    "no choices": [(0, event({"id": 3})), (0, DONE)],
    "no text": [(0, event({"choices": [{"index": 0}]})), (0, DONE)],
    "no usage": [(0, chunk() + DONE)],
    "no token": [(0, usage() + DONE)],
    "no end": [(0, chunk() + usage())],
    "no stream": [(0, b'{"choices": [{"text": "a"}]}')],
    "not gzip": [500, b"oops", b"Content-Encoding: gzip\r\n"],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_failures_are_counted_by_kind(kind):
    record = one_record(list(BROKEN[kind]), timeout_s=0.3 if kind == "timeout" else 30.0)
    assert record.error_kind == kind, record.error
    assert record.error


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_streams_are_told(what):
    record = one_record(list(MALFORMED[what]))
    assert record.error_kind == "malformed", record.error


def test_a_connection_closed_in_the_middle_is_a_reset():
    assert one_record([(0, chunk()), (0.05, CLOSE)]).error_kind == "reset"


def test_no_server_is_a_failed_connection():
    with serving(lambda number, body: answer()) as server:
        pass
    (record,) = run(server, conversations()).records
    assert record.error_kind == "connect"


def test_the_run_goes_on_after_every_failure():
    scripts = [*map(list, BROKEN.values()), *map(list, MALFORMED.values()), answer()]
    with serving(lambda number, body: list(scripts[number])) as server:
        one = run(server, conversations(len(scripts)), timeout_s=BUSY_S)
    summary = latency.summarize(one.records, one.duration_s)
    assert (summary.completed, summary.failed) == (1, len(scripts) - 1)
    assert summary.errors == {"malformed": len(MALFORMED), **dict.fromkeys(BROKEN, 1)}
    assert summary.total_output_tokens == 4


def test_a_closed_loop_keeps_its_users_busy_and_no_more():
    with serving(lambda number, body: answer(2, 0.01)) as server:
        one = run(server, conversations(12), pace=Pace(max_concurrency=4))
    assert latency.peak_concurrency(one.records) == 4
    assert len(one.records) == 12
    assert all(0 <= record.lag_s < BUSY_S for record in one.records)


def test_connections_are_used_again():
    with serving(lambda number, body: answer(1)) as server:
        run(server, conversations(10), pace=Pace(max_concurrency=2))
    assert len(server.seen) == 10
    assert server.connections == 2


def test_a_server_that_stalls_does_not_slow_the_schedule():
    # From its request 5 on the server stands still until request 30 has come. A client that waited
    # for answers would never send that one, and if it did, hide the wait.
    gates = []

    def script(number, body):
        gates[:] = gates or [asyncio.Event()]
        if number == 30:
            gates[0].set()
        return [(0, gates[0]), *answer(1)] if 5 <= number < 30 else answer(1)

    due_s = [0.02 * number for number in range(40)]
    with serving(script) as server:
        one = run(server, conversations(40), pace=Pace(due_s=due_s))
    assert sorted(record.due_s for record in one.records) == due_s
    assert all(record.error_kind is None for record in one.records)
    went_on_s = server.seen[30].arrived_s - one.start_s
    first_tokens_s = [record.sent_s + record.ttft_s for record in one.records]
    assert sum(moment >= went_on_s for moment in first_tokens_s) >= 35  # the stall is in their TTFT
    assert latency.peak_concurrency(one.records) >= 25


def test_an_open_loop_may_be_bounded_and_waiting_is_told_apart_from_lag():
    with serving(lambda number, body: answer(1, 0.3)) as server:
        one = run(server, conversations(3), pace=Pace(due_s=[0.0] * 3, max_concurrency=1))
    for before, after in itertools.pairwise(one.records):
        assert after.sent_s >= before.sent_s + before.e2el_s
        assert after.queue_s >= 0.2  # the answer before it took 0.3 s
        assert after.queue_s > after.lag_s
        assert after.lag_s == pytest.approx(after.sent_s - after.queue_s)
        assert after.lag_s < BUSY_S
    assert latency.peak_concurrency(one.records) == 1


def test_conversations_grow_and_their_turns_follow_one_another():
    with serving(
        lambda number, body: [(0, delta(content=f"re{number}")), (0, usage() + DONE)]
    ) as server:
        one = run(server, conversations(1, "one", "two", "three"), endpoint="chat")
    assert [record.turn for record in one.records] == [0, 1, 2]
    said = server.seen[2].body["messages"]
    assert [message["content"] for message in said] == ["one", "re0", "two", "re1", "three"]
    assert [message["role"] for message in said] == [
        "user", "assistant", "user", "assistant", "user",
    ]  # fmt: skip
    assert server.seen[1].body["messages"] == said[:3]


def test_conversations_of_token_ids_grow_by_token_ids():
    convs = [(Turn([1, 2], 16), Turn([3], 16))]
    with serving(lambda number, body: [(0, chunk(token_ids=[8, 9]) + usage() + DONE)]) as server:
        run(server, convs)
    assert server.seen[0].body["return_token_ids"] is True
    assert server.seen[1].body["prompt"] == [1, 2, 8, 9, 3]
    with serving(lambda number, body: answer()) as server:
        (record,) = run(server, convs).records
    assert "no token ids" in record.error


def test_a_failed_turn_ends_its_conversation():
    scripts = [[429, b""], answer()]
    with serving(lambda number, body: list(scripts[min(number, 1)])) as server:
        one = run(server, [*conversations(1, "a", "b"), *conversations(1, "c")])
    assert [record.error_kind for record in one.records] == ["http_429", None]


def test_token_ids_do_not_go_to_the_chat_endpoint():
    with pytest.raises(CommandError, match="/v1/completions"):
        Run([(Turn([1], 1),)], Ask(model="m"), Target(base_url="http://x"), Pace(max_concurrency=1))


def test_what_is_asked():
    with serving(lambda number, body: answer()) as server:
        run(server, conversations(), ignore_eos=True, seed=3, extra_body={"cache_salt": "x"})
        run(server, conversations(), endpoint="chat", temperature=None)
    first, second = server.seen
    assert first.path == "/v1/completions"
    assert first.body == {
        "model": "m", "prompt": "hello", "max_tokens": 16, "stream": True, "temperature": 0.0,
        "stream_options": {"include_usage": True}, "seed": 3, "ignore_eos": True,
        "cache_salt": "x",
    }  # fmt: skip
    assert b"authorization: bearer key" in first.headers.lower()
    assert second.path == "/v1/chat/completions"
    assert second.body == {
        "model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_a_stopped_run_keeps_what_was_measured():
    def script(number, body):
        return answer() if number < 3 else [(0, chunk()), (0, WAIT)]

    counted, events = [], []

    def stop(one):
        events.append(asyncio.Event())
        return events[0]

    def on_record(record):
        counted.append(record)
        if len(counted) == 3:
            asyncio.get_running_loop().call_later(0.05, events[0].set)

    with serving(script) as server:
        pace = Pace(max_concurrency=2)
        one = run(server, conversations(50), pace=pace, stop=stop, on_record=on_record)
    assert len(one.records) == 3
    assert all(record.error is None for record in one.records)
    assert one.interrupted == 2
    assert 0 < one.duration_s < 10
