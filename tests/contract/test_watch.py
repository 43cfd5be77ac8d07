"""``/experts/stream``: the counts of each second, made once for all viewers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import zlib
from types import SimpleNamespace

import httpx
import numpy as np
import orjson
import pytest

from moescope_service.api import watch
from moescope_service.errors import CollectorGoneError
from tests.waiting import DEADLINE_S, wait_until

from .deployment import Deployment
from .fake_engine import OUTPUT, PROMPT, SPEC

SHAPE = (2, len(SPEC.layers), SPEC.num_experts)
SELECTIONS = len(SPEC.layers) * SPEC.top_k


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Events come ten times a second."""
    monkeypatch.setattr(watch, "EVENT_S", 0.1)


@contextlib.contextmanager
def events_of(deployment, **headers):
    """The events of a stream as they come: (name, values)."""
    with deployment.http.stream("GET", "/experts/stream", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        yield map(parsed, events(answer.iter_lines()))


def events(lines):
    while event := list(itertools.takewhile(bool, lines)):
        yield event


def parsed(event):
    fields = dict(line.split(": ", 1) for line in event)
    values = orjson.loads(fields["data"])
    if "counts" in values:
        packed = zlib.decompress(base64.b64decode(values["counts"]))
        values["counts"] = np.frombuffer(packed, "<u4").reshape(SHAPE)
    return fields.get("event", "message"), values


def viewers(deployment):
    return deployment.app.state.moescope_watch.viewers.count


def counted(stream, num_rows):
    """Take events until they have so many rows in all; return the sums by phase."""
    counts, rows = np.zeros(SHAPE, np.int64), np.zeros(2, np.int64)
    while rows.sum() < num_rows:
        _, event = next(stream)
        counts += event["counts"]
        rows += event["num_rows"]
    return counts, rows


def test_events_add_up_to_what_experts_says_with_the_phases_apart(deployment):
    deployment.complete("before")
    wait_until(lambda: deployment.http.get("/routes/cmpl-before").status_code == 200, "it ends")
    with events_of(deployment) as stream:
        name, first = next(stream)
        assert (name, first["from_s"], first["counts"].sum()) == ("message", first["to_s"], 0)
        assert (first["phases"], first["layers"]) == (["prefill", "decode"], SPEC.layers)
        before = {p: experts(deployment, p) for p in first["phases"]}
        deployment.complete("counted")
        counts, rows = counted(stream, len(PROMPT) + len(OUTPUT) - 1)
    assert rows.tolist() == [len(PROMPT), len(OUTPUT) - 1]
    assert counts.sum(axis=(1, 2)).tolist() == (rows * SELECTIONS).tolist()
    for number, phase in enumerate(before):
        np.testing.assert_array_equal(counts[number], experts(deployment, phase) - before[phase])


def experts(deployment, phase):
    answer = deployment.http.get("/experts", params={"phase": phase})
    return np.array(answer.json()["counts"])


def test_each_event_goes_on_where_the_one_before_ended(deployment):
    with events_of(deployment) as stream:
        seen = [next(stream)[1] for _ in range(4)]
    for one, following in itertools.pairwise(seen):
        assert one["to_s"] == following["from_s"] < following["to_s"]


def test_a_reset_takes_nothing_back(deployment):
    with events_of(deployment) as stream:
        next(stream)
        deployment.complete("a")
        counted(stream, len(PROMPT) + len(OUTPUT) - 1)
        assert deployment.http.post("/routes/reset").status_code == 200
        deployment.complete("b")
        counts, _ = counted(stream, len(PROMPT) + len(OUTPUT) - 1)
    assert counts.sum() == (len(PROMPT) + len(OUTPUT) - 1) * SELECTIONS


def test_the_collector_is_asked_once_for_all_viewers_and_not_for_none(deployment, monkeypatch):
    asked = []
    collector = deployment.app.state.moescope_collector
    monkeypatch.setattr(
        collector, "ask", lambda query, ask=collector.ask: asked.append(query) or ask(query)
    )
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(events_of(deployment)) for _ in range(5)]
        last = [[next(stream)[1] for _ in range(3)][-1] for stream in streams]
        assert len(asked) <= 2 + round((max(e["to_s"] for e in last) - last[0]["from_s"]) / 0.1 + 2)
        numbers = {event["to_s"] for event in last}
        assert len(numbers) < len(streams)
        task = deployment.app.state.moescope_watch._task
    wait_until(lambda: viewers(deployment) == 0, "they leave")
    wait_until(task.done, "nothing is made for nobody")


