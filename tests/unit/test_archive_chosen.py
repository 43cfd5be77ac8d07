"""What the commands read of an archive: by time, model and adapter."""

from __future__ import annotations

import dataclasses
import datetime as dt

import numpy as np
import orjson
import pytest
from analysis_reference import random_trace
from pyarrow import parquet
from rich.console import Console

from moescope import arrow, formats, route_files
from moescope.analyze import inputs
from moescope.analyze import run as analyzing
from moescope.archive import Archive, Archived
from moescope.archive.layout import Part
from moescope.archive.table import to_table
from moescope.cli import main
from moescope.errors import CommandError, FormatError
from moescope.filters import Filter
from moescope.trace import Source

DAY = dt.datetime(2027, 1, 15, tzinfo=dt.UTC)
START_S = DAY.timestamp()
HOUR_S = 3600
SPEC = {"device": "NVIDIA H200", "seed": 7}
LATER = Filter(since_s=START_S + HOUR_S + 60)
LETTERS = "abcdefgh"
NAMES = ("a", "b", "again")
COMMANDS = ("analyze", "convert", "view", "diff")
CHOICES = [
    ({"since_s": START_S + HOUR_S}, "cdefgh"),
    ({"until_s": START_S + 2 * HOUR_S}, "abcd"),
    ({"since_s": START_S + 60, "until_s": START_S + HOUR_S + 60}, "bc"),
    ({"since_s": START_S + 61}, "cdefgh"),
    ({"model": "large"}, "gh"),
    ({"model": "tiny"}, "abcdef"),
    ({"lora": "math"}, "bfh"),
    ({"lora": "code"}, "d"),
    ({"lora": ""}, "aceg"),
    ({"lora": "math", "since_s": START_S + HOUR_S, "model": "tiny"}, "f"),
]


def archived(number: int, *, model: str = "tiny", lora: str | None = None) -> Archived:
    """A trace; two in an hour, one minute apart."""
    hour, minute = divmod(number, 2)
    trace = dataclasses.replace(
        random_trace(number, num_rows=12 + number),
        model=model,
        lora=lora,
        request_id=LETTERS[number],
        token_ids=np.arange(13 + number, dtype=np.int32),
        prompt_len=3,
    )
    finished_s = START_S + HOUR_S * hour + 60 * minute
    return Archived(trace=trace, number=number + 1, finished_s=finished_s)


ENTRIES = [
    archived(0), archived(1, lora="math"), archived(2), archived(3, lora="code"),
    archived(4), archived(5, lora="math"),
    archived(6, model="large"), archived(7, model="large", lora="math"),
]  # fmt: skip


@pytest.fixture
def archive(tmp_path):
    """Four hours, a file each: two adapters, two models.

    Two traces are in two row groups, in one, in three that begin within them, and in one.
    """
    folder = tmp_path / "routes"
    for hour, ends in enumerate(([13], [], [5, 20], [])):
        both = ENTRIES[2 * hour : 2 * hour + 2]
        path = (
            folder
            / Part(
                int(START_S) // HOUR_S + hour,
                "0123456789ab00000001",
                both[0].number,
                both[1].number,
            ).path
        )
        path.parent.mkdir(parents=True)
        table = to_table(both, spec={**SPEC, "model": both[0].trace.model})
        with parquet.ParquetWriter(path, table.schema, compression="zstd") as writer:
            for rows in np.split(np.arange(len(table)), ends):
                writer.write_table(table.slice(rows[0], len(rows)))
    return folder


def files_of(archive):
    return sorted(archive.rglob("*.parquet"))


def said(capsys):
    """What is on standard error, without typer's frame."""
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def run(*arguments):
    """The exit status of moescope."""
    try:
        return main([*map(str, arguments)])
    except SystemExit as error:
        return error.code or 0


