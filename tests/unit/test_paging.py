"""Pages of traces: cut by the server, joined by the client, whole in between."""

from __future__ import annotations

import dataclasses

import httpx
import orjson
import pytest
from client_fakes import make_trace, same
from client_fakes import server as transport

from moescope import Client, FormatError, RouteTrace, TraceEvictedError, batch, formats
from moescope.errors import MoescopeError

LIMIT = 5


def client(routes):
    return Client("http://moe", transport=transport(routes))


def cut(traces, start):
    """Return the page of traces that begins at a row, and where the next one does."""
    more = any(trace.num_rows > start + LIMIT for trace in traces)
    return [trace.page(start, LIMIT) for trace in traces], start + LIMIT if more else None


def server(traces, asked):
    def answer(request):
        start = int(request.url.params.get("start", 0))
        asked.append(start)
        pages, next_start = cut(traces, start)
        return httpx.Response(200, content=formats.dump_npz(pages, next_start=next_start))

    return client({"GET /routes/r": answer})


@pytest.mark.parametrize("rows", [(0,), (4,), (5,), (6,), (12,), (12, 3, 5), (0, 11)])
def test_a_request_is_whole_again(rows):
    traces = [make_trace(n, index=n, num_rows=num) for n, num in enumerate(rows)]
    asked = []
    found = server(traces, asked).routes("r")
    assert all(same(a, b) for a, b in zip(traces, found, strict=True))
    assert asked == list(range(0, max(*rows, 1), LIMIT))


def test_traces_that_only_their_place_tells_apart_are_not_mixed_up():
    """Those of beam search: one a beam and token, all of them of choice 0 of one request."""
    traces = [make_trace(n, num_rows=num) for n, num in enumerate((12, 7, 12))]
    found = server(traces, []).routes("r")
    assert all(same(a, b) for a, b in zip(traces, found, strict=True))


def test_rows_that_are_known_are_not_fetched():
    asked = []
    (found,) = server([make_trace(num_rows=12)], asked).routes("r", start=8)
    assert (asked, found.start, found.num_rows, len(found.token_ids)) == ([8], 8, 4, 5)


def test_pages_in_every_format_say_where_they_are():
    trace = make_trace(num_rows=12)
    page = trace.page(5, 4)
    values = orjson.loads(formats.dump_json("r", [page], next_start=9))
    assert (values["truncated"], values["next_start"], values["traces"][0]["start"]) == (True, 9, 5)
    assert same(formats.from_dict(values["traces"][0]), dataclasses.replace(
        page, topk_weights=page.topk_weights.astype("float32")))  # fmt: skip
    assert same(formats.load_npz(formats.dump_npz([page], next_start=9))[0], page)
    lines = [orjson.loads(line) for line in formats.route_lines(page)]
    assert sorted({line["token_idx"] for line in lines}) == [5, 6, 7, 8]


def test_a_trace_that_goes_meanwhile_is_an_error():
    trace = make_trace(num_rows=12)
    other = dataclasses.replace(trace, created_s=2.0)

    def answer(request):
        start = int(request.url.params.get("start", 0))
        pages, next_start = cut([other if start else trace], start)
        return httpx.Response(200, content=formats.dump_npz(pages, next_start=next_start))

    with pytest.raises(TraceEvictedError, match="made room for newer ones while"):
        client({"GET /routes/r": answer}).routes("r")


def test_a_server_that_does_not_get_on_is_an_error():
    pages = formats.dump_npz([make_trace(num_rows=12).page(0, 5)], next_start=5)
    moe = client({"GET /routes/r": lambda _: httpx.Response(200, content=pages)})
    with pytest.raises(FormatError, match="expected a page behind row 5, got 5"):
        moe.routes("r")


