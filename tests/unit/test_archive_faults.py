"""The archive when its store, its files or another hand do what they should not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from moescope.analyze import inputs
from moescope.archive import Archive as Reading
from moescope.archive import table
from moescope.archive.layout import Part
from moescope.archive.store import Store
from moescope.trace import Source
from moescope_service.messages import pack, unpack
from moescope_service.queries import ArchiveFigures, RoutesQuery, Wanted, pack_query
from tests.unit.test_archive_files import API, COLLECTOR, NAME, Bench, make_trace


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "archive")


def damage(path: Path) -> None:
    """Change what a file has of routes; its footer and the columns of ids stay readable."""
    data = bytearray(path.read_bytes())
    column = parquet.ParquetFile(path).metadata.row_group(0)
    (place,) = (
        column.column(number).data_page_offset
        for number in range(column.num_columns)
        if column.column(number).path_in_schema.startswith("topk_weights")
    )
    data[place : place + 40] = bytes(40)
    path.write_bytes(data)


def test_a_damaged_file_ends_no_process_and_keeps_what_is_deleted_of_others(bench):
    bench.publish(*map(make_trace, "ab"))
    bench.publish(*map(make_trace, "cd"))
    damaged, _ = (bench.folder / path for path in bench.paths())
    damage(damaged)
    before = damaged.read_bytes()
    for name in "ac":
        assert bench.delete(name) == 1
    bench.pass_s(31)
    assert damaged.read_bytes() == before
    assert not any(one.is_failing for one in bench.figures())
    damaged.unlink()
    assert bench.names() == ["d"]
    damaged.write_bytes(before)
    bench.begin()
    assert bench.routes("a")[0].status == "unknown"


def test_a_query_that_waits_ends_no_process_where_its_file_is_no_archive_s_any_more(bench):
    for name in "ab":
        bench.publish(make_trace(name))
    begin_failing(bench)
    bench.archive.tick()  # it reads the newest file
    newest = bench.folder / bench.paths()[1]
    parquet.write_table(parquet.read_table(newest).replace_schema_metadata(None), newest)
    for number, name in ((98, "a"), (99, "b")):
        query = RoutesQuery(wanted=[Wanted(request_id=name)])
        bench.archive.handle(API, pack_query(number, query))
    bench.pass_s(0)
    told = [unpack(frames)[1]["number"] for peer, frames in bench.archive.outbox if peer == API]
    assert told == [98]


def test_files_of_a_later_version_are_not_looked_at_and_leave_at_their_age(tmp_path, monkeypatch):
    bench = Bench(tmp_path / "archive", archive_ttl_s=4000.0)
    monkeypatch.setattr(table, "SCHEMA_VERSION", 2)
    bench.publish(*map(make_trace, "ab"))
    assert bench.delete("a") == 1
    (path,) = (bench.folder / path for path in bench.paths())
    monkeypatch.undo()
    before = path.read_bytes()
    bench.begin()
    bench.publish(make_trace("c"))
    assert bench.delete("c") == 1
    bench.pass_s(31)
    assert [bench.routes(name)[0].status for name in "abc"] == ["unknown"] * 3
    assert path.read_bytes() == before
    assert bench.figures()[-1].files == 1
    bench.pass_s(4000)
    assert not path.exists()


def test_a_large_file_that_cannot_be_read_does_not_cost_the_others(bench):
    bench.publish(make_trace("a"))
    size_bytes = (bench.folder / bench.paths()[0]).stat().st_size
    (bench.folder / bench.paths()[0]).write_bytes(bytes(10 * size_bytes))
    small = Bench(bench.folder, archive_max_bytes=3 * size_bytes)
    small.number = 1
    small.publish(make_trace("b"))
    assert small.names() == ["b"]


def test_a_file_that_another_hand_removed_is_not_waited_for(bench):
    for name in "abc":
        bench.publish(make_trace(name))
    for path in bench.paths()[:2]:
        (bench.folder / path).unlink()
    assert bench.delete("b") == 1
    with pytest.raises(AssertionError, match="no reply"):
        bench.routes("a")
    assert bench.routes("a")[0].status == "unknown"
    bench.pass_s(31)
    assert bench.figures()[-1] == ArchiveFigures(
        files=1, bytes=(bench.folder / bench.paths()[0]).stat().st_size
    )


class Failing(Store):
    """A store of which some calls fail while told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.fails: set[str] = set()
        self.fails_late = False

    def parts(self) -> Any:
        self._check("parts")
        return super().parts()

    def opened(self, name: str) -> Any:
        if Part.parse(name):
            self._check("opened")
        return super().opened(name)

    def put(self, name: str, data: Any) -> None:
        self._check("put")
        super().put(name, data)
        if self.fails_late:
            raise OSError("no answer")

    def _check(self, name: str) -> None:
        if name in self.fails:
            raise OSError("away")


def begin_failing(bench: Bench) -> Failing:
    store = Failing(bench.folder)
    bench.archive = bench.make(store)
    bench.archive.handle(COLLECTOR, pack("archive", collector=NAME))
    return store


def test_a_store_that_is_away_for_long_leaves_no_file_out(bench):
    for name in "ab":
        bench.publish(make_trace(name))
    store = begin_failing(bench)
    store.fails = {"opened"}
    bench.archive.tick()  # it lists them
    store.fails = {"opened", "parts"}
    for _ in range(10):
        bench.pass_s(60)
    store.fails = set()
    bench.pass_s(60)
    assert [bench.routes(name)[0].status for name in "ab"] == ["finished"] * 2


