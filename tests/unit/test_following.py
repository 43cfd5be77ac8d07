"""The client follows a request: pages as their lines arrive, errors, hostile servers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip

import httpx
import orjson
import pytest
from client_fakes import make_trace, same
from hostile import CAP, Stream, bounded, checked, client, mutated, streamed, use
from hypothesis import given
from hypothesis import strategies as st

import moescope
from moescope import AsyncClient, MoescopeError, RouteTrace, bodies, formats
from moescope.errors import (
    CollectorDownError,
    ConnectionFailedError,
    FormatError,
    RequestNotFoundError,
    ServerError,
)

WHOLE = make_trace(num_rows=12)


def page(start, num_rows, trace=WHOLE, **changes):
    """A line of a running request."""
    so_far = {"finish_reason": None, "complete": False, "token_ids": None} | changes
    one = dataclasses.replace(trace.page(start, num_rows), **so_far)
    return formats.dump_json("x", [one], running=True) + b"\n"


def end(start, trace=WHOLE):
    """The last line."""
    return formats.dump_json("x", [trace.page(start, trace.num_rows)]) + b"\n"


def quiet():
    return formats.dump_json("x", [], running=True) + b"\n"


LINES = [page(0, 0), page(0, 5), quiet(), page(5, 4), end(9)]


def followed(*parts, **changes):
    return [*client(streamed(*parts)).follow("x", **changes)]


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
def test_lines_may_arrive_in_any_parts(size):
    body = b"".join(LINES)
    parts = [body[first : first + size] for first in range(0, len(body), size)]
    pages = followed(*parts)
    assert [one.num_rows for one in pages] == [0, 5, 4, 3]
    assert [one.finish_reason for one in pages] == [None, None, None, "stop"]
    joined = RouteTrace.joined(pages)
    expected = formats.from_dict(orjson.loads(formats.dump_json("x", [WHOLE]))["traces"][0])
    assert same(joined, dataclasses.replace(expected, token_ids=None))


def test_a_page_is_given_as_its_line_arrives():
    stream = Stream(*LINES)
    pages = client(httpx.Response(200, stream=stream)).follow("x")
    assert stream.taken == 0
    for number, num_rows in ((1, 0), (2, 5), (4, 4)):
        assert next(pages).num_rows == num_rows
        assert stream.taken == number


def test_rows_behind_the_end_are_no_part_of_what_is_joined():
    """The engine had routed the last token before it knew that it was the last one."""
    shorter = dataclasses.replace(
        WHOLE.page(0, 10), num_tokens=11, token_ids=None,
        weights_versions=WHOLE.weights_versions[:1], weight_labels=[], tokens=None,
    )  # fmt: skip
    pages = followed(page(0, 12), end(12, shorter))
    joined = RouteTrace.joined(pages)
    assert (joined.num_rows, joined.num_tokens, joined.finish_reason) == (10, 11, "stop")


def test_what_is_asked_for():
    asked = []

    def answer(request):
        asked.append(request)
        return streamed(end(3))

    moe = client(answer)
    list(moe.follow("a/b", start=3, index=2, layers=[0, 3], weights=False))
    list(moe.follow("x", start=3))
    first, second = asked
    assert first.url.raw_path.startswith(b"/routes/a%2Fb/stream?")
    wanted = {"index": "2", "start": "3", "layers": "0,3", "weights": "false"}
    assert dict(first.url.params) == wanted
    assert dict(second.url.params) == {"index": "0", "start": "3"}
    assert first.headers["Accept-Encoding"] == "identity"


def test_the_response_is_closed_where_nobody_reads_on():
    response = streamed(*LINES)
    pages = client(response).follow("x")
    next(pages)
    assert not response.is_closed
    pages.close()
    assert response.is_closed


def test_the_asynchronous_client_does_the_same():
    async def main():
        closed = []
        for num_pages in (1, 9):
            response = streamed(*LINES)
            served = httpx.MockTransport(lambda _, response=response: response)
            async with AsyncClient("http://moe", transport=served) as moe:
                pages = moe.follow("x")
                rows = [one.num_rows async for _, one in azip(range(num_pages), pages)]
                await pages.aclose()
            closed.append((rows, response.is_closed))
        return closed

    async def azip(numbers, pages):
        for number in numbers:
            try:
                yield number, await anext(pages)
            except StopAsyncIteration:
                return

    assert asyncio.run(main()) == [([0], True), ([0, 5, 4, 3], True)]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, RequestNotFoundError), (503, CollectorDownError), (500, ServerError)],
)
def test_an_error_is_raised_before_the_first_line_or_after_others(status, kind):
    body = {"error": {"message": "no\x1b more", "type": "x", "param": None, "code": status}}
    for parts, http_status in (([orjson.dumps(body)], status),
                               ([page(0, 5), orjson.dumps(body) + b"\n"], 200)):  # fmt: skip
        with pytest.raises(kind, match=r"no\\x1b more") as raised:
            list(client(streamed(*parts, status=http_status)).follow("x"))
        assert raised.value.status_code == status


def test_beginning_is_tried_again_and_going_on_is_not(monkeypatch):
    monkeypatch.setattr(moescope._client.time, "sleep", lambda _: None)
    answers = [streamed(b"{}", status=503), streamed(page(0, 5))]
    served = httpx.MockTransport(lambda _: answers.pop(0))
    pages = moescope.Client("http://moe", transport=served).follow("x")
    assert next(pages).num_rows == 5
    with pytest.raises(ConnectionFailedError, match="go on with start=5") as raised:
        next(pages)
    assert raised.value.is_transient


BAD = {
    "no JSON": (FormatError, [b"x\n"]),
    "no object": (FormatError, [b"[]\n"]),
    "no traces": (FormatError, [b"{}\n"]),
    "traces that are none": (FormatError, [b'{"traces": [3]}\n']),
    "an error that is none": (ServerError, [b'{"error": [[1]]}\n']),
    "a status that is none": (ServerError, [b'{"error": {"code": "x", "message": 5}}\n']),
    "rows that came already": (FormatError, [page(0, 5), page(4, 4)]),
    "rows that are left out": (FormatError, [page(0, 5), page(6, 4)]),
    "another trace": (FormatError, [page(0, 5), page(5, 4, make_trace(request_id="other"))]),
    "another beginning": (FormatError, [page(3, 5)]),
    "a line that is cut off": (ConnectionFailedError, [page(0, 5)[:-9]]),
    "nothing": (ConnectionFailedError, []),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_stream_of_a_trace(case):
    kind, parts = BAD[case]
    with pytest.raises(kind) as raised:
        followed(*parts)
    assert str(raised.value).isprintable()


def test_a_line_without_end():
    stream = Stream(b"[[],[]," * 512, endless=True)
    with bounded(4), pytest.raises(FormatError, match="max_bytes"):
        list(client(httpx.Response(200, stream=stream)).follow("x"))
    assert stream.taken <= CAP // 3584 + 1


def test_lines_without_end_are_held_one_at_a_time():
    pages = client(httpx.Response(200, stream=Stream(page(0, 0), endless=True))).follow("x")
    with bounded(1):
        for _ in range(2000):
            next(pages)


def test_gzip_that_was_not_asked_for():
    for headers, body in (({"Content_Encoding": b"gzip"}, gzip.compress(bytes(64 * CAP))),
                          ({"Content_Encoding": b"br"}, b"x\n")):  # fmt: skip
        with bounded(4), pytest.raises(MoescopeError):
            list(client(streamed(body, **headers)).follow("x"))


def test_a_line_that_drips():
    response, now_s = httpx.Response(200, request=httpx.Request("GET", "http://moe")), 0.0
    lines = bodies.Lines(response, CAP, 60.0, clock=lambda: now_s)
    for number in range(3):
        now_s = number * 50.0
        assert len([*lines.add(b"x\n")]) == 1
    now_s += 59.0
    assert [*lines.add(b"x")] == []
    now_s += 2.0
    with pytest.raises(ConnectionFailedError, match="no whole response"):
        list(lines.add(b"x"))


@checked
@given(st.data())
def test_lines_that_are_not_what_they_were(data):
    bad = orjson.dumps(mutated(data, orjson.loads(page(0, 5)))) + b"\n"
    with bounded(8), contextlib.suppress(MoescopeError):
        use(followed(bad, page(5, 4), end(9)))