@pytest.mark.parametrize(("chosen", "names"), CHOICES)
def test_every_reader_reads_what_is_chosen(archive, chosen, names):
    found = inputs.find([str(archive)], Filter(**chosen))
    batches = [batch for one in found for batch in inputs.read(one)]
    assert "".join(name for name, _ in (batch.key for batch in batches)) == names
    rows = sum(batch.rows.num_rows for batch in batches)
    assert rows == sum(one.trace.present.sum() for one in ENTRIES if one.trace.request_id in names)
    kept = [kept for one in found for _, kept in inputs.traces(one)]
    assert "".join(one.trace.request_id for one in kept) == names
    for one in kept:
        expected = ENTRIES[LETTERS.index(one.trace.request_id)].trace
        present = expected.present
        assert np.array_equal(one.trace.topk_ids[present], expected.topk_ids[present])
    assert "".join(one.trace.request_id for one in Archive(archive).scan(**chosen)) == names


def test_a_file_whose_hour_is_ruled_out_is_not_opened(archive):
    files_of(archive)[0].write_bytes(b"PAR1 no more")
    found = inputs.find([str(archive)], Filter(since_s=START_S + HOUR_S, model="tiny"))
    assert [one.path for one in found] == files_of(archive)[1:]
    with pytest.raises(FormatError, match="hour=00"):
        inputs.find([str(archive)], Filter(since_s=START_S + HOUR_S - 1))


@pytest.mark.parametrize("chosen", [{"since_s": START_S + 60}, {"lora": "math"}])
def test_of_row_groups_without_a_chosen_trace_the_routes_are_not_read(archive, chosen):
    path = files_of(archive)[0]
    metadata = parquet.ParquetFile(path).metadata.row_group(0)
    columns = [metadata.column(one) for one in range(metadata.num_columns)]
    (ids,) = (one for one in columns if one.path_in_schema.startswith("topk_ids"))
    damaged = bytearray(path.read_bytes())
    place = ids.dictionary_page_offset or ids.data_page_offset
    damaged[place : place + ids.total_compressed_size] = bytes(ids.total_compressed_size)
    path.write_bytes(damaged)
    (one,) = inputs.find([str(path)], Filter(**chosen))
    assert {batch.key for batch in inputs.read(one)} == {("b", 0)}
    assert [kept.trace.request_id for _, kept in inputs.traces(one)] == ["b"]
    with pytest.raises(FormatError):
        list(inputs.read(*inputs.find([str(path)])))


def test_no_part_of_another_trace_is_read(archive):
    _, found = route_files.read(files_of(archive)[1], where=LATER)
    sizes = [(kept.trace.request_id, kept.trace.num_rows) for kept in found]
    chosen = ENTRIES[3].trace
    assert sizes == [(chosen.request_id, chosen.num_rows)]


def test_nothing_chosen_says_what_there_is(archive):
    with pytest.raises(CommandError) as caught:
        inputs.find([f"{archive}/date=2027-01-15/hour=0[123]"], Filter(lora="maths"))
    assert str(caught.value) == (
        f"{archive}/date=2027-01-15/hour=0[123] has no trace with the adapter 'maths'; it has "
        "models: 'large', 'tiny'; adapters: 'code', 'math', none; finished: 2027-01-15T01:00:00Z "
        "to 2027-01-15T03:01:00Z"
    )
    late = Filter(since_s=START_S + 24 * HOUR_S, until_s=START_S + 48 * HOUR_S, model="a", lora="")
    words = "finished since 2027-01-16T00:00:00Z, finished before 2027-01-17T00:00:00Z, "
    with pytest.raises(CommandError, match=f"{words}of the model 'a', with no adapter; it has"):
        inputs.find([str(archive)], late)


def test_each_input_has_something_chosen(archive):
    first = str(files_of(archive)[0])
    assert inputs.find([str(archive), first], Filter(lora="math"))
    with pytest.raises(CommandError, match="parquet has no trace with the adapter 'code'"):
        inputs.find([str(archive), first], Filter(lora="code"))


