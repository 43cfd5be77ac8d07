"""What the processes of a server do, as Linux has it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from moescope.servers import Server

from .waiting import wait_until


def commands(server: Server) -> list[str]:
    """Return the command lines of a server's processes that have not ended."""
    return [
        (process / "cmdline").read_text().replace("\0", " ") for process, _ in _processes(server)
    ]


def runs(server: Server) -> bool:
    """Return whether any process of a server has not ended."""
    return bool(_processes(server))


def is_suspended(server: Server) -> bool:
    """Return whether all processes of a server are suspended, or none is."""

    def of_all() -> set[bool] | None:
        found = {state == "T" for _, state in _processes(server)}
        return found if len(found) == 1 else None

    all_of_it: set[bool] = wait_until(of_all, "all processes have had the signal")
    return all_of_it == {True}


def _processes(server: Server) -> list[tuple[Path, str]]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == server.pid and state != "Z":
                found.append((stat.parent, state))
    return found
