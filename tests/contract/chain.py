"""A server in a process of its own, with the collector and the archive that it keeps; and load.

What a kill of it ends is the API server, the worker and the parent of the two other processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import psutil

from moescope_service.runtime import archive_address, collector_address
from moescope_service.runtime.supervisor import ARCHIVE, COLLECTOR, Program, Supervisor
from tests.waiting import DEADLINE_S, wait_until

from .deployment import Deployment

ROOT = Path(__file__).parents[2]
SMALL = Program("tests.contract.small_queue", "collector", COLLECTOR.lost)
MODULES = {"archive": {ARCHIVE.module}, "collector": {COLLECTOR.module, SMALL.module}}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])  # vLLM is imported once


class Chain(Deployment):
    """A deployment whose processes are kept as a server keeps them, with short pauses.

    Args:
        collector: The program that is its collector.
        flags: As of `Deployment`.
    """

    def __init__(self, collector: Program, **flags: Any) -> None:
        super().__init__(**flags)
        self._collector = collector

    def start_processes(self, stack: contextlib.ExitStack) -> None:
        """Start both; the collector ends before the archive."""
        addresses = {ARCHIVE: archive_address(), self._collector: collector_address()}
        for program, address in addresses.items():
            supervisor = Supervisor(address, first_pause_s=0.05, program=program)
            stack.callback(supervisor.stop)
            if (code := supervisor.start()) is not None:
                raise RuntimeError(f"the {program.name} process did not start: {code}")


def serve(folder: str, collector: Program, connection: Connection) -> None:
    """Serve until the other end of a connection is closed."""
    os.setpgid(0, 0)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    flags = {"archive": folder, "memory": "1", "archive_interval": "0.2"}
    with Chain(collector, **flags).running() as chain:
        connection.send((chain.url, str(chain.directory)))
        with contextlib.suppress(EOFError):
            connection.recv()


class Served:
    """Servers of one archive, one after another, of which parts are killed.

    The first one's queue for the archive is small, the next one's that of any server, and so on.

    Args:
        folder: The archive.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_small = False
        """Whether the server's queue for the archive holds few traces."""
        self._directories: list[str] = []

    def __enter__(self) -> Served:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
        for directory in self._directories:  # of those that were killed
            shutil.rmtree(directory, ignore_errors=True)

    def start(self) -> None:
        """Start a server, and wait until it serves."""
        self.is_small = not self.is_small
        self._connection, other = FORKS.Pipe()
        collector = SMALL if self.is_small else COLLECTOR
        arguments = str(self.folder), collector, other
        self._process: Any = FORKS.Process(target=serve, args=arguments)
        self._process.start()
        other.close()
        assert self._connection.poll(DEADLINE_S), "the server does not start"
        self.url, directory = self._connection.recv()
        self._directories.append(directory)

    def end(self) -> None:
        """End the server as SIGTERM does, its collector and its archive with it."""
        self._connection.close()
        self._process.join(DEADLINE_S)
        if self._process.exitcode is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self, kind: str) -> None:
        """Kill a part: ``archive``, ``collector``, ``server`` (the others see it) or ``all``."""
        pid = int(self._process.pid)
        match kind:
            case "server":
                os.kill(pid, signal.SIGKILL)
            case "all":
                os.killpg(pid, signal.SIGKILL)
            case _:
                part = wait_until(lambda: self._part(kind), f"the {kind} runs")
                part.kill()
                part.wait(DEADLINE_S)
                return
        self._process.join(DEADLINE_S)
        self._connection.close()

    def _part(self, kind: str) -> psutil.Process | None:
        for child in psutil.Process(self._process.pid).children():
            with contextlib.suppress(psutil.Error):
                if MODULES[kind] & {*child.cmdline()} and child.is_running():
                    return child
        return None


class Load:
    """Requests, some at once, until it is paused.

    Args:
        url: Returns where the server is at present.
    """

    def __init__(self, url: Callable[[], str]) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._goes_on = threading.Event()
        self._is_over = False
        self._num_busy = 0
        self.asked: list[str] = []
        self.served: list[str] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(3)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over = True
        self._goes_on.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def resume(self) -> None:
        """Let requests come."""
        self._goes_on.set()

    def pause(self) -> None:
        """Let none come, and wait for those that run."""
        self._goes_on.clear()
        wait_until(lambda: not self._num_busy, "no request runs")

    def wait(self, count: int) -> None:
        """Wait until so many more are served."""
        wanted = len(self.served) + count
        wait_until(lambda: len(self.served) >= wanted, f"{count} more are served")

    def _run(self) -> None:
        with httpx.Client(timeout=DEADLINE_S) as http:
            while not self._is_over:
                self._goes_on.wait()
                self._ask(http)

    def _ask(self, http: httpx.Client) -> None:
        with self._lock:
            if not self._goes_on.is_set():
                return
            self._num_busy += 1
            name = f"r{len(self.asked)}"
            self.asked.append(name)
        url = self._url()
        try:
            answer = http.post(f"{url}/v1/completions", json={"id": name})
            if answer.status_code == 200:
                self.served.append(name)
        except httpx.TransportError:  # the server was killed
            wait_until(lambda: self._is_over or self._url() != url, "there is another server")
        finally:
            with self._lock:
                self._num_busy -= 1
