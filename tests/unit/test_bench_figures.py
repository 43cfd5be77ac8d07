"""Schedules, workloads, figures and the result file of the load test."""

import io
import itertools
import math
import re

import numpy as np
import orjson
import pytest
from rich.console import Console

from moescope import CommandError
from moescope.bench import latency, result, schedule, table, workload
from moescope.bench.command import ReportOptions
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.measured_request import MeasuredRequest
from moescope.bench.plan import Plan


def request(sent_s=0.0, chunks=(0.1, 0.2, 0.4), tokens=3, **more):
    values = {
        "due_s": sent_s, "sent_s": sent_s, "chunk_s": list(chunks), "e2el_s": chunks[-1],
        "prompt_tokens": 10, "completion_tokens": tokens,
    }  # fmt: skip
    return MeasuredRequest(**{**values, **more})


def failed(kind="http_429", **more):
    return request(error_kind=kind, error="no", **more)


# Schedules.


def kolmogorov_smirnov(samples, cdf):
    """The statistic D of samples against a distribution, times the root of their number."""
    ordered = np.sort(samples)
    expected = np.array([cdf(value) for value in ordered])
    n = len(ordered)
    above = np.max(np.arange(1, n + 1) / n - expected)
    below = np.max(expected - np.arange(n) / n)
    return max(above, below) * math.sqrt(n)


def erlang_cdf(shape, rate):
    """The gamma distribution of a whole shape, in closed form."""

    def cdf(x):
        y = rate * shape * x
        return 1.0 - math.exp(-y) * sum(y**i / math.factorial(i) for i in range(shape))

    return cdf


def half_cdf(rate):
    """The gamma distribution of the shape 1/2."""
    return lambda x: math.erf(math.sqrt(rate * 0.5 * x))


CDFS = {0.5: half_cdf(20.0), 1.0: erlang_cdf(1, 20.0), 3.0: erlang_cdf(3, 20.0)}
CRITICAL_D = 1.63
"""At 1% significance, for many samples."""


@pytest.mark.parametrize("burstiness", CDFS)
@pytest.mark.parametrize("seed", [1, 2])
def test_gaps_are_gamma_distributed(burstiness, seed):
    due_s = schedule.due_times(4000, request_rate=20.0, burstiness=burstiness, seed=seed)
    gaps = np.diff(due_s, prepend=0.0)
    for shape, cdf in CDFS.items():
        statistic = kolmogorov_smirnov(gaps, cdf)
        assert (statistic < CRITICAL_D) == (shape == burstiness)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.06)


def test_the_rate_is_the_one_asked_for_whatever_the_seed():
    for seed in range(5):
        assert schedule.due_times(100, request_rate=20.0, seed=seed)[-1] == pytest.approx(5.0)


