"""The text of tokens in a trace, through every format, to the client and into a run directory."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json

import httpx
import numpy as np
import orjson
import pyarrow as pa
import pytest
from client_fakes import TEXTS, make_trace, same, server
from hostile import CAP, arrays_of, bounded, npz
from moe_server import serving
from pyarrow import parquet

from moescope import AsyncClient, Client, FormatError, RouteTrace, arrow, batch, formats, routes_log
from moescope.cli import main

TRACE = make_trace(tokens=True)


def json_of(trace):
    return orjson.loads(formats.dump_json("r", [trace]))["traces"][0]


def from_json(trace):
    return formats.from_dict(json_of(trace))


def from_npz(trace):
    return formats.load_npz(formats.dump_npz([trace]))[0]


def from_arrow(trace):
    return arrow.from_table(pa.ipc.open_stream(arrow.dump_arrow([trace])).read_all())[0]


def from_parquet(trace):
    return arrow.from_table(parquet.read_table(io.BytesIO(arrow.dump_parquet([trace]))))[0]


class TestATrace:
    def test_has_the_tokens_of_its_page(self):
        assert TRACE.page(2, 3).tokens == TRACE.tokens[2:5]
        assert TRACE.page(10, 9).tokens == TRACE.tokens[10:]
        assert TRACE.select(layers=[1], weights=False).tokens == TRACE.tokens

    def test_is_joined_of_pages(self):
        pages = [TRACE.page(start, 5) for start in (0, 5, 10)]
        assert same(RouteTrace.joined(pages), TRACE)
        pages[1] = dataclasses.replace(pages[1], tokens=None)
        assert RouteTrace.joined(pages).tokens is None

    def test_counts_their_characters(self):
        without = dataclasses.replace(TRACE, tokens=None)
        assert TRACE.size_bytes - without.size_bytes == sum(map(len, TRACE.tokens))

    @pytest.mark.parametrize("tokens", [[], TRACE.tokens[:-1], [*TRACE.tokens, ""]])
    def test_has_one_for_each_id(self, tokens):
        with pytest.raises(ValueError, match=r"tokens must be \[13\]"):
            dataclasses.replace(TRACE, tokens=tokens)

    def test_has_none_without_ids(self):
        with pytest.raises(ValueError, match="beside token_ids"):
            dataclasses.replace(TRACE, token_ids=None)


@pytest.mark.parametrize("through", [from_json, from_npz, from_arrow, from_parquet])
@pytest.mark.parametrize("start", [0, 3])
def test_a_format_gives_them_back(through, start):
    page = TRACE.page(start, 4)
    assert through(page).tokens == page.tokens
    assert through(TRACE.page(start, 99)).tokens == TRACE.tokens[start:]
    assert through(make_trace()).tokens is None


def test_npz_and_tables_hold_traces_with_and_without():
    traces = [make_trace(), make_trace(1, tokens=True), make_trace(2, token_ids=False)]
    for found in (
        formats.load_npz(formats.dump_npz(traces)),
        arrow.from_table(arrow.to_table(traces)),
    ):
        assert [one.tokens for one in found] == [None, traces[1].tokens, None]


def test_the_column_is_beside_the_ids_and_has_the_last_token_too():
    table = arrow.to_table([TRACE])
    names = table.column_names
    assert names.index("token") == names.index("token_id") + 1
    assert table["token"].type == pa.dictionary(pa.int32(), pa.string())
    assert table["token"].to_pylist() == TRACE.tokens
    assert len(table["token"].chunk(0).dictionary) == len(TEXTS)


def test_every_route_line_has_its_token():
    page = TRACE.page(5, 4)
    lines = [orjson.loads(line) for line in formats.route_lines(page)]
    assert [line["token"] for line in lines] == [one for one in page.tokens for _ in page.layers]


def test_where_they_are_not_asked_for_nothing_says_so():
    trace = make_trace()
    assert "tokens" not in json_of(trace)
    assert "tokens" not in formats.arrays_of([trace])
    assert "token" not in arrow.to_table([trace]).column_names
    assert all("token" not in orjson.loads(line) for line in formats.route_lines(trace))


def test_a_batch_has_them_in_both_formats():
    whole = batch.RoutesBatch(status={"a": "finished"}, traces={"a": [TRACE]})
    assert batch.load_npz(batch.dump_npz(whole)).traces["a"][0].tokens == TRACE.tokens
    (result,) = json.loads(batch.dump_json(whole))["results"]
    assert result["traces"][0]["tokens"] == TRACE.tokens


BAD = [[], ["a"] * 12, ["a"] * 14, ["a"] * 12 + [7], ["a"] * 12 + [None], "a" * 13, 5, {"a": 1}]


class TestHostile:
    @pytest.mark.parametrize("tokens", BAD, ids=str)
    def test_json(self, tokens):
        with pytest.raises(FormatError, match=r"not a trace in moescope's JSON: .*(tokens|len)"):
            formats.from_dict({**json_of(TRACE), "tokens": tokens})

    @pytest.mark.parametrize("tokens", [*([bad] for bad in BAD), [], [None, None], {}, 7], ids=str)
    def test_npz(self, tokens):
        arrays = arrays_of(TRACE, tokens=np.frombuffer(orjson.dumps(tokens), np.uint8))
        with pytest.raises(FormatError, match=r"not an \.npz of traces"):
            formats.load_npz(npz(arrays))

    def test_more_than_fits(self):
        lists = np.frombuffer(b"[" + b"[],".join([b""] * 100_000) + b"[]]", np.uint8)
        with bounded(4), pytest.raises(FormatError, match="bytes of memory"):
            formats.load_npz(npz(arrays_of(TRACE, tokens=lists)), CAP)

    @pytest.mark.parametrize("column", [["a"] * 12 + [None], [*range(12), None], [[]] * 13])
    def test_a_table(self, column):
        table = arrow.to_table([TRACE])
        place = table.column_names.index("token")
        with pytest.raises(FormatError, match="not a table of traces"):
            arrow.from_table(table.set_column(place, "token", pa.array(column)))


class TestAClient:
    def test_asks_for_them_and_has_them(self):
        asked = []

        def get(request):
            asked.append(dict(request.url.params))
            return httpx.Response(200, content=formats.dump_npz([TRACE]))

        def post(request):
            asked.append(orjson.loads(request.content))
            whole = batch.RoutesBatch(status={"r": "finished"}, traces={"r": [TRACE]})
            return httpx.Response(200, content=batch.dump_npz(whole))

        transport = server({"GET /routes/r": get, "POST /routes/batch": post})

        async def by_asyncio():
            async with AsyncClient("http://moe", transport=transport) as client:
                (trace,) = await client.routes("r", tokens=True)
                many = await client.routes_batch(["r"], tokens=True)
                return [trace, *many.traces["r"]]

        client = Client("http://moe", transport=transport)
        found = [
            *client.routes("r", tokens=True),
            *client.routes_batch(["r"], tokens=True).traces["r"],
            *asyncio.run(by_asyncio()),
        ]
        assert all(same(trace, TRACE) for trace in found)
        one = {"format": "npz", "tokens": "true"}
        many = {"request_ids": ["r"], "format": "npz", "tokens": True}
        assert asked == [one, many, one, many]

    def test_refuses_pages_with_and_without(self):
        def answer(request):
            start = int(request.url.params.get("start", 0))
            page = TRACE.page(start, 6)
            page = page if start else dataclasses.replace(page, tokens=None)
            more = None if start else 6
            return httpx.Response(200, content=formats.dump_npz([page], next_start=more))

        client = Client("http://moe", transport=server({"GET /routes/r": answer}))
        with pytest.raises(FormatError, match="has another form"):
            client.routes("r", tokens=True)


class TestARunDirectory:
    @pytest.fixture
    def moe(self):
        with serving() as one:
            yield one

    def run(self, moe, run_dir, *more):
        """Replay, and fetch the routes again; returns the exit status of both."""
        prompts = run_dir.parent / "source.txt"
        prompts.write_text("a\nb")
        where = ("--base-url", moe.url, *more)
        replayed = status("replay", "--run-dir", run_dir, "--prompts", prompts, *where)
        (run_dir / "moe_routes.jsonl").unlink(missing_ok=True)
        return replayed, status("routes", run_dir, *where)

    def lines(self, run_dir):
        _, *lines = (run_dir / "moe_routes.jsonl").read_bytes().splitlines()
        return [orjson.loads(line) for line in lines]

    def test_has_them_in_its_log(self, moe, tmp_path):
        assert self.run(moe, tmp_path / "run", "--tokens") == (0, 0)
        assert moe.texts == ["true"] * 4
        assert {line["token"] for line in self.lines(tmp_path / "run")} == set(TEXTS)
        assert routes_log.read(tmp_path / "run" / "moe_routes.jsonl").rows == 24

    def test_has_none_by_default(self, moe, tmp_path):
        assert self.run(moe, tmp_path / "run") == (0, 0)
        assert moe.texts == [None] * 4
        assert not any("token" in line for line in self.lines(tmp_path / "run"))

    def test_of_a_server_that_keeps_ids_out_is_refused(self, moe, tmp_path, capsys):
        moe.info["token_ids"] = False
        assert self.run(moe, tmp_path / "run", "--tokens") == (1, 1)
        assert "--routes-token-ids off" in capsys.readouterr().err
        assert (moe.asked, moe.texts) == ([], [])


def status(*argv):
    """The exit status of a command line."""
    try:
        return main([*map(str, argv)])
    except SystemExit as error:
        return error.code or 0
