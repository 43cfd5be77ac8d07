"""``/routes?follow=true``: what ends, as it ends, asked for once for all who follow."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from types import SimpleNamespace

import httpx
import orjson
import pytest

from moescope_service.api import ended
from moescope_service.errors import CollectorGoneError
from moescope_service.queries import EndedReply
from tests.waiting import DEADLINE_S, wait_until

from .deployment import Deployment
from .test_watch import events

FOLLOW = "/routes?follow=true"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The collector is asked twenty times a second."""
    monkeypatch.setattr(ended, "POLL_S", 0.05)


@contextlib.contextmanager
def following(deployment, **headers):
    """The events of a stream as they come, after the first one: (name, values)."""
    with deployment.http.stream("GET", FOLLOW, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        stream = map(parsed, events(answer.iter_lines()))
        assert next(stream) == ("message", {"sequences": []})
        yield stream


def parsed(event):
    fields = dict(line.split(": ", 1) for line in event)
    return fields.get("event", "message"), orjson.loads(fields["data"])


def take(stream, number):
    """The next so many sequences."""
    sequences = []
    while len(sequences) < number:
        sequences += next(stream)[1]["sequences"]
    return sequences


def readers(deployment):
    return deployment.app.state.moescope_ended.readers.count


def test_sequences_come_as_they_end_and_as_the_list_has_them(deployment):
    deployment.complete("before")
    wait_until(lambda: deployment.http.get("/routes/cmpl-before").status_code == 200, "it ends")
    with following(deployment) as stream:
        deployment.complete("first", n=2)
        found = take(stream, 2)
        deployment.complete("second")
        found += take(stream, 1)
        listed = deployment.http.get("/routes?limit=3").json()["sequences"]
    key = lambda one: (one["created_s"], one["index"])  # noqa: E731
    assert sorted(found, key=key) == sorted(listed, key=key)
    assert found[-1]["request_id"] == "cmpl-second"


def test_the_collector_is_asked_once_for_all_and_not_for_none(deployment, monkeypatch):
    asked = []
    collector = deployment.app.state.moescope_collector
    monkeypatch.setattr(
        collector, "ask", lambda query, ask=collector.ask: asked.append(query) or ask(query)
    )
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(following(deployment)) for _ in range(5)]
        task = deployment.app.state.moescope_ended._task
        deployment.complete("for-all")
        assert {take(stream, 1)[0]["request_id"] for stream in streams} == {"cmpl-for-all"}
        assert deployment.app.state.moescope_ended._task is task
    numbers = [query.number for query in asked if query.epoch is not None]
    assert numbers == sorted(numbers)
    wait_until(lambda: readers(deployment) == 0, "they leave")
    wait_until(task.done, "nobody is asked for nobody")


def test_what_a_key_may_not_see_does_not_come():
    keys = {name: {"Authorization": f"Bearer {name}"} for name in ("secret", "other")}
    with Deployment(api_key=[*keys], private="on").running() as deployment:
        assert deployment.http.get(FOLLOW).status_code == 401
        with (
            following(deployment, **keys["secret"]) as mine,
            following(deployment, **keys["other"]) as others,
        ):
            deployment.complete("theirs", keys["other"])
            deployment.complete("mine", keys["secret"])
            assert [one["request_id"] for one in take(mine, 1)] == ["cmpl-mine"]
            assert [one["request_id"] for one in take(others, 1)] == ["cmpl-theirs"]


def test_a_collector_that_dies_ends_the_stream_with_an_error(fresh):
    with following(fresh) as stream:
        fresh.kill_collector()
        *_, (name, last) = stream
    assert (name, last["error"]["code"]) == ("error", 503)
    answer = fresh.http.get(FOLLOW)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    wait_until(lambda: readers(fresh) == 0, "nobody is left")


def test_a_server_that_stops_does_not_wait_for_its_followers(deployment):
    with following(deployment) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ended, "QUIET_S", 1000.0)
        patch.setattr(deployment.app.state, "server", SimpleNamespace(should_exit=True))
        assert list(stream) == []


def test_the_65th_is_told_to_come_back(deployment):
    with contextlib.ExitStack() as stack:
        limits = httpx.Limits(max_connections=None)
        http = stack.enter_context(httpx.Client(base_url=deployment.url, limits=limits))
        for _ in range(ended.MAX_FOLLOWERS):
            answer = stack.enter_context(http.stream("GET", FOLLOW))
            assert answer.status_code == 200
        refused = deployment.http.get(FOLLOW)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "64 clients follow what ends" in refused.json()["error"]["message"]
    wait_until(lambda: readers(deployment) == 0, "they leave")


def test_it_goes_with_no_other_parameter(deployment):
    answer = deployment.http.get(f"{FOLLOW}&limit=3&before=7")
    assert answer.status_code == 422
    assert "['before', 'limit']" in answer.json()["error"]["message"]
    assert readers(deployment) == 0


def test_a_server_that_keeps_no_routes():
    with Deployment(mode="counts").running() as deployment:
        assert deployment.http.get(FOLLOW).status_code == 409


class Fake:
    """Says that so many sequences ended since it was asked last."""

    def __init__(self, *counts):
        self._counts = iter(counts)
        self._names = itertools.count()
        self.is_over = asyncio.Event()

    async def ask(self, query):
        count = next(self._counts, None)
        if count is None:
            self.is_over.set()
            raise CollectorGoneError("gone")
        names = [str(next(self._names)) for _ in range(count)]
        return EndedReply(sequences=names, owners=[None] * count, epoch=0, number=0)


def test_a_slow_follower_is_told_how_many_it_missed(monkeypatch):
    monkeypatch.setattr(ended, "POLL_S", 0)
    monkeypatch.setattr(ended, "MAX_WAITING", 5)

    async def main():
        followed, collector = ended.Ended(), Fake(0, 3, 2, 1, 1)
        follower = followed.enter(collector, None)
        await collector.is_over.wait()
        stream = follower.events()
        seen = [(await anext(stream)).decode().strip().split("\n") for _ in range(4)]
        with pytest.raises(CollectorGoneError):
            await anext(stream)
        followed.leave(follower)
        return [parsed(event) for event in seen]

    assert asyncio.run(asyncio.wait_for(main(), DEADLINE_S)) == [
        ("message", {"sequences": []}),
        ("message", {"sequences": ["0", "1", "2"]}),
        ("message", {"sequences": ["3", "4"]}),
        ("skipped", {"sequences": 2}),
    ]


@pytest.mark.parametrize(("owner", "told"), [(None, 3), ("alice", None)])
def test_how_many_others_ended_is_no_owners_business(owner, told):
    async def main():
        follower = ended.Follower(owner, 0.0)
        follower.tell(b"data: {}", 0, 3)
        return parsed((await anext(follower.events())).decode().strip().split("\n"))

    assert asyncio.run(main()) == ("skipped", {"sequences": told})


def test_one_that_hears_of_nothing_is_told_so(monkeypatch):
    monkeypatch.setattr(ended, "POLL_S", 0)
    monkeypatch.setattr(ended, "QUIET_S", 0)

    async def main():
        followed = ended.Ended()
        collector = SimpleNamespace(ask=Fake(*[0] * 1000).ask)
        follower = followed.enter(collector, None)
        stream = follower.events()
        seen = {await anext(stream) for _ in range(9)}
        followed.leave(follower)
        return seen

    seen = asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    assert seen == {b'data: {"sequences":[]}\n\n', b""}