def test_the_schedule_follows_its_seed():
    one, same, other = (schedule.due_times(9, request_rate=2.0, seed=s) for s in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_no_rate_is_all_at_once_and_endless_burstiness_has_equal_gaps():
    assert not schedule.due_times(3).any()
    steady = schedule.due_times(4, request_rate=2.0, burstiness=math.inf)
    assert steady.tolist() == pytest.approx([0.5, 1.0, 1.5, 2.0])


@pytest.mark.parametrize(
    ("strategy", "middle"), [("linear", (10.0 + 90.0) / 2), ("exponential", math.sqrt(10.0 * 90.0))]
)
def test_a_ramp_grows_from_the_first_rate_to_the_last(strategy, middle):
    ramp_up = schedule.RampUp(strategy=strategy, start_rps=10.0, end_rps=90.0)
    due_s = schedule.due_times(101, burstiness=math.inf, ramp_up=ramp_up)
    rates = 1 / np.diff(due_s, prepend=0.0)
    assert rates[[0, 50, 100]].tolist() == pytest.approx([10.0, middle, 90.0])


@pytest.mark.parametrize(
    "options",
    [
        {"request_rate": 0.0},
        {"request_rate": -1.0},
        {"request_rate": 1.0, "burstiness": 0.0},
        {
            "request_rate": 1.0,
            "ramp_up": schedule.RampUp(strategy="linear", start_rps=1, end_rps=2),
        },
        {"ramp_up": schedule.RampUp(strategy="linear", start_rps=0, end_rps=2)},
        {"ramp_up": schedule.RampUp(strategy="exponential", start_rps=0, end_rps=2)},
    ],
)
def test_malformed_rates_are_refused(options):
    with pytest.raises(CommandError):
        schedule.due_times(10, **options)


# Workloads.


def test_random_prompts_have_the_lengths_asked_for():
    made = workload.random_tokens(
        num_conversations=200, turns=2, input_len=40, output_len=10, range_ratio=0.5, prefix_len=7,
        token_range=(5, 9), seed=3,
    )  # fmt: skip
    firsts = [one[0].content for one in made]
    assert len({tuple(content[:7]) for content in firsts}) == 1
    lengths = [len(content) - 7 for content in firsts] + [len(one[1].content) for one in made]
    assert (min(lengths), max(lengths)) == (20, 60)
    assert {turn.max_tokens for one in made for turn in one} == set(range(5, 16))
    assert {token for content in firsts for token in content} == {5, 6, 7, 8}
    again = workload.random_tokens(num_conversations=1, turns=1, input_len=4, output_len=1, seed=3)
    assert len(again[0][0].content) == 4


def test_texts_are_asked_in_order_and_again_from_the_first():
    made = workload.from_texts(["a", "b", "c"], num_conversations=2, turns=2, max_tokens=5)
    assert [turn.content for one in made for turn in one] == ["a", "b", "c", "a"]


def test_the_warm_up_is_none_of_what_counts():
    warm_up, counted = Plan(dataset_name="random", num_warmups=2, num_prompts=3).conversations()
    assert (len(warm_up), len(counted)) == (2, 3)
    assert not {str(one) for one in warm_up} & {str(one) for one in counted}


# Figures.


def test_the_figures_of_known_requests():
    requests = [
        request(0.0, (0.1, 0.2, 0.4), 3),  # TPOT (0.4 - 0.1) / 2
        request(0.3, (0.3, 0.7), 5),  # two chunks, five tokens: TPOT 0.4 / 4
        request(1.0, (0.2,), 1),  # one token: no TPOT
        failed(sent_s=1.2, chunks=(0.5,), tokens=9),
    ]
    made = latency.summarize(
        requests, 2.0, percentiles=(50.0, 99.0), goodput_ms={"ttft": 250.0, "tpot": 120.0}
    )
    assert (made.completed, made.failed, made.errors) == (3, 1, {"http_429": 1})
    assert (made.total_input_tokens, made.total_output_tokens) == (30, 9)
    assert made.request_throughput == pytest.approx(1.5)
    assert made.output_throughput == pytest.approx(4.5)
    assert made.total_token_throughput == pytest.approx(19.5)
    assert made.latencies["ttft"].mean_ms == pytest.approx(200.0)
    assert made.latencies["ttft"].std_ms == pytest.approx(np.std([100, 300, 200]))
    assert made.latencies["ttft"].percentiles_ms[99.0] == pytest.approx(298.0)
    assert made.latencies["tpot"].mean_ms == pytest.approx((150 + 100) / 2)
    assert made.latencies["itl"].median_ms == pytest.approx(200.0)  # 100, 200, 400
    assert made.latencies["e2el"].median_ms == pytest.approx(400.0)
    assert made.request_goodput == pytest.approx(1 / 2.0)  # the third alone
    assert made.max_concurrent_requests == 2


def test_limits_hold_what_is_exactly_at_them():
    at = request(chunks=(0.25, 0.75), tokens=2)
    for name, value in (("ttft", 250.0), ("tpot", 500.0), ("e2el", 750.0)):
        assert latency.within([at], {name: value}) == 1
        assert latency.within([at], {name: value - 0.001}) == 0


def test_peak_concurrency_counts_an_end_before_a_start():
    touching = [request(0.0, (1.0,)), request(1.0, (1.0,)), request(0.5, (0.25,))]
    assert latency.peak_concurrency(touching) == 2
    assert latency.peak_concurrency([]) == 0


def test_tokens_by_second_are_the_usages():
    requests = [request(0.5, (0.1, 0.6), 10), request(2.2, (0.1,), 3)]
    assert latency.tokens_by_second(requests).tolist() == pytest.approx([5.0, 5.0, 3.0])


def test_a_lag_above_a_hundredth_of_the_ttft_is_warned_of():
    prompt = [request(due_s=-0.0005) for _ in range(50)]
    assert latency.lag(prompt).warning is None
    late = [request(due_s=-0.002) for _ in range(50)]
    assert "2.00 ms on average" in latency.lag(late).warning
    tail = [*prompt * 2, request(due_s=-0.3), request(due_s=-0.3)]
    assert latency.lag(tail).warning is not None
    waited = [request(due_s=-5.0, queue_s=5.0)]
    assert latency.lag(waited).warning is None


def test_a_busy_client_is_warned_of():
    assert not latency.summarize([request()], 2.0, cpu_s=1.5).warnings
    assert "90% busy" in latency.summarize([request()], 2.0, cpu_s=1.8).warnings[0]


@pytest.mark.parametrize("item", ["ttft", "itl:3", "ttft:x", "ttft:0", ":3", "tpot:-1"])
def test_malformed_limits_are_refused(item):
    with pytest.raises(CommandError, match="invalid --goodput"):
        latency.parse_goodput([item])


def test_limits_are_parsed():
    assert latency.parse_goodput(["ttft:500", "e2el:2.5"]) == {"ttft": 500.0, "e2el": 2.5}


# The result.

VLLM_KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
    "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed",
    "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "latencies", "queue_times",
    "max_output_tokens_per_s", "max_concurrent_requests", "rtfx", "mean_ttft_ms",
    "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "median_tpot_ms",
    "std_tpot_ms", "p99_tpot_ms", "mean_itl_ms", "median_itl_ms", "std_itl_ms", "p99_itl_ms",
}  # fmt: skip
"""What vLLM 0.32.0 writes with its defaults, a rate and no bound."""
DETAILED_KEYS = {
    "input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors",
}  # fmt: skip