def test_what_is_no_archive_is_refused(archive, tmp_path):
    traces = [ENTRIES[0].trace]
    (tmp_path / "a.npz").write_bytes(formats.dump_npz(traces))
    (tmp_path / "a.parquet").write_bytes(arrow.dump_parquet(traces))
    (tmp_path / "a.jsonl").write_bytes(b"")
    for name in ("a.npz", "a.parquet", "a.jsonl"):
        with pytest.raises(CommandError, match=f"{name} is no file of an archive: --since"):
            inputs.find([str(archive), str(tmp_path / name)], Filter(model="tiny"))
    with pytest.raises(CommandError, match="no file of an archive"):
        route_files.read(tmp_path / "a.parquet", where=Filter(model="tiny"))


def test_a_file_that_is_named_as_one_of_an_archive_is_refused(archive, tmp_path):
    """By its name it is not opened at first; no command reads it unfiltered."""
    path = files_of(archive)[-1]
    path.write_bytes(arrow.dump_parquet([ENTRIES[0].trace]))
    found = inputs.find([str(archive)], Filter(model="tiny"))
    with pytest.raises(CommandError, match=f"{path.name}: it is no file of an archive"):
        list(inputs.traces(next(one for one in found if one.path == path)))


def test_a_file_of_an_archive_is_one_wherever_it_lies(archive, tmp_path):
    table = parquet.read_table(files_of(archive)[0], partitioning=None)
    parquet.write_table(table, tmp_path / "copy.parquet")
    (one,) = inputs.find([str(tmp_path / "copy.parquet")], Filter(lora="math"))
    assert [kept.trace.request_id for _, kept in inputs.traces(one)] == ["b"]


def test_a_sequence_may_be_long(tmp_path):
    """That of 100,000 tokens of a large model has more than 256 MiB of weights."""
    num_rows, num_layers = 80, 1000
    trace = dataclasses.replace(
        ENTRIES[0].trace,
        layers=np.arange(num_layers, dtype=np.int32),
        num_hidden_layers=num_layers,
        topk_ids=np.zeros((num_rows, num_layers, 1024), np.uint8),
        topk_weights=None,
        source=np.full(num_rows, Source.MISSING, np.uint8),
        token_ids=None,
        num_tokens=num_rows + 1,
    )
    table = to_table([Archived(trace=trace, number=1, finished_s=START_S)], spec=SPEC)
    parquet.write_table(table, tmp_path / "a.parquet")
    ((_, kept),) = inputs.traces(*inputs.find([str(tmp_path / "a.parquet")]))
    assert kept.trace.num_rows == num_rows


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_every_option(archive, tmp_path, capsys, command):
    inputs_of = [archive] * (1 + (command == "diff"))
    options = ["--since", "2027-01-15T02:00", "--until", "2027-01-15T03:00"]
    options += ["--model", "tiny", "--lora", "code"]
    assert run(command, *inputs_of, "-o", tmp_path / "out.npz", *options) == 1
    assert (
        "has no trace finished since 2027-01-15T02:00:00Z, finished before 2027-01-15T03:00:00Z, "
        "of the model 'tiny', with the adapter 'code'; it has models: 'large', 'tiny'"
    ) in said(capsys)


def test_an_analysis_of_one_of_several_models_says_what_was_chosen(archive):
    console, options = Console(quiet=True), analyzing.Options()
    with pytest.raises(CommandError, match="are not of one model"):
        analyzing.read(inputs.find([str(archive)]), options, console)
    found = inputs.find([str(archive)], Filter(model="tiny", lora="math"))
    subject = analyzing.read(found, options, console)
    assert subject.profile.num_requests == 2
    facts, values = analyzing._facts(subject, found), analyzing._values(subject, found)
    assert facts["traces"] == "only those of the model 'tiny', with the adapter 'math'"
    assert values["filter"] == {"model": "tiny", "lora": "math"}


