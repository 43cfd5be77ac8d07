"""The loads of the GPU measurement, and what a sitting writes of them."""

from __future__ import annotations

import contextlib
import dataclasses

import orjson
import pytest
from client_fakes import INFO
from stream_server import DONE, chunk, serving, usage

from benchmarks.gpu import loads, throughput
from benchmarks.gpu.loads import ENGINE_ITL, TPOT, WALL, Workload
from benchmarks.gpu.throughput import COUNTERS, Sitting
from moescope import CommandError
from moescope.overhead import comparison
from moescope.overhead.arms import Arm
from moescope.overhead.engine import ITL_S, ITLS
from moescope.overhead.hosting import InTurn, SideBySide, StartedArms

SMALL = Workload(
    name="small", num=2, concurrency=2, input_len=3, output_len=2, rounds=2, target_percent=1.0
)

# Loads.


def by_start(start, **options):
    (one,) = loads.pick(loads.workloads(["a", "b"], **options), [start])
    return one


@pytest.mark.parametrize(
    ("start", "num", "turns", "input_len", "output_len"),
    [
        ("batch 1", 2, 1, 128, 256),
        ("64 concurrent", 64, 1, 128, 256),
        ("256 concurrent", 256, 1, 128, 256),
        ("64 conversations", 64, 20, 256, 128),
    ],
)
def test_random_tokens_are_fresh_in_every_round_and_alike_for_all_arms(
    start, num, turns, input_len, output_len
):
    one = by_start(start)
    first, second = one.conversations(1), one.conversations(2)
    assert first == one.conversations(1)
    assert len(first) == num
    assert {len(conversation) for conversation in first} == {turns}
    every = [turn for conversation in first for turn in conversation]
    assert {(len(turn.content), turn.max_tokens) for turn in every} == {(input_len, output_len)}
    assert {token in range(50, 450) for turn in every for token in turn.content} == {True}
    starts = [tuple(talk[0].content[:16]) for talk in (*first, *second)]
    assert len(set(starts)) == 2 * num


@pytest.mark.parametrize(("num", "input_len"), [(64, 1024), (16, 4096)])
def test_prompts_of_a_prefill_come_in_one_request(num, input_len):
    one = by_start(f"prefill {num}")
    ((first,),), ((second,),) = one.conversations(1), one.conversations(2)
    assert [len(prompt) for prompt in first.content] == [input_len] * num
    assert len({tuple(prompt) for turn in (first, second) for prompt in turn.content}) == 2 * num
    assert (first.num_prompts, first.max_tokens) == (num, 1)
    ((warm_up,),) = one.conversations(0)
    assert warm_up.num_prompts == num


def test_questions_are_asked_in_their_order():
    one = by_start("GSM8K, 25")
    assert [talk[0].content for talk in one.conversations(1)[:3]] == ["a", "b", "a"]
    many = by_start("GSM8K, 1,319")
    assert len(many.conversations(1)) == 1319
    assert len(many.conversations(0)) == many.concurrency == 128


def test_the_warm_up_is_short():
    one = by_start("64 conversations")
    assert [len(talk) for talk in one.conversations(0)] == [4] * 64


def test_every_answer_has_its_length_and_is_sampled():
    load = by_start("batch 1").load()
    assert load.options.ignore_eos
    assert (load.options.endpoint, load.options.temperature, load.options.seed) == (
        "completions",
        1.0,
        None,
    )


def test_loads_are_picked():
    every = loads.workloads(scale=0.5)
    assert [one.rounds for one in every[:3]] == [20, 5, 6]
    assert [one.concurrency for one in every[:3]] == [1, 64, 256]
    by_default = loads.pick(every, [])
    assert [one for one in every if one.crowded] == [one for one in every if one not in by_default]
    (one,) = loads.pick(every, ["64 conv"], rounds=2, concurrency=8)
    assert (one.concurrency, one.rounds) == (8, 2)
    assert one.name.endswith("128 out, 8 at a time")  # another load than that of 64
    (one,) = loads.pick(every, ["256"], stream_interval=10)
    assert one.name == "256 concurrent, 128 in, 256 out, 10 tokens a chunk"
    with pytest.raises(CommandError, match="no load starts with 'batch 2'"):
        loads.pick(every, ["batch 1", "batch 2"])