@pytest.mark.parametrize("number", [1, 1024, 1025, 2500])
def test_any_number_of_requests(number):
    asked = []

    def answer(request):
        ids = orjson.loads(request.content)["request_ids"]
        asked.append(len(ids))
        return httpx.Response(200, content=batch.dump_npz(batch.RoutesBatch(
            status=dict.fromkeys(ids, "unknown"), traces={})))  # fmt: skip

    ids = [f"r{i}" for i in range(number)]
    found = client({"POST /routes/batch": answer}).routes_batch(ids)
    assert list(found.failed) == ids
    assert asked == [min(1024, number - first) for first in range(0, number, 1024)]


@pytest.mark.parametrize("char", ["a", "é", "\U0001f600", '"', "\x01"])
@pytest.mark.parametrize("start", [0, 7])
def test_a_body_takes_no_more_than_the_server_reads(char, start):
    bodies = []

    def answer(request):
        bodies.append(len(request.content))
        ids = orjson.loads(request.content)["request_ids"]
        return httpx.Response(200, content=batch.dump_npz(batch.RoutesBatch(
            status=dict.fromkeys(ids, "unknown"), traces={})))  # fmt: skip

    ids = [f"{i:04}".ljust(512, char) for i in range(1024)]
    found = client({"POST /routes/batch": answer}).routes_batch(ids, start=start, layers="0," * 500)
    assert list(found.failed) == ids
    assert max(bodies) <= 2**20
    assert len(bodies) <= sum(bodies) / 2**18


def test_an_id_that_is_larger_than_a_body_is_asked_for_alone():
    asked = []

    def answer(request):
        ids = orjson.loads(request.content)["request_ids"]
        asked.append(len(ids))
        return httpx.Response(200, content=batch.dump_npz(batch.RoutesBatch(
            status=dict.fromkeys(ids, "unknown"), traces={})))  # fmt: skip

    client({"POST /routes/batch": answer}).routes_batch(["a", "b" * 2**20, "c"])
    assert asked == [1, 1, 1]


def test_a_batch_is_whole_again():
    traces = {
        name: [make_trace(n, num_rows=7 * n, request_id=name)] for n, name in enumerate("abc")
    }

    def answer(request):
        body = orjson.loads(request.content)
        ids, starts = body["request_ids"], body.get("start", {})
        pages = {one: cut(traces[one], starts.get(one, 0)) for one in ids}
        first = ids[0]  # there is room for one request
        return httpx.Response(200, content=batch.dump_npz(batch.RoutesBatch(
            status=dict.fromkeys(ids, "finished"),
            traces={one: pages[one][0] if one == first else [] for one in ids},
            next_start={one: start for one in ids if (start := pages[one][1]
                        if one == first else starts.get(one, 0)) is not None},
        )))  # fmt: skip

    found = client({"POST /routes/batch": answer}).routes_batch("abc")
    assert found.next_start == {}
    for name, whole in traces.items():
        assert same(found.traces[name][0], whole[0])


def test_a_batch_that_does_not_get_on_is_an_error():
    page = batch.RoutesBatch(status={"a": "finished"}, traces={}, next_start={"a": 0})
    moe = client(
        {"POST /routes/batch": lambda _: httpx.Response(200, content=batch.dump_npz(page))}
    )
    with pytest.raises(MoescopeError, match="sends no row"):
        moe.routes_batch(["a"])


class TestJoined:
    def test_gaps_and_other_traces_are_refused(self):
        trace = make_trace(num_rows=12)
        with pytest.raises(ValueError, match=r"from row 5 on, got .* from row 6"):
            RouteTrace.joined([trace.page(0, 5), trace.page(6, 5)])
        with pytest.raises(ValueError, match="expected a page of"):
            RouteTrace.joined([trace.page(0, 5), make_trace(request_id="other").page(5, 5)])

    def test_a_page_knows_its_tokens(self):
        trace = make_trace(num_rows=12)
        with pytest.raises(ValueError, match=r"token_ids must be \[5\]"):
            dataclasses.replace(trace.page(0, 5), token_ids=trace.token_ids)