def test_one_that_only_counts_is_watched_too():
    with Deployment(mode="counts").running() as deployment, events_of(deployment) as stream:
        assert next(stream)[1]["counts"].shape == SHAPE


def test_a_collector_that_dies_ends_the_stream_with_an_error(fresh):
    with events_of(fresh) as stream:
        next(stream)
        fresh.kill_collector()
        *_, (name, last) = stream
    assert (name, last["error"]["code"]) == ("error", 503)
    assert "has ended" in last["error"]["message"]
    answer = fresh.http.get("/experts/stream")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    wait_until(lambda: viewers(fresh) == 0, "nobody is left")


def test_a_server_that_stops_does_not_wait_for_its_viewers(deployment):
    server = deployment.app.state.server
    with events_of(deployment) as stream:
        next(stream)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deployment.app.state, "server", SimpleNamespace(should_exit=True))
            rest = list(itertools.islice(stream, 20))
    assert len(rest) < 20
    assert {name for name, _ in rest} <= {"message"}
    assert not server.should_exit


def test_the_65th_is_told_to_come_back(deployment):
    with contextlib.ExitStack() as stack:
        limits = httpx.Limits(max_connections=None)
        http = stack.enter_context(httpx.Client(base_url=deployment.url, limits=limits))
        for _ in range(watch.MAX_VIEWERS):
            answer = stack.enter_context(http.stream("GET", "/experts/stream"))
            assert answer.status_code == 200
        refused = deployment.http.get("/experts/stream")
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "64 clients watch the experts" in refused.json()["error"]["message"]
    wait_until(lambda: viewers(deployment) == 0, "they leave")


def test_keys_and_pages_of_other_sites():
    with Deployment(api_key=["secret"]).running() as deployment:
        assert deployment.http.get("/experts/stream").status_code == 401
        key = {"Authorization": "Bearer secret"}
        with events_of(deployment, **key) as stream:
            next(stream)
        page = {"Sec-Fetch-Site": "cross-site"}
        assert deployment.http.get("/experts/stream", headers=key | page).status_code == 403
        assert deployment.http.post("/experts/stream", headers=key).status_code == 405
        wait_until(lambda: viewers(deployment) == 0, "nobody is counted who was refused")


def reply(number):
    """A reply of the collector in which every count is the number."""
    counts = np.full(SHAPE, number, np.int64)
    return SimpleNamespace(spec=SPEC, arrays=[counts], rows=[number, number], since_s=1.0)


def test_a_slow_viewer_skips_events():
    async def main():
        asked = itertools.count()

        async def ask(_):
            return reply(next(asked))

        watched, collector = watch.Watch(), SimpleNamespace(ask=ask)
        watched.viewers.enter()
        slow, fast = watched.events(collector), watched.events(collector)
        first = await anext(slow)
        newest = [await anext(fast) for _ in range(5)]
        second = await anext(slow)
        watched.leave()
        return first, newest, second

    first, newest, second = asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    assert first == newest[0]
    assert len({*newest}) == len(newest)
    assert second == newest[-1]


def test_whoever_comes_after_an_error_begins_anew():
    async def main():
        async def gone(_):
            raise CollectorGoneError("gone")

        async def there(_):
            return reply(1)

        watched = watch.Watch()
        watched.viewers.enter()
        with pytest.raises(CollectorGoneError):
            await anext(watched.events(SimpleNamespace(ask=gone)))
        event = await anext(watched.events(SimpleNamespace(ask=there)))
        watched.leave()
        return event

    assert asyncio.run(asyncio.wait_for(main(), DEADLINE_S)).startswith(b"id: 0\n")