def build(requests, *, detailed=False, **plan):
    plan = Plan(model="m", request_rate=plan.pop("request_rate", 5.0), **plan)
    options = plan.request_options("m")
    run = Run([], options, Target(base_url="http://moe"), Pace(max_concurrency=1))
    run.requests, run.start_s = requests, 100.0
    summary = latency.summarize(requests, 2.0, percentiles=(99.0, 99.9))
    setting = plan.requested_load(options, len(requests))
    return result.build(run, summary, setting, metrics=("ttft", "tpot", "itl"), detailed=detailed)


def test_the_file_has_vllms_keys(tmp_path):
    values = build([request(), request(0.2)])
    p999 = {f"p99.9_{name}_ms" for name in ("ttft", "tpot", "itl")}
    assert set(values) == VLLM_KEYS | p999 | {"moescope"}
    result.write(tmp_path / "r.json", values)
    assert orjson.loads((tmp_path / "r.json").read_bytes())["request_rate"] == 5.0
    assert build([request()], request_rate=math.inf)["request_rate"] == "inf"


def test_details_are_by_request_in_the_order_sent():
    values = build([request(0.5, tokens=2), failed(sent_s=0.1)], detailed=True)
    assert values.keys() >= DETAILED_KEYS
    assert values["start_times"] == pytest.approx([100.1, 100.5])
    assert values["errors"] == ["no", ""]
    assert values["output_lens"] == [3, 2]
    assert values["itls"][1] == pytest.approx([0.1, 0.2])
    assert values["moescope"]["errors"] == {"http_429": 1}


def test_a_bounded_open_loop_has_queue_times():
    values = build([request(queue_s=0.3, sent_s=0.3)], max_concurrency=4)
    assert values["queue_times"] == [0.3]
    assert values["mean_client_queue_time_ms"] == pytest.approx(300.0)


