"""The route log of a real collector process: full disks, signals, floods of bad messages."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest
import zmq

from moescope_service.messages import pack_introduction, unpack
from moescope_service.queries import InfoQuery, InfoReply, pack_query, unpack_reply
from tests.waiting import DEADLINE_S, scrape, wait_until

from .deployment import Deployment, start_collector, stop_collector
from .disks import fill
from .fake_engine import SPEC


def records(path: Path) -> list[dict[str, object]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def request_ids(path: Path) -> list[object]:
    return list(dict.fromkeys(r["req_id"] for r in records(path) if r["type"] == "route"))


def test_a_disk_that_was_full_for_a_while_costs_no_line(small_disk):
    path = small_disk / "routes.jsonl"
    with Deployment(log=str(path)).running() as deployment:

        def log() -> dict[str, object]:
            found: dict[str, object] = httpx.get(f"{deployment.url}/moescope/info").json()["log"]
            return found

        assert log() == {"state": "ok", "dropped": 0}
        filler = fill(small_disk)
        for number in range(40):  # a page of the file may have room for the first ones
            ended = deployment.frontend.serve(f"b{number}")
            deployment.engine.step(finished=ended)
        wait_until(lambda: log()["state"] == "failing", "the log fails")
        filler.unlink()
        wait_until(lambda: log()["state"] == "ok", "the log goes on")
        ended = deployment.frontend.serve("c")
        deployment.engine.step(finished=ended)
        wait_until(lambda: request_ids(path)[-1:] == ["c"], "the log has the last")
        assert "\nmoescope_log_traces_dropped_total" in scrape(deployment.url)
        assert log() == {"state": "ok", "dropped": 0}
    written = records(path)
    assert [one["type"] for one in written] == ["meta"] + ["route"] * (len(written) - 1)
    assert request_ids(path) == [*(f"b{number}" for number in range(40)), "c"]


@pytest.fixture
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"ipc://{tmp_path_factory.mktemp('z') / 's'}"


@pytest.fixture
def socket(address: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        yield socket


def ask_info(socket: zmq.Socket[bytes]) -> InfoReply:
    socket.send_multipart(pack_query(1, InfoQuery()))
    while socket.poll(DEADLINE_S * 1000):
        kind, values = unpack(frames := socket.recv_multipart())
        if kind == "reply":
            reply = unpack_reply(InfoReply, values, frames)
            assert isinstance(reply, InfoReply)
            return reply
    pytest.fail("no reply")


def test_sighup_makes_a_moved_log_anew(address, socket, tmp_path):
    path = tmp_path / "routes.jsonl"
    process = start_collector(address, MOESCOPE_ROUTES_LOG=str(path))
    try:
        socket.send_multipart(pack_introduction(SPEC))
        wait_until(lambda: len(records(path)) == 1, "the log is begun")
        path.rename(tmp_path / "routes.jsonl.1")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(records(path)) == 1, "the log is begun anew")
        assert ask_info(socket).info.log.state == "ok"
        assert process.poll() is None
    finally:
        stop_collector(process)
    assert process.returncode == 0


def test_sighup_without_a_log(address, socket):
    process = start_collector(address)
    try:
        process.send_signal(signal.SIGHUP)
        assert ask_info(socket).info.log.state == "off"
    finally:
        stop_collector(process)
    assert process.returncode == 0


def test_a_later_collector_starts_though_its_log_cannot_be_opened(address, socket, tmp_path):
    """It has routes to keep; the log goes on when its folder is back."""
    path = tmp_path / "gone" / "routes.jsonl"
    process = start_collector(address, epoch=1, MOESCOPE_ROUTES_LOG=str(path))
    try:
        socket.send_multipart(pack_introduction(SPEC))
        wait_until(lambda: ask_info(socket).info.log.state == "failing", "the log fails")
        path.parent.mkdir()
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(records(path)) == 1, "the log is begun")
    finally:
        stop_collector(process)


def test_a_flood_of_bad_messages_is_logged_once_a_second(address, socket, capfd):
    process = start_collector(address)
    try:
        for _ in range(500):
            socket.send_multipart([b"\xff", os.urandom(16)])
        assert ask_info(socket).info.spec is None
    finally:
        stop_collector(process)
    errors = capfd.readouterr().err
    assert 1 <= errors.count("Traceback (most recent call last)") < 60
