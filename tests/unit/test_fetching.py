"""Routes are fetched several at a time, into a log that has the order of the prompts."""

import asyncio
import os
import signal

import pytest
from client_fakes import INFO, lines, make_trace

from moescope import (
    CollectorDownError,
    CommandError,
    ConnectionFailedError,
    FormatError,
    ServerInfo,
    formats,
    interrupts,
    log_draft,
    routes_log,
)
from moescope.fetching import RoutesFetcher
from moescope.log_draft import LogDraft

LAYERS = [0, 1, 3]
SERVER = ServerInfo.from_json(INFO)


def lines_of(request_id, index=0, num_rows=3):
    traces = [make_trace(index, request_id=request_id, index=index, num_rows=num_rows)]
    return log_draft.lines_of(request_id, traces, LAYERS)


def kept(path, layers=LAYERS):
    return LogDraft(path, SERVER, layers, routes_log.read(path))


class TestDraft:
    def test_what_comes_in_any_order_is_written_in_that_of_the_prompts(self, tmp_path):
        path = tmp_path / "log"
        with LogDraft(path, SERVER, LAYERS) as draft:
            for name in ("c", "a", "b"):
                draft.add(name, lines_of(name))
            assert "a" in draft
            assert "d" not in draft
            assert [*tmp_path.iterdir()] == []  # nothing is seen of it, and nothing left
            draft.write(["a", "b", "d"])
        meta, *records = lines(path.read_bytes())
        assert (meta["model_id"], meta["layers_logged"], meta["num_experts"]) == (
            "demo",
            LAYERS,
            60,
        )
        assert [record["req_id"] for record in records] == [*"a" * 9, *"b" * 9, *"c" * 9]
        assert [*tmp_path.iterdir()] == [path]

    def test_what_the_log_holds_stays_as_it_is(self, tmp_path):
        path = tmp_path / "log"
        with LogDraft(path, SERVER, LAYERS) as draft:
            draft.add("c", lines_of("c"))
            draft.write([])
        # A server's log: choices apart, a line cut off, a meta line anew.
        part, cut = path.read_bytes(), b'{"type":"route","req_id":"c","tok'
        meta = part.splitlines(keepends=True)[0]
        path.write_bytes(part + lines_of("a") + cut + b"\n" + meta + lines_of("c", 1) + cut)
        with kept(path) as draft:
            draft.add("b", lines_of("b"))
            draft.write("abc")
        whole = path.read_bytes()
        assert whole == meta + lines_of("a") + lines_of("b") + lines_of("c") + lines_of("c", 1)

    def test_a_long_request_is_copied_in_parts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(log_draft, "_COPY_BYTES", 100)
        path, part = tmp_path / "log", lines_of("a", num_rows=40)
        with LogDraft(path, SERVER, LAYERS) as draft:
            draft.add("a", part)
            draft.write("a")
        assert path.read_bytes().endswith(part)

    @pytest.mark.parametrize(
        ("meta", "message"),
        [
            ({"model": "other"}, "is of the model other, not demo"),
            ({"layers": [0]}, "is of layers 0, not 0, 1, 3"),
        ],
    )
    def test_routes_of_another_kind_are_refused(self, tmp_path, meta, message):
        path = tmp_path / "log"
        values = {"model": "demo", "layers": LAYERS, "num_experts": 60, **meta}
        line = formats.meta_line(versions={}, device="cpu", seed=0, top_k=4, **values)
        path.write_bytes(line + next(formats.route_lines(make_trace())))
        with pytest.raises(CommandError, match=message):
            kept(path)

    def test_a_trace_of_other_layers_is_no_part_of_it(self):
        with pytest.raises(FormatError, match="expected layers 0, got 0, 1, 3"):
            log_draft.lines_of("a", [make_trace()], [0])

    def test_the_id_in_the_log_is_that_of_the_response(self):
        trace = make_trace(request_id="an-alias")
        data = log_draft.lines_of("chatcmpl-7", [trace], LAYERS)
        assert {record["req_id"] for record in lines(data)} == {"chatcmpl-7"}


class TestFetcher:
    def test_no_more_are_fetched_at_a_time_than_said_and_the_next_one_waits(self, tmp_path):
        busy = most = 0

        async def fetch(request_id):
            nonlocal busy, most
            busy += 1
            most = max(most, busy)
            for _ in range(20):
                await asyncio.sleep(0)
            busy -= 1
            return [make_trace(request_id=request_id)]

        async def go(fetcher):
            async with asyncio.TaskGroup() as group:
                for name in "abcdefg":
                    await fetcher.start(group, name)
                    assert busy <= 3

        with LogDraft(tmp_path / "log", SERVER, LAYERS) as draft:
            fetcher = RoutesFetcher(fetch, draft, max_concurrency=3)
            asyncio.run(go(fetcher))
            assert (most, fetcher.num_fetched, fetcher.missing("abcdefg")) == (3, 7, {})

    @pytest.mark.parametrize(
        "error",
        [
            CollectorDownError("no collector", 503),
            ConnectionFailedError("no server"),
            FormatError("no trace"),
            OSError("No space left on device"),
        ],
    )
    def test_one_that_fails_is_told_and_the_others_go_on(self, tmp_path, error):
        errors, done = {"b": error}, []

        async def fetch(request_id):
            if request_id in errors:
                raise errors.pop(request_id)
            return [make_trace(request_id=request_id)]

        with LogDraft(tmp_path / "log", SERVER, LAYERS) as draft:
            fetcher = RoutesFetcher(fetch, draft)
            fetcher.on_fetched = lambda: done.append(1)
            assert fetcher.missing("a") == {"a": "they were not fetched"}
            asyncio.run(fetcher.all("abc"))
            assert fetcher.missing("abc") == {"b": str(error)}
            assert len(done) == 3
            asyncio.run(fetcher.all("abc"))  # only what is missing, so `b` alone
            assert (fetcher.missing("abc"), len(done)) == ({}, 4)


class TestUntilSignal:
    def test_work_that_ends_by_itself(self):
        async def work():
            await asyncio.sleep(0)

        assert asyncio.run(interrupts.until_signal(work())) is None

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_cancels_it_and_the_handlers_of_before_come_back(self, number):
        before = {one: signal.getsignal(one) for one in signal.Signals if one.value < 32}
        is_cancelled = False

        async def work():
            nonlocal is_cancelled
            os.kill(os.getpid(), number)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                is_cancelled = True
                raise

        assert asyncio.run(interrupts.until_signal(work())) == number
        assert is_cancelled
        assert {one: signal.getsignal(one) for one in before} == before

    def test_an_ignored_signal_stays_ignored(self):
        """As under nohup."""

        async def work():
            os.kill(os.getpid(), signal.SIGHUP)
            for _ in range(10):
                await asyncio.sleep(0)

        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            assert asyncio.run(interrupts.until_signal(work())) is None
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_an_error_of_the_work_is_raised(self):
        async def work():
            raise OSError("full")

        with pytest.raises(OSError, match="full"):
            asyncio.run(interrupts.until_signal(work()))
