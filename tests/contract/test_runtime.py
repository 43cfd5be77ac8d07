"""The collector's process and its directory, from start to end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from moescope_service import runtime
from moescope_service.api.collector_client import CollectorClient
from moescope_service.errors import RefusedError
from moescope_service.messages import Register, pack, pack_hello, unpack
from moescope_service.settings import RUNTIME_DIR
from tests.waiting import DEADLINE_S, wait_until

from .deployment import start_collector, stop_collector
from .fake_engine import HELLO

PARENT = """
import os, signal, subprocess, sys, time
from moescope_service import runtime

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as vLLM's server does
started, original = [], subprocess.Popen
subprocess.Popen = lambda *a, **k: started.append(original(*a, **k)) or started[-1]
try:
    runtime.ensure_collector()
    runtime.ensure_collector()
except runtime.RefusedError as error:
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
    command = [sys.executable, "-c", PARENT]
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


def test_no_collector_is_a_refusal_every_time(tmp_path, monkeypatch):
    monkeypatch.delenv(RUNTIME_DIR, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"cannot be started: .*nothing"):
            runtime.ensure_collector()
        assert RUNTIME_DIR not in os.environ
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def address(tmp_path_factory):
    return f"ipc://{tmp_path_factory.mktemp('z') / 's'}"


def ask(socket: zmq.Socket[bytes], **query: object) -> dict[str, object]:
    socket.send_multipart(pack("query", number=1, **query))
    assert socket.poll(DEADLINE_S * 1000), "no answer"
    return unpack(socket.recv_multipart())[1]


@pytest.fixture
def socket(address):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        yield socket


@pytest.mark.parametrize(
    "frames",
    [[b"not json"], [b""], [b"{}"], pack("what"), pack("query", number=1, op="what"), pack("steps"),
     pack("register"), pack("finish"), [b"[1]"], [b"\xff" * 100, b"x"]],
)  # fmt: skip
def test_a_message_that_nobody_understands_is_left_out(address, socket, frames):
    process = start_collector(address)
    try:
        socket.send_multipart(frames)
        assert ask(socket, op="info")["capture"] == "on"
        assert process.poll() is None
    finally:
        stop_collector(process)


def test_an_answer_that_cannot_be_given_when_it_is_due_is_left_out(address, socket):
    process = start_collector(address)
    try:
        socket.send_multipart(pack("server"))
        register = Register(
            internal_id="a-i", request_id="a", ids=["a"], index=0, model="tiny", lora=None,
            prompt_len=1, created_s=0.0, keep=True,
        )  # fmt: skip
        socket.send_multipart(pack("register", **dataclasses.asdict(register)))
        socket.send_multipart(pack("query", op="routes", request_id="a", wait_s=0.01))  # no number
        assert ask(socket, op="routes", request_id="a", wait_s=0.5)["status"] == "running"
        assert process.poll() is None
    finally:
        stop_collector(process)


def test_layers_that_cannot_be_logged_are_a_refusal(address, socket, tmp_path):
    env = {"MOESCOPE_ROUTES_LOG": str(tmp_path / "log"), "MOESCOPE_ROUTES_LOG_LAYERS": "1-2"}
    process = start_collector(address, **env)
    client = CollectorClient(address)
    try:
        socket.send_multipart(pack_hello(HELLO))
        with pytest.raises(RefusedError, match=r"names layer 2, .* layers with experts: 1, 3"):
            client.wait_for_hello()
    finally:
        client.close()
        stop_collector(process)


def test_sigint_is_the_servers_affair(address, socket):
    process = start_collector(address)
    try:
        process.send_signal(signal.SIGINT)
        assert ask(socket, op="info")["hello"] is None
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
    first = Path(os.environ[RUNTIME_DIR])
    end_first = runtime.release()
    assert RUNTIME_DIR not in os.environ
    runtime.ensure_collector()
    second = Path(os.environ[RUNTIME_DIR])
    end_second = runtime.release()
    try:
        assert first != second
        end_first()
        assert not first.exists()
        client = CollectorClient(f"ipc://{second}/collector.sock")
        assert client.ask_and_wait("info").values["capture"] == "on"
        client.close()
    finally:
        end_first()
        end_second()
    assert not second.exists()
