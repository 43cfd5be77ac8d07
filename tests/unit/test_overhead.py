"""Rounds on several arms, and what their differences are worth."""

import dataclasses
import sys
from pathlib import Path

import httpx
import numpy as np
import orjson
import pytest
from client_fakes import INFO, server
from stream_server import DONE, chunk, delta, serving, usage

from moescope import CommandError
from moescope.bench.driver import Pace
from moescope.bench.workload import Ask, Turn
from moescope.overhead import arms, comparison, hosting, plot, rounds, table, timing
from moescope.overhead.arms import MOESCOPE, STOCK, STOCK_AGAIN, Arm
from moescope.overhead.rounds import Load, Pass, Round
from moescope.replay import Options
from moescope.run_dir import RunDir

OPTIONS = Options(model="demo", concurrency=1)


def made(value, *, token_ids=((1,),), **metrics):
    return Pass(
        wall_s=value,
        prompt_tokens=1,
        completion_tokens=1,
        metrics={**dict.fromkeys(comparison.METRICS, value), **metrics},
        token_ids=[list(one) if one else None for one in token_ids],
    )


def paired(**by_arm):
    """Rounds of arms whose values are given round by round; the first arm's are 1."""
    names = {"stock": STOCK, "again": STOCK_AGAIN, "moescope": MOESCOPE}
    count = len(next(iter(by_arm.values())))
    values = {"stock": [0.0] * count, **by_arm}
    return [
        Round(
            order=tuple(names[name] for name in values),
            passes={names[n]: made(1.0 + percents[i] / 100) for n, percents in values.items()},
        )
        for i in range(count)
    ]


# Rounds.


def chat(token_ids=(1, 2)):
    return [
        (0, delta(content="a")),
        (0, chunk_of(token_ids)),
        (0, usage(3, 2) + DONE),
    ]


def chunk_of(token_ids):
    values = orjson.loads(delta(content="b")[6:])
    values["choices"][0]["token_ids"] = list(token_ids)
    return b"data: " + orjson.dumps(values) + b"\n\n"


def measure(names, scripts=None, *, count=3, prompts=("x", "y"), **hooks):
    servers, done = measure_loads(
        names, [Load.of_prompts(prompts, OPTIONS)], scripts, count=count, **hooks
    )
    return servers, [item for (item,) in done]


def measure_loads(names, loads, scripts=None, *, count=1, **hooks):
    with serving_all(names, scripts or {}) as (servers, urls):
        done = list(
            rounds.measure(
                loads, hosting.Running(urls), list(names),
                rounds=count, seed=0, hooks=rounds.Hooks(**hooks),
            )
        )  # fmt: skip
    return servers, done


class serving_all:  # noqa: N801
    def __init__(self, names, scripts):
        self.contexts = {
            name: serving(scripts.get(name, lambda number, body: chat())) for name in names
        }

    def __enter__(self):
        servers = {name: context.__enter__() for name, context in self.contexts.items()}
        return servers, {name: one.url for name, one in servers.items()}

    def __exit__(self, *error):
        for context in self.contexts.values():
            context.__exit__(*error)


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
    assert set(map(tuple, salts)) == {tuple(salts[0])}  # the same for all arms
    assert len(set(salts[0])) == 4  # another in each round
    arrivals = sorted((seen.arrived_s, name) for name, one in servers.items() for seen in one.seen)
    order = [name for _, name in arrivals[3 * 2 :: 2]]
    assert order == [name for item in done for name in item.order]


def test_passes_have_the_figures_of_their_requests():
    _, done = measure(("a", "b"), count=1)
    one = done[0].passes["a"]
    assert one.token_ids == [[1, 2], [1, 2]]
    assert (one.prompt_tokens, one.completion_tokens) == (6, 4)
    assert set(one.metrics) == set(comparison.METRICS)
    assert one.metrics["s_per_token"] == pytest.approx(one.wall_s / 4)
    assert one.metrics["median_ttft_ms"] > 0


def test_token_ids_are_in_the_order_of_the_prompts():
    def script(number, body):
        slow = body["messages"][0]["content"] == "slow"
        token = 7 if slow else 8
        return [(0.2 if slow else 0.0, chunk_of([token])), (0, usage() + DONE)]

    with serving(script) as one:
        host = hosting.Running({"a": one.url, "b": one.url})
        options = dataclasses.replace(OPTIONS, concurrency=2)
        load = Load.of_prompts(["slow", "fast"], options)
        ((item,),) = rounds.measure([load], host, ["a", "b"], rounds=1, seed=0)
    assert item.passes["a"].token_ids == [[7], [8]]