@pytest.mark.parametrize(
    ("time", "hour"),
    [
        ("2027-01-15", 0),
        ("2027-01-15T01:00", 1),
        ("2027-01-15T01:00:00", 1),
        ("2027-01-15T01:00Z", 1),
        ("2027-01-14T19:00:00-06:00", 1),
        ("2027-01-15T03:30+0130", 2),
    ],
)
def test_times_are_in_utc_or_have_an_offset(archive, tmp_path, time, hour):
    arguments = ("--until", "2027-01-15T03:00", "-o", tmp_path / "a.npz")
    assert run("convert", archive, "--since", time, *arguments) == 0
    traces = formats.load_npz((tmp_path / "a.npz").read_bytes())
    assert "".join(one.request_id for one in traces) == LETTERS[2 * hour : 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--since", "yesterday"], "'yesterday' does not match"),
        (["--until", "1800000000"], "'1800000000' does not match"),
        (["--since", "2027-01-15+02:00"], "does not match"),
        (["--since", "01/02/2027"], "does not match"),
        (["--since", "2027-02-29"], "does not match"),
        (["--since", "2027-01-15", "--until", "2027-01-15T02:00+02:00"], "is not before --until"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_times_that_are_none_are_refused(archive, tmp_path, capsys, command, arguments, message):
    inputs_of = [archive] * (1 + (command == "diff"))
    assert run(command, *inputs_of, "-o", tmp_path / "out.npz", *arguments) == 2
    assert message in said(capsys)
    assert not (tmp_path / "out.npz").exists()


def test_convert_and_view_choose_too(archive, tmp_path, capsys):
    assert run("convert", archive, "-o", tmp_path / "a.jsonl", "--model", "large") == 0
    meta = orjson.loads((tmp_path / "a.jsonl").read_bytes().splitlines()[0])
    assert (meta["model_id"], meta["device"], meta["seed"]) == ("large", *SPEC.values())
    capsys.readouterr()
    assert run("view", archive, "-o", tmp_path / "a.html", "--lora", "code") == 0
    assert ": 1 requests, " in capsys.readouterr().out


def test_diff_chooses_once_for_all_sides_or_once_for_each(archive, tmp_path):
    arguments = ["--lora", "", "--lora", "math", "--lora", "code", "--model", "tiny"]
    assert run("diff", archive, archive, "--again", archive, "-o", tmp_path, *arguments) == 0
    diff = orjson.loads((tmp_path / "diff.json").read_bytes())
    assert {name: (diff[name]["filter"], diff[name]["sequences"]) for name in NAMES} == {
        "a": ({"model": "tiny", "lora": ""}, 3),
        "b": ({"model": "tiny", "lora": "math"}, 2),
        "again": ({"model": "tiny", "lora": "code"}, 1),
    }


def test_diff_refuses_two_parts_of_an_archive_that_overlap(archive, tmp_path, capsys):
    times = ["--since", "2027-01-15", "--until", "2027-01-15T01:00"]
    times += ["--since", "2027-01-15T00:59", "--until", "2027-01-15T03:00"]
    assert run("diff", archive, archive, "-o", tmp_path / "out", *times) == 1
    message = capsys.readouterr().err
    assert f"{archive}, finished since 2027-01-15T00:00:00Z, finished before" in message
    assert "are the same files: expected two runs, or parts of an archive that have no" in message


def test_diff_refuses_an_option_that_is_not_for_each_side(archive, tmp_path, capsys):
    arguments = ("--again", archive, "--model", "tiny", "--model", "large")
    assert run("diff", archive, archive, "-o", tmp_path / "out", *arguments) == 2
    assert "given 2 times for 3 sides" in said(capsys)


@pytest.mark.parametrize(
    ("one", "other", "excludes"),
    [
        ({}, {}, False),
        ({"lora": "a"}, {}, False),
        ({"lora": "a"}, {"lora": "a"}, False),
        ({"lora": "a"}, {"lora": ""}, True),
        ({"lora": "a", "model": "m"}, {"lora": "a", "model": "n"}, True),
        ({"until_s": 5}, {"since_s": 5}, True),
        ({"until_s": 5}, {"since_s": 4}, False),
        ({"since_s": 1, "until_s": 2}, {"since_s": 1, "until_s": 2}, False),
    ],
)
def test_filters_that_no_trace_passes_both_of(one, other, excludes):
    assert Filter(**one).excludes(Filter(**other)) == excludes
    assert Filter(**other).excludes(Filter(**one)) == excludes
