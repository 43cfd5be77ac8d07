"""The archive of a real deployment: what is in it, who finds it, what kills and full disks cost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moescope import Client
from moescope.archive import Archive
from moescope.archive.store import Store
from moescope.errors import MoescopeError, RequestNotFoundError
from moescope_service.archive.process import locked
from moescope_service.errors import RefusedError
from moescope_service.imports import check_archive
from moescope_service.metric_names import METRICS
from moescope_service.runtime import archive_address, collector_address
from moescope_service.settings import Settings
from tests.waiting import DEADLINE_S, scrape, wait_until

from .deployment import Deployment, start_collector, stop_collector
from .disks import fill

SOON = {"archive_interval": "0.05"}


def start_archive(**env: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "moescope_service.archive", archive_address(),
         str(os.getpid()), "0"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> None:
    process.send_signal(number)
    process.wait(DEADLINE_S)
    assert process.stdout is not None
    process.stdout.close()


class Archiving(Deployment):
    """A deployment whose archive's process the test starts and ends."""

    def __init__(self, folder: Path, **flags: object) -> None:
        super().__init__(archive=str(folder), **{**SOON, **flags})
        self.folder = folder
        self.archive: subprocess.Popen[str] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[Archiving]:
        with super().running():
            self.start()
            try:
                yield self
            finally:
                stop_collector(self.collector)  # before the archive, as a server does
                self.end()

    def start(self, **env: str) -> None:
        self.archive = start_archive(**env)

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.archive is not None:
            stop(self.archive, number)
            self.archive = None

    def serve(self, name: str, **options: object) -> None:
        ended = self.frontend.serve(name, **options)
        self.engine.step(finished=ended)

    def metric(self, name: str) -> float:
        """Return a metric of the archive, summed over its labels."""
        start = f"moescope_archive_{name}{{"

        def told() -> list[str]:
            return [one for one in scrape(self.url).splitlines() if one.startswith(start)]

        lines = wait_until(told, "workers have told a new collector what they capture")
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def wait_archived(self, count: int) -> None:
        wait_until(
            lambda: self.metric("traces_total") >= count and not self.metric("traces_waiting"),
            f"{count} traces are archived",
        )


OURS = [
    spec.sample_name.removeprefix("moescope_archive_")
    for spec in METRICS.values()
    if spec.name.startswith("moescope_archive_")
]


def in_files(folder: Path) -> list[str]:
    return [one.trace.request_id for one in Archive(folder).scan()]


@pytest.fixture
def archiving(tmp_path):
    with Archiving(tmp_path / "archive", memory="1").running() as deployment:
        yield deployment


def test_what_the_store_does_not_keep_is_found_in_the_archive(archiving):
    archiving.serve("a")
    archiving.serve("b", n=2)
    archiving.wait_archived(3)
    with Client(archiving.url) as client:
        (trace,) = client.routes("a")
        assert (trace.num_tokens, trace.complete, trace.token_ids.tolist()) == (
            8, True, [11, 12, 13, 14, 15, 21, 22, 23],
        )  # fmt: skip
        assert [one.index for one in client.routes("b")] == [0, 1]
        (page,) = client.routes("a", start=4)
        assert page.topk_ids.tolist() == trace.topk_ids[4:].tolist()
        with pytest.raises(RequestNotFoundError):
            client.routes("c")
    assert in_files(archiving.folder) == ["a", "b", "b"]
    shown = {name: archiving.metric(name) for name in OURS}
    assert shown.pop("bytes") > 0
    assert shown == {
        "traces_total": 3, "traces_dropped_total": 0, "traces_waiting": 0, "up": 1,
        "files": len(Archive(archiving.folder).parts()),
    }  # fmt: skip


def test_an_archive_process_that_is_killed_loses_nothing(archiving):
    archiving.serve("a")
    archiving.wait_archived(1)
    archiving.end(signal.SIGKILL)
    archiving.serve("b")
    wait_until(lambda: archiving.metric("up") == 0, "the collector notices")
    archiving.start()
    archiving.wait_archived(2)
    archiving.serve("c")
    archiving.wait_archived(3)
    assert in_files(archiving.folder) == ["a", "b", "c"]


def test_what_an_archive_process_publishes_at_its_end_is_not_there_twice(tmp_path):
    with Archiving(tmp_path / "archive", archive_interval="3600").running() as archiving:
        for name in ("a", "b"):
            archiving.serve(name)
        wait_until(lambda: archiving.metric("traces_waiting") == 2, "they wait")
        archiving.end()  # the collector may hear what was published, or not
        archiving.start(MOESCOPE_ROUTES_ARCHIVE_INTERVAL="0.05")
        archiving.serve("c")
        archiving.wait_archived(3)
        assert in_files(archiving.folder) == ["a", "b", "c"]


