"""``POST /routes/batch`` over HTTP, with the real client and without."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from vllm.v1.engine import FinishReason

import moescope
from moescope import batch, errors, formats

from .deployment import Deployment
from .fake_engine import OUTPUT, PROMPT, rows_of

NUM_ROWS = len(PROMPT) + len(OUTPUT) - 1


@pytest.fixture(scope="module", autouse=True)
def served(deployment):
    deployment.complete("one")
    deployment.complete("two", n=2)


@pytest.fixture
def running(deployment):
    """A request that runs until it is told to end."""
    (name,) = deployment.frontend.add("running-0")
    sequence = deployment.engine.start(name)

    def end():
        deployment.frontend.put(name, OUTPUT, FinishReason.STOP)
        deployment.engine.step(finished=[sequence])

    yield end
    if name in deployment.frontend.output_processor.request_states:
        end()
    deployment.http.delete("/routes/running-0")


def post(deployment, *request_ids, **body):
    body = {"request_ids": request_ids, **body}
    answer = deployment.http.post("/routes/batch", json=body)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.usefixtures("running")
def test_every_id_has_its_status_in_the_order_asked(deployment, client):
    asked = ["nobody's", "cmpl-two", "running-0", "cmpl-one"]
    found = client.routes_batch(asked)
    assert list(found.status) == asked
    assert found.failed == {"nobody's": "unknown", "running-0": "running"}
    assert {one: [t.index for t in traces] for one, traces in found.traces.items()} == {
        "cmpl-two": [0, 1],
        "cmpl-one": [0],
    }
    (trace,) = found.traces["cmpl-one"]
    np.testing.assert_array_equal(trace.topk_ids, rows_of(0, NUM_ROWS)[0])
    np.testing.assert_array_equal(trace.topk_weights, rows_of(0, NUM_ROWS)[1])
    assert (trace.complete, trace.token_ids.tolist()) == (True, PROMPT + OUTPUT)


def test_json_is_the_default(deployment):
    answer = post(deployment, "cmpl-one", "nobody's")
    assert answer.headers["content-type"] == "application/json"
    one, other = answer.json()["results"]
    assert (one["request_id"], one["status"]) == ("cmpl-one", "finished")
    assert formats.from_dict(one["traces"][0]).num_rows == NUM_ROWS
    assert other == {"request_id": "nobody's", "status": "unknown", "traces": []}


def test_npz_holds_the_requests_beside_the_traces(deployment):
    answer = post(deployment, "cmpl-two", "cmpl-one", format="npz")
    assert answer.headers["content-type"] == "application/x-npz"
    assert [trace.request_id for trace in formats.load_npz(answer.content)] == [
        "cmpl-two", "cmpl-two", "cmpl-one",
    ]  # fmt: skip
    assert batch.load_npz(answer.content).status == {"cmpl-two": "finished", "cmpl-one": "finished"}


def test_no_trace_at_all(client):
    found = client.routes_batch(["nobody's"])
    assert (found.traces, found.failed) == ({}, {"nobody's": "unknown"})


def test_an_id_that_is_named_twice_is_answered_once(deployment):
    results = post(deployment, "cmpl-one", "cmpl-two", "cmpl-one").json()["results"]
    assert [one["request_id"] for one in results] == ["cmpl-one", "cmpl-two"]


def test_a_part(deployment, client):
    (trace,) = client.routes_batch(["cmpl-one"], layers=[3], weights=False).traces["cmpl-one"]
    assert (trace.layers.tolist(), trace.topk_weights) == ([3], None)
    (one,) = post(deployment, "cmpl-one", layers="3", weights=False).json()["results"]
    assert (one["traces"][0]["layers"], one["traces"][0]["topk_weights"]) == ([3], None)


def test_as_many_as_it_takes(deployment, client):
    asked = [f"no-{number}" for number in range(1023)] + ["cmpl-one"]
    found = client.routes_batch(asked)
    assert (list(found.status), list(found.traces)) == (asked, ["cmpl-one"])


def test_it_waits_for_requests_that_run(deployment, client, running):
    assert client.routes_batch(["running-0"], wait_s=0.05).failed == {"running-0": "running"}
    timer = threading.Timer(0.1, running)
    timer.start()
    assert client.routes_batch(["cmpl-one", "running-0"], wait_s=20).failed == {}
    timer.join()


def test_a_wait_is_for_all_of_them_together(deployment, client):
    """Ten times as many as are asked at a time, none of which ends."""
    asked = [f"many-{number}" for number in range(320)]
    names = [deployment.frontend.add(request_id)[0] for request_id in asked]
    started = [deployment.engine.start(name) for name in names]
    with moescope.Client(deployment.url, timeout_s=9) as hurried:
        assert set(hurried.routes_batch(asked, wait_s=1).failed.values()) == {"running"}
    deployment.frontend.output_processor.abort_requests(names, internal=True)
    deployment.engine.step(finished=started)


def test_evicted():
    with Deployment(memory="9k").running() as small, moescope.Client(small.url) as client:
        for number in range(6):
            small.complete(f"e{number}")
            client.routes(f"cmpl-e{number}")
        assert client.routes_batch(["cmpl-e0", "cmpl-e5"]).failed == {"cmpl-e0": "evicted"}


def test_a_request_may_be_called_batch(deployment, client):
    deployment.complete("", {"X-Request-Id": "batch"})
    assert client.routes("batch")[0].request_id == "cmpl-batch"
    assert client.routes_batch(["batch"]).failed == {}
    assert client.delete("batch") == 1
    assert deployment.http.post("/routes/other", json={}).status_code == 405


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"request_ids": []}, ["request_ids: ", "at least 1"]),
        ({"request_ids": ["x"] * 1025}, ["request_ids: ", "at most 1024", "'x', '", "…"]),
        ({"request_ids": ["x", ""]}, ["request_ids.1: ", "at least 1"]),
        ({"request_ids": [1] * 1024}, ["request_ids.0: ", "request_ids.4: ", "string"]),
        ({"request_ids": "x"}, ["request_ids: ", "list", "'x'"]),
        ({}, ["request_ids: ", "required"]),
        ({"request_ids": ["x"], "wait": 1}, ["wait: ", "not permitted"]),
        ({"request_ids": ["x"], "wait_s": 61}, ["wait_s: ", "60", "61"]),
        (
            {"request_ids": ["x"], "format": "jsonl"},
            ["format: ", "'arrow' or 'parquet'", "'jsonl'"],
        ),
        ({"request_ids": ["x"], "layers": "x"}, ["invalid layers 'x'", "0,5-7"]),
        ({"request_ids": ["x"], "layers": "0-9999,1"}, ["invalid layers", "at most 10,000"]),
        ({"request_ids": ["x"], "layers": "1," * 10**5}, ["invalid layers", "at most 1000"]),
        ({"request_ids": ["cmpl-one"], "layers": "9"}, ["invalid layers: ", "9", "1, 3"]),
        ({"request_ids": ["x"], "x" * 10**5: "y" * 10**5}, ["xxx: ", "not permitted", "'yyy", "…"]),
        (r'{"request_ids": ["\ud800"]}', ["body: ", "JSON"]),
        ("[", ["body: ", "Expected `object`, got `array`"]),
        ('{"request_ids": [[]', ["body: ", "got `array`", "$[...][0]"]),
        ('{"request_ids": ["x"', ["body: ", "JSON", "truncated"]),
        ("[" * 2**19, ["body: ", "Expected `object`, got `array`"]),
        ("", ["body: ", "required"]),
    ],
)
def test_a_bad_body(deployment, body, words):
    how = {"content": body, "headers": {"Content-Type": "application/json"}}
    how = how if isinstance(body, str) else {"json": body}
    answer = deployment.http.post("/routes/batch", **how)
    assert answer.status_code == 422
    message = answer.json()["error"]["message"]
    assert all(word in message for word in words), message
    assert len(message) < 600


def test_the_client_raises_what_it_means(client):
    with pytest.raises(errors.InvalidQueryError, match="at least 1 character"):
        client.routes_batch([""])
    assert client.routes_batch([]).status == {}
