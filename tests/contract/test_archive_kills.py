"""Kills parts of an archiving deployment under load, and accounts for every trace."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from moescope.archive import Archive
from moescope_service.runtime import collector_address
from tests.waiting import DEADLINE_S, wait_until

from .deployment import start_collector
from .test_archive import Archiving, in_files

KILLS = int(os.environ.get("MOESCOPE_TEST_KILLS", "6"))
DOOMED = """
import os, subprocess, sys, time
from moescope_service.collector.process import archive_queue
from benchmarks.simulation.parts import make_spec
from tests.unit.test_store import make_kept

address = sys.argv[1]
command = [sys.executable, "-P", "-m", "moescope_service.archive", address + "/archive.sock"]
process = subprocess.Popen([*command, str(os.getpid()), "0"], stdout=subprocess.PIPE)
assert process.stdout.readline() == b"ready\\n"
queue = archive_queue(address + "/collector.sock")
for uid in range(1, 6):
    queue.add(make_kept(uid, f"r{uid}"), make_spec())
while queue:
    time.sleep(0.01)
print("handed over", flush=True)
time.sleep(600)
"""


def test_kills_lose_nothing_but_what_a_killed_collector_had_not_handed_over(tmp_path: Path) -> None:
    rng = random.Random(20)
    served: list[str] = []
    at_risk: set[str] = set()
    with Archiving(tmp_path / "archive", memory="1", archive_interval="0.2").running() as archiving:

        def serve() -> None:
            for _ in range(rng.randrange(1, 12)):
                served.append(f"r{len(served)}")
                archiving.serve(served[-1])

        for number in range(KILLS):
            serve()
            if rng.random() < 0.5:  # else the kill comes at once
                wait_until(lambda: not archiving.metric("traces_waiting"), "all is published")
                serve()
            if number % 2:
                archiving.kill_collector()
                at_risk |= {*served} - {*in_files(archiving.folder)}
                assert archiving.collector.stdout is not None
                archiving.collector.stdout.close()
                archiving.collector = start_collector(collector_address(), epoch=number + 1)
            else:
                archiving.end(signal.SIGKILL)
                serve()
                archiving.start()
            serve()
        archiving.wait_archived(1)
        assert archiving.metric("traces_dropped_total") == 0
    names = in_files(archiving.folder)
    assert len(names) == len({*names}), "a trace is there twice"
    lost = {*served} - {*names}
    assert lost <= at_risk, "a trace is lost that no killed collector had"
    assert {*names} <= {*served}
    print(f"{KILLS} kills, {len(served)} served, {len(lost)} of {len(at_risk)} at risk lost")


def test_the_archive_of_a_killed_server_publishes_what_it_has(tmp_path: Path) -> None:
    folder, runtime = tmp_path / "archive", tmp_path / "run"
    runtime.mkdir()
    env = {**os.environ, "MOESCOPE_ROUTES_ARCHIVE": str(folder)}
    command = [sys.executable, "-c", DOOMED, f"ipc://{runtime}"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"handed over\n"
        assert in_files(folder) == []
        server.kill()
        server.wait(DEADLINE_S)
        wait_until(lambda: Archive(folder).parts(), "the archive publishes")
    assert in_files(folder) == [f"r{uid}" for uid in range(1, 6)]
