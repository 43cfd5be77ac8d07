"""The collector's process and its directory, from start to end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import zmq

from moescope_service import runtime
from moescope_service.errors import RefusedError
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.messages import Register, pack, pack_introduction, unpack
from moescope_service.processes import Process
from moescope_service.queries import (
    InfoQuery,
    Query,
    Reply,
    RoutesQuery,
    Wanted,
    pack_query,
    unpack_reply,
)
from moescope_service.settings import RUNTIME_DIR
from tests.waiting import DEADLINE_S, wait_until

from .deployment import start_collector, stop_collector
from .fake_engine import SPEC

PARENT = """
import os, signal, subprocess, sys, time
from moescope_service import runtime
from moescope_service.errors import RefusedError

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as vLLM's server does
started, original = [], subprocess.Popen
subprocess.Popen = lambda *a, **k: started.append(original(*a, **k)) or started[-1]
try:
    runtime.ensure_collector()
    runtime.ensure_collector()
except RefusedError as error:
    print("refused:", error, flush=True)
    sys.exit(3)
assert len(started) == 1
print(started[0].pid, os.environ["MOESCOPE_RUNTIME_DIR"], flush=True)
while True:
    time.sleep(0.1)  # signal.pause() sleeps on where a signal comes just before it
"""


@contextlib.contextmanager
def start_parent(**env: str) -> Iterator[subprocess.Popen[str]]:
    clean = {name: value for name, value in os.environ.items() if name != RUNTIME_DIR}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-P", "-c", PARENT]
    with subprocess.Popen(command, env={**clean, **env}, **pipes) as parent:
        try:
            yield parent
        finally:
            parent.kill()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_collector_ends_with_its_parent(how):
    with start_parent() as parent:
        pid, directory = parent.stdout.readline().split()
        pid = int(pid)
        try:
            assert is_alive(pid)
            assert Path(directory, "collector.sock").exists()
            parent.send_signal(how)
            parent.wait(DEADLINE_S)
            wait_until(lambda: not is_alive(pid), "the collector ends")
            wait_until(lambda: not Path(directory).exists(), "its directory is removed")
        finally:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
            if Path(directory).exists():
                Path(directory, "collector.sock").unlink(missing_ok=True)
                Path(directory).rmdir()


def test_a_collector_that_does_not_start_is_a_refusal(tmp_path):
    with start_parent(MOESCOPE_ROUTES_LOG=str(tmp_path / "missing" / "log.jsonl")) as parent:
        out, err = parent.communicate(timeout=DEADLINE_S)
    assert parent.returncode == 3
    assert out.startswith("refused: the collector process did not start")
    assert "log.jsonl" in err


def test_a_log_that_is_a_pipe_is_a_refusal_at_once(tmp_path):
    """It would wait for who reads it."""
    pipe = tmp_path / "log.jsonl"
    os.mkfifo(pipe)
    with start_parent(MOESCOPE_ROUTES_LOG=str(pipe)) as parent:
        out, err = parent.communicate(timeout=DEADLINE_S)
    assert out.startswith("refused: the collector process did not start")
    assert f"moescope: --routes-log: cannot write {pipe}: it is not a regular file" in err
    assert "Traceback" not in err


def test_no_collector_is_a_refusal_every_time(tmp_path, monkeypatch):
    monkeypatch.delenv(RUNTIME_DIR, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"cannot be started: .*nothing"):
            runtime.ensure_collector()
        assert RUNTIME_DIR not in os.environ
    assert list(tmp_path.iterdir()) == []


R = TypeVar("R", bound=Reply)


@pytest.fixture
def address(tmp_path_factory):
    return f"ipc://{tmp_path_factory.mktemp('z') / 's'}"


def ask(socket: zmq.Socket[bytes], query: Query[R]) -> R:
    socket.send_multipart(pack_query(1, query))
    assert socket.poll(DEADLINE_S * 1000), "no reply"
    frames = socket.recv_multipart()
    return unpack_reply(query.reply, unpack(frames)[1], frames)


@pytest.fixture
def socket(address):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        yield socket


@pytest.mark.parametrize(
    "frames",
    [[b"not json"], [b""], [b"{}"], pack("what"), pack("query", number=1, query="what"),
     pack("query", query="info"),
     pack("query", number=1, query="routes", values={"wanted": 7}), pack("steps"),
     pack("register"), pack("finish"), [b"[1]"], [b"\xff" * 100, b"x"]],
)  # fmt: skip
def test_a_message_that_nobody_understands_is_left_out(address, socket, frames):
    process = start_collector(address)
    try:
        socket.send_multipart(frames)
        assert ask(socket, InfoQuery()).info.capture == "on"
        assert process.poll() is None
    finally:
        stop_collector(process)


def test_a_query_without_a_number_is_left_out(address, socket):
    process = start_collector(address)
    try:
        socket.send_multipart(pack("server"))
        register = Register(
            internal_id="a-i", request_id="a", ids=["a"], index=0, model="tiny", lora=None,
            prompt_len=1, created_s=0.0, keep=True,
        )  # fmt: skip
        socket.send_multipart(pack("register", **dataclasses.asdict(register)))
        query = RoutesQuery(wanted=[Wanted(request_id="a")])
        socket.send_multipart(pack("query", query="routes", values=query))
        assert ask(socket, query).found[0].status == "running"
        assert process.poll() is None
    finally:
        stop_collector(process)


def test_layers_that_cannot_be_logged_are_a_refusal(address, socket, tmp_path):
    env = {"MOESCOPE_ROUTES_LOG": str(tmp_path / "log"), "MOESCOPE_ROUTES_LOG_LAYERS": "1-2"}
    process = start_collector(address, **env)
    client = CollectorClient(address)
    try:
        socket.send_multipart(pack_introduction(SPEC))
        with pytest.raises(RefusedError, match=r"names layer 2, .* layers with experts: 1, 3"):
            client.wait_for_workers()
    finally:
        client.close()
        stop_collector(process)


def test_sigint_is_the_servers_affair(address, socket):
    process = start_collector(address)
    try:
        process.send_signal(signal.SIGINT)
        assert ask(socket, InfoQuery()).info.spec is None
    finally:
        stop_collector(process)
    assert process.returncode == 0


def test_the_reason_of_a_refusal_reaches_the_first_process(tmp_path, monkeypatch):
    monkeypatch.delenv(RUNTIME_DIR, raising=False)
    assert runtime.reported_reason() is None
    monkeypatch.setenv(RUNTIME_DIR, str(tmp_path))
    assert runtime.reported_reason() is None
    with pytest.raises(RefusedError), runtime.reported_refusal():
        raise RefusedError("because")
    assert runtime.reported_reason() == "because"
    assert runtime.collector_address() == f"ipc://{tmp_path}/collector.sock"


def test_a_released_collector_ends_alone(monkeypatch):
    """Each `vllm.LLM` has a collector of its own; the first is ended while the second runs."""
    monkeypatch.delenv(RUNTIME_DIR, raising=False)
    runtime.ensure_collector()
    first_path = Path(os.environ[RUNTIME_DIR])
    first = runtime.release()
    assert RUNTIME_DIR not in os.environ
    runtime.ensure_collector()
    second_path = Path(os.environ[RUNTIME_DIR])
    second = runtime.release()
    try:
        assert first_path != second_path
        first.end()
        assert not first_path.exists()
        assert second.address == f"ipc://{second_path}/collector.sock"
        client = CollectorClient(second.address)
        assert client.ask_and_wait(InfoQuery()).info.capture == "on"
        client.close()
    finally:
        first.end()
        second.end()
    assert not second_path.exists()


def test_a_deployment_that_this_process_did_not_start_is_not_its_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv(RUNTIME_DIR, str(tmp_path))
    (tmp_path / "maker").write_text(str(Process.current()))
    runtime.ensure_collector()
    deployment = runtime.release()
    assert deployment.address == f"ipc://{tmp_path}/collector.sock"
    deployment.end()
    assert tmp_path.exists()


FORKS = """
import os, sys
from pathlib import Path
from moescope_service import runtime

