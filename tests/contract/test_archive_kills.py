"""Kills parts of an archiving deployment under load, and accounts for every trace."""

from __future__ import annotations

import collections
import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from pyarrow import parquet

from moescope.archive import Archive
from tests.waiting import DEADLINE_S, scrape, wait_until

from .chain import Load, Served
from .fake_engine import OUTPUT, PROMPT, rows_of
from .test_archive import in_files

KILLS = int(os.environ.get("MOESCOPE_TEST_KILLS", "4"))
KINDS = ("archive", "collector", "server", "all")
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


class Account:
    """What became of every request, from one moment at which all is settled to the next."""

    def __init__(self, served: Served, load: Load) -> None:
        self.served, self.load = served, load
        self.at_risk: set[str] = set()
        self.dropped = 0.0
        """What this collector had counted as dropped before."""
        self.begin = 0
        """How many requests were served before."""

    def kill(self, kind: str) -> None:
        self.served.kill(kind)
        if kind != "archive":  # what it had not handed over may be gone
            self.at_risk |= {*map(named, [*self.load.asked])} - {*in_files(self.served.folder)}
            self.dropped = 0.0
        if kind in ("server", "all"):
            self.served.start()

    def settle(self) -> tuple[int, int, int]:
        """Wait for the rest; return how many were served, lost at risk, and dropped and counted.

        What is missing and was not at risk is what the collector that lives has counted. It may
        have counted more: what was at risk is told to it again.
        """
        missing, told = wait_until(self._settled, "all is in files, was at risk or is counted")
        dropped = told["archive_traces_dropped_total"] - self.dropped
        assert dropped <= len(missing - self.at_risk) + len(self.at_risk)
        assert not dropped or self.served.is_small
        assert told["archive_traces_total"] == num_of_newest_collector(self.served.folder)
        figures = len(self.load.served) - self.begin, len(missing & self.at_risk), int(dropped)
        self.at_risk, self.begin = set(), len(self.load.served)
        self.dropped = told["archive_traces_dropped_total"]
        return figures

    def _settled(self) -> tuple[set[str], collections.Counter[str]] | None:
        told = totals(self.served.url)
        archived, dropped = told["archive_traces_total"], told["archive_traces_dropped_total"]
        if told["archive_up"] != 1 or not archived or told["traces_total"] != archived + dropped:
            return None
        missing = {*map(named, self.load.served[self.begin :])} - {*in_files(self.served.folder)}
        beyond = len(missing - self.at_risk)
        is_settled = beyond <= dropped - self.dropped
        return (missing, told) if is_settled else None


def totals(url: str) -> collections.Counter[str]:
    """Return our metrics, each summed over its labels."""
    found: collections.Counter[str] = collections.Counter()
    for line in scrape(url).splitlines():
        name, _, value = re.sub("{.*}", "", line).partition(" ")
        if name.startswith("moescope_"):
            found[name.removeprefix("moescope_")] += float(value)  # type: ignore[assignment]
    return found


def named(name: str) -> str:
    """Return the id of a response to a request of a name."""
    return f"cmpl-{name}"


def num_of_newest_collector(folder: Path) -> int:
    """Return how many traces there are of the collector that started last."""
    parts = Archive(folder).parts()
    newest = max((part.collector for part in parts), default="")
    files = [folder / part.path for part in parts if part.collector == newest]
    return sum(len(parquet.read_table(one, columns=["number"])["number"].unique()) for one in files)


def check_files(folder: Path) -> None:
    """Every file can be read, and every trace in it is whole and as it was routed."""
    paths = sorted(folder.rglob("*.parquet"))
    assert len(paths) == len(Archive(folder).parts())
    num_rows = sum(parquet.read_table(path).num_rows for path in paths)
    traces = [one.trace for one in Archive(folder).scan()]
    assert num_rows == sum(trace.num_tokens for trace in traces)
    for trace in traces:
        assert trace.num_rows == trace.num_tokens - 1
        here = trace.present
        assert here.all() == trace.complete
        np.testing.assert_array_equal(
            trace.topk_ids[here], rows_of(0, trace.num_rows)[0][here], trace.request_id
        )
        if trace.complete:
            assert trace.token_ids is not None
            assert trace.token_ids.tolist() == [*PROMPT, *OUTPUT]
    assert not list(folder.rglob("*.new"))


def test_kills_under_load_lose_what_was_at_risk_or_is_counted(tmp_path: Path) -> None:
    rng, folder = random.Random(5), tmp_path / "archive"
    decks = (kind for _ in range(KILLS) for kind in rng.sample(KINDS, len(KINDS)))
    kinds = collections.deque(itertools.islice(decks, KILLS))
    with Served(folder) as served, Load(lambda: served.url) as load:
        account = Account(served, load)
        lines = []
        while kinds:
            load.resume()
            now = [kinds.popleft() for _ in range(min(rng.choice((1, 1, 2)), len(kinds)))]
            for kind in now:
                load.wait(rng.randrange(40))
                account.kill(kind)
            load.wait(rng.randrange(20, 80))
            load.pause()
            lines.append((now, *account.settle()))
    names = in_files(folder)
    assert len(names) == len({*names}), "a trace is there twice"
    assert {*names} <= {*map(named, load.asked)}
    check_files(folder)
    for line in lines:
        print("killed {}: {} served, {} at risk lost, {} dropped and counted".format(*line))
    print(f"{KILLS} kills, {len(load.served)} served, {len(names)} in files")


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