def test_a_load_is_compared_where_more_is_slower():
    compared = {one.name.split()[0]: one.compared for one in loads.workloads()}
    assert compared["batch"] == compared["256"] == compared["GSM8K,"] == TPOT
    assert compared["prefill"] == compared["64"] == WALL
    assert {TPOT, WALL} <= set(comparison.METRICS)


def test_arms_that_capture_less_are_measured_under_two_loads():
    few = [one.name for one in loads.workloads() if one.every_arm]
    assert [name.partition(",")[0] for name in few] == ["batch 1", "64 concurrent"]


# Sittings.


VLLMS = """
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_sum{{model_name="demo"}} {itl_s}
vllm:inter_token_latency_seconds_count{{model_name="demo"}} {itls}
vllm:inter_token_latency_seconds_created{{model_name="demo"}} 99.0
"""
OURS = """
moescope_steps_total{{model_name="demo"}} {steps}
moescope_steps_created{{model_name="demo"}} 99.0
moescope_hook_seconds_total{{model_name="demo"}} {hook_s}
moescope_rows_captured_total{{model_name="demo"}} {rows}
moescope_rows_lost_total{{model_name="demo",reason="queue_full"}} {lost}
moescope_rows_lost_total{{model_name="demo",reason="hook_missed"}} {lost}
"""