runtime.ensure_collector()
path = Path(os.environ["MOESCOPE_RUNTIME_DIR"])
child = os.fork()
if child == 0:
    if sys.argv[1] == "end":
        runtime.release().end()
    sys.exit(0)  # runs the exit handlers that it has from its parent
assert os.waitpid(child, 0)[1] == 0
assert path.exists()
runtime.release().end()
assert not path.exists()
"""


@pytest.mark.parametrize("how", ["end", "exit"])
def test_a_forked_child_leaves_its_parent_s_collector_alone(how):
    clean = {name: value for name, value in os.environ.items() if name != RUNTIME_DIR}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, how]
    subprocess.run(command, env=clean, check=True, timeout=DEADLINE_S)


def test_the_salt_is_one_for_all_servers_of_a_deployment(monkeypatch, tmp_path):
    salts = []
    for name in ("a", "b"):
        directory = tmp_path / name
        directory.mkdir()
        monkeypatch.setenv(RUNTIME_DIR, str(directory))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            (salt,) = set(pool.map(lambda _: runtime.owner_salt(), range(8)))
        assert [path.name for path in directory.iterdir()] == ["salt"]
        assert (directory / "salt").stat().st_mode & 0o777 == 0o600
        salts.append(salt)
    assert len(set(salts)) == 2
    assert {len(salt) for salt in salts} == {32}
