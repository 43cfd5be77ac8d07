"""``/experts/{layer}/{expert}/tokens``: who may ask, for what, and what is counted."""

from __future__ import annotations

import collections

import pytest

from moescope_service.api import expert_tokens
from moescope_service.collector.pages import AT_ONCE
from tests.waiting import wait_until

from .deployment import Deployment
from .fake_engine import OUTPUT, PROMPT, SPEC
from .tokenizers_made import byte_level

LAYER = SPEC.layers[1]
NUM_ROWS = len(PROMPT) + len(OUTPUT) - 1


def complete(deployment, name, **body):
    """Run a request and wait for its trace."""
    deployment.complete(name, **body)
    url, headers = f"/routes/cmpl-{name}", {"Authorization": "Bearer secret"}
    wait_until(lambda: deployment.http.get(url, headers=headers).status_code == 200, "it ends")


def ask(deployment, layer=LAYER, expert=0, headers=None, **params):
    return deployment.http.get(
        f"/experts/{layer}/{expert}/tokens", params=params, headers=headers or {}
    )


@pytest.fixture(scope="module")
def served():
    """One that has three requests, the second with two choices."""
    with Deployment().running() as running:
        for name, n in (("one", 1), ("two", 2), ("three", 1)):
            complete(running, name, n=n)
        yield running


def plainly(deployment, expert):
    """Count over all traces."""
    counts, totals = collections.Counter(), collections.Counter()
    for name in ("one", "two", "three"):
        for trace in deployment.http.get(f"/routes/cmpl-{name}").json()["traces"]:
            for token, layers in zip(trace["token_ids"], trace["topk_ids"], strict=False):
                totals[token] += 1
                counts[token] += expert in layers[1]
    order = sorted(+counts, key=lambda token: (-counts[token], token))
    return [(token, counts[token], totals[token]) for token in order]


def found(answer):
    return [(one["token_id"], one["count"], one["total"]) for one in answer.json()["tokens"]]


@pytest.mark.parametrize("expert", range(SPEC.num_experts))
def test_the_tokens_are_those_of_all_traces(served, expert):
    answer = ask(served, expert=expert)
    assert answer.status_code == 200
    assert found(answer) == plainly(served, expert)
    values = answer.json()
    assert (values["layer"], values["expert"]) == (LAYER, expert)
    assert (values["requests"], values["rows"], values["rows_missing"]) == (3, 4 * NUM_ROWS, 0)
    assert values["rows_selected"] == sum(count for _, count, _ in found(answer))
    for one in values["tokens"]:
        assert one["share"] == one["count"] / one["total"]
        assert one["token"] is None
        traces = served.http.get(f"/routes/{one['request_id']}").json()["traces"]
        (trace,) = [trace for trace in traces if trace["index"] == one["index"]]
        assert expert in trace["topk_ids"][one["position"]][1]
        assert trace["token_ids"][one["position"]] == one["token_id"]


def test_of_fewer_requests_the_newest_and_of_fewer_tokens_the_most_frequent(served):
    values = ask(served, requests=2).json()
    assert (values["requests"], values["rows"]) == (2, 3 * NUM_ROWS)
    assert {one["request_id"] for one in values["tokens"]} == {"cmpl-three"}
    assert found(ask(served, limit=1)) == plainly(served, 0)[:1]


def test_where_there_is_a_tokenizer_tokens_have_their_text(tmp_path):
    tokenizer = byte_level(tmp_path)
    with Deployment(tokenizer=tokenizer).running() as deployment:
        complete(deployment, "text")
        values = ask(deployment).json()
        assert values["tokens"]
        for one in values["tokens"]:
            assert one["token"] == tokenizer.decode([one["token_id"]])
        assert deployment.http.get("/moescope/info").json()["tokenizer"] is True


def test_of_no_request_there_is_nothing():
    with Deployment().running() as deployment:
        values = ask(deployment).json()
        assert (values["requests"], values["rows"], values["tokens"]) == (0, 0, [])
        assert deployment.http.get("/moescope/info").json()["tokenizer"] is False


@pytest.mark.parametrize(
    ("layer", "expert", "params", "told"),
    [
        (2, 0, {}, "layer 2 is not captured; captured layers: 1, 3"),
        (LAYER, 8, {}, "invalid expert 8: expected 0 to 7"),
        (LAYER, -1, {}, "expert: Input should be greater than or equal to 0"),
        (10**30, 0, {}, "layer: "),
        ("x", 0, {}, "layer: Input should be a valid integer"),
        (LAYER, 0, {"requests": 201}, "requests: Input should be less than or equal to 200"),
        (LAYER, 0, {"requests": 0}, "requests: "),
        (LAYER, 0, {"limit": 1001}, "limit: "),
    ],
)
def test_what_is_not_there_is_said(served, layer, expert, params, told):
    answer = ask(served, layer, expert, **params)
    assert answer.status_code == 422
    assert told in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("flags", "told"), [({"mode": "counts"}, "only counts"), ({"token_ids": "off"}, "token ids")]
)
def test_a_server_that_keeps_none_says_so(flags, told):
    with Deployment(**flags).running() as deployment:
        answer = ask(deployment)
        assert answer.status_code == 409
        assert told in answer.json()["error"]["message"]


def test_users_that_are_kept_apart_see_their_own():
    with Deployment(api_key=["secret", "other"], private="on").running() as deployment:
        complete(deployment, "mine")
        assert ask(deployment).status_code == 401
        other = ask(deployment, headers={"Authorization": "Bearer other"}).json()
        assert (other["requests"], other["tokens"]) == (0, [])
        mine = ask(deployment, headers={"Authorization": "Bearer secret"}).json()
        assert (mine["requests"], mine["rows"]) == (1, NUM_ROWS)


def test_so_many_rows_are_enough(served, monkeypatch):
    monkeypatch.setattr(expert_tokens, "MAX_ROWS", 2 * NUM_ROWS)
    values = ask(served).json()
    assert (values["requests"], values["rows"]) == (2, 2 * NUM_ROWS)


def test_more_traces_than_a_page_has():
    with Deployment().running() as deployment:
        complete(deployment, "many", n=AT_ONCE + 1)
        assert ask(deployment).json()["rows"] == (AT_ONCE + 1) * NUM_ROWS


def test_a_collector_that_is_gone(fresh):
    fresh.kill_collector()
    answer = ask(fresh)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