def test_a_ramp_is_in_the_file():
    values = build([request()], request_rate=math.inf, ramp_up_strategy="linear",
                   ramp_up_start_rps=1.0, ramp_up_end_rps=3.0)  # fmt: skip
    assert values["ramp_up_end_rps"] == 3.0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"endpoint": "embeddings"}, "invalid --endpoint"),
        ({"extra_body": "[]"}, "JSON object"),
        ({"extra_body": "{"}, "JSON object"),
        ({"dataset_name": "random", "endpoint": "chat"}, "invalid --endpoint 'chat'"),
    ],
)
def test_malformed_plans_are_refused(plan, message):
    with pytest.raises(CommandError, match=message):
        Plan(**plan).request_options("m")


def test_no_sampling_seed_is_sent_that_was_not_given():
    assert Plan().request_options("m").seed is None
    assert Plan(seed=0).request_options("m").seed == 0
    same = [Plan(dataset_name="random", request_rate=1.0, seed=seed) for seed in (None, 0)]
    assert same[0].conversations() == same[1].conversations()
    assert same[0].pace() == same[1].pace()


def test_half_a_ramp_is_refused():
    with pytest.raises(CommandError, match="--ramp-up-strategy"):
        Plan(ramp_up_strategy="linear").pace()


def test_loops_are_closed_or_open_by_what_is_given():
    assert Plan(max_concurrency=3).pace() == Pace(max_concurrency=3)
    assert Plan(num_prompts=2).pace().due_s == [0.0, 0.0]
    bounded = Plan(num_prompts=2, max_concurrency=3, request_rate=1.0).pace()
    assert (bounded.max_concurrency, len(bounded.due_s)) == (3, 2)


@pytest.mark.parametrize("report", [{"metrics": "ttft,x"}, {"percentiles": "50,x"},
                                    {"percentiles": "101"}])  # fmt: skip
def test_malformed_reports_are_refused(report):
    with pytest.raises(CommandError):
        ReportOptions(**report).parsed()


def test_the_table_shows_what_was_measured():
    summary = latency.summarize(
        [request(), failed(), failed("reset")], 2.0, cpu_s=1.9, goodput_ms={"ttft": 500.0}
    )
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table.render(summary, interrupted=7))
    text = console.export_text()
    rows = {tuple(part.strip() for part in line.split("  ") if part.strip())
            for line in text.splitlines()}  # fmt: skip
    assert ("requests failed", "2 (http_429: 1, reset: 1)") in rows
    assert ("requests given up when stopped", "7") in rows
    assert ("good requests/s", "0.50") in rows
    assert ("TTFT", "100.00", "100.00", "0.00", "100.00", "100.00") in rows
    assert "95% busy" in text
    console.file.close()


def test_the_tables_say_what_was_run_and_the_median_once():
    summary = latency.summarize([request()], 2.0, percentiles=(50.0, 99.0))
    about = {"model": "demo", "server": "http://moe:8000", "load": Plan(turns=3).words()}
    console = Console(width=80, file=io.StringIO())
    console.print(table.render(summary, about=about))
    text = console.file.getvalue()
    assert re.search(r"model +demo *\n *server +http://moe:8000 *\n", text)
    assert re.search(r"load +100 conversations of sample, 3 turns each", text)
    assert "p50" not in text
    assert re.search(r"mean +median +std +p99", text)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({}, "100 conversations of sample"),
        ({"max_concurrency": 8}, "100 conversations of sample, 8 at a time"),
        (
            {"request_rate": 2.5, "dataset_name": "random"},
            "100 conversations of random, 2.5 a second (burstiness 1)",
        ),
        (
            {"ramp_up_strategy": "linear", "ramp_up_start_rps": 1.0, "ramp_up_end_rps": 9.0},
            "100 conversations of sample, 1 to 9 a second (linear, burstiness 1)",
        ),
    ],
)
def test_a_load_in_words(plan, words):
    assert Plan(**plan).words() == words


def test_gaps_of_chunks_are_inter_token_latencies():
    chunks = (0.1, 0.15, 0.4)
    assert request(chunks=chunks).itls_s == pytest.approx(
        [b - a for a, b in itertools.pairwise(chunks)]
    )
