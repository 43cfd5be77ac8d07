"""Rounds on several arms."""

import dataclasses

import pytest
from overhead_fakes import OPTIONS, chunk_of, measure, measure_loads
from stream_server import DONE, chunk, serving, usage

from moescope import CommandError
from moescope.bench.driver import Pace
from moescope.bench.workload import RequestOptions, Turn
from moescope.overhead import comparison, engine, hosting, rounds
from moescope.overhead.rounds import Load


def test_every_arm_answers_all_prompts_in_every_round_after_a_warm_up():
    passes, visits = [], []
    servers, done = measure(
        ("a", "b", "c"), on_pass=lambda: passes.append(1), on_visit=lambda n, _: visits.append(n)
    )
    assert len(done) == 3
    assert len(passes) == 3 * 4
    assert visits == ["a", "b", "c", *(name for item in done for name in item.order)]
    for item in done:
        assert list(item.passes) == ["a", "b", "c"]
        assert all(one.completion_tokens == 4 for one in item.passes.values())
    salts = [[seen.body["cache_salt"] for seen in one.seen] for one in servers.values()]
    assert all(len(one) == 2 * 4 for one in salts)
    assert all(len(set(one)) == 4 for one in salts)  # another in each round
    assert len({salt for one in salts for salt in one}) == 3 * 4  # and for each arm
    arrivals = sorted((seen.arrived_s, name) for name, one in servers.items() for seen in one.seen)
    order = [name for _, name in arrivals[3 * 2 :: 2]]
    assert order == [name for item in done for name in item.order]


def test_passes_have_the_figures_of_their_requests():
    _, done = measure(("a", "b"), count=1)
    one = done[0].passes["a"]
    assert one.token_ids == [[1, 2], [1, 2]]
    assert (one.prompt_tokens, one.completion_tokens) == (6, 4)
    assert set(one.metrics) == set(comparison.METRICS) - {engine.ITL}
    assert one.metrics["s_per_token"] == pytest.approx(one.wall_s / 4)
    assert one.metrics["median_ttft_ms"] > 0


def test_token_ids_are_in_the_order_of_the_prompts():
    def script(number, body):
        slow = body["messages"][0]["content"] == "slow"
        token = 7 if slow else 8
        return [(0.2 if slow else 0.0, chunk_of([token])), (0, usage() + DONE)]

    with serving(script) as one:
        arrangement = hosting.SideBySide({"a": one.url, "b": one.url})
        options = dataclasses.replace(OPTIONS, concurrency=2)
        load = Load.of_prompts(["slow", "fast"], options)
        ((item,),) = rounds.measure([load], arrangement, ["a", "b"], rounds=1, seed=0)
    assert item.passes["a"].token_ids == [[7], [8]]


def test_a_failed_request_ends_the_measurement():
    scripts = {"b": lambda number, body: [500, b'{"error": {"message": "out of memory"}}']}
    with pytest.raises(CommandError, match=r"2 of 2 requests.*out of memory"):
        measure(("a", "b"), scripts)


def test_an_arm_that_generates_nothing_is_told():
    nothing = chunk(delta={"content": ""}, finish_reason="stop") + usage(1, 0) + DONE
    scripts = {"b": lambda number, body: [(0, nothing)]}
    with pytest.raises(CommandError, match="generated no token"):
        measure(("a", "b"), scripts)


def load_of(*conversations, **more):
    return Load(
        conversations=lambda number: conversations if number else conversations[:1],
        options=RequestOptions(model="demo", endpoint="completions", ignore_eos=True, **more),
        pace=Pace(max_concurrency=1),
    )


def tokens(number):
    """A script that answers with that many tokens."""
    return lambda seen, body: [(0, chunk_of([1])), (0, usage(3, number) + DONE)]


def test_a_visit_puts_every_load_on_an_arm():
    one = load_of((Turn([1, 2], 2),), (Turn([3], 2),))
    other = load_of((Turn([4], 2),))
    scripts = {"a": tokens(2), "b": tokens(2)}
    servers, done = measure_loads(("a", "b"), [one, other], scripts, count=2)
    assert [len(item) for item in done] == [2, 2]
    assert done[0][0].order == done[0][1].order
    assert [item[0].passes["b"].completion_tokens for item in done] == [4, 4]
    assert [item[1].passes["b"].completion_tokens for item in done] == [2, 2]
    bodies = [seen.body for seen in servers["b"].seen]
    prompts = [body["prompt"] for body in bodies]
    warm_up, later = [[1, 2], [4]], [[1, 2], [3], [4]]
    assert prompts == [*warm_up, *later, *later]
    # Neither a round nor another load finds in the prefix cache what one put there.
    assert len({body["cache_salt"] for body in bodies}) == 2 * 3


def test_a_request_of_several_prompts_has_as_many_answers():
    load = load_of((Turn([[1, 2], [3]], 2),))
    servers, ((item,),) = measure_loads(("a", "b"), [load], {"a": tokens(4), "b": tokens(4)})
    assert item.passes["a"].completion_tokens == 4
    assert {str(seen.body["prompt"]) for seen in servers["a"].seen} == {"[[1, 2], [3]]"}
    with pytest.raises(CommandError, match="generated 2 tokens where 4 were requested"):
        measure_loads(("a", "b"), [load], {"a": tokens(2), "b": tokens(2)})


def test_answers_of_another_length_are_not_the_same_work():
    load = load_of((Turn([1], 3),))
    with pytest.raises(CommandError, match="generated 2 tokens where 3 were requested"):
        measure_loads(("a", "b"), [load], {"a": tokens(3), "b": tokens(2)})


def test_counters_are_told_by_pass():
    count = {"a": 100.0, "b": 0.0}

    def counters(name, url):
        count[name] += 7.0 if name == "a" else 1.0
        return {"steps": count[name]}

    _, done = measure(("a", "b"), count=2, counters=counters)
    assert [item.passes["a"].counted for item in done] == [{"steps": 7.0}] * 2
    assert [item.passes["b"].counted for item in done] == [{"steps": 1.0}] * 2


def test_outputs_of_conversations_are_in_the_order_of_their_turns():
    def script(number, body):
        if len(body["prompt"]) == 3:  # the first turn of the second conversation is slow
            return [(0.2, chunk_of([9])), (0, usage(3, 1) + DONE)]
        return [(0, chunk_of([body["prompt"][0]])), (0, usage(3, 1) + DONE)]

    load = load_of((Turn([5], 1), Turn([6], 1)), (Turn([7, 7, 7], 1), Turn([8], 1)), token_ids=True)
    _, ((item,),) = measure_loads(("a", "b"), [load], {"a": script, "b": script})
    assert item.passes["a"].token_ids == [[5], [9], [9], [7]]


def test_orders_are_balanced_and_follow_the_seed():
    names = ["a", "b", "c"]
    for seed in range(20):
        orders = rounds.shuffled_orders(names, 6, seed)
        for place in range(3):
            assert sorted(order[place] for order in orders) == sorted(names * 2)
    assert rounds.shuffled_orders(names, 6, 3) == rounds.shuffled_orders(names, 6, 3)
    assert len({tuple(rounds.shuffled_orders(names, 6, seed)) for seed in range(20)}) > 10
    assert len(rounds.shuffled_orders(names, 4, 0)) == 4
