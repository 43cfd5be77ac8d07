"""Responses that are shared and bounded: clients that leave at any moment, errors, slow readers."""

from __future__ import annotations

import asyncio
import threading

import pytest
from fastapi import HTTPException
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from moescope_service.api import sharing
from moescope_service.api.sharing import Budget, MadeBody, SentInPieces, SharedResponses
from tests.examples import made_up

SIZE = 100
"""What making a response takes, in bytes; its body takes half of it."""


class Client:
    """One request, whose client may leave."""

    def __init__(self):
        self.gone = asyncio.Event()
        self.request = Request({"type": "http"}, self._receive)

    async def _receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}


class Server:
    """Responses whose collector replies, and whose threads go on, when they are told to."""

    def __init__(self, max_bytes=10 * SIZE):
        self.responses = SharedResponses(Budget(max_bytes))
        self.asked = 0
        self.made = 0
        self.reply = asyncio.Event()
        self.go_on = threading.Event()
        self.error = None
        self.reply.set()
        self.go_on.set()

    async def ask(self):
        self.asked += 1
        number = self.asked
        await self.reply.wait()
        return number

    def make(self, reply):
        self.go_on.wait(10)
        self.made += 1
        if self.error is not None:
            raise self.error
        return MadeBody(b"x" * (SIZE // 2), "text/plain", {"reply": str(reply)})

    def get(self, client, key="a"):
        return asyncio.create_task(
            self.responses.respond(
                client.request, key, max_bytes=SIZE, ask=self.ask, make=self.make
            )
        )

    async def settled(self):
        for _ in range(20):
            await asyncio.sleep(0)

    async def ended(self):
        """Wait until nothing is made any more."""
        tasks = [one.task for making in self.responses._making.values() for one in making]
        if tasks:
            await asyncio.wait(tasks, timeout=10)
        await self.settled()
        assert self.responses.num_making == 0

    @property
    def used_bytes(self):
        return self.responses.budget.used_bytes


async def read(response):
    """Let a client take a response."""
    sent = []

    async def send(message):
        sent.append(message)

    await response({"type": "http"}, None, send)
    return sent


def test_clients_that_ask_at_the_same_time_share_a_response():
    async def main():
        server = Server()
        responses = await asyncio.gather(*(server.get(Client()) for _ in range(5)))
        assert (server.asked, server.made, server.used_bytes) == (1, 1, SIZE // 2)
        for number, response in enumerate(responses):
            assert server.used_bytes == SIZE // 2, number
            await read(response)
        assert (server.used_bytes, server.responses.num_making) == (0, 0)

    asyncio.run(main())


def test_who_comes_after_the_collector_was_asked_has_a_newer_reply():
    async def main():
        server = Server()
        server.reply.clear()
        first = server.get(Client())
        await server.settled()
        later = [server.get(Client()) for _ in range(3)]
        await server.settled()
        assert server.asked == 1
        server.reply.set()
        first, *later = await asyncio.gather(first, *later)
        assert first.headers["reply"] == "1"
        assert [one.headers["reply"] for one in later] == ["2"] * 3
        for response in (first, *later):
            await read(response)
        assert server.used_bytes == 0

    asyncio.run(main())


def test_who_leaves_while_it_queues_leaves_nothing_behind():
    async def main():
        server = Server(max_bytes=SIZE)
        server.reply.clear()
        first = server.get(Client(), "first")
        await server.settled()
        leaving = Client()
        queued = server.get(leaving)
        await server.settled()
        assert server.responses.budget.num_queued == 1
        leaving.gone.set()
        with pytest.raises(ClientDisconnect):
            await queued
        assert server.responses.budget.num_queued == 0
        again = server.get(Client())
        server.reply.set()
        await read(await first)
        await read(await again)
        assert (server.used_bytes, server.responses.num_making) == (0, 0)

    asyncio.run(main())


def test_who_was_not_served_in_time_can_ask_again(monkeypatch):
    monkeypatch.setattr(sharing, "QUEUE_TIMEOUT_S", 0.01)

    async def main():
        server = Server(max_bytes=SIZE)
        server.reply.clear()
        first = server.get(Client(), "first")
        await server.settled()
        for waiting in [server.get(Client()), server.get(Client())]:
            with pytest.raises(HTTPException) as caught:
                await waiting
            assert (caught.value.status_code, caught.value.headers) == (503, {"Retry-After": "1"})
        server.reply.set()
        await read(await first)
        await read(await server.get(Client()))
        assert (server.used_bytes, server.responses.num_making) == (0, 0)

    asyncio.run(main())


def test_too_many_are_not_queued(monkeypatch):
    monkeypatch.setattr(sharing, "MAX_QUEUED", 2)

    async def main():
        server = Server(max_bytes=SIZE)
        server.reply.clear()
        waiting = [server.get(Client(), key) for key in range(4)]
        with pytest.raises(HTTPException, match="too many"):
            await waiting.pop()
        server.reply.set()
        for one in waiting:
            await read(await one)
        assert server.used_bytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("stage", ["reply", "go_on"])
def test_bytes_are_in_use_until_collector_and_thread_are_done(stage):
    """A client that leaves frees nothing that is still in memory, nor does one that comes again."""

    async def main():
        server = Server()
        getattr(server, stage).clear()
        for _ in range(3):
            client = Client()
            task = server.get(client)
            await asyncio.sleep(0.01)
            client.gone.set()
            with pytest.raises(ClientDisconnect):
                await task
        await server.settled()
        assert (server.asked, server.used_bytes) == (1, SIZE)
        getattr(server, stage).set()
        await server.ended()
        assert server.used_bytes == 0
        assert server.made == (1 if stage == "go_on" else 0)  # without clients nothing is encoded
        await read(await server.get(Client()))
        assert server.used_bytes == 0

    asyncio.run(main())


def test_an_error_is_that_of_all_who_share_it_and_of_no_later_one():
    async def main():
        server = Server()
        server.error = HTTPException(404, "no such request")
        for task in [server.get(Client()) for _ in range(3)]:
            with pytest.raises(HTTPException, match="no such request"):
                await task
        assert (server.asked, server.used_bytes, server.responses.num_making) == (1, 0, 0)
        server.error = None
        await read(await server.get(Client()))

    asyncio.run(main())


def test_a_body_that_is_larger_than_was_thought_counts_as_it_is():
    async def main():
        server = Server()
        server.make = lambda _: MadeBody(b"x" * 3 * SIZE, "text/plain")
        response = await server.get(Client())
        assert server.used_bytes == 3 * SIZE
        await read(response)
        assert server.used_bytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("takes", [0, 1, 2])
def test_a_client_that_takes_nothing_is_cut_off(monkeypatch, caplog, takes):
    """Neither the headers, behind a response before it, nor a piece, nor the end."""
    monkeypatch.setattr(sharing, "SEND_TIMEOUT_S", 0.02)
    ended = []

    async def main():
        taken = 0

        async def send(message):
            nonlocal taken
            if taken == takes:
                await asyncio.Event().wait()
            taken += 1

        response = SentInPieces(MadeBody(b"x" * 1000, "text/plain"), lambda: ended.append(True))
        await asyncio.wait_for(response({"type": "http"}, None, send), 10)

    asyncio.run(main())
    assert ended == [True]
    assert "cut off a client" in caplog.text


def test_a_body_is_sent_as_it_is():
    async def main(content):
        sent = await read(SentInPieces(MadeBody(content, "text/plain"), lambda: None))
        assert b"".join(message.get("body", b"") for message in sent) == content
        assert [message.get("more_body") for message in sent[1:-1]] == [True] * (len(sent) - 2)
        assert sent[-1]["more_body"] is False

    for size in (0, 1, sharing._PIECE_BYTES, 2 * sharing._PIECE_BYTES + 7):
        asyncio.run(main(b"x" * size))


class Actions:
    """What clients, the collector and threads may do, in any order."""

    def __init__(self, server):
        self.server = server
        self.clients, self.tasks = [], []
        self._is_read = set()

    def get(self, number):
        self.clients.append(Client())
        self.tasks.append(self.server.get(self.clients[-1], key=number % 3))

    def leave(self, number):
        if number < len(self.clients):
            self.clients[number].gone.set()

    def reply(self, number):
        self.server.reply.set()

    def hold(self, number):
        self.server.reply.clear()

    def error(self, number):
        self.server.error = HTTPException(409, "no") if number % 2 else None

    async def read(self, number):
        if number < len(self.tasks) and self.tasks[number].done() and number not in self._is_read:
            self._is_read.add(number)
            error = self.tasks[number].exception()
            assert isinstance(error, (ClientDisconnect, HTTPException, type(None)))
            if error is None:
                await read(self.tasks[number].result())

    async def turn(self, number):
        await asyncio.sleep(0)

    async def thread(self, number):
        await asyncio.to_thread(lambda: None)


steps = st.lists(
    st.tuples(
        st.sampled_from(["get", "leave", "reply", "hold", "error", "read", "turn", "thread"]),
        st.integers(0, 5),
    ),
    max_size=40,
)


@made_up(100)
@given(steps, st.sampled_from([SIZE, 2 * SIZE, 10 * SIZE]))
def test_whatever_clients_do_no_byte_and_no_key_is_left(chosen, max_bytes):
    async def main():
        server = Server(max_bytes)
        actions = Actions(server)
        for action, number in chosen:
            done = getattr(actions, action)(number)
            if done is not None:
                await done
            assert server.used_bytes <= max_bytes
        server.reply.set()
        for number, task in enumerate(actions.tasks):
            _, pending = await asyncio.wait((task,), timeout=20)
            assert not pending
            await actions.read(number)
        await server.ended()
        assert (server.used_bytes, server.responses.budget.num_queued) == (0, 0)

    asyncio.run(main())
