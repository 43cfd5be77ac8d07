"""A collector that hangs and goes on: requests served meanwhile are told of, or said to be lost."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import re
import signal
import threading
import time

import httpx
from vllm.v1.engine import FinishReason

from moescope_service.frontend.outbox import MAX_QUERY_BYTES
from moescope_service.ids import short_id
from moescope_service.queries import RoutesQuery, Wanted, pack_query
from tests.waiting import DEADLINE_S, scrape, wait_until

from .deployment import Deployment
from .fake_engine import PROMPT, SPEC


@contextlib.contextmanager
def stopped(deployment):
    """The collector takes nothing in."""
    deployment.collector.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        deployment.collector.send_signal(signal.SIGCONT)


def flood(deployment):
    """Ask for batches of half a megabyte; those that the socket or the outbox takes wait 2 s."""
    ids = [f"{number}-{'x' * 500}" for number in range(1024)]

    def ask(number):
        body = {"request_ids": [f"{number}-{one}" for one in ids], "wait_s": 0}
        answer = httpx.post(f"{deployment.url}/routes/batch", json=body, timeout=DEADLINE_S)
        return answer.status_code, answer.headers.get("Retry-After")

    with concurrent.futures.ThreadPoolExecutor(20) as threads:
        return list(threads.map(ask, range(60)))


def fill_the_socket(deployment):
    """Let queries fill what ZMQ and the system hold of messages: what follows waits."""
    client = client_of(deployment)
    frames = pack_query(10**6, RoutesQuery(wanted=[Wanted(request_id="x" * 500)] * 1000))
    number, end_s = 10**6, time.monotonic() + 1
    while time.monotonic() < end_s:  # it takes none for a second
        if client._outbox.query(number, frames):
            client._link.wake()
            number, end_s = number + 1, time.monotonic() + 1
        time.sleep(0.001)
    assert client._outbox._others.waiting


def sample(deployment, name):
    (value,) = re.findall(rf"^{name}(?:{{.*}})? (.*)$", scrape(deployment.url), re.MULTILINE)
    return float(value)


def client_of(deployment):
    return deployment.app.state.moescope_collector


def test_queries_take_no_room_from_registrations(fresh):
    """However few bytes the link itself may hold: 500 such batches were all that it may."""
    client_of(fresh)._link._max_bytes = 2**20
    with stopped(fresh):
        answers = flood(fresh)
        for number in range(20):
            fresh.complete(f"r{number}")
        held_bytes = client_of(fresh)._outbox._others._size_bytes
    assert set(answers) == {(503, "1")}
    assert held_bytes <= 2 * MAX_QUERY_BYTES
    assert sample(fresh, "moescope_registrations_lost_total") == 0
    for number in range(20):
        answer = fresh.http.get(f"/routes/cmpl-r{number}?wait_s=10")
        assert answer.status_code == 200, answer.text
        assert answer.json()["traces"][0]["complete"]


def test_what_registrations_have_no_room_for_is_said_to_be_lost(fresh):
    journal = client_of(fresh)._outbox.journal
    (known,) = fresh.frontend.add("known")
    known_running = fresh.engine.start(known)
    wait_until(lambda: fresh.http.get("/routes/known").status_code == 202, "it is known")
    with stopped(fresh):
        fill_the_socket(fresh)
        journal._max_bytes = 0
        for number in range(20):
            fresh.complete("x", {"X-Request-Id": f"x{number}"})
        fresh.complete("x", {"X-Request-Id": "opted-out", "X-Moescope": "off"})
        (begun,) = fresh.frontend.add("begun")
        begun_running = fresh.engine.start(begun)
        fresh.frontend.put(known, [1], FinishReason.STOP)
        assert journal.size_bytes < 100_000
        journal._max_bytes = 2**20
    fresh.engine.step(finished=[known_running])
    wait_until(lambda: not client_of(fresh)._outbox, "all is sent")
    assert sample(fresh, "moescope_registrations_lost_total") == 20  # it answers by now
    for number in range(20):
        for request_id in (f"cmpl-x{number}", f"x{number}"):
            answer = fresh.http.get(f"/routes/{request_id}")
            assert answer.status_code == 410, answer.text
            assert "hung" in answer.json()["error"]["message"]
    assert fresh.http.get("/routes/opted-out").status_code == 404
    batch = fresh.http.post("/routes/batch", json={"request_ids": ["x1", "never"]}).json()
    assert [one["status"] for one in batch["results"]] == ["lost", "unknown"]
    # What it knew is told to its end, and what runs on as if it had never hung.
    assert fresh.http.get("/routes/known?wait_s=10").json()["traces"][0]["complete"]
    assert fresh.http.get("/routes/begun").status_code == 202
    fresh.frontend.put(begun, [1], FinishReason.STOP)
    fresh.engine.step(finished=[begun_running])
    assert fresh.http.get("/routes/begun?wait_s=10").json()["traces"][0]["complete"]


def test_a_query_finds_what_was_told_before_it(deployment):
    """However fast it follows: it does not overtake."""
    for number in range(50):
        deployment.frontend.add(f"at-once-{number}")
        assert deployment.http.get(f"/routes/at-once-{number}").status_code == 202


def test_long_ids_find_their_request_and_are_kept_short(fresh):
    long_id = "a/b" + "x" * 5000
    fresh.complete("x", {"X-Request-Id": long_id})
    answer = fresh.http.get(f"/routes/{long_id}?wait_s=10")
    assert answer.status_code == 200
    assert answer.json()["request_id"] == long_id
    (trace,) = answer.json()["traces"]
    assert trace["complete"]
    assert trace["request_id"] == short_id(f"cmpl-{long_id}")
    assert fresh.http.get(f"/routes/{short_id(long_id)}").json()["traces"] == [trace]
    assert fresh.http.get(f"/routes/{long_id}y").status_code == 404
    body = {"request_ids": [long_id, f"cmpl-{long_id}", f"{long_id}y"]}
    batch = fresh.http.post("/routes/batch", json=body).json()["results"]
    assert [one["request_id"] for one in batch] == body["request_ids"]
    assert [one["status"] for one in batch] == ["finished", "finished", "unknown"]
    (recent,) = fresh.http.get("/routes").json()["sequences"]
    assert max(map(len, [*recent["ids"], recent["request_id"]])) <= 512
    assert fresh.http.delete(f"/routes/{long_id}").json()["deleted"] == 1
    assert fresh.http.get(f"/routes/{long_id}").status_code == 404


def test_up_means_up_while_others_fetch_a_long_trace():
    """Six clients fetch the pages of one trace of 100,000 tokens, over and over."""
    with Deployment(spec=dataclasses.replace(SPEC, num_blocks=2**15)).running() as deployment:
        make_long_trace(deployment, "long", 100_000)
        with fetching(deployment, num_clients=6):
            texts = [deployment.http.get("/metrics").text for _ in range(25)]
    assert ["\nmoescope_collector_up 1.0\n" in text for text in texts] == [True] * 25
    assert all("moescope_steps_total" in text for text in texts)


@contextlib.contextmanager
def fetching(deployment, num_clients):
    """Fetch pages of "long" in the largest format, until the block ends."""
    is_over = threading.Event()

    def fetch():
        with httpx.Client(base_url=deployment.url, timeout=DEADLINE_S) as http:
            start = 0
            while not is_over.is_set():
                answer = http.get(f"/routes/long?format=jsonl&start={start}&limit=20000")
                assert answer.status_code in {200, 503}
                start = (start + 20_000) % 100_000

    with concurrent.futures.ThreadPoolExecutor(num_clients) as clients:
        fetches = [clients.submit(fetch) for _ in range(num_clients)]
        try:
            yield
        finally:
            is_over.set()
        for one in fetches:
            one.result()


def make_long_trace(deployment, name, num_tokens):
    """Let the fake engine route a prompt, most of it in steps of a thousand tokens."""
    (internal_id,) = deployment.frontend.add(name, prompt=[1] * num_tokens)
    running = deployment.engine.start(internal_id, PROMPT)
    for _ in range(num_tokens // 1000):
        deployment.engine.step([(running, 1000)])
    deployment.frontend.put(internal_id, [1], FinishReason.STOP)
    deployment.engine.step(finished=[running])
    answer = deployment.http.get(f"/routes/{name}?wait_s=20&limit=1")
    assert answer.status_code == 200, answer.text
    assert answer.json()["traces"][0]["num_tokens"] == num_tokens + 1
