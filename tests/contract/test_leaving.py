"""Clients that wait and leave: nothing is kept for them, and those who stay are answered."""

from __future__ import annotations

import contextlib
import resource
import socket

import psutil
import pytest
from vllm.v1.engine import FinishReason

from moescope_service.queries import WaitQuery
from tests.waiting import wait_until

MIB = 2**20
NUM_WAITING = 1000


class TestClientsThatLeave:
    """Before: 1,000 that had left were answered in the end, and the collector grew by 1.3 GB."""

    @pytest.fixture
    def files(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
        yield
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    @pytest.mark.usefixtures("files")
    def test_nothing_is_kept_for_them(self, fresh):
        (name,) = fresh.frontend.add("long")
        running = fresh.engine.start(name)
        fresh.http.get("/routes/long")
        collector = fresh.app.state.moescope_collector
        process = psutil.Process(fresh.collector.pid)
        for round_ in range(3):
            self.ask_and_leave(fresh, collector)
            if round_ == 0:
                before = process.memory_info().rss
        assert process.memory_info().rss - before < 8 * MIB
        fresh.frontend.put(name, [1], FinishReason.STOP)
        fresh.engine.step(finished=[running])
        assert fresh.http.get("/routes/long?wait_s=10").status_code == 200
        assert process.memory_info().rss - before < 8 * MIB

    def ask_and_leave(self, fresh, collector):
        """All of them can wait at once: those of the round before do not any more."""
        host, port = fresh.url.removeprefix("http://").split(":")
        with contextlib.ExitStack() as stack:
            readers = []
            for _ in range(NUM_WAITING):
                reader = stack.enter_context(socket.create_connection((host, int(port))))
                reader.sendall(b"GET /routes/long?wait_s=60 HTTP/1.1\r\nHost: x\r\n\r\n")
                readers.append(reader)
            wait_until(lambda: len(collector._open) == NUM_WAITING, "all of them wait")
            assert fresh.http.get("/routes?limit=1").status_code == 200  # the collector knows them
            for reader in readers:
                reader.setblocking(False)
                with pytest.raises(BlockingIOError):
                    reader.recv(1)
        wait_until(lambda: not collector._open, "none of them waits any more")

    @pytest.mark.usefixtures("files")
    def test_too_many_are_told_to_come_back(self, fresh):
        (name,) = fresh.frontend.add("long")
        fresh.engine.start(name)
        fresh.http.get("/routes/long")
        collector = fresh.app.state.moescope_collector
        query = WaitQuery(request_ids=["long"], wait_s=60.0)
        numbers = [collector._send(query)[0] for _ in range(1024)]
        fresh.http.get("/routes?limit=1")  # the collector knows them by now
        answer = fresh.http.get("/routes/long?wait_s=5")
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        for number in numbers:
            collector._close(number)
        assert fresh.http.get("/routes/long?wait_s=0.01").status_code == 202