def metered(text, output, **growth):
    """A script of a server whose counters grow with every pass of two requests."""

    def script(number, body):
        if number % 2 == 0:
            values = {name: (number // 2 + 1) * each for name, each in growth.items()}
            script.server.pages["/metrics"] = text.format(**values).encode()
        return [(0, chunk()), (0, chunk()), (0, usage(3, output) + DONE)]

    return script


@contextlib.contextmanager
def arms(*, output=2):
    """A stock arm, and one that says it captures; both have counters."""
    scripts = (
        metered(VLLMS, output, itl_s=0.01, itls=5),
        metered(VLLMS + OURS, output, itl_s=0.011, itls=5, steps=10, hook_s=1e-3, rows=8, lost=1),
    )
    with serving(scripts[0]) as stock, serving(scripts[1]) as captured:
        scripts[0].server, scripts[1].server = stock, captured
        models = orjson.dumps({"data": [{"id": "demo"}]})
        stock.pages["/v1/models"] = captured.pages["/v1/models"] = models
        captured.pages["/moescope/info"] = orjson.dumps(INFO)
        chosen = [Arm(name="stock"), Arm(name="moescope")]
        urls = {"stock": stock.url, "moescope": captured.url}
        yield chosen, StartedArms(arms=chosen, arrangement=SideBySide(urls))


def measure(workloads, **options):
    written = []
    with arms(**options) as (chosen, started):
        Sitting(chosen, started, settle_s=0.0).measure(
            workloads, lambda one, measured: written.append((one.name, measured))
        )
    return written


def test_every_arm_is_visited_only_where_it_says_so():
    with arms() as (chosen, started):
        urls = {**started.arrangement.urls}
        urls["counts"] = urls["stock"]
        every = [*chosen, Arm(name="counts")]
        whole = StartedArms(arms=every, arrangement=SideBySide(urls))
        sitting = Sitting(every, whole, settle_s=0.0)
        for_all = dataclasses.replace(SMALL, every_arm=True)
        assert sitting._names([SMALL, for_all]) == ["stock", "moescope", "counts"]
        assert sitting._names([SMALL]) == ["stock", "moescope"]
        few = dataclasses.replace(whole, arms=[every[0], every[2]])
        with pytest.raises(CommandError, match="small is not put on counts"):
            Sitting(few.arms, few, settle_s=0.0).measure([SMALL], print)


def test_what_is_measured_is_told_after_every_round():
    other = dataclasses.replace(SMALL, name="other", rounds=1)
    written = measure([SMALL, other])
    assert [(name, one["rounds"], one["complete"]) for name, one in written] == [
        ("small", 1, False),
        ("small", 2, True),
        ("other", 1, True),
    ]
    measured = written[1][1]
    assert list(measured["arms"]) == ["stock", "moescope"]
    assert set(measured["differences"]) == {"moescope"}
    assert {"s_per_token", "median_ttft_ms", "p99_itl_ms"} <= set(
        measured["differences"]["moescope"]
    )
    first, second = measured["passes"]
    assert sorted(first["order"]) == ["moescope", "stock"]
    assert second["moescope"]["prompt_tokens"] == 6
    assert "token_ids" not in second["moescope"]
    median = measured["arms"]["stock"]["median"]
    assert median["output_throughput"] == pytest.approx(median["prompt_throughput"] * 4 / 6)
    orjson.dumps(written)


def test_the_work_on_the_host_is_that_of_the_rounds_that_count():
    measured = measure([SMALL])[-1][1]
    captured = measured["arms"]["moescope"]
    assert captured["steps"] == 2 * 10  # without those of the warm-up
    assert captured["hook_us_per_step"] == pytest.approx(100.0)
    assert (captured["rows_captured"], captured["rows_lost"]) == (2 * 8, 2 * 2)
    assert measured["arms"]["stock"]["hook_us_per_step"] is None
    assert {frozenset(one["moescope"]["counted"]) for one in measured["passes"]} == {
        frozenset(COUNTERS)
    }


def test_the_time_between_tokens_is_that_of_the_engine():
    measured = measure([SMALL])[-1][1]
    assert measured["arms"]["stock"]["median"][ENGINE_ITL] == pytest.approx(2.0)
    assert measured["differences"]["moescope"][ENGINE_ITL]["percent"] == pytest.approx(10.0)
    assert {*measured["passes"][0]["stock"]["counted"]} == {ITL_S, ITLS}


def test_answers_of_one_token_have_no_time_between_tokens(monkeypatch):
    monkeypatch.setitem(globals(), "VLLMS", VLLMS.replace("{itls}", "0"))
    measured = measure([SMALL])[-1][1]
    assert ENGINE_ITL not in measured["differences"]["moescope"]
    assert ENGINE_ITL not in measured["arms"]["stock"]["median"]


def test_an_answer_of_another_length_ends_it():
    with pytest.raises(CommandError, match="generated 3 tokens where 2 were requested"):
        measure([SMALL], output=3)


def test_an_arm_that_is_not_what_it_must_be_ends_it():
    with arms() as (chosen, started):
        urls = dict(started.arrangement.urls)
        urls["stock"], urls["moescope"] = urls["moescope"], urls["stock"]
        swapped = StartedArms(arms=chosen, arrangement=SideBySide(urls))
        with pytest.raises(CommandError, match=r"the arm stock at .* answers /moescope/info"):
            Sitting(chosen, swapped, settle_s=0.0).measure([SMALL], print)


def test_a_visit_in_turn_has_as_many_rounds_as_the_shortest_load():
    other = dataclasses.replace(SMALL, name="other", rounds=1)
    written = []
    with arms() as (chosen, started):
        running = {name: Arm(name=name, url=url) for name, url in started.arrangement.urls.items()}
        in_turn = StartedArms(arms=chosen, arrangement=InTurn(None, running))
        Sitting(chosen, in_turn, settle_s=0.0).measure(
            [SMALL, other], lambda one, measured: written.append((one.name, measured["complete"]))
        )
    assert written == [("small", True), ("other", True)]


def test_sittings_are_added():
    other = dataclasses.replace(SMALL, name="other")
    first = throughput.add({}, SMALL, "2026-01-01", {"rounds": 1})
    second = throughput.add(first, SMALL, "2026-01-02", {"rounds": 2})
    third = throughput.add(second, other, "2026-01-02", {"rounds": 3})
    assert first == {"small": {"2026-01-01": {"rounds": 1}}}
    assert third == {
        "small": {"2026-01-01": {"rounds": 1}, "2026-01-02": {"rounds": 2}},
        "other": {"2026-01-02": {"rounds": 3}},
    }
    # A round more of the same sitting takes the place of what it had.
    assert throughput.add(first, SMALL, "2026-01-01", {"rounds": 2}) == {
        "small": {"2026-01-01": {"rounds": 2}}
    }


def test_differences_are_told_in_words():
    client, engine = throughput.statements(SMALL, measure([SMALL])[-1][1])
    assert client.startswith("small: moescope changes the wall time per token by ")
    assert engine.startswith("small: moescope changes the ITL, mean, engine's clock by +10.00% ")
    assert "2 paired rounds" in client
