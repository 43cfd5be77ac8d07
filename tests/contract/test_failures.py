"""Keys, and a collector that is gone."""

from __future__ import annotations

import dataclasses
import signal

import pytest

import moescope
from moescope import errors
from moescope_service.runtime import collector_address
from tests.waiting import SCRAPE_TIMEOUT_S, scrape, wait_until

from .deployment import Deployment, Frontend
from .fake_engine import PROMPT, SPEC, Engine

GUARDED = [
    ("GET", "/routes"), ("GET", "/routes/x"), ("DELETE", "/routes/x"), ("POST", "/routes/batch"),
    ("POST", "/routes/pause"), ("POST", "/routes/resume"), ("POST", "/routes/reset"),
    ("GET", "/experts"), ("GET", "/moescope/info"),
]  # fmt: skip


@pytest.fixture(scope="module")
def locked():
    with Deployment(api_key=["secret", "other"]).running() as deployment:
        yield deployment


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "secret", "Basic secret"])
def test_without_a_key(locked, method, path, header):
    headers = {"Authorization": header} if header else {}
    answer = locked.http.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert "--api-key" in answer.json()["error"]["message"]
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["secret", "other"])
def test_with_a_key(locked, key):
    locked.complete(f"k-{key}")
    with moescope.Client(locked.url, api_key=key) as client:
        assert client.routes(f"cmpl-k-{key}")[0].complete
        assert client.info().model == "tiny"
    with moescope.Client(locked.url) as client, pytest.raises(errors.AuthenticationError):
        client.info()


def test_what_stays_open(locked):
    assert locked.http.get("/metrics").status_code == 200


def test_a_bad_key_is_told_nothing_of_bad_parameters(locked):
    assert locked.http.get("/routes?limit=x").status_code == 401


def test_a_collector_that_was_killed(fresh):
    fresh.complete("before")
    assert fresh.http.get("/routes/cmpl-before").status_code == 200
    fresh.kill_collector()
    text = fresh.http.get("/metrics", timeout=SCRAPE_TIMEOUT_S).text
    assert "moescope_collector_up 0.0" in text
    assert "moescope_rows_captured" not in text
    assert "process_" in text or "python_" in text
    fresh.complete("after")  # serving goes on
    for path in ("/routes/cmpl-before", "/moescope/info"):
        answer = fresh.http.get(path)
        assert answer.status_code == 503
        message = answer.json()["error"]["message"]
        assert "collector" in message
        assert "serving goes on" in message
    with moescope.Client(fresh.url, retries=0) as client:
        for ask in (client.recent, lambda: client.routes_batch(["cmpl-before", "cmpl-after"])):
            with pytest.raises(errors.CollectorDownError):
                ask()


def test_rows_that_the_queue_cannot_take_are_counted_and_named():
    """The collector stops for a while: rows are dropped, control is not."""
    with Deployment().running() as deployment:
        engine = Engine(
            collector_address(), dataclasses.replace(SPEC, engine=1), max_rows_bytes=100_000
        )
        try:
            frontend = Frontend(engine)
            frontend.output_processor = deployment.frontend.output_processor
            deployment.collector.send_signal(signal.SIGSTOP)
            (name,) = frontend.add("slow")
            running = engine.start(name)
            for _ in range(3000):
                engine.step([(running, 1)])
            frontend.put(name, [1] * 3001, None)
            frontend.output_processor.request_states[name].make_request_output(
                [], None, "stop", None
            )
            engine.step(finished=[running])
            deployment.collector.send_signal(signal.SIGCONT)
            answer = wait_until(
                lambda: (
                    (a := deployment.http.get("/routes/slow?wait_s=5")).status_code == 200 and a
                ),
                "the request ends",
            )
        finally:
            deployment.collector.send_signal(signal.SIGCONT)
            engine.recorder.close()
        (trace,) = answer.json()["traces"]
        missing = [i for i, source in enumerate(trace["source"]) if source == "missing"]
        assert not trace["complete"]
        assert 0 < len(missing) < len(trace["source"]) == len(PROMPT) + 3001 - 1
        assert all(
            (trace["topk_ids"][i] is None) == (i in set(missing)) for i in range(0, 3000, 50)
        )
        text = scrape(deployment.url)
        sample = 'moescope_rows_lost_total{model_name="tiny",reason="queue_full"}'
        assert f"{sample} {float(len(missing))}" in text
        deployment.complete("later")
        trace = deployment.http.get("/routes/cmpl-later").json()["traces"][0]
        assert trace["complete"]
