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
from collections.abc import Callable, Iterator
from pathlib import Path

from moescope_service.errors import RefusedError
from moescope_service.settings import RUNTIME_DIR

logger = logging.getLogger("moescope")

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
"""What is left of the route log is written in that time; without one the collector ends at once."""
_MAX_DIRECTORY_CHARS = 90

_stops: dict[str, Callable[[], None]] = {}
"""Ends the collectors that this process started, by directory."""


def collector_address() -> str:
    """Return where the deployment's collector is bound."""
    return f"ipc://{os.environ[RUNTIME_DIR]}/collector.sock"


def ensure_collector() -> None:
    """Start the deployment's collector, unless a process before this one did.

    The collector ends with this process. If it dies earlier, serving goes on without it.

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
    process = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "moescope_service.collector",
            collector_address(),
            str(os.getpid()),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    stop = _stops[directory] = functools.partial(_stop, process, directory, os.getpid())
    atexit.register(stop)
    if not _is_ready(process):
        process.kill()
        del os.environ[RUNTIME_DIR]
        raise RefusedError(
            "the collector process did not start; its message stands above "
            f"(exit code {process.wait()})"
        )
    threading.Thread(target=_watch, args=[process], name="moescope-watch", daemon=True).start()


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
    lines: list[str] = []

    def read() -> None:
        if process.stdout is not None:
            lines.append(process.stdout.readline())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(_START_TIMEOUT_S)
    return lines == ["ready\n"]


def _watch(process: subprocess.Popen[str]) -> None:
    code = process.wait()
    if code:
        logger.error("the collector process %d ended with code %d", process.pid, code)
        with contextlib.suppress(OSError):  # the deployment is ending as well
            _path("ended").write_text(f"the collector process {process.pid} ended with code {code}")


def _stop(process: subprocess.Popen[str], directory: str, owner: int) -> None:
    if os.getpid() != owner:  # a forked child runs its parent's exit handlers
        return
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        logger.warning("the collector process %d did not end in time: it is killed", process.pid)
        process.kill()
    if process.stdout is not None:
        process.stdout.close()
    shutil.rmtree(directory, ignore_errors=True)


def _path(name: str) -> Path:
    return Path(os.environ.get(RUNTIME_DIR, os.devnull), name)


def _read(name: str) -> str | None:
    path = _path(name)
    return path.read_text() if path.exists() else None


def collector_end() -> str | None:
    """Return how the collector ended, if it did."""
    return _read("ended")


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
