"""The archive without its socket: what is published when, found, deleted and removed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.simulation.parts import make_spec
from moescope.analyze import inputs
from moescope.archive import Archive as Reading
from moescope.archive import reading, table
from moescope.archive.store import Store
from moescope.arrow import dump_parquet
from moescope.cli import main
from moescope.errors import FormatError
from moescope.formats import load_npz
from moescope.trace import RouteTrace
from moescope_service.archive import core, files
from moescope_service.archive_messages import Handed, figures_of, pack_traces
from moescope_service.messages import pack, unpack
from moescope_service.queries import (
    ArchiveFigures,
    DeleteQuery,
    RoutesQuery,
    Wanted,
    pack_query,
    unpack_reply,
)
from moescope_service.settings import Settings

COLLECTOR, API = b"collector", b"api"
NAME = "0123456789ab00000001"
START_S = 1_800_000_000.0  # a full hour


def make_trace(request_id: str, *, index: int = 0, num_tokens: int = 6, **changes: Any) -> Any:
    rng = np.random.default_rng(num_tokens)
    shape = (num_tokens - 1, 2, 2)
    values: dict[str, Any] = {
        "request_id": request_id, "index": index, "model": "tiny", "num_experts": 8,
        "num_hidden_layers": 5, "layers": np.array([1, 3], np.int32),
        "topk_ids": rng.integers(0, 8, shape).astype(np.uint8),
        "topk_weights": rng.random(shape).astype(np.float16),
        "source": np.zeros(num_tokens - 1, np.uint8),
        "weights_versions": np.array([[0, 4]], np.int64)[: num_tokens - 1],
        "token_ids": np.arange(num_tokens, dtype=np.int32), "prompt_len": 1,
        "num_tokens": num_tokens, "cached_len": 0, "finish_reason": "stop", "complete": True,
        "created_s": START_S - 1, "versions": {"moescope": "0"},
    }  # fmt: skip
    return RouteTrace(**(values | changes))


class Bench:
    """An archive and a collector that hands traces over, message by message."""

    def __init__(self, folder: Path | str, **settings: Any) -> None:
        self.folder: Any = folder
        self.now_s, self.passed_s = START_S, 0.0
        self.settings = Settings(archive=str(folder), archive_interval_s=10.0, **settings)
        self.number, self._query = 0, 0
        self.begin()

    def begin(self) -> None:
        """Start the process, in place of one that was killed where there was one."""
        self.archive = self.make(Store(str(self.folder)))
        self.archive.handle(COLLECTOR, pack("archive", collector=NAME))
        self.pass_s(0)

    def make(self, store: Store) -> core.Archive:
        return core.Archive(store, self.settings, lambda: self.now_s, lambda: self.passed_s)

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        self.passed_s += seconds
        self.archive.tick()
        while self.archive.is_busy:
            self.archive.tick()

    def hand_over(self, *traces: Any, owner: str | None = None, ids: Any = ()) -> None:
        handed = []
        for trace in traces:
            self.number += 1
            handed.append(Handed(number=self.number, finished_s=self.now_s,
                                 ids=(trace.request_id, *ids), owner=owner))  # fmt: skip
        frames = pack_traces(make_spec(), handed, traces)
        self.archive.handle(COLLECTOR, [bytes(memoryview(f).cast("B")) for f in frames])

    def publish(self, *traces: Any, **changes: Any) -> None:
        self.hand_over(*traces, **changes)
        self.pass_s(10)

    def acknowledged(self) -> int:
        """Return up to which number traces are published, as the collector was told."""
        told = [unpack(frames) for peer, frames in self.archive.outbox if peer == COLLECTOR]
        return max((values["last"] for kind, values in told if kind == "archived"), default=0)

    def figures(self) -> list[ArchiveFigures]:
        """Return what the collector was told of the files."""
        told = [unpack(frames) for peer, frames in self.archive.outbox if peer == COLLECTOR]
        return [figures_of(values) for kind, values in told if kind == "figures"]

    def ask(self, query: Any) -> Any:
        self._query += 1
        self.archive.handle(API, pack_query(self._query, query))
        for peer, frames in self.archive.outbox:
            _, values = unpack(frames)
            if peer == API and values["number"] == self._query:
                return unpack_reply(query.reply, values, frames)
        raise AssertionError("no reply")

    def routes(self, request_id: str, start: int = 0, **limits: Any) -> Any:
        reply = self.ask(RoutesQuery(wanted=[Wanted(request_id=request_id, start=start)], **limits))
        return reply.found[0], reply.traces()

    def delete(self, request_id: str, **options: Any) -> int:
        return int(self.ask(DeleteQuery(request_id=request_id, **options)).deleted)

    def names(self) -> list[str]:
        return [one.trace.request_id for one in Reading(self.folder).scan()]

    def paths(self) -> list[str]:
        return [one.path for one in Reading(self.folder).parts()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "archive")


def same(one: Any, other: Any) -> bool:
    names = RouteTrace.__dataclass_fields__
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_a_file_is_published_when_its_first_trace_is_old_enough(bench):
    bench.hand_over(make_trace("a"))
    bench.pass_s(9)
    assert bench.paths() == []
    bench.hand_over(make_trace("b"))
    bench.pass_s(1)
    assert bench.names() == ["a", "b"]
    assert bench.acknowledged() == 2


def test_a_file_is_published_when_it_is_large_enough(bench, monkeypatch):
    monkeypatch.setattr(core, "FILE_BYTES", 3 * 2048)
    for name in "abc":
        assert bench.paths() == []
        bench.hand_over(make_trace(name))
        bench.pass_s(0)
    assert bench.names() == ["a", "b", "c"]


def test_each_hour_has_files_of_its_own(bench):
    bench.now_s += 3595
    bench.hand_over(make_trace("a"))
    bench.now_s += 10
    bench.publish(make_trace("b"))
    assert bench.paths() == [
        f"date=2027-01-15/hour=08/part-{NAME}-000000001-000000001.parquet",
        f"date=2027-01-15/hour=09/part-{NAME}-000000002-000000002.parquet",
    ]


@pytest.mark.parametrize("is_published", [True, False])
def test_a_trace_comes_back_as_it_was_and_in_pages(bench, is_published):
    traces = [
        make_trace("long", num_tokens=40),
        make_trace("one", num_tokens=1, weights_versions=np.empty((0, 2), np.int64)),
        make_trace("labels", weight_labels=[{"version": "v1", "start": 0, "end": 3}]),
    ]
    bench.hand_over(make_trace("before"), *traces)
    if is_published:
        bench.pass_s(10)
    for trace in traces:
        found, (back,) = bench.routes(trace.request_id)
        assert (found.status, found.next_start) == ("finished", None)
        assert same(back, trace)
    found, (page,) = bench.routes("long", start=7, limit=5)
    assert found.next_start == 12
    assert same(page, traces[0].page(7, 5))
    found, (page,) = bench.routes("long", start=30)
    assert same(page, traces[0].page(30, 9))
    assert bench.routes("long", start=99)[1][0].num_rows == 0
    small = bench.routes("long", max_bytes=1)
    assert (small[0].next_start, small[1][0].num_rows) == (1, 1)


def test_an_id_finds_the_newest_request_with_all_its_choices(bench):
    for second in (1, 2):
        choices = [make_trace("a", index=one, created_s=START_S + second) for one in (1, 0)]
        bench.publish(*choices)
    found, traces = bench.routes("a")
    assert found.lacks_older
    assert [(one.created_s, one.index) for one in traces] == [(START_S + 2, 0), (START_S + 2, 1)]
    assert [one.index for one in bench.routes("a", index=1)[1]] == [1]
    assert bench.routes("a", index=7)[0].indices == [0, 1]


def test_the_id_of_a_response_finds_that_one_alone(bench):
    bench.publish(make_trace("a"), ids=["x"])
    bench.publish(make_trace("x", created_s=START_S - 5))
    assert [one.request_id for one in bench.routes("x")[1]] == ["x"]
    assert bench.delete("x") == 1
    assert [one.request_id for one in bench.routes("x")[1]] == ["a"]
    assert bench.delete("x", own_only=True) == 0


def test_what_an_owner_made_is_found_by_that_owner(bench):
    bench.publish(make_trace("a"), owner="o")
    assert bench.routes("a", owner="o")[0].status == "finished"
    for owner in ("other", ""):
        assert bench.routes("a", owner=owner)[0].status == "unknown"
        assert bench.delete("a", owner=owner) == 0
    assert bench.delete("a", owner="o") == 1


def test_a_killed_process_leaves_whole_files_and_knows_what_it_has(bench):
    bench.publish(make_trace("a"))
    bench.hand_over(make_trace("b"))
    left = bench.folder / bench.paths()[0]
    left.with_name(".part-x.new").write_bytes(b"half")
    bench.begin()
    assert bench.acknowledged() == 1
    assert not list(bench.folder.rglob("*.new"))
    assert bench.routes("a")[0].status == "finished"
    bench.number = 0
    bench.publish(make_trace("a"), make_trace("b"))  # the collector was not told
    assert bench.names() == ["a", "b"]


def test_what_is_deleted_stays_deleted_and_leaves_its_file_within_a_minute(bench):
    bench.publish(*map(make_trace, "abc"))
    assert bench.delete("b") == 1
    assert bench.routes("b")[0].status == "unknown"
    assert bench.names() == ["a", "b", "c"]
    bench.begin()
    assert bench.routes("b")[0].status == "unknown"
    assert bench.names() == ["a", "c"]
    assert bench.delete("a") == 1
    bench.pass_s(31)
    assert bench.names() == ["c"]
    assert bench.delete("c") == 1
    bench.pass_s(31)
    assert bench.paths() == []
    assert [path.name for path in bench.folder.iterdir()] == ["_deleted.json"]


def test_the_collector_s_word_deletes_what_is_published(bench):
    bench.publish(*map(make_trace, "abc"))
    bench.hand_over(make_trace("d"))
    bench.archive.handle(COLLECTOR, pack("forget", numbers=[2, 4]))
    for name, status in zip("abcd", ("finished", "unknown", "finished", "unknown"), strict=True):
        assert bench.routes(name)[0].status == status


def test_the_collector_s_word_holds_though_the_files_are_not_read_yet(bench):
    bench.publish(*map(make_trace, "ab"))
    archive = bench.make(Store(str(bench.folder)))
    archive.handle(COLLECTOR, pack("archive", collector=NAME))
    archive.handle(COLLECTOR, pack("forget", numbers=[1]))
    bench.archive = archive
    bench.pass_s(0)
    assert [bench.routes(name)[0].status for name in "ab"] == ["unknown", "finished"]


def test_traces_leave_at_their_age(tmp_path):
    bench = Bench(tmp_path / "archive", archive_ttl_s=100.0)
    bench.publish(make_trace("a"))
    bench.pass_s(60)
    bench.publish(make_trace("b"))
    bench.pass_s(20)
    assert bench.names() == ["b"]
    assert bench.routes("a")[0].status == "unknown"


def test_the_oldest_files_make_room(bench):
    for name in "abc":
        bench.publish(make_trace(name))
    size_bytes = max((bench.folder / path).stat().st_size for path in bench.paths())
    small = Bench(bench.folder, archive_max_bytes=2 * size_bytes)
    assert small.names() == ["b", "c"]


def test_a_broken_file_is_left_alone(bench):
    for name in "ab":
        bench.publish(make_trace(name))
    broken = bench.folder / bench.paths()[0]
    broken.write_bytes(b"PAR1 no more")
    bench.begin()
    assert bench.routes("a")[0].status == "unknown"
    assert bench.routes("b")[0].status == "finished"
    assert broken.exists()


def test_an_archive_is_scanned_by_time_model_and_adapter(bench):
    bench.publish(make_trace("a"), make_trace("b", lora="math"))
    bench.now_s += 3600
    bench.publish(make_trace("c", lora="code"), make_trace("d"))

    def names(**chosen):
        return [one.trace.request_id for one in Reading(bench.folder).scan(**chosen)]

    assert names() == ["a", "b", "c", "d"]
    assert names(until_s=START_S + 3600) == ["a", "b"]
    assert names(since_s=START_S + 1) == ["c", "d"]
    assert names(lora="math") == ["b"]
    assert names(lora="", since_s=START_S) == ["a", "d"]
    assert names(model="other") == []
    assert len(Reading(bench.folder).parts(since_s=START_S + 3600)) == 1


def test_traces_that_span_row_groups_are_whole(bench, monkeypatch):
    monkeypatch.setattr(files, "batch_rows", lambda shared: 7)
    monkeypatch.setattr(reading, "batch_rows", lambda shared: 5)
    traces = [make_trace(str(count), num_tokens=count) for count in (3, 20, 1, 11)]
    traces[2] = make_trace("1", num_tokens=1, weights_versions=np.empty((0, 2), np.int64))
    bench.publish(*traces)
    back = [one.trace for one in Reading(bench.folder).scan()]
    assert [same(*pair) for pair in zip(back, traces, strict=True)] == [True] * 4
    for trace in traces:
        assert same(bench.routes(trace.request_id)[1][0], trace)


def test_servers_of_one_archive_are_read_together_and_leave_each_other_alone(tmp_path):
    root = tmp_path / "archive"
    plain = Bench(root, archive_ttl_s=3600.0)  # of before there was another one
    one = Bench(root / "server=one", archive_ttl_s=100.0)
    two = Bench(root / "server=two")  # the same collector and numbers: the same names of files
    two.publish(make_trace("b", model="other"), make_trace("c", model="other"))
    one.publish(make_trace("a"))
    kept = {path: path.read_bytes() for path in root.rglob("server=two/**/*.parquet")}
    assert len(kept) == 1
    left = next(iter(kept)).with_name(".part-x.new")
    left.write_bytes(b"in the middle of it")

    def found(**chosen: Any) -> list[tuple[str, str]]:
        return [(e.trace.model, e.trace.request_id) for e in Reading(root).scan(**chosen)]

    assert found() == [("tiny", "a"), ("other", "b"), ("other", "c")]
    assert found(model="other") == [("other", "b"), ("other", "c")]
    assert {part.server for part in Reading(root).parts()} == {"one", "two"}
    for other in (one, plain):
        other.begin()
        assert other.routes("b")[0].status == "unknown"
        assert other.delete("b") == 0
    one.publish(make_trace("d"))
    assert one.delete("d") == 1
    one.pass_s(31)  # rewritten without what was deleted
    assert found(model="tiny") == [("tiny", "a")]
    for other in (one, plain):
        other.pass_s(10_000)
    assert found() == [("other", "b"), ("other", "c")]
    assert {path: path.read_bytes() for path in kept} == kept
    assert left.exists()
    two.begin()
    assert two.routes("b")[0].status == "finished"
    assert plain.figures()[-1].files == 0


def test_what_is_not_the_directory_of_a_server_is_no_part_of_the_archive(bench):
    bench.publish(make_trace("a"))
    (path,) = bench.paths()
    for folder in ("backup", "server=", "server=a/server=b"):
        copy = bench.folder / folder / path
        copy.parent.mkdir(parents=True)
        copy.write_bytes((bench.folder / path).read_bytes())
    assert bench.names() == ["a"]


def test_a_later_schema_is_refused(bench, monkeypatch):
    monkeypatch.setattr(table, "SCHEMA_VERSION", 2)
    bench.publish(make_trace("a"))
    monkeypatch.undo()
    with pytest.raises(FormatError, match="schema version 2"):
        list(Reading(bench.folder).scan())


def test_analyze_reads_an_archive_as_it_reads_a_file(bench, tmp_path):
    traces = [make_trace("a", num_tokens=30), make_trace("b", num_tokens=20, index=1)]
    bench.publish(traces[0])
    bench.publish(traces[1])
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "all.parquet").write_bytes(dump_parquet(traces))
    read = []
    for folder in (bench.folder, tmp_path / "plain"):
        found = inputs.find([str(folder)])
        batches = [batch for one in found for batch in inputs.read(one)]
        read.append(
            (
                batches[0].model,
                np.concatenate([batch.rows.topk_ids for batch in batches]).tolist(),
                [(one.key, one.text.prompt_len, [*one.text.token_ids]) for one in batches],
            )
        )  # fmt: skip
    assert read[0] == read[1]


def run(*arguments: str) -> int | str:
    """The exit status of moescope."""
    try:
        return main([*arguments])
    except SystemExit as error:
        return error.code or 0


def test_diff_and_convert_read_an_archive(bench, tmp_path, capsys):
    traces = [make_trace("a", num_tokens=30), make_trace("b", num_tokens=20)]
    for trace in traces:
        trace.topk_ids[..., 1] = (trace.topk_ids[..., 0] + 1) % 8  # no expert twice
    bench.publish(*traces)
    (tmp_path / "plain.parquet").write_bytes(dump_parquet(traces))
    plain, out = str(tmp_path / "plain.parquet"), tmp_path / "out"
    assert run("diff", str(bench.folder), plain, "-o", str(out)) == 0
    said = capsys.readouterr().out
    assert "2 of 2 and 2 sequences are paired: 2 by id" in said
    assert "48 rows compared" in said
    with (out / "diff.csv").open() as file:
        layers = list(csv.DictReader(file))
    assert [layer["layer"] for layer in layers] == ["1", "3"]
    assert not any(
        float(layer[name]) for layer in layers for name in ("rows", "near_ties", "order", "weights")
    )
    assert run("convert", str(bench.folder), "-o", str(tmp_path / "all.npz")) == 0
    back = load_npz((tmp_path / "all.npz").read_bytes())
    assert [same(*pair) for pair in zip(back, traces, strict=True)] == [True, True]
