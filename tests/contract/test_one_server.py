"""Arms that share a server: the capture comes off its worker and is put back."""

from __future__ import annotations

import contextlib
import os
import signal
from types import SimpleNamespace

import pytest

from benchmarks.gpu import one_server
from benchmarks.gpu.one_server import DETACHED, DETACHED_AGAIN, OneServer
from moescope import CommandError
from moescope.overhead.arms import COUNTS, MOESCOPE, PAUSED
from moescope_service.capture.install import WorkerCapture

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def handlers():
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def runner(tmp_path, monkeypatch, handlers):
    """A model runner of this process whose steps are recorded, until somebody takes that off."""

    def record(capture):
        bare = capture._runner.execute_model
        capture._runner.execute_model = lambda: [*bare(), "recorded"]

    monkeypatch.setattr(WorkerCapture, "_record", record)
    one_server.make_detachable(tmp_path / "state")
    runner = SimpleNamespace(execute_model=lambda: ["ran"])
    WorkerCapture._record(SimpleNamespace(_runner=runner))
    return runner


def test_a_visit_takes_the_capture_off_or_puts_it_back(runner, tmp_path, monkeypatch):
    resumed = []
    monkeypatch.setattr(one_server.Client, "resume", lambda self: resumed.append(1))
    server = OneServer("http://127.0.0.1:1", tmp_path / "state")
    seen = []
    for name in (MOESCOPE, DETACHED, DETACHED_AGAIN, MOESCOPE, DETACHED, PAUSED, MOESCOPE):
        with server.visit(name) as url:
            seen.append("recorded" in runner.execute_model())
            assert url == "http://127.0.0.1:1"
    assert seen == [True, False, False, True, False, True, True]
    assert resumed == [1]


def test_a_server_that_does_not_obey_ends_it(handlers, tmp_path, monkeypatch):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    monkeypatch.setattr(one_server, "_SWITCH_TIMEOUT_S", 0.05)
    state = tmp_path / "state"
    state.write_text(f"{os.getpid()} attached")
    visit = OneServer("http://127.0.0.1:1", state).visit(DETACHED)
    with pytest.raises(CommandError, match=r"not detached after 0\.05 s"):
        visit.__enter__()


@pytest.mark.parametrize(
    ("names", "started"), [(one_server.DEFAULT, MOESCOPE), ((DETACHED, COUNTS), COUNTS)]
)
def test_the_server_captures_what_its_arms_want(names, started, tmp_path, monkeypatch):
    monkeypatch.setattr(one_server, "wait_ready", lambda servers, timeout_s: None)
    asked = []

    @contextlib.contextmanager
    def server(arm):
        asked.append(arm.name)
        yield SimpleNamespace(url="http://127.0.0.1:1")

    launcher = SimpleNamespace(server=server, timeout_s=1.0)
    with one_server.start_arms(launcher, names, tmp_path / "state") as ready:
        assert ready.names == list(names)
    assert asked == [started]
