"""Starts the collector, or the archive's process, watches it, and ends it."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time

logger = logging.getLogger("moescope")

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
"""The collector writes the rest of the route log in that time; without a log it ends at once."""
_LIVED_S = 10.0
"""A collector that ran for longer is not counted as one that ends at once."""
_MAX_PAUSE_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """What a supervisor keeps."""

    module: str
    name: str
    lost: str
    """What its end costs, for the log."""


COLLECTOR = Program(
    "moescope_service.collector", "collector", "its traces and counts are gone, another one is"
)
ARCHIVE = Program(
    "moescope_service.archive",
    "archive",
    "what it had not published is handed over again to another one, which is",
)


class Supervisor:
    """Keeps a collector at an address: one that ends is followed by another.

    The next one starts 0.5 s after the end of one that ran for more than 10 s, and otherwise after
    pauses that double up to 30 s. It has none of the earlier one's data; workers and API servers
    notice the new connection and introduce themselves (`moescope_service.link`).

    Args:
        address: Where the collectors are bound.
        first_pause_s: The shortest pause, in seconds.
        program: What is kept there: another one in the collector's place.
    """

    def __init__(
        self, address: str, *, first_pause_s: float = 0.5, program: Program | None = None
    ) -> None:
        self._address = address
        self._program = program or COLLECTOR
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
            OSError: The system cannot start a process.
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
                "the %s process %d did not end in time: it is killed",
                self._program.name, process.pid,
            )  # fmt: skip
            process.kill()
            return process.wait()

    def _spawn(self) -> subprocess.Popen[str] | None:
        command = [sys.executable, "-P", "-m", self._program.module]
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
                    "the %s process %d ended with code %d; %s started in %g s",
                    self._program.name, process.pid, code, self._program.lost, pause_s,
                )  # fmt: skip
            self._is_stopping.wait(pause_s)
            pause_s, started_s = min(2 * pause_s, _MAX_PAUSE_S), time.monotonic()
            try:
                follower = self._spawn()
            except OSError as error:  # too little memory or too many processes: try again later
                logger.warning("no %s process can be started: %s", self._program.name, error)
                continue
            if follower is None:
                return
            process = follower
            if _is_ready(process):
                logger.warning("the %s process %d has started", self._program.name, process.pid)
            else:
                process.kill()


def _is_ready(process: subprocess.Popen[str]) -> bool:
    """Wait until a collector writes that it is bound; afterwards it writes nothing more."""
    lines: list[str] = []

    def read() -> None:
        if process.stdout is not None:
            with process.stdout:
                lines.append(process.stdout.readline())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(_START_TIMEOUT_S)
    return lines == ["ready\n"]