def test_a_collector_that_is_killed_costs_nothing_that_it_had_handed_over(archiving):
    archiving.serve("a")
    archiving.wait_archived(1)
    archiving.kill_collector()
    archiving.collector.stdout.close()
    archiving.collector = start_collector(collector_address(), epoch=1)
    archiving.serve("b")
    archiving.wait_archived(1)
    assert in_files(archiving.folder) == ["a", "b"]
    with Client(archiving.url) as client:
        assert client.routes("a")[0].num_tokens == 8


def test_a_deleted_request_is_in_no_answer_and_leaves_its_file(archiving):
    for name in ("a", "b"):
        archiving.serve(name)
    archiving.wait_archived(2)
    with Client(archiving.url) as client:
        assert client.delete("a") == 1
        with pytest.raises(RequestNotFoundError):
            client.delete("a")
        archiving.end(signal.SIGKILL)  # before the compaction
        archiving.start()
        assert client.routes("b")[0].request_id == "b"
        with pytest.raises(MoescopeError):
            client.routes("a")
    wait_until(lambda: in_files(archiving.folder) == ["b"], "it has left its file")


def test_a_request_that_is_deleted_while_it_waits_is_not_archived(tmp_path):
    with Archiving(tmp_path / "archive", archive_interval="3600").running() as archiving:
        for name in ("a", "b"):
            archiving.serve(name)
        wait_until(lambda: archiving.metric("traces_waiting") == 2, "they wait")
        with Client(archiving.url) as client:
            assert client.delete("a") == 1
    assert in_files(archiving.folder) == ["b"]


def test_each_key_finds_and_deletes_what_it_made(tmp_path):
    keys = {"api_key": ["alice", "bob"], "private": "on", "admin_key": "admin", "memory": "1"}
    with Archiving(tmp_path / "archive", **keys).running() as archiving:
        for key in ("alice", "bob"):
            archiving.complete(key, {"Authorization": f"Bearer {key}"})
        archiving.wait_archived(2)
        with (
            Client(archiving.url, api_key="alice") as alice,
            Client(archiving.url, api_key="bob") as bob,
            Client(archiving.url, api_key="admin") as admin,
        ):
            assert alice.routes("cmpl-alice")[0].num_tokens == 8
            with pytest.raises(MoescopeError):
                bob.routes("cmpl-alice")
            with pytest.raises(RequestNotFoundError):
                bob.delete("cmpl-alice")
            assert admin.routes("cmpl-bob")[0].num_tokens == 8
            assert alice.delete("cmpl-alice") == 1
            assert admin.delete("cmpl-bob") == 1


def test_the_oldest_files_make_room(tmp_path):
    with Archiving(tmp_path / "archive", archive_max_bytes="30000").running() as archiving:
        for number in range(8):
            archiving.serve(f"r{number}")
            archiving.wait_archived(number + 1)
        assert 0 < archiving.metric("bytes") <= 30_000
    names = in_files(archiving.folder)
    assert names
    assert names == [f"r{number}" for number in range(8)][-len(names) :]
    assert len(names) < 8


def test_a_second_server_of_a_directory_is_refused(tmp_path):
    store = Store(str(tmp_path / "archive"))
    with locked(store), pytest.raises(OSError, match="another server writes it"), locked(store, 0):
        pass


def test_a_full_disk_costs_nothing_but_time(small_disk):
    folder = small_disk / "archive"
    with Archiving(folder).running() as archiving:
        archiving.serve("a")
        archiving.wait_archived(1)
        filler = fill(small_disk)
        archiving.serve("b")
        wait_until(lambda: archiving.metric("up") == 0, "the archive fails")
        assert archiving.metric("traces_waiting") == 1
        filler.unlink()
        archiving.wait_archived(2)
        assert archiving.metric("up") == 1
    assert in_files(folder) == ["a", "b"]
    assert not list(folder.rglob("*.new"))


def test_a_server_without_pyarrow_or_with_another_place_is_refused():
    code = """
import sys
sys.modules["pyarrow"] = None
from moescope_service.errors import RefusedError
from moescope_service.imports import check_archive
try:
    check_archive("/data")
except RefusedError as error:
    print(error)
"""
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.stdout == (
        "--routes-archive: archives need pyarrow, moescope's extra `arrow`: pip install pyarrow\n"
    )
    with pytest.raises(RefusedError, match="--routes-archive: invalid archive 'gs://bucket'"):
        check_archive("gs://bucket")
    counts = {"MOESCOPE_ROUTES_MODE": "counts", "MOESCOPE_ROUTES_ARCHIVE": "/data"}
    with pytest.raises(ValueError, match="there are no routes to archive"):
        Settings.from_env(counts)
