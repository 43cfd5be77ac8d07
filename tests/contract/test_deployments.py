"""Deployments side by side, within each other and after each other: each has its own directory."""

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

from moescope_service import runtime
from moescope_service.processes import Process
from moescope_service.runtime import directory
from moescope_service.settings import RUNTIME_DIR
from tests.waiting import DEADLINE_S

SERVER = """
import multiprocessing, os, subprocess, sys, time
from moescope_service import runtime

def directory():
    runtime.ensure_collector()
    return os.environ["MOESCOPE_RUNTIME_DIR"]

if __name__ == "__main__":
    print(directory(), flush=True)
    if "alone" not in sys.argv:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(directory), flush=True)
        subprocess.run([sys.executable, __file__, "alone"], check=True, stdin=subprocess.DEVNULL)
    sys.stdin.read()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return path


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the directories that these deployments make."""
    path: Path = tmp_path_factory.mktemp("t")
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv(RUNTIME_DIR, raising=False)
    return path


@contextlib.contextmanager
def serving(script: Path, *argv: str) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, str(script), *argv]
    with subprocess.Popen(command, **pipes, start_new_session=True) as server:
        try:
            yield server
        finally:
            if server.poll() is None:
                server.communicate(timeout=DEADLINE_S)


def test_vllm_s_processes_share_a_directory_and_another_server_has_its_own(script, temporary):
    """A server that is started within another deployment's environment inherits its variable."""
    with serving(script) as server:
        own, api_server, other = (server.stdout.readline().strip() for _ in range(3))
        assert own == api_server
        assert other != own
        assert Path(own, "collector.sock").exists()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("what", ["missing", "without a maker", "of a dead one", "of a stranger"])
def test_an_inherited_directory_that_is_not_this_deployments(what, tmp_path, monkeypatch, caplog):
    inherited = tmp_path / "d"
    monkeypatch.setenv(RUNTIME_DIR, str(inherited))
    me = Process.current()
    if what != "missing":
        inherited.mkdir()
    if what == "of a dead one":
        (inherited / "maker").write_text(str(dataclasses.replace(me, start_ticks=1)))
    if what == "of a stranger":
        (inherited / "maker").write_text(str(dataclasses.replace(me, pid=os.getppid())))
    runtime.ensure_collector()
    path = os.environ[RUNTIME_DIR]
    runtime.release().end()
    assert path != str(inherited)
    assert f"names {inherited}, which is another deployment's" in caplog.text
    assert inherited.exists() == (what != "missing")


def test_what_a_killed_process_group_left_is_swept_at_the_next_start(script, temporary):
    with serving(script, "alone") as server:
        left = Path(server.stdout.readline().strip())
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(DEADLINE_S)
    assert (left / "collector.sock").exists()
    runtime.ensure_collector()
    runtime.release().end()
    assert list(temporary.iterdir()) == []


def test_what_is_not_swept(temporary):
    me = Process.current()
    dead = dataclasses.replace(me, start_ticks=1)
    makers = {"alive": me, "elsewhere": dataclasses.replace(dead, world="elsewhere"), "dead": dead}
    for name, maker in makers.items():
        (temporary / f"moescope-{name}").mkdir()
        (temporary / f"moescope-{name}" / "maker").write_text(str(maker))
    (temporary / "moescope-being-made").mkdir()
    (temporary / "moescope-nonsense").mkdir()
    (temporary / "moescope-nonsense" / "maker").write_bytes(b"\xff")
    (temporary / "other").mkdir()
    (temporary / "other" / "maker").write_text(str(dead))
    (temporary / "moescope-link").symlink_to(temporary / "other")
    (temporary / "moescope-file").touch()
    before = {path.name for path in temporary.iterdir()}
    directory.sweep()
    assert before - {path.name for path in temporary.iterdir()} == {"moescope-dead"}
    assert (temporary / "other" / "maker").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_users_directory_is_not_swept(temporary):
    path = temporary / "moescope-theirs"
    path.mkdir()
    (path / "maker").write_text(str(dataclasses.replace(Process.current(), start_ticks=1)))
    os.chown(path, 12345, -1)
    directory.sweep()
    assert path.exists()
    assert not directory.is_ours(str(path))
