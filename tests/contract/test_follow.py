"""``/routes/{id}/stream``: rows while their request runs, once each, and the end of its trace."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import socket

import httpx
import numpy as np
import orjson
import pytest
from fastapi import FastAPI
from vllm.v1.engine import FinishReason

import moescope
from moescope import Client, RouteTrace, errors
from moescope_service.api import follow, sharing
from moescope_service.api.streaming import Readers, Streamed
from tests.waiting import DEADLINE_S, wait_until

from .deployment import Deployment
from .fake_engine import OUTPUT, PROMPT, SPEC

NUM_ROWS = len(PROMPT) + len(OUTPUT) - 1


class Request:
    """A request of the fake engine, token by token."""

    def __init__(self, deployment, name, n=1, prompt=PROMPT):
        self.engine, self.frontend = deployment.engine, deployment.frontend
        self.names = self.frontend.add(name, n, prompt=prompt)
        self.running = [self.engine.start(one, prompt) for one in self.names]
        self.name, self.prompt_len = name, len(prompt)

    def await_rows(self, deployment):
        """Wait until the collector has the rows of the prompt."""
        with lines_of(deployment, self.name) as lines:
            so_far = itertools.accumulate(map(num_rows, lines))
            next(number for number in so_far if number >= self.prompt_len)

    def decode(self, num_tokens=1, choice=0):
        for _ in range(num_tokens):
            self.frontend.put(self.names[choice], [7], None)
            self.engine.step([(self.running[choice], 1)])

    def end(self, choice=0):
        self.frontend.put(self.names[choice], [8], FinishReason.STOP)
        self.engine.step(finished=[self.running[choice]])


@contextlib.contextmanager
def lines_of(deployment, request_id, **params):
    """The lines of a stream, parsed as they come."""
    url = f"/routes/{request_id}/stream"
    with deployment.http.stream("GET", url, params=params) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"] == "application/x-ndjson"
        yield map(orjson.loads, answer.iter_lines())


def followers(deployment):
    return deployment.app.state.moescope_followers.count


def num_rows(line):
    return sum(len(trace["topk_ids"]) for trace in line["traces"])


def check(pages, trace):
    """The pages are the trace: each row once, and what its last page says."""
    joined = RouteTrace.joined(pages)
    np.testing.assert_array_equal(joined.topk_ids, trace.topk_ids)
    np.testing.assert_array_equal(joined.topk_weights, trace.topk_weights)
    np.testing.assert_array_equal(joined.source, trace.source)
    np.testing.assert_array_equal(joined.weights_versions, trace.weights_versions)
    facts = [
        "key", "model", "prompt_len", "num_tokens", "cached_len", "finish_reason", "complete",
        "num_rows", "start",
    ]  # fmt: skip
    assert [getattr(joined, name) for name in facts] == [getattr(trace, name) for name in facts]


def test_rows_come_while_the_request_runs_and_its_facts_at_the_end(deployment, client):
    request = Request(deployment, "early")
    with lines_of(deployment, "early") as lines:
        first = next(lines)
        assert (first["request_id"], first["status"]) == ("early", "running")
        (trace,) = first["traces"]
        assert (trace["finish_reason"], trace["complete"], trace["token_ids"]) == (
            None, False, None,
        )  # fmt: skip
        num_seen = num_rows(first)
        for number in range(3):
            request.decode()
            while num_seen < len(PROMPT) + number + 1:
                line = next(lines)
                assert line["traces"][0]["start"] == num_seen
                assert line["traces"][0]["num_tokens"] == num_seen + num_rows(line) + 1
                num_seen += num_rows(line)
        request.end()
        *between, last = lines
        assert [one for one in between if num_rows(one)] == []
    whole = deployment.http.get("/routes/early").json()
    assert num_rows(last) == 0
    assert last["traces"][0].keys() == whole["traces"][0].keys()
    assert "status" not in last
    facts = {"start", "source", "topk_ids", "topk_weights", "weights_versions", "token_ids"}
    for name in whole["traces"][0].keys() - facts:
        assert last["traces"][0][name] == whole["traces"][0][name], name
    assert client.routes("early")[0].num_rows == num_seen


def test_a_line_is_what_routes_would_answer(deployment):
    """Of a request that has finished, byte for byte."""
    deployment.complete("done")
    wait_until(lambda: deployment.http.get("/routes/cmpl-done").status_code == 200, "it ends")
    for params in ({}, {"start": 3}, {"start": 99}, {"layers": "3", "weights": False}):
        answer = deployment.http.get("/routes/cmpl-done/stream", params=params)
        page = deployment.http.get("/routes/cmpl-done", params={"index": 0, **params})
        assert answer.content == page.content + b"\n"


@pytest.mark.parametrize("start", [0, 2, len(PROMPT), NUM_ROWS, 50])
def test_the_client_gets_each_row_once_wherever_it_begins(deployment, client, start):
    request = Request(deployment, f"resumed-{start}")
    pages = []
    for page in client.follow(f"resumed-{start}", start=start):
        pages.append(page)
        num_sent = request.running[0].num_rows
        if num_sent < NUM_ROWS:
            request.decode(NUM_ROWS - num_sent)
            request.end()
    assert [page.finish_reason for page in pages] == [None] * (len(pages) - 1) + ["stop"]
    check(pages, client.routes(f"resumed-{start}", start=start)[0])


def test_the_asynchronous_client_follows_several_at_once(deployment, client):
    requests = {name: Request(deployment, name) for name in ("a-1", "a-2")}

    async def followed(name):
        pages = []
        async with moescope.AsyncClient(deployment.url) as moe:
            async for page in moe.follow(name, layers="3", weights=False):
                if not pages:
                    requests[name].decode(2)
                    requests[name].end()
                pages.append(page)
        return pages

    async def both():
        return await asyncio.gather(*map(followed, requests))

    for name, pages in zip(requests, asyncio.run(both()), strict=True):
        joined, (trace,) = RouteTrace.joined(pages), client.routes(name)
        np.testing.assert_array_equal(joined.topk_ids[:, 0], trace.topk_ids[:, 1])
        assert (joined.layers.tolist(), joined.topk_weights) == ([3], None)


def test_choices_advance_by_themselves(deployment, client):
    request = Request(deployment, "two", n=2)
    with lines_of(deployment, "two", index=1) as lines:
        next(lines)
        request.decode(3, choice=1)
        request.end(choice=1)
        *_, last = lines  # the other one runs on
        assert last["traces"][0]["index"] == 1
    assert deployment.http.get("/routes/two").status_code == 202
    request.decode(1, choice=0)
    request.end(choice=0)
    pages = list(client.follow("two", index=0))
    assert (pages[-1].num_rows, pages[-1].index) == (len(PROMPT) + 1, 0)
    with pytest.raises(errors.InvalidQueryError, match=r"expected one that 'two' has, \[0, 1\]"):
        next(client.follow("two", index=2))


def test_the_newest_request_of_an_id_is_followed_and_stuck_to(deployment, client):
    add_id = deployment.app.state.moescope_registration.add_id
    requests = [Request(deployment, f"shared-{number}") for number in range(3)]
    for request in requests[:2]:
        add_id(request.names, "shared")
    pages = client.follow("shared")
    assert next(pages).request_id == "shared-1"
    add_id(requests[2].names, "shared")
    assert next(client.follow("shared")).request_id == "shared-2"
    for request in requests:
        request.decode(2)
        request.end()
    assert {page.request_id for page in pages} == {"shared-1"}


def test_what_cannot_be_followed(deployment, client):
    with pytest.raises(errors.RequestNotFoundError, match="never-seen"):
        next(client.follow("never-seen"))
    Request(deployment, "bad").end()
    for params in ({"layers": "2"}, {"layers": "x"}, {"index": -1}, {"start": -1}, {"start": "x"}):
        answer = deployment.http.get("/routes/bad/stream", params=params)
        assert answer.status_code == 422, params
    assert deployment.http.post("/routes/bad/stream").status_code == 405
    page = {"Sec-Fetch-Site": "cross-site"}
    assert deployment.http.get("/routes/bad/stream", headers=page).status_code == 403
    wait_until(lambda: followers(deployment) == 0, "nobody is counted who was refused")


def test_a_server_that_only_counts_has_nothing_to_follow():
    with Deployment(mode="counts").running() as deployment:
        assert deployment.http.get("/routes/x/stream").status_code == 409


@pytest.mark.parametrize("request_id", ["a/b", "ü%2F?#", "x/stream", "batch"])
def test_ids_of_every_kind(deployment, client, request_id):
    response_id = deployment.complete(f"f-{request_id}").json()["id"]
    assert [*client.follow(response_id)][-1].request_id == f"cmpl-f-{request_id}"


def test_a_trace_that_is_deleted_meanwhile_ends_with_an_error(deployment, client):
    Request(deployment, "deleted")
    pages = client.follow("deleted")
    while next(pages).num_rows == 0:
        pass
    assert client.delete("deleted") == 1
    with pytest.raises(errors.RequestNotFoundError, match=f"go on with start={len(PROMPT)}"):
        list(pages)
    wait_until(lambda: followers(deployment) == 0, "the follower is gone")


def test_a_trace_that_is_evicted_meanwhile_ends_with_an_error():
    with Deployment(memory="1").running() as deployment, Client(deployment.url) as client:
        request = Request(deployment, "evicted")
        pages = client.follow("evicted")
        next(pages)
        request.end()
        with pytest.raises(errors.TraceEvictedError):
            list(pages)


def test_a_collector_that_dies_ends_the_stream_with_an_error(fresh):
    Request(fresh, "orphan")
    with lines_of(fresh, "orphan") as lines:
        next(lines)
        fresh.kill_collector()
        *_, last = lines
    assert (last["error"]["code"], "has ended" in last["error"]["message"]) == (503, True)
    wait_until(lambda: followers(fresh) == 0, "the follower is gone")


def test_others_requests_are_unknown_where_they_are_private():
    keys = {"api_key": ["alice", "bob"], "private": "on"}
    with Deployment(**keys).running() as deployment:
        deployment.complete("", {"Authorization": "Bearer alice", "X-Request-Id": "hers"})
        path, own = "/routes/hers/stream", {"Authorization": "Bearer alice"}
        assert deployment.http.get(path).status_code == 401
        other = deployment.http.get(path, headers={"Authorization": "Bearer bob"})
        assert other.status_code == 404
        assert deployment.http.get(path, headers=own).status_code == 200


def test_the_65th_is_told_to_come_back(deployment, client):
    request = Request(deployment, "popular")
    with contextlib.ExitStack() as stack:
        http = stack.enter_context(
            httpx.Client(base_url=deployment.url, limits=httpx.Limits(max_connections=None))
        )
        for _ in range(follow.MAX_FOLLOWERS):
            answer = stack.enter_context(http.stream("GET", "/routes/popular/stream"))
            assert answer.status_code == 200
        refused = deployment.http.get("/routes/popular/stream")
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "64 clients" in refused.json()["error"]["message"]
    wait_until(lambda: followers(deployment) == 0, "who leaves makes room, rows or not")
    request.end()
    assert [*client.follow("popular")][-1].finish_reason == "stop"


def test_a_silent_request_is_said_to_run(deployment, monkeypatch):
    monkeypatch.setattr(follow, "QUIET_S", 0.1)
    request = Request(deployment, "silent")
    request.await_rows(deployment)
    with lines_of(deployment, "silent") as lines:
        assert num_rows(next(lines)) == len(PROMPT)
        quiet = {"request_id": "silent", "status": "running", "traces": []}
        assert [next(lines) for _ in range(3)] == [quiet] * 3
        request.end()
        assert [one for one in lines if one != quiet][-1]["traces"][0]["finish_reason"] == "stop"


WIDE = dataclasses.replace(SPEC, layers=list(range(24)), num_hidden_layers=24, num_experts=128,
                           top_k=8, num_blocks=2**13)  # fmt: skip
ROW_BYTES = 24 * 8 * 3 + 5
NUM_TOKENS = 20_000


@pytest.fixture(scope="module")
def wide():
    """A deployment whose rows are large, and a request that has many of them and runs."""

    def rows(start, count):
        number = np.arange(start, start + count)[:, None, None] + np.arange(24)[:, None] * 7
        ids = (number + np.arange(8) * 13) % 128
        return ids.astype(np.uint8), (ids / 1023).astype(np.float16)

    with Deployment(spec=WIDE).running() as deployment:
        deployment.engine.rows_of = rows
        Request(deployment, "wide", prompt=list(range(NUM_TOKENS))).await_rows(deployment)
        yield deployment


def test_many_rows_come_in_lines_that_are_bounded(wide):
    most = follow.LINE_BYTES // ROW_BYTES
    with lines_of(wide, "wide") as lines:
        seen = list(itertools.takewhile(lambda line: "next_start" in line, lines))
    assert max(map(num_rows, seen)) <= most
    assert min(map(num_rows, seen)) > most // 2
    assert [line["next_start"] for line in seen] == np.cumsum([*map(num_rows, seen)]).tolist()
    assert seen[-1]["next_start"] > NUM_TOKENS - most
    assert all(line["status"] == "running" and line["truncated"] for line in seen)


def test_nothing_is_made_for_a_reader_that_does_not_read_and_it_is_cut_off(
    wide, monkeypatch, caplog
):
    """What was made is what the sockets took, a line in the server's hands, and the next one."""
    monkeypatch.setattr(sharing, "SEND_TIMEOUT_S", 1.0)
    made = []
    monkeypatch.setattr(
        follow, "_line", lambda *args, line=follow._line: made.append(line(*args)) or made[-1]
    )
    address = httpx.URL(wide.url)
    with socket.create_connection((address.host, address.port)) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        reader.sendall(b"GET /routes/wide/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: followers(wide) == 1, "it follows")
        wait_until(lambda: followers(wide) == 0, "it is cut off")
        assert "cut off a client" in caplog.text
        reader.settimeout(DEADLINE_S)
        num_taken = sum(map(len, iter(lambda: reader.recv(2**16), b"")))
    whole = NUM_TOKENS // (follow.LINE_BYTES // ROW_BYTES)
    assert len(made) < whole / 2
    assert num_taken <= sum(map(len, made)) <= num_taken + 2 * max(map(len, made)) + 2**17


def test_the_collector_is_not_asked_before_the_line_is_taken(monkeypatch):
    """A server takes a message at once, and the next one when the client has taken it."""
    monkeypatch.setattr(sharing, "SEND_TIMEOUT_S", 0.05)
    asked = []

    async def lines():
        for number in range(3):
            asked.append(number)
            yield b"a line\n"

    async def main():
        followers, messages = Readers(1, "read"), iter(range(2))
        followers.enter()

        async def send(_):
            if next(messages, None) is None:  # the head and the line were taken in
                await asyncio.Event().wait()

        response = Streamed(lines(), follow.MEDIA_TYPE, on_end=followers.leave)
        scope = {"type": "http", "app": FastAPI()}
        await asyncio.wait_for(response(scope, asyncio.Event().wait, send), DEADLINE_S)
        return followers.count

    assert asyncio.run(main()) == 0
    assert asked == [0]
