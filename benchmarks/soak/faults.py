"""What is done to a server while it serves: one fault after the other."""

from __future__ import annotations

import asyncio
import collections
import itertools
import os
import resource
import signal
import time
from collections.abc import Sequence
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.faults.served import collector_pid, until
from benchmarks.simulation.server import API_KEY
from benchmarks.soak.load import Load
from moescope.servers import Server

_FULL_BYTES = 4096
HOLD_S = 3.0
ORDER = ("kill", "stop", "fill_disk", "pause", "leave")
_LEAVING = 50
_RESTART_S = 60.0


class Faults:
    """Disturbs a server every few seconds, each fault in its turn.

    The disk is full for the route log as far as the collector can tell: its limit for the size of
    files is below the log's, so that a write fails (``EFBIG``) until the limit is lifted. A file
    system of its own would need root.

    Args:
        server: The server.
        load: Is told of faults of the collector.
        every_s: Seconds from one fault to the next.
        hold_s: How long the collector is stopped, the disk is full, and the capture is paused.
        order: The faults.
    """

    def __init__(
        self,
        server: Server,
        load: Load,
        every_s: float,
        *,
        hold_s: float = HOLD_S,
        order: Sequence[str] = ORDER,
    ) -> None:
        self._server, self._load = server, load
        self._every_s, self._hold_s, self._order = every_s, hold_s, order
        self.counts: collections.Counter[str] = collections.Counter()
        self.missing_rows = 0
        """Of the traces of all collectors."""
        self.missing_by_cause: collections.Counter[str] = collections.Counter()

    async def run(self) -> None:
        """Disturb until the task is cancelled; a fault that began is undone before."""
        headers = {"Authorization": f"Bearer {API_KEY}"}
        async with httpx.AsyncClient(
            base_url=self._server.url, headers=headers, timeout=120
        ) as http:
            for name in itertools.cycle(self._order):
                await asyncio.sleep(self._every_s)
                fault = asyncio.create_task(getattr(self, f"_{name}")(http))
                try:
                    await asyncio.shield(fault)
                finally:
                    await fault

    async def account(self, http: httpx.AsyncClient) -> None:
        """Add up what the running collector says of missing rows."""
        families = text_string_to_metric_families((await http.get("/metrics")).text)
        samples = [sample for family in families for sample in family.samples]
        if not any(one.name == "moescope_collector_up" and one.value for one in samples):
            self.counts["collectors_not_asked"] += 1
            return
        for one in samples:
            if one.name == "moescope_trace_rows_total" and one.labels["source"] == "missing":
                self.missing_rows += int(one.value)
            elif one.name == "moescope_trace_rows_missing_total":
                self.missing_by_cause[one.labels["cause"]] += int(one.value)

    async def _kill(self, http: httpx.AsyncClient) -> None:
        pid = collector_pid(self._server)
        if pid is None:
            return
        await self.account(http)
        self._load.fault_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self.counts["collector_kills"] += 1
        deadline_s = time.monotonic() + _RESTART_S
        while collector_pid(self._server) in {None, pid}:
            if time.monotonic() > deadline_s:
                raise TimeoutError("the collector is not started again")
            await asyncio.sleep(0.1)
        await until(200, http, "GET", "/moescope/info")
        self._load.fault_s = time.monotonic()

    async def _stop(self, http: httpx.AsyncClient) -> None:
        pid = collector_pid(self._server)
        if pid is None:
            return
        self._load.fault_s = time.monotonic() + self._hold_s
        os.kill(pid, signal.SIGSTOP)
        self.counts["collector_stops"] += 1
        await asyncio.sleep(self._hold_s)
        os.kill(pid, signal.SIGCONT)
        await until(200, http, "GET", "/moescope/info")
        self._load.fault_s = time.monotonic()

    async def _fill_disk(self, http: httpx.AsyncClient) -> None:
        pid = collector_pid(self._server)
        if pid is None:
            return
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_FULL_BYTES, before[1]))
        self.counts["disks_full"] += 1
        await asyncio.sleep(self._hold_s)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    async def _pause(self, http: httpx.AsyncClient) -> None:
        self.counts["pauses"] += (await http.post("/routes/pause")).status_code == 200
        await asyncio.sleep(self._hold_s)
        await until(200, http, "POST", "/routes/resume")

    async def _leave(self, http: httpx.AsyncClient) -> None:
        """Let clients wait for requests of a moment ago, and go."""

        async def leave(number: int) -> None:
            url = f"/routes/soak-{self._load.counts['requests'] + number % 8}?wait_s=60"
            try:
                await http.get(url, timeout=0.2)
            except httpx.TimeoutException:
                self.counts["left"] += 1

        await asyncio.gather(*(leave(number) for number in range(_LEAVING)))


def processes(server: Server) -> dict[str, int]:
    """Return the ids of a server's processes, by the names that a picture has."""
    found = {}
    try:
        children = psutil.Process(server.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return {}
    for child in children:
        try:
            name, command = child.name(), " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "moescope_service.coll" in command:
            found["collector"] = child.pid
        elif "APIServer" in command or "ApiServer" in command:
            number = "".join(filter(str.isdigit, command.rsplit("erver", 1)[-1]))
            found[f"API server {number}"] = child.pid
        elif "EngineCore" in command or "Worker" in command:
            found[name] = child.pid
    return found


def end_of_api_server(server: Server, timeout_s: float) -> dict[str, Any]:
    """Kill one of a server's API servers and say how the server ended.

    Returns:
        The exit status, None where it runs on; how many of its processes are left.
    """
    before = processes(server)
    all_of_it = psutil.Process(server.pid).children(recursive=True)
    victim = next((pid for name, pid in before.items() if name.startswith("API server")), None)
    if victim is None:
        raise RuntimeError(f"no API server among {before}")
    os.kill(victim, signal.SIGKILL)
    server.wait_exit(timeout_s)
    status = server._process.poll() if server._process else None
    _, left = psutil.wait_procs(all_of_it, timeout=10)
    return {"exit_status": status, "processes_left": len(left)}
