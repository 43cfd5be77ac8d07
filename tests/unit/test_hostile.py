"""Whatever a server sends: one of moescope's errors, in bounded memory, after bounded reading."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json

import httpx
import orjson
import pytest
from client_fakes import INFO, make_trace
from client_fakes import server as transport
from hostile import CAP, DEEP, Stream, bounded, checked, client, mutated, streamed
from hypothesis import given
from hypothesis import strategies as st

from moescope import Client, MoescopeError, bodies, cli, formats, http
from moescope.errors import ConnectionFailedError, FormatError, ServerError

BOMB = gzip.compress(bytes(64 * CAP))


class TestBodies:
    def test_gzip_that_becomes_too_much(self):
        answer = streamed(BOMB, Content_Encoding="gzip")
        with bounded(4), pytest.raises(FormatError, match=r"more than max_bytes=1,048,576"):
            client(answer).routes("x")

    def test_gzip_that_never_becomes_anything(self):
        head, empty_block = gzip.compress(b"", 0)[:10], b"\x00\x00\x00\xff\xff" * 4096
        stream = Stream(head, *[empty_block] * 200)
        answer = httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=stream)
        with pytest.raises(FormatError, match="max_bytes"):
            client(answer).info()
        assert stream.taken < 60

    @pytest.mark.parametrize("encoding", ["gzip, gzip", "br", "zstd", "deflate", "x\x01", "☃"])
    def test_other_encodings(self, encoding):
        answer = streamed(b"x", Content_Encoding=encoding.encode())
        with pytest.raises(ConnectionFailedError, match="expected gzip or none"):
            client(answer).info()

    def test_gzip_that_is_cut_off(self):
        body = gzip.compress(json.dumps(INFO).encode())
        for end in (5, 20, len(body) - 9):
            with pytest.raises(ConnectionFailedError, match="ends within its gzip"):
                client(streamed(body[:end], Content_Encoding="gzip")).info()
        assert client(streamed(body + b"more", Content_Encoding="gzip")).info().top_k == 4

    @pytest.mark.parametrize("status", [200, 404, 500])
    def test_a_body_without_end(self, status):
        stream = Stream(b"[[],[]," * 512, endless=True)
        error = FormatError if status == 200 else ServerError
        with bounded(4), pytest.raises(error):
            client(httpx.Response(status, stream=stream)).info()
        assert stream.taken <= CAP // 3584 + 1

    @pytest.mark.parametrize("length", ["1048577", "9" * 19, "9" * 5000])
    def test_a_length_that_is_too_much_is_not_waited_for(self, length):
        stream = Stream(b"x", endless=True)
        with pytest.raises(FormatError, match="max_bytes"):
            client(httpx.Response(200, headers={"Content-Length": length}, stream=stream)).info()
        assert stream.taken == 0

    @pytest.mark.parametrize("length", ["²", "-1", "", "x", "5, 6"])
    def test_a_length_that_is_none(self, length):
        answer = streamed(json.dumps(INFO).encode(), Content_Length=length.encode())
        assert client(answer).info().top_k == 4

    def test_a_body_that_drips(self):
        clock = itertools.count(0.0, 0.9)  # seconds: a byte for each look at it
        response = httpx.Response(200, stream=Stream(), request=httpx.Request("GET", "http://moe"))
        body = bodies.Body(response, timeout_s=60.0, clock=lambda: next(clock))

        def drip():
            for _ in range(1000):
                body.add(b"x")

        with pytest.raises(ConnectionFailedError, match=r"no whole response .* 67 bytes in 60 s"):
            drip()

    def test_an_asynchronous_client_has_the_same_bounds(self):
        async def ask():
            stream = Stream(BOMB)
            answer = httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=stream)
            served = httpx.MockTransport(lambda _: answer)
            async with http.connect_async("http://moe", transport=served) as moe:
                moe.max_bytes = CAP
                await moe.get("/")

        with bounded(20), pytest.raises(FormatError, match="max_bytes"):  # it imports, too
            asyncio.run(ask())

    @pytest.mark.parametrize("location", ["/routes/x", "http://[", "//", "http://é..", "x:", "\\"])
    def test_redirects_are_not_followed(self, location):
        asked = []

        def answer(request):
            asked.append(request)
            return streamed(status=307, Location=location.encode())

        with pytest.raises(MoescopeError):
            client(answer).info()
        assert len(asked) == 1


WORDS = {
    "a list of errors": orjson.dumps({"detail": [{"loc": 5, "msg": {"a": 1}}, 3, None]}),
    "many errors": orjson.dumps({"detail": [{"loc": ["a"], "msg": "m"}] * 20_000}),
    "a number": b'{"detail": 5}',
    "deep": b'{"detail": ' + DEEP + b"}",
    "deep error": b'{"error": {"message": ' + DEEP + b"}}",
    "deep in a list": b'{"detail": [{"loc": [' + DEEP + b'], "msg": ' + DEEP + b"}]}",
    "control characters": orjson.dumps({"detail": "\x1b[2J\r\n\x00\u202e\x9b"}),
    "control characters that are no JSON": b"\x1b]0;x\x07\r\n\x9b",
    "no UTF-8": b"\xff\xfe\x80",
    "surrogates": b'{"detail": "\\ud800"}',
    "long": orjson.dumps({"error": "a" * 900_000}),
    "nothing": b"",
}


@pytest.mark.parametrize("status", [200, 404, 422, 500])
@pytest.mark.parametrize("case", WORDS)
def test_the_words_of_an_error_are_short_and_can_be_shown(case, status):
    with bounded(30), pytest.raises(MoescopeError) as raised:
        client(streamed(WORDS[case], status=status)).info()
    assert len(str(raised.value)) < 2500
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("charset", ["zip", "hex", "rot13", "undefined", "idna", "utf-16", "\0"])
def test_a_charset_of_the_servers_choice_is_not_used(charset):
    body = f"text/plain; charset={charset}".encode()
    for status in (200, 500):
        with pytest.raises(MoescopeError, match="grün"):
            client(streamed("grün".encode(), status=status, Content_Type=body)).info()


def test_json_that_becomes_too_much():
    body = b"[" + b"[]," * (CAP // 4) + b"0]"
    for whole in (body, b'{"a":' + body + b"}"):
        with bounded(4), pytest.raises(FormatError, match="bytes of memory"):
            client(streamed(whole)).info()


COUNTS = {
    "model": "demo", "phase": "all", "since_s": 5.0, "num_rows": 3, "num_experts": 3,
    "layers": [0, 4], "counts": [[1, 2, 0], [0, 0, 3]],
}  # fmt: skip
SEQUENCE = {
    "request_id": "x", "ids": ["x", "y"], "index": 0, "status": "finished", "prompt_len": 3,
    "num_tokens": 9, "finish_reason": "stop", "complete": True, "coverage": 1.0, "created_s": 1.0,
    "size_bytes": 10,
}  # fmt: skip
ENDPOINTS = {
    "info": (INFO, lambda moe: moe.info()),
    "experts": (COUNTS, lambda moe: moe.experts()),
    "recent": ({"sequences": [SEQUENCE], "next_before": 7}, lambda moe: moe.recent()),
    "delete": ({"deleted": 1}, lambda moe: moe.delete("x")),
    "pause": ({"capture": "on"}, lambda moe: moe.pause()),
    "reset": ({"since_s": 1.5}, lambda moe: moe.reset()),
}


@pytest.mark.parametrize("name", ENDPOINTS)
@checked
@given(data=st.data())
def test_values_of_endpoints(name, data):
    values, call = ENDPOINTS[name]
    body = orjson.dumps(mutated(data, values))
    with bounded(4), contextlib.suppress(MoescopeError):
        call(client(httpx.Response(200, content=body)))


def test_counts_that_are_none():
    for values in (
        {"counts": [[1, 2, -3], [0, 0, 3]]},
        {"counts": [[1, 2, 2**64 - 1], [0, 0, 3]]},
        {"layers": [0, 2**40]},
        {"num_experts": 2**40},
        {"num_rows": -1},
        {"num_rows": "3"},
    ):
        with pytest.raises(FormatError, match="not a ExpertCounts"):
            client(httpx.Response(200, json=COUNTS | values)).experts()


@pytest.mark.parametrize("next_before", [17, 18, -1, "x", 1.5, True])
def test_a_list_of_sequences_that_does_not_get_on(next_before):
    answer = {"sequences": [SEQUENCE], "next_before": next_before}
    with pytest.raises(FormatError, match="next_before below 17"):
        client(httpx.Response(200, json=answer)).recent(before=17)


def test_an_empty_page_that_is_not_the_last():
    answer = {"sequences": [], "next_before": 2**60}
    with pytest.raises(FormatError, match="a page without any"):
        list(client(httpx.Response(200, json=answer)).iter_recent())


def test_more_sequences_than_were_asked_for():
    answer = {"sequences": [SEQUENCE] * 3, "next_before": None}
    with pytest.raises(FormatError, match="2 sequences at most, got 3"):
        client(httpx.Response(200, json=answer)).recent(limit=2)


@pytest.mark.parametrize("models", [[], [{}], [{"id": {}}], [{"id": 5}], {}, "x", None, [[]]])
def test_a_list_of_models_that_is_none(models):
    response = httpx.Response(200, json={"data": models}, request=httpx.Request("GET", "http://m"))
    with pytest.raises(FormatError, match="lists no model"):
        http.first_model(response)


def test_what_a_command_prints_has_no_control_characters(capsys):
    assert cli._fail("a\x1b[2J\x9b\u202e\rb\n  c") == 1
    assert capsys.readouterr().err == "moescope: a\\x1b[2J\\x9b\\u202e\\rb\n  c\n"


def test_the_whole_way_still_works():
    served = transport({"GET /routes/r": lambda _: streamed(formats.dump_npz([make_trace()]))})
    (trace,) = Client("http://moe", transport=served, max_bytes=CAP).routes("r")
    assert trace.num_rows == 12
