"""Pages that lead nowhere, and completions of servers that need not be moescope's."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools

import httpx
import numpy as np
import orjson
import pytest
from client_fakes import completion, make_trace
from hostile import CAP, Stream, arrays_of, bounded, checked, client, mutated, npz
from hypothesis import given
from hypothesis import strategies as st

from moescope import MoescopeError, batch, formats, http, replay
from moescope.bench.connections import Connections, HTTPStatusError, Target
from moescope.bench.stream import Event, EventParser, MalformedStreamError, StreamedResponse
from moescope.errors import FormatError, TraceEvictedError

BOMB = gzip.compress(bytes(64 * CAP))


class TestPages:
    def serve(self, page_of, **kwargs):
        """A client of a server whose n-th page is that; and how many were asked for."""
        numbers = itertools.count()
        asked = []

        def answer(_):
            asked.append(next(numbers))
            assert len(asked) < 50, "it asks without end"
            pages, next_start = page_of(asked[-1])
            return httpx.Response(200, content=formats.dump_npz(pages, next_start=next_start))

        return client(answer, **kwargs), asked

    trace = make_trace(num_rows=12)

    @pytest.mark.parametrize(
        "page_of",
        [
            lambda n: ([TestPages.trace.page(0, 5)], 5 + n),  # the same page, ever further on
            lambda n: ([TestPages.trace.page(0, 5)], 5),
            lambda n: ([TestPages.trace.page(0, 5)], 5 - n),
            lambda n: ([TestPages.trace.page(0, 5)], -1),
            lambda n: ([TestPages.trace.page(5 * n, 0)], 5 * n + 5),  # without rows
            lambda n: ([TestPages.trace.page(0, 5)] if n == 0 else [], 5 + 5 * n),
            lambda n: ([make_trace(num_rows=20 + n).page(5 * n, 5)], 5 * n + 5),  # it grows
            lambda n: ([make_trace(num_rows=12, weights=n == 0).page(5 * n, 5)], 5 * n + 5),
            lambda n: ([make_trace(num_rows=12, top_k=4 - n).page(5 * n, 5)], 5 * n + 5),
        ],
    )
    def test_pages_that_lead_nowhere(self, page_of):
        moe, asked = self.serve(page_of)
        with pytest.raises(MoescopeError):
            moe.routes("r")
        assert len(asked) <= 3

    def test_a_whole_trace_needs_no_further_page(self):
        moe, asked = self.serve(lambda n: ([self.trace], 12 + n))
        assert moe.routes("r")[0].num_rows == 12
        assert len(asked) == 1

    def test_other_traces_of_an_old_id_are_not_kept(self):
        other = make_trace(request_id="other", num_rows=12)
        moe, asked = self.serve(
            lambda n: ([(other if n else self.trace).page(5 * n, 5)], 5 * n + 5)
        )
        with pytest.raises(TraceEvictedError):
            moe.routes("r")
        assert len(asked) == 2

    @pytest.mark.parametrize(
        "next_start", [np.array([5]), np.array("x"), np.array(5.5), np.array([]), np.array(True)]
    )
    def test_a_next_start_that_is_none(self, next_start):
        answer = npz(arrays_of(self.trace.page(0, 5), next_start=next_start))
        with pytest.raises(FormatError, match="next_start"):
            client(httpx.Response(200, content=answer)).routes("r")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"status": {"b": "finished"}}, "says nothing of 'a'"),
            ({"next_start": {"a": 0}}, "sends no row"),
            ({"next_start": {"a": 5}}, "sends no row"),
            ({"next_start": {"a": -5}}, "expected rows of 'a' from"),
            (
                {"status": dict.fromkeys("az", "running"), "next_start": {"z": 5}},
                "expected rows of 'z' from",
            ),
        ],
    )
    def test_batches_that_lead_nowhere(self, changes, match):
        asked = []

        def answer(request):
            asked.append(request)
            values = {"status": {"a": "finished", "b": "finished"}, "traces": {}, **changes}
            return httpx.Response(200, content=batch.dump_npz(batch.RoutesBatch(**values)))

        with pytest.raises(FormatError, match=match):
            client(answer).routes_batch(["a", "b"] if "next_start" not in changes else ["a"])
        assert len(asked) <= 2

    @pytest.mark.parametrize("number", [-1, 2, 2**40, True, 0.5, "0", None, [0]])
    def test_numbers_of_traces(self, number):
        requests = [{"request_id": "a", "status": "finished", "traces": [number]}]
        members = arrays_of(requests=np.frombuffer(orjson.dumps(requests), np.uint8))
        with pytest.raises(FormatError, match=r"not an \.npz of requests"):
            batch.load_npz(npz(members))


class TestCompletions:
    """Servers that are replayed against and measured need not be moescope's."""

    @checked
    @given(data=st.data())
    def test_replay(self, data):
        body = orjson.dumps(mutated(data, completion("hi")))

        async def go():
            served = httpx.MockTransport(lambda _: httpx.Response(200, content=body))
            async with http.connect_async("http://moe", transport=served) as moe:
                return await replay.replay(["hi"], moe, replay.ReplayOptions(model="m"))

        (response,) = asyncio.run(go())
        orjson.dumps(response)
        assert response.error is None or response.error.isprintable()
        assert min(response.prompt_tokens, response.completion_tokens) >= 0

    @checked
    @given(data=st.data())
    def test_chunks(self, data):
        values = mutated(data, {
            "choices": [{"index": 0, "text": "a", "finish_reason": "stop", "token_ids": [1]}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 4},
        })  # fmt: skip
        response = StreamedResponse()
        with contextlib.suppress(MalformedStreamError):
            response.take(Event(orjson.dumps(values)), 1.0)
        assert isinstance("".join(response.text), str)
        assert (response.prompt_tokens or 0) + (response.completion_tokens or 0) >= 0
        orjson.dumps([response.token_ids, response.finish_reason])

    @pytest.mark.parametrize("part", [b"data: " + bytes(2**14), b"data: x\n" * 2**9, b": \n" * 9])
    def test_a_stream_without_an_event(self, part):
        events = EventParser(2**18)

        def feed():
            for _ in range(2**18 // len(part) + 1):
                assert events.feed(part) == []

        with bounded(8), pytest.raises(MalformedStreamError, match="without an event"):
            feed()

    def test_an_error_of_the_server_under_test(self):
        stream = Stream(BOMB, endless=True)
        answer = httpx.Response(500, headers={"Content-Encoding": "gzip"}, stream=stream)

        async def go():
            connections = Connections(Target(base_url="http://moe"), "/v1/completions")
            connections._idle.append(httpx.MockTransport(lambda _: answer))
            async with connections.stream(b"{}"):
                pass

        with bounded(20), pytest.raises(HTTPStatusError, match="HTTP 500"):
            asyncio.run(go())
        assert stream.taken == 1
