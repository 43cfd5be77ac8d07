"""The load test's client against a server whose timing is known."""

import asyncio
import itertools

import pytest
from stream_server import DONE, WAIT, answer, chunk, delta, serving, usage

from moescope import CommandError
from moescope.bench import latency
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.workload import RequestOptions, Turn

BUSY_S = 5.0
"""What a machine that is busy with other things may add to a moment; most are within 1 ms."""


def conversations(num=1, *texts):
    return [tuple(Turn(text, 16) for text in texts or ("hello",))] * num


def run(server, convs, *, pace=None, stop=None, timeout_s=30.0, on_request=None, **more):
    options = RequestOptions(model="m", **{"endpoint": "completions", **more})

    async def go():
        target = Target(base_url=server.url, api_key="key", timeout_s=timeout_s)
        one = Run(convs, options, target, pace or Pace(max_concurrency=1))
        await one.go(stop(one) if stop else None, on_request)
        return one

    return asyncio.run(asyncio.wait_for(go(), 60))


def one_request(script, **options):
    with serving(lambda number, body: script) as server:
        (request,) = run(server, conversations(), **options).requests
    return request


def test_times_are_those_of_the_server():
    gaps = (0.08, 0.03, 0.05, 0.02)
    script = [*((gap, chunk()) for gap in gaps), (0.05, usage(completion=4) + DONE)]
    with serving(lambda number, body: list(script)) as server:
        runs = [run(server, conversations()) for _ in range(5)]
    late = []
    for one, seen in zip(runs, server.seen, strict=True):
        (request,) = one.requests
        sent_s = one.start_s + request.sent_s
        assert 0 <= seen.arrived_s - sent_s < BUSY_S
        arrivals = [read_s + sent_s for read_s in request.chunk_s]
        late += [read - sent for read, sent in zip(arrivals, seen.sent_s[:4], strict=True)]
        assert request.ttft_s == request.chunk_s[0]
        assert request.e2el_s == request.chunk_s[-1]  # not the usage's chunk, 50 ms later
        assert request.tpot_s == pytest.approx((request.chunk_s[3] - request.chunk_s[0]) / 3)
        assert request.itls_s == pytest.approx(
            [after - before for before, after in itertools.pairwise(request.chunk_s)]
        )
        assert one.start_s + one.duration_s >= seen.sent_s[4]  # that of the usage's chunk
    assert min(late) >= 0
    assert min(late) < 0.01
    assert max(late) < BUSY_S


def test_no_server_is_a_failed_connection():
    with serving(lambda number, body: answer()) as server:
        pass
    (request,) = run(server, conversations()).requests
    assert request.error_kind == "connect"


def test_a_closed_loop_keeps_its_users_busy_and_no_more():
    with serving(lambda number, body: answer(2, 0.01)) as server:
        one = run(server, conversations(12), pace=Pace(max_concurrency=4))
    assert latency.peak_concurrency(one.requests) == 4
    assert len(one.requests) == 12
    assert all(0 <= request.lag_s < BUSY_S for request in one.requests)


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
    assert sorted(request.due_s for request in one.requests) == due_s
    assert all(request.error_kind is None for request in one.requests)
    went_on_s = server.seen[30].arrived_s - one.start_s
    first_tokens_s = [request.sent_s + request.ttft_s for request in one.requests]
    assert sum(moment >= went_on_s for moment in first_tokens_s) >= 35  # the stall is in their TTFT
    assert latency.peak_concurrency(one.requests) >= 25


def test_an_open_loop_may_be_bounded_and_waiting_is_told_apart_from_lag():
    with serving(lambda number, body: answer(1, 0.3)) as server:
        one = run(server, conversations(3), pace=Pace(due_s=[0.0] * 3, max_concurrency=1))
    for before, after in itertools.pairwise(one.requests):
        assert after.sent_s >= before.sent_s + before.e2el_s
        assert after.queue_s >= 0.2  # the answer before it took 0.3 s
        assert after.queue_s > after.lag_s
        assert after.lag_s == pytest.approx(after.sent_s - after.queue_s)
        assert after.lag_s < BUSY_S
    assert latency.peak_concurrency(one.requests) == 1


def test_conversations_grow_and_their_turns_follow_one_another():
    with serving(
        lambda number, body: [(0, delta(content=f"re{number}")), (0, usage() + DONE)]
    ) as server:
        one = run(server, conversations(1, "one", "two", "three"), endpoint="chat")
    assert [request.turn for request in one.requests] == [0, 1, 2]
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
        (request,) = run(server, convs).requests
    assert "no token ids" in request.error


def test_a_failed_turn_ends_its_conversation():
    scripts = [[429, b""], answer()]
    with serving(lambda number, body: list(scripts[min(number, 1)])) as server:
        one = run(server, [*conversations(1, "a", "b"), *conversations(1, "c")])
    assert [request.error_kind for request in one.requests] == ["http_429", None]


def test_token_ids_do_not_go_to_the_chat_endpoint():
    with pytest.raises(CommandError, match="expected completions"):
        Run(
            [(Turn([1], 1),)],
            RequestOptions(model="m"),
            Target(base_url="http://x"),
            Pace(max_concurrency=1),
        )


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

    def on_request(request):
        counted.append(request)
        if len(counted) == 3:
            asyncio.get_running_loop().call_later(0.05, events[0].set)

    with serving(script) as server:
        pace = Pace(max_concurrency=2)
        one = run(server, conversations(50), pace=pace, stop=stop, on_request=on_request)
    assert len(one.requests) == 3
    assert all(request.error is None for request in one.requests)
    assert one.interrupted == 2
    assert 0 < one.duration_s < 10