def test_a_failed_request_ends_the_measurement():
    scripts = {"b": lambda number, body: [500, b'{"error": {"message": "out of memory"}}']}
    with pytest.raises(CommandError, match=r"2 of 2 requests.*out of memory"):
        measure(("a", "b"), scripts)


def test_an_arm_that_generates_nothing_is_told():
    scripts = {"b": lambda number, body: [(0, chunk(delta={"content": ""}) + usage(1, 0) + DONE)]}
    with pytest.raises(CommandError, match="generated no token"):
        measure(("a", "b"), scripts)


def load_of(*conversations, **ask):
    return Load(
        conversations=lambda number: conversations if number else conversations[:1],
        ask=Ask(model="demo", endpoint="completions", ignore_eos=True, **ask),
        pace=Pace(max_concurrency=2),
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


def test_answers_of_another_length_are_not_the_same_work():
    load = load_of((Turn([1], 3),))
    with pytest.raises(CommandError, match="with 2 tokens where 3 were asked for"):
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


# Differences.


def difference(measured, arm=MOESCOPE, metric="s_per_token"):
    return comparison.differences(measured, 0)[arm][metric]


def test_a_tenth_more_in_every_round_is_ten_percent():
    one = difference(paired(moescope=[10.0] * 4))
    assert one.percent == pytest.approx(10.0)
    assert one.claim_percent == pytest.approx((10.0, 10.0))
    assert one.distinguishable
    assert one.noise_percent is None


def test_rounds_are_compared_with_themselves():
    # The machine gets slower from round to round, the arms alike: 5% stay 5%.
    drifting = [
        Round(order=(STOCK, MOESCOPE), passes={STOCK: made(s), MOESCOPE: made(1.05 * s)})
        for s in (1.0, 3.0, 9.0)
    ]
    one = difference(drifting)
    assert one.interval_95_percent == pytest.approx((5.0, 5.0))


def test_a_rate_and_its_inverse_agree():
    halved, doubled = made(0.5), made(2.0)
    measured = [
        Round(order=(STOCK, MOESCOPE), passes={STOCK: made(1.0), MOESCOPE: one})
        for one in (halved, doubled)
    ]
    assert difference(measured).percent == pytest.approx(0.0)
    times = [made(1.0, s_per_token=1 / v, output_throughput=v) for v in (1.1, 1.3)]
    measured = [
        Round(order=(STOCK, MOESCOPE), passes={STOCK: made(1.0), MOESCOPE: one}) for one in times
    ]
    slower = 1 + difference(measured).percent / 100
    faster = 1 + difference(measured, metric="output_throughput").percent / 100
    assert slower * faster == pytest.approx(1.0)


def test_an_interval_that_holds_zero_is_not_distinguishable():
    unclear = difference(paired(moescope=[-1.0, 1.2, -0.5, 0.6]))
    assert not unclear.distinguishable
    said = comparison.statement("capture", "s_per_token", unclear, 4)
    assert said.endswith("not distinguishable from zero")
    clear = difference(paired(moescope=[1.0, 1.2, 0.5, 0.6]))
    assert clear.distinguishable
    assert "not distinguishable" not in comparison.statement("capture", "s_per_token", clear, 4)


def test_nothing_narrower_than_the_stock_pair_is_claimed():
    quiet = difference(paired(again=[0.1, -0.2, 0.1, 0.0], moescope=[2.0, 2.1, 1.9, 2.0]))
    assert quiet.distinguishable
    assert quiet.noise_percent < 0.3
    # The second stock server is 3% slower in every round: 2% of another are no finding.
    noisy = paired(again=[3.0, 3.1, 2.9, 3.0], moescope=[2.0, 2.1, 1.9, 2.0])
    one = difference(noisy)
    assert one.interval_95_percent[0] > 1.8
    assert one.noise_percent == pytest.approx(3.05, abs=0.06)
    assert one.claim_percent == pytest.approx((1.02 / 1.0305 * 100 - 100, 5.1), abs=0.15)
    assert not one.distinguishable
    assert "noise of the run ±3.0" in comparison.statement("capture", "s_per_token", one, 4)
    assert difference(noisy, STOCK_AGAIN).noise_percent is None


def test_noise_is_a_ratio_alike_in_both_directions():
    one = difference(paired(again=[-50.0] * 3, moescope=[100.0] * 3))
    assert one.noise_percent == pytest.approx(100.0)  # half is as far off as twice
    assert one.claim_percent == pytest.approx((0.0, 300.0))


def test_a_metric_that_is_not_there_is_left_out():
    measured = [
        Round(order=(STOCK, MOESCOPE), passes={
            STOCK: made(1.0, mean_tpot_ms=0.0), MOESCOPE: made(1.0)})
    ]  # fmt: skip
    by_metric = comparison.differences(measured, 0)[MOESCOPE]
    assert "mean_tpot_ms" not in by_metric
    assert set(by_metric) == set(comparison.METRICS) - {"mean_tpot_ms"}


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(7)
    covered = 0
    for _ in range(100):
        low, high = comparison.bootstrap_interval(list(random.normal(3.0, 1.0, 20)), 0)
        covered += low <= 3.0 <= high
    assert 85 <= covered <= 99


def test_the_interval_follows_the_seed():
    values = [1.0, 2.0, 4.0, 8.0]
    low, high = comparison.bootstrap_interval(values, 1)
    assert (low, high) == comparison.bootstrap_interval(values, 1)
    assert 1.0 <= low < np.mean(values) < high <= 8.0


def test_outputs_are_compared_between_arms_and_within_an_arm():
    same, other = made(1.0, token_ids=[(1, 2), (3,)]), made(1.0, token_ids=[(1, 2), (4,)])
    measured = [
        Round(order=("a", "b"), passes={"a": same, "b": other}),
        Round(order=("a", "b"), passes={"a": same, "b": same}),
        Round(order=("a", "b"), passes={"a": same, "b": made(1.0, token_ids=[None, (3,)])}),
    ]
    assert comparison.agreement(measured) == {
        "between_arms": {"b": {"same": 4, "compared": 5}},
        "within_arm": {"same": 6, "compared": 7},
    }


# The file.


def test_the_file_keeps_the_two_rows_and_the_overhead():
    values = timing.summarize(paired(again=[0.0] * 3, moescope=[25.0] * 3), 0)
    assert values["no_log"] == pytest.approx(
        {"wall_s": 3.0, "prompt_tokens": 3, "completion_tokens": 3, "tokens_per_s": 1.0}
    )
    assert values["log"]["tokens_per_s"] == pytest.approx(0.8)
    assert values["overhead"]["percent"] == pytest.approx(25.0)
    assert "capture changes the wall time per token by +25.00%" in values["overhead"]["statement"]
    assert [item["round"] for item in values["rounds"]] == [1, 2, 3]
    assert values["arms"][MOESCOPE]["metrics"]["mean_ttft_ms"] == pytest.approx(1.25)
    assert list(values["differences"]) == [STOCK_AGAIN, MOESCOPE]


def test_rows_are_left_out_where_their_arms_are_not_there():
    alone = timing.summarize(paired(moescope=[1.0] * 3), 0)
    assert "the noise of the run is not known" in timing.statements(alone)[-1]
    values = timing.summarize(paired(again=[1.0] * 3), 0)
    assert len(timing.statements(values)) == 1
    assert not {"no_log", "log", "overhead"} & set(values)


def run_timing(path, scripts=None, *, count=2, refused=None):
    names = {name: Arm(name=name) for name in ("a", "b")}
    with serving_all(names, scripts or {}) as (_, urls):
        setting = timing.Setting(
            prompts=["x"],
            arms=[Arm(name=name, url=urls[name]) for name in names],
            options=OPTIONS,
            rounds=count,
        )
        hosted = hosting.Hosted(hosting.Running(urls), list(names), refused or {})
        return timing.run(path, setting, hosted, urls)


def test_the_file_is_written_after_every_round(tmp_path):
    path = tmp_path / "timing.json"

    def script(number, body):  # fails in the second round that counts: warm-up, one, two
        return chat() if number < 2 else [500, b""]

    with pytest.raises(CommandError, match="requests"):
        run_timing(path, {"b": script}, count=3)
    values = timing.read(path)
    assert len(values["rounds"]) == 1
    assert values["complete"] is False
    whole = run_timing(path, refused={"c": "c: no"})
    assert whole["complete"] is True
    assert whole["placement"] == "together"
    assert timing.read(path)["refused"] == {"c": "c: no"}
    assert timing.statements(whole)[0].startswith("b changes the wall time per token by ")
    plot.draw(tmp_path / "o.png", whole)
    assert (tmp_path / "o.png").stat().st_size > 10_000
    assert table.render(whole).row_count == len(comparison.METRICS)
    assert [one.name for one in tmp_path.iterdir()] != []


# Arms.


def test_arms_are_parsed():
    assert Arm.parse("stock") == Arm(name="stock")
    assert Arm.parse("x=http://h:1") == Arm(name="x", url="http://h:1")
    assert Arm.parse("x=serve --port {port} a=b").command == "serve --port {port} a=b"
    for text in ("nonsense", "x=serve", "x="):
        with pytest.raises(CommandError):
            Arm.parse(text)


@pytest.mark.parametrize("texts", [["stock"], ["stock", "stock"]])
def test_two_arms_or_more_of_different_names_are_wanted(texts):
    with pytest.raises(CommandError, match="two arms or more"):
        arms.parse_all(texts)


def test_the_commands_of_the_built_in_arms():
    model = arms.Model(path="/m", served_name="demo", args=["--dtype", "float32"])
    both = ["--served-model-name", "demo", "--host", "127.0.0.1", "--dtype", "float32"]
    stock = [*["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", "/m"], *both]
    capture = [*["-m", "moescope", "serve", "/m"], *both]
    expected = {
        "stock": stock,
        "stock-again": stock,
        "moescope": capture,
        "counts": [*capture, "--routes-mode", "counts"],
        "paused": capture,
        "installed": stock,
        "routed-experts": [*stock, "--enable-return-routed-experts"],
    }
    assert set(expected) == set(arms.BUILT_IN)
    for name, command in expected.items():
        line = Arm(name=name).command_line(model, 81)
        assert line == [sys.executable, *command, "--port", "81"]
    custom = Arm.parse("x=run --port {port} 'a b'")
    assert custom.command_line(model, 81) == ["run", "--port", "81", "a b"]


def test_commands_are_told_as_one_types_them(tmp_path):
    launcher = hosting.Launcher(
        model=arms.Model(path=str(Path.cwd() / "a model"), served_name="demo"),
        run_dir=RunDir(tmp_path),
        timeout_s=1.0,
        tell=print,
    )
    every = [Arm(name="moescope"), Arm(name="x", command="y {port}"), Arm(name="z", url="http://z")]
    assert launcher.commands(every) == {
        "moescope": "python -m moescope serve 'a model' --served-model-name demo "
        "--host 127.0.0.1 --port {port}",
        "x": "y {port}",
        "z": "http://z",
    }


def test_a_stock_arms_environment_has_nothing_of_moescope():
    env = {"MOESCOPE_ENABLE": "1", "PATH": "/bin"}
    for name in ("stock", "stock-again", "routed-experts"):
        made = Arm(name=name).environment(env)
        assert "moescope" not in made.pop("VLLM_PLUGINS").split(",")
        assert made == {"PATH": "/bin"}
    assert Arm(name="installed").environment(env) == {"PATH": "/bin"}
    assert Arm(name="moescope").environment(env) == env


def check(name, transport):
    return arms.check(Arm(name=name), "http://moe", None, transport)


def test_arms_are_what_they_must_be():
    plain, captured = server({}), server({"GET /moescope/info": INFO})
    paused = server({"GET /moescope/info": {**INFO, "capture": "paused"}})
    counting = server({"GET /moescope/info": {**INFO, "mode": "counts"}})
    down = httpx.MockTransport(lambda _: httpx.Response(503, json={"detail": "collector"}))
    assert check("stock", plain) is None
    assert check("anything", plain) is None
    assert check("moescope", captured).model == "demo"
    assert check("anything", paused).capture == "paused"
    assert check("counts", counting).mode == "counts"
    assert check("paused", paused).capture == "paused"
    assert check("installed", plain) is None
    for name, transport, why in (
        ("stock", captured, "answers /moescope/info"),
        ("stock-again", paused, "answers /moescope/info"),
        ("routed-experts", captured, "answers /moescope/info"),
        ("moescope", plain, "HTTP 404"),
        ("moescope", paused, "is paused"),
        ("moescope", counting, "--routes-mode is counts, not routes"),
        ("installed", captured, "answers /moescope/info"),
        ("paused", captured, "is on, not paused"),
        ("paused", plain, "HTTP 404"),
        ("counts", captured, "--routes-mode is routes, not counts"),
        ("stock", down, "HTTP 503"),
    ):
        with pytest.raises(CommandError, match=why):
            check(name, transport)


def test_the_arm_paused_is_paused_where_moescope_started_it():
    asked = []

    def pause(request):
        asked.append(request.url.path)
        return httpx.Response(200, json={"capture": "paused"})

    transport = server({"POST /routes/pause": pause})
    for arm in (Arm(name="moescope"), Arm(name="stock"), Arm(name="paused", url="http://moe")):
        arms.prepare(arm, "http://moe", None, transport)
    assert asked == []
    arms.prepare(Arm(name="paused"), "http://moe", None, transport)
    assert asked == ["/routes/pause"]


# Hosting.

SERVE = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def launch(tmp_path):
    (tmp_path / "serve.py").write_text(SERVE)
    told = []
    launcher = hosting.Launcher(
        model=arms.Model(path="", served_name=""),
        run_dir=RunDir(tmp_path),
        timeout_s=60.0,
        tell=told.append,
    )
    serve = f"{sys.executable} -S {tmp_path / 'serve.py'} {{port}}"
    dying = f"{sys.executable} -S -c raise(SystemExit('no_such_flag')) {{port}}"

    def go(placement, *, free_memory=hosting.available_memory, **commands):
        every = [
            Arm(name=name, command=serve if command == "serve" else dying)
            for name, command in commands.items()
        ]
        return hosting.hosted(
            dataclasses.replace(launcher, free_memory=free_memory), every, placement
        )

    go.told = told
    return go


def answers(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_arms_run_side_by_side_and_end(launch):
    with launch("auto", a="serve", b="serve") as hosted:
        assert hosted.host.stays_up
        urls = []
        for name in hosted.names:
            with hosted.host.visit(name) as url:
                urls.append(url)
        assert all(map(answers, urls))
        assert len(set(urls)) == 2
    assert not any(map(answers, urls))


def test_arms_in_turn_are_up_one_at_a_time(launch):
    with launch("in-turn", a="serve", b="serve") as hosted:
        assert not hosted.host.stays_up
        with hosted.host.visit("a") as first:
            assert answers(first)
        assert not answers(first)
        with hosted.host.visit("b") as second:
            assert answers(second)


def test_memory_that_is_short_makes_them_run_in_turn(launch):
    free = iter([{"host": 100}, {"host": 40}])
    with launch("auto", free_memory=lambda: next(free), a="serve", b="serve") as hosted:
        assert not hosted.host.stays_up
    assert "in turn" in launch.told[-1]


def test_an_arm_that_does_not_start_is_left_out_and_told(launch):
    with launch("together", a="serve", b="dying", c="serve") as hosted:
        assert hosted.names == ["a", "c"]
        assert "no_such_flag" in hosted.refused["b"]
    assert any("left out: b" in line for line in launch.told)


@pytest.mark.parametrize("commands", [{"a": "dying", "b": "serve"}, {"a": "serve", "b": "dying"}])
def test_without_the_first_arm_or_any_other_there_is_nothing_to_compare(launch, commands):
    with pytest.raises(CommandError, match="no_such_flag"), launch("together", **commands):
        pass


def test_vllms_refusal_of_its_own_capture_is_told_clearly(tmp_path):
    log = tmp_path / "log"
    log.write_text("Value error, AuxOutput Connector requires Model Runner V2; set VLLM_…\n")
    error = CommandError("the routed-experts server ended with status 1")
    assert "the CPU has none" in hosting.refusal("routed-experts", error, log)
    assert "status 1" in hosting.refusal("other", error, log)


def test_memory_fits_or_not():
    assert hosting.fits({"host": 100, "gpu 0": 80}, {"host": 70, "gpu 0": 70}, 1)
    assert not hosting.fits({"host": 100, "gpu 0": 80}, {"host": 90, "gpu 0": 40}, 1)
    assert not hosting.fits({"host": 100}, {"host": 70}, 2)
    assert hosting.fits({"host": 100}, {"host": 0}, 0)
    assert hosting.available_memory()["host"] > 0
