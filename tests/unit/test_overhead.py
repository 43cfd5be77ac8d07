import asyncio

import httpx
import numpy as np
import orjson
import pytest
from client_fakes import INFO, completion, server

from moescope import CommandError, overhead, replay, timing


class Arm:
    """A server whose every answer takes a set time on a clock of the test's own."""

    def __init__(self, clock, s_per_token, tokens=4, token_ids=None):
        self.clock, self.s_per_token, self.tokens = clock, s_per_token, tokens
        self.token_ids = token_ids
        self.salts = []

    def __call__(self, request):
        body = orjson.loads(request.content)
        self.salts.append(body["cache_salt"])
        self.clock.now_s += self.s_per_token * self.tokens
        self.clock.order.append(self)
        values = completion(body["messages"][0]["content"], tokens=self.tokens)
        if self.token_ids:
            values["choices"][0]["token_ids"] = self.token_ids(body, len(self.salts))
        return httpx.Response(200, json=values)


class Clock:
    def __init__(self):
        self.now_s = 0.0
        self.order = []

    def __call__(self):
        return self.now_s


def measure(arms, clock, *, rounds=6, prompts=("a", "b"), on_pass=None):
    async def go():
        clients = {
            name: replay.connect("http://moe", transport=httpx.MockTransport(arm))
            for name, arm in arms.items()
        }
        options = replay.Options(model="demo", concurrency=1)
        try:
            return await overhead.measure(
                prompts, clients, options, rounds=rounds, on_pass=on_pass, clock=clock
            )
        finally:
            for client in clients.values():
                await client.aclose()

    return asyncio.run(go())


def test_a_tenth_more_time_a_token_is_ten_percent():
    clock = Clock()
    rounds = measure({"no_log": Arm(clock, 0.5), "log": Arm(clock, 0.55)}, clock)
    summary = overhead.summarize(rounds, 1234)
    assert summary["overhead"]["percent"] == pytest.approx(10.0)
    assert summary["overhead"]["interval_95_percent"] == pytest.approx([10.0, 10.0])
    assert summary["overhead"]["distinguishable"] is True
    assert "by +10.00%" in summary["overhead"]["statement"]
    assert summary["no_log"] == pytest.approx(
        {"wall_s": 24.0, "prompt_tokens": 12, "completion_tokens": 48, "tokens_per_s": 2.0}
    )
    assert summary["log"]["tokens_per_s"] == pytest.approx(1 / 0.55)
    assert len(summary["rounds"]) == 6


def test_time_is_counted_by_token_where_an_arm_generates_more():
    clock = Clock()
    arms = {"no_log": Arm(clock, 0.5, tokens=4), "log": Arm(clock, 0.5, tokens=8)}
    assert measure(arms, clock)[0].overhead_percent == pytest.approx(0.0)


def test_the_warm_up_is_not_counted():
    clock, passes = Clock(), []
    arms = {"no_log": Arm(clock, 0.5), "log": Arm(clock, 0.5)}
    rounds = measure(arms, clock, rounds=3, on_pass=lambda: passes.append(clock.now_s))
    assert len(rounds) == 3
    assert len(passes) == 8
    assert all(len(arm.salts) == 2 * 4 for arm in arms.values())


def test_each_round_has_a_cache_salt_of_its_own_the_same_for_both_arms():
    clock = Clock()
    arms = {"no_log": Arm(clock, 0.5), "log": Arm(clock, 0.5)}
    measure(arms, clock, rounds=3)
    assert arms["log"].salts == arms["no_log"].salts
    assert len(set(arms["log"].salts)) == 4
    before = set(arms["log"].salts)
    measure(arms, clock, rounds=3)
    assert not before & set(arms["log"].salts[8:])


def test_the_order_told_is_the_order_run():
    clock = Clock()
    arms = {"no_log": Arm(clock, 0.5), "log": Arm(clock, 0.5)}
    rounds = measure(arms, clock, rounds=5, prompts=("a",))
    names = [next(name for name, arm in arms.items() if arm is one) for one in clock.order]
    assert names[2:] == [name for item in rounds for name in item.order]


def test_orders_are_balanced_and_follow_the_seed():
    orders = {seed: overhead.shuffled_orders(6, seed) for seed in range(20)}
    for order in orders.values():
        assert sum(first == "log" for first, _ in order) == 3
    assert orders[3] == overhead.shuffled_orders(6, 3)
    assert len({tuple(order) for order in orders.values()}) > 5


def test_an_interval_with_zero_in_it_is_not_distinguishable():
    def item(percent):
        passes = {
            name: overhead.Pass(wall_s=w, prompt_tokens=1, completion_tokens=1, token_ids=[None])
            for name, w in (("no_log", 1.0), ("log", 1.0 + percent / 100))
        }
        return overhead.Round(order=overhead.ARMS, passes=passes)

    unclear = overhead.summarize([item(p) for p in (-1.0, 1.2, -0.5, 0.6)], 0)["overhead"]
    assert unclear["distinguishable"] is False
    assert unclear["statement"].endswith("not distinguishable from zero")
    clear = overhead.summarize([item(p) for p in (1.0, 1.2, 0.5, 0.6)], 0)["overhead"]
    assert clear["distinguishable"] is True
    assert "not distinguishable" not in clear["statement"]


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(7)
    covered = 0
    for _ in range(100):
        low, high = overhead.bootstrap_interval(list(random.normal(3.0, 1.0, 20)), 0)
        covered += low <= 3.0 <= high
    assert 85 <= covered <= 99


def test_the_interval_follows_the_seed():
    values = [1.0, 2.0, 4.0, 8.0]
    assert overhead.bootstrap_interval(values, 1) == overhead.bootstrap_interval(values, 1)
    low, high = overhead.bootstrap_interval(values, 1)
    assert 1.0 <= low < np.mean(values) < high <= 8.0


def test_outputs_are_compared_between_arms_and_within_an_arm():
    clock = Clock()
    arms = {
        "no_log": Arm(clock, 0.5, token_ids=lambda body, n: [1, 2]),
        "log": Arm(clock, 0.5, token_ids=lambda body, n: [1, 2 + (n == 3)]),
    }
    summary = overhead.summarize(measure(arms, clock, rounds=3), 0)
    # Answer 3 of the arm is the first of its first round: one of six pairs between the arms
    # differs, and one of the eight from one round to the next.
    assert summary["token_ids"] == {
        "between_arms": {"same": 5, "compared": 6},
        "within_arm": {"same": 7, "compared": 8},
    }


def test_a_failed_request_ends_the_measurement():
    clock = Clock()

    def fail(request):
        return httpx.Response(500, json={"error": "out of memory"})

    with pytest.raises(CommandError, match=r"2 of 2 requests failed.*out of memory"):
        measure({"no_log": Arm(clock, 0.5), "log": fail}, clock)


def test_an_arm_that_generates_nothing_is_told():
    clock = Clock()
    with pytest.raises(CommandError, match="generated no token"):
        measure({"no_log": Arm(clock, 0.5), "log": Arm(clock, 0.5, tokens=0)}, clock)


def test_a_stock_arm_has_nothing_of_moescope():
    timing.require_stock("http://moe", server({}))
    with pytest.raises(CommandError, match="answers /moescope/info"):
        timing.require_stock("http://moe", server({"GET /moescope/info": INFO}))
    down = httpx.MockTransport(lambda _: httpx.Response(503, json={"detail": "collector"}))
    with pytest.raises(CommandError, match="HTTP 503"):
        timing.require_stock("http://moe", down)
