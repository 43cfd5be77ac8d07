"""Tells a process from every other one, also from a later one that has its number.

Relies on Linux, ``/proc/PID/stat`` (proc_pid_stat(5)): field 3 is the state, 4 the parent, 22 the
time of the start in clock ticks since boot.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Self

_PROC = Path("/proc")
_ENDED = frozenset("ZXx")


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """One process of one boot of one machine, or container: numbers of others mean nothing here."""

    pid: int
    start_ticks: int
    world: str
    """The boot, and the namespace of process numbers."""

    @classmethod
    def current(cls) -> Self:
        """Return the process that calls."""
        pid = os.getpid()
        stat = _read_stat(pid)
        return cls(pid, 0 if stat is None else stat.start_ticks, _world())

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the process that ``str`` wrote; None where the text is none."""
        try:
            pid, start_ticks, world = text.split()
            return cls(int(pid), int(start_ticks), world)
        except ValueError:
            return None

    def __str__(self) -> str:
        """Return a text that `parse` reads."""
        return f"{self.pid} {self.start_ticks} {self.world}"

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine, in this container or another one."""
        return self.world.partition("/")[0] == _world().partition("/")[0]

    @property
    def is_alive(self) -> bool:
        """Whether it certainly runs."""
        return self.world == _world() and self._runs

    @property
    def is_dead(self) -> bool:
        """Whether it has certainly ended; of another container's process that cannot be told."""
        return self.world == _world() and not self._runs

    @property
    def is_ancestor(self) -> bool:
        """Whether it started the process that calls, or one of those that did."""
        if not self.is_alive:
            return False
        pid = os.getpid()
        while pid != self.pid and pid and (stat := _read_stat(pid)) is not None:
            pid = stat.parent
        return pid == self.pid

    @property
    def _runs(self) -> bool:
        stat = _read_stat(self.pid)
        return stat is not None and (
            stat.start_ticks == self.start_ticks and stat.state not in _ENDED
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    parent: int
    start_ticks: int


def _read_stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return _Stat(fields[0], int(fields[1]), int(fields[19]))


def _world() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{(_PROC / 'self/ns/pid').stat().st_ino}"
    except OSError:
        return "unknown"
