"""What the processes of one deployment share: a private directory.

The first process makes it and starts the collector; the others find it by an environment variable.
It holds the collector's socket and, where a worker refuses to capture, the reason.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moescope_service.errors import RefusedError
from moescope_service.settings import RUNTIME_DIR

logger = logging.getLogger("moescope")

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
"""What is left of the route log is written in that time; without one the collector ends at once."""
_LIVED_S = 10.0
"""A collector that served so long did not end at once."""
_MAX_PAUSE_S = 30.0
_MAX_DIRECTORY_CHARS = 90

_stops: dict[str, Callable[[], None]] = {}
"""Ends the collectors that this process started, by directory."""


def collector_address() -> str:
    """Return where the deployment's collector is bound."""
    return f"ipc://{os.environ[RUNTIME_DIR]}/collector.sock"


def ensure_collector() -> None:
    """Start the deployment's collector, unless a process before this one did.

    It ends with this process. If it ends earlier, it is started again: see `Supervisor`.

    Raises:
        RefusedError: It did not start.
    """
    if RUNTIME_DIR in os.environ:
        return
    directory = tempfile.mkdtemp(prefix="moescope-")
    if len(directory) > _MAX_DIRECTORY_CHARS:  # a socket's path is at most 107 characters long
        Path(directory).rmdir()
        directory = tempfile.mkdtemp(prefix="moescope-", dir="/tmp")
    os.environ[RUNTIME_DIR] = directory
    supervisor = Supervisor(collector_address())
    stop = _stops[directory] = functools.partial(_stop, supervisor, directory, os.getpid())
    atexit.register(stop)
    try:
        code = supervisor.start()
    except OSError as error:
        release()()
        raise RefusedError(f"the collector process cannot be started: {error}") from error
    if code is not None:
        release()()
        raise RefusedError(
            f"the collector process did not start; its message stands above (exit code {code})"
        )


class Supervisor:
    """Keeps a collector at an address: one that ends is followed by another.

    The next one starts 0.5 s after the end of one that had lived, and then, where they end at once,
    after pauses that double up to 30 s. It knows nothing of before; workers and API servers notice
    and introduce themselves (`moescope_service.link`).

    Args:
        address: Where the collectors are bound.
        first_pause_s: The shortest pause, in seconds.
    """

    def __init__(self, address: str, *, first_pause_s: float = 0.5) -> None:
        self._address = address
        self._first_pause_s = first_pause_s
        self._is_stopping = threading.Event()
        self._starting = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._epoch = 0

    @property
    def pid(self) -> int | None:
        """Process id of the newest collector; None before the first."""
        return None if self._process is None else self._process.pid

    def start(self) -> int | None:
        """Start the first collector, and watch it from a thread.

        Returns:
            Its exit code where it did not start; None where it did.

        Raises:
            OSError: The system starts no process.
        """
        process = self._spawn()
        if process is None or not _is_ready(process):
            return self.stop()
        threading.Thread(
            target=self._watch, args=[process], name="moescope-watch", daemon=True
        ).start()
        return None

    def stop(self) -> int | None:
        """End the collector for good; return its exit code."""
        self._is_stopping.set()
        with self._starting:
            process = self._process
        if process is None:
            return None
        process.terminate()
        try:
            return process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning(
                "the collector process %d did not end in time: it is killed", process.pid
            )
            process.kill()
            return process.wait()

    def _spawn(self) -> subprocess.Popen[str] | None:
        command = [sys.executable, "-P", "-m", "moescope_service.collector"]
        with self._starting:
            if self._is_stopping.is_set():
                return None
            self._process = subprocess.Popen(
                [*command, self._address, str(os.getpid()), str(self._epoch)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._epoch += 1
            return self._process

    def _watch(self, process: subprocess.Popen[str]) -> None:
        pause_s, started_s = self._first_pause_s, time.monotonic()
        while True:
            code = process.wait()
            if time.monotonic() - started_s > _LIVED_S:
                pause_s = self._first_pause_s
            if not self._is_stopping.is_set():
                logger.error(
                    "the collector process %d ended with code %d; its traces and counts are gone, "
                    "another one is started in %g s", process.pid, code, pause_s,
                )  # fmt: skip
            self._is_stopping.wait(pause_s)
            pause_s, started_s = min(2 * pause_s, _MAX_PAUSE_S), time.monotonic()
            try:
                follower = self._spawn()
            except OSError as error:  # too little memory, too many processes: not for ever
                logger.warning("no collector process can be started: %s", error)
                continue
            if follower is None:
                return
            process = follower
            if _is_ready(process):
                logger.warning("the collector process %d is here", process.pid)
            else:
                process.kill()


def release() -> Callable[[], None]:
    """Make room for another deployment: the next `ensure_collector` starts a collector anew.

    Everybody of this deployment knows its collector by now.

    Returns:
        Ends the collector and removes the directory. Where that is never called, it ends with this
        process; where another process started it, it is that one's to end.
    """
    directory = os.environ.pop(RUNTIME_DIR)
    stop = _stops.pop(directory, None)

    def end() -> None:
        if stop is not None:
            atexit.unregister(stop)
            stop()

    return end


def _is_ready(process: subprocess.Popen[str]) -> bool:
    """Wait until a collector says that it is bound; it writes nothing more afterwards."""
    lines: list[str] = []

    def read() -> None:
        if process.stdout is not None:
            with process.stdout:
                lines.append(process.stdout.readline())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(_START_TIMEOUT_S)
    return lines == ["ready\n"]


def _stop(supervisor: Supervisor, directory: str, owner: int) -> None:
    if os.getpid() != owner:  # a forked child runs its parent's exit handlers
        return
    supervisor.stop()
    shutil.rmtree(directory, ignore_errors=True)


def _path(name: str) -> Path:
    return Path(os.environ.get(RUNTIME_DIR, os.devnull), name)


def _read(name: str) -> str | None:
    path = _path(name)
    return path.read_text() if path.exists() else None


@contextlib.contextmanager
def reported_refusal() -> Iterator[None]:
    """Leave the reason of a refusal where the first process finds it."""
    try:
        yield
    except RefusedError as error:
        with contextlib.suppress(OSError):
            _path("refused").write_text(str(error))
        raise


def reported_reason() -> str | None:
    """Return why a worker refused to capture, if one did."""
    return _read("refused")