def test_what_is_too_old_leaves_though_nothing_can_be_written(tmp_path):
    bench = Bench(tmp_path / "archive", archive_ttl_s=100.0)
    store = begin_failing(bench)
    bench.publish(make_trace("a"))
    store.fails = {"put"}
    bench.hand_over(make_trace("b"))
    bench.pass_s(100)
    assert bench.figures()[-1].is_failing
    assert bench.paths() == []


def test_what_says_what_is_deleted_is_missed_where_it_is_damaged(bench):
    bench.publish(*map(make_trace, "ab"))
    assert bench.delete("a") == 1
    (bench.folder / "_deleted.json").write_bytes(b"[]")
    bench.begin()
    assert bench.figures()[-1].is_failing
    (bench.folder / "_deleted.json").unlink()
    bench.pass_s(1)
    assert not bench.figures()[-1].is_failing


def test_what_was_published_without_an_answer_is_not_there_twice(bench):
    store = begin_failing(bench)
    bench.pass_s(0)
    store.fails_late = True
    bench.publish(*map(make_trace, "abc"))
    assert bench.names() == ["a", "b", "c"]
    assert bench.acknowledged() == 0
    bench.archive.handle(COLLECTOR, pack("forget", numbers=[1]))
    bench.hand_over(make_trace("d"))
    store.fails_late = False
    bench.pass_s(10)
    assert bench.names() == ["b", "c", "d"]
    assert bench.acknowledged() == 4


def test_what_was_published_without_an_answer_and_then_deleted_is_in_no_file(bench):
    store = begin_failing(bench)
    bench.pass_s(0)
    store.fails_late = True
    bench.publish(make_trace("a"))
    bench.archive.handle(COLLECTOR, pack("forget", numbers=[1]))
    store.fails_late = False
    bench.pass_s(10)
    bench.publish(make_trace("b"))
    assert bench.names() == ["b"]


def test_a_trace_that_makes_no_sense_is_told_to_be_lost(bench):
    bad = make_trace("bad")
    bad.topk_ids[0] = 99
    bench.publish(make_trace("a"))
    bench.hand_over(bad)
    bench.publish(make_trace("b"))
    told = [unpack(frames) for peer, frames in bench.archive.outbox if peer == COLLECTOR]
    assert [values for kind, values in told if kind == "lost"] == [{"numbers": [2]}]
    assert bench.names() == ["a", "b"]


def test_an_id_that_comes_late_finds_what_is_not_published_yet(bench):
    bench.hand_over(make_trace("a"), make_trace("b"))
    bench.archive.handle(COLLECTOR, pack("alias", ids=[(2, "late"), (7, "of none")]))
    assert [one.request_id for one in bench.routes("late")[1]] == ["b"]
    bench.pass_s(10)
    assert [one.request_id for one in bench.routes("late")[1]] == ["b"]


def test_a_clock_that_is_set_back_holds_nothing_up(bench):
    store = begin_failing(bench)
    store.fails = {"put"}
    bench.publish(make_trace("a"))
    bench.now_s -= 7200
    store.fails = set()
    bench.pass_s(1)
    assert bench.names() == ["a"]
    bench.hand_over(make_trace("b"))
    bench.now_s -= 7200
    bench.pass_s(1)
    assert bench.names() == ["b", "a"]
    assert bench.delete("a") == 1
    bench.now_s -= 7200
    bench.pass_s(31)
    assert bench.names() == ["b"]


def test_a_trace_of_a_very_long_context_is_read(bench):
    """Of more than 256 MiB of weights as float32; most rows are missing, which takes no time."""
    shape = (6000, 12, 1024)
    ids, source = np.zeros(shape, np.uint8), np.full(shape[0], Source.MISSING, np.uint8)
    ids[-1], source[-1] = 7, Source.COMPUTED
    bench.publish(
        make_trace(
            "long", num_tokens=shape[0] + 1, num_hidden_layers=12, complete=False, source=source,
            layers=np.arange(12, dtype=np.int32), topk_ids=ids, topk_weights=None,
        )
    )  # fmt: skip
    (archived,) = Reading(bench.folder).scan()
    assert np.array_equal(archived.trace.topk_ids, ids)


def test_nothing_is_left_of_a_list_of_deleted_traces_that_was_not_written_whole(bench):
    left = bench.folder / "._deleted.0123.new"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"{")
    bench.begin()
    assert not left.exists()


def test_what_is_published_or_removed_is_so_after_the_machine_failed(tmp_path, monkeypatch):
    """A directory's own entry is in the one above, which is flushed on its own."""
    flushed: list[str] = []
    fsync = os.fsync

    def note(file: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    store = Store(str(tmp_path / "archive"))
    part = Part(500_000, NAME, 1, 1).path
    store.put(part, b"x")
    folders = [str(store.path / folder) for folder in Path(part).parents]
    assert flushed[1:] == folders
    flushed.clear()
    store.remove(part)
    assert flushed == folders[-1:]


def test_a_part_of_an_archive_is_named_from_within(bench, monkeypatch):
    """Its directories have an equals sign, as labels do."""
    bench.publish(make_trace("a"))
    monkeypatch.chdir(bench.folder)
    for name in ("date=2027-01-15", "date=2027*", "date=2027-01-15/hour=0*"):
        assert [str(one.path) for one in inputs.find([name])] == bench.paths()
    (one,) = inputs.find(["label=date=2027*"])
    assert one.label == "label"
