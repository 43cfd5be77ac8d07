"""``moescope analyze``: what it reads, what it writes and what it says."""

from __future__ import annotations

import csv
import dataclasses
import re

import numpy as np
import orjson
import pyarrow as pa
import pytest
from analysis_reference import log_of, make_trace, random_trace, response_of

from moescope import analysis, arrow, formats, replay, routes_log
from moescope.analysis import Profile, Rows
from moescope.analyze import inputs, run, token_texts
from moescope.analyze.section import NAMES
from moescope.cli import main
from moescope.errors import CommandError, FormatError
from moescope.route_files import spool

TRACES = [random_trace(number) for number in range(6)]
SHAPE = (3, 7, 2)


@pytest.fixture
def files(tmp_path):
    """The same traces as each kind of input."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "moe_routes.jsonl").write_bytes(log_of(TRACES))
    replay.write_responses(
        run_dir / "responses.jsonl", [response_of(one, n) for n, one in enumerate(TRACES)]
    )
    (tmp_path / "routes.jsonl").write_bytes(log_of(TRACES))
    (tmp_path / "all.npz").write_bytes(formats.dump_npz(TRACES))
    (tmp_path / "half-1.npz").write_bytes(formats.dump_npz(TRACES[:3]))
    (tmp_path / "half-2.npz").write_bytes(formats.dump_npz(TRACES[3:]))
    (tmp_path / "stream.arrow").write_bytes(arrow.dump_arrow(TRACES))
    table = arrow.to_table(TRACES)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "all.parquet").write_bytes(arrow.dump_parquet(TRACES))
    return tmp_path


def rows_of(path, batch_rows=None, monkeypatch=None):
    batches = [batch for one in inputs.find([str(path)]) for batch in inputs.read(one)]
    assert batches[-1].done == 1.0
    rows = Rows.joined([batch.rows for batch in batches])
    return rows, sum(batch.num_missing for batch in batches), batches


def assert_same_rows(rows, *, has_tokens=True, has_weights=True):
    expected = Rows.joined([Rows.of(trace) for trace in TRACES])
    names = ["topk_ids", "positions", "requests"]
    if has_tokens:
        names += ["token_ids", "phases"]
    for name in names:
        assert getattr(rows, name).tolist() == getattr(expected, name).tolist(), name
    assert rows.topk_weights == pytest.approx(expected.topk_weights)


NUM_MISSING = sum(int((~trace.present).sum()) for trace in TRACES)


TABLES = ["stream.arrow", "file.arrow", "all.parquet"]


@pytest.mark.parametrize("name", ["run", "all.npz", "half-*.npz", "routes.jsonl", *TABLES])
@pytest.mark.parametrize("batch_rows", [2**16, 7])
def test_every_kind_of_input_gives_the_same_rows(files, name, batch_rows, monkeypatch):
    monkeypatch.setattr("moescope.analyze.batches.Model.batch_rows", batch_rows)
    rows, num_missing, batches = rows_of(files / name)
    assert num_missing == NUM_MISSING > 0
    assert (len(batches) > 20) is (batch_rows == 7)
    is_bare = name == "routes.jsonl"
    assert_same_rows(rows, has_tokens=not is_bare)
    if is_bare:
        assert set(rows.phases.tolist()) == {analysis.PHASES.index("unknown")}
        assert set(rows.token_ids.tolist()) == {analysis.NO_TOKEN}


def test_pages_of_a_trace_keep_their_positions(tmp_path):
    (tmp_path / "a.npz").write_bytes(formats.dump_npz([TRACES[0].page(11, 20)]))
    rows, *_ = rows_of(tmp_path / "a.npz")
    expected = Rows.of(TRACES[0].page(11, 20))
    assert rows.positions.tolist() == expected.positions.tolist()
    assert rows.token_ids.tolist() == expected.token_ids.tolist()
    assert rows.phases.tolist() == expected.phases.tolist()


def test_traces_without_weights_and_tokens(tmp_path):
    traces = [dataclasses.replace(one, topk_weights=None, token_ids=None) for one in TRACES]
    (tmp_path / "a.npz").write_bytes(formats.dump_npz(traces))
    rows, *_ = rows_of(tmp_path / "a.npz")
    assert rows.topk_weights is None
    assert set(rows.token_ids.tolist()) == {analysis.NO_TOKEN}
    assert run_command(tmp_path / "a.npz", "-o", tmp_path / "out") == 0
    made = {one.stem for one in (tmp_path / "out").glob("*.png")}
    assert set(NAMES) - made == {"domains", "effective_experts", "similarity", "vocabulary"}


def test_lines_of_a_token_may_be_apart(tmp_path):
    head, *lines = log_of(TRACES).splitlines(keepends=True)
    order = np.argsort([orjson.loads(line)["layer"] for line in lines], kind="stable")
    (tmp_path / "a.jsonl").write_bytes(head + b"".join(lines[one] for one in order))
    rows, num_missing, _ = rows_of(tmp_path / "a.jsonl")
    assert num_missing == NUM_MISSING
    assert_same_rows(rows, has_tokens=False)


def test_lines_too_far_apart_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("moescope.route_files.log._MAX_OPEN_ROWS", 5)
    head, *lines = log_of(TRACES).splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(head + b"".join(lines[::3]))
    with pytest.raises(FormatError, match="line 7: 6 tokens lack lines"):
        rows_of(tmp_path / "a.jsonl")


def test_a_log_that_was_cut_off_is_read_up_to_there(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(log_of(TRACES)[:-20])
    rows, num_missing, _ = rows_of(tmp_path / "a.jsonl")
    whole = sum(int(trace.present.sum()) for trace in TRACES)
    assert (rows.num_rows, num_missing) == (whole - 1, NUM_MISSING + 1)


def test_rows_of_which_a_log_has_no_line_are_missing(files):
    lines = (files / "run" / "moe_routes.jsonl").read_bytes().splitlines(keepends=True)
    (files / "run" / "moe_routes.jsonl").write_bytes(b"".join(lines[:-30]))
    rows, num_missing, _ = rows_of(files / "run")
    assert rows.num_rows + num_missing == sum(trace.num_rows for trace in TRACES)


@pytest.mark.parametrize("command", ["analyze", "diff"])
def test_the_rows_of_a_log_lie_beside_the_output_meanwhile(files, monkeypatch, command):
    folders = []

    class Recorded(spool.Disk):
        def __init__(self, folder):
            folders.append(folder)
            super().__init__(folder)

    monkeypatch.setattr("moescope.route_files.log.Disk", Recorded)
    (files / "elsewhere").mkdir()
    other = [str(files / "all.npz")] * (command == "diff")
    out = files / "elsewhere" / "new" / "out"
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, str(files / "run"), *other, "-o", str(out)])
    assert folders == [files / "elsewhere"]


def test_counts_of_a_log_do_not_depend_on_where_they_are_folded(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(log_of(TRACES))
    expected = sum(trace.counts() for trace in TRACES)
    for fold in (2**16, 3):
        monkeypatch.setattr("moescope.routes_log._Tally._FOLD", fold)
        assert (routes_log.read(tmp_path / "a.jsonl").counts == expected).all()


class TestTexts:
    """The text of tokens, from traces that have it."""

    @pytest.fixture
    def traces(self):
        return [
            dataclasses.replace(
                one, tokens=[*(f"text {token}" for token in one.token_ids[:-1]), ""]
            )
            for one in TRACES
        ]

    @pytest.fixture
    def files(self, files, traces):
        log = log_of([dataclasses.replace(one, tokens=one.tokens) for one in traces])
        (files / "run" / "moe_routes.jsonl").write_bytes(log)
        (files / "all.npz").write_bytes(formats.dump_npz(traces))
        (files / "all.arrow").write_bytes(arrow.dump_arrow(traces))
        (files / "all.parquet").write_bytes(arrow.dump_parquet(traces))
        return files

    @pytest.mark.parametrize("name", ["run", "all.npz", "all.arrow", "all.parquet"])
    @pytest.mark.parametrize("batch_rows", [2**16, 7])
    def test_every_kind_of_input_gives_them(self, files, traces, name, batch_rows, monkeypatch):
        monkeypatch.setattr("moescope.analyze.batches.Model.batch_rows", batch_rows)
        *_, batches = rows_of(files / name)
        pairs = [pair for batch in batches for pair in batch.token_texts.items()]
        texts = dict(pairs)
        assert len(texts) == len(pairs)  # each once
        ids = {
            token for one in traces for token in one.token_ids[: one.num_rows][one.present].tolist()
        }
        assert texts.keys() >= ids
        assert {token: texts[token] for token in ids} == {one: f"text {one}" for one in ids}

    def test_the_vocabulary_has_them_and_a_tokenizer_goes_before(self, files):
        assert run_command(files / "all.npz", "-o", files / "out") == 0
        assert "text " in (files / "out" / "vocabulary.csv").read_text()
        tokenizer = files / "tokenizer.json"
        vocab = {f"own {token}": token for token in range(100)}
        tokenizer.write_bytes(orjson.dumps({"model": {"vocab": vocab}}))
        more = ("--tokenizer", tokenizer, "--force")
        assert run_command(files / "all.npz", "-o", files / "out", *more) == 0
        table = (files / "out" / "vocabulary.csv").read_text()
        assert "own " in table
        assert "text " not in table


def run_command(*arguments):
    """The exit status of ``moescope analyze``."""
    try:
        return main(["analyze", *map(str, arguments)])
    except SystemExit as error:
        return error.code or 0


def analyzed(tmp_path, *arguments):
    out = tmp_path / "out"
    assert run_command(*arguments, "-o", out) == 0
    return out, orjson.loads((out / "analysis.json").read_bytes())


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_writes_a_picture_and_a_table_of_each_figure(files, capsys):
    out, values = analyzed(files, f"math={files / 'half-1.npz'}", f"code={files / 'half-2.npz'}")
    for name in NAMES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert table(out / f"{name}.csv"), name
        assert name in values
    assert not [one for one in out.iterdir() if one.name.startswith(".")]
    assert (values["rows"], values["missing_rows"]) == (
        sum(int(trace.present.sum()) for trace in TRACES), NUM_MISSING
    )  # fmt: skip
    assert (values["requests"], values["layers"], values["model"]) == (6, [0, 2, 4], "tiny")
    counts = sum(trace.counts() for trace in TRACES)
    assert values["balance"]["entropy_bits"] == pytest.approx(analysis.entropy_bits(counts))
    for line in table(out / "load.csv"):
        place = [0, 2, 4].index(int(line["layer"]))
        assert int(line["selections"]) == counts[place, int(line["expert"])]
    assert values["domains"]["tokens"] == {
        "code": sum(int(trace.present.sum()) for trace in TRACES[3:]),
        "math": sum(int(trace.present.sum()) for trace in TRACES[:3]),
    }
    assert str(out / "report.html") in capsys.readouterr().out

    assert_the_report_needs_nothing_else(out)


def assert_the_report_needs_nothing_else(out):
    page = (out / "report.html").read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:image/png;base64,|#)', page)
    made = {one.stem for one in out.glob("*.png")}
    assert page.count("data:image/png;base64,") == len(made) == len(NAMES)
    for name in made:
        assert f'href="#{name}"' in page
        assert f'id="{name}"' in page


def test_text_of_prompts_is_escaped(tmp_path, monkeypatch):
    evil = "<script>alert(1)</script>$x_$\udc80"
    trace = make_trace("a", [[[1, 0]]] * 12, tokens=[5] * 13, model=f"tiny{evil[:20]}")
    (tmp_path / "a.npz").write_bytes(formats.dump_npz([trace]))
    vocabulary = {"model": {"vocab": {evil[:-1]: 5}}}
    (tmp_path / "tokenizer.json").write_bytes(orjson.dumps(vocabulary))
    out, values = analyzed(
        tmp_path, f"{evil[:8]}={tmp_path / 'a.npz'}", "--tokenizer", tmp_path / "tokenizer.json"
    )
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert values["vocabulary"]["most_specialized"][0]["text"] == evil[:-1]
    assert table(out / "vocabulary.csv")[0]["text"] == evil[:-1]


def test_an_earlier_analysis_is_kept_unless_forced(files, capsys):
    out, _ = analyzed(files, f"a={files / 'half-1.npz'}", f"b={files / 'half-2.npz'}")
    before = (out / "report.html").read_bytes()
    assert run_command(files / "all.npz", "-o", out) == 1
    assert "holds an earlier analysis: --force replaces it" in capsys.readouterr().err
    assert (out / "report.html").read_bytes() == before
    assert run_command(files / "all.npz", "-o", out, "--force") == 0
    assert not (out / "domains.png").exists()  # the new one has no labels
    assert not (out / "domains.csv").exists()


def test_a_directory_that_cannot_be_made_is_said_before_the_work(files, capsys):
    assert run_command(files / "half-1.npz", "-o", files / "all.npz") == 1
    assert "all.npz is not a directory" in capsys.readouterr().err


def cut(data):
    return data[: len(data) // 2]


def changed(data):
    place = data.index(b"topk_ids.npy") + 2000
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    "damage", [cut, changed, lambda _: b"", lambda _: b"PK\x05\x06" + bytes(18)]
)
def test_a_broken_file_is_named_and_nothing_is_written(files, capsys, damage):
    (files / "half-2.npz").write_bytes(damage((files / "half-2.npz").read_bytes()))
    assert run_command(files / "half-*.npz", "-o", files / "out") == 1
    assert "half-2.npz: no file of routes" in capsys.readouterr().err
    assert not (files / "out").exists()


def test_experts_that_the_model_does_not_have_are_refused(tmp_path):
    trace = dataclasses.replace(TRACES[0], num_experts=5)
    (tmp_path / "a.npz").write_bytes(formats.dump_npz([trace]))
    with pytest.raises(FormatError, match=r"a.npz: not an .npz .*topk_ids must be 0 to 4"):
        rows_of(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: dataclasses.replace(TRACES[0], model="big"), "big, 3 layers"),
        (lambda: dataclasses.replace(TRACES[0], num_experts=9), "top-2 of 9"),
        (lambda: TRACES[0].select(layers=[0, 4]), "layers [0, 2, 4] and [0, 4]"),
    ],
)
def test_two_models_are_refused(files, capsys, other, words):
    (files / "other.npz").write_bytes(formats.dump_npz([other()]))
    arguments = [str(files / "all.npz"), str(files / "other.npz")]
    assert run_command(*arguments, "-o", files / "out") == 1
    told = capsys.readouterr().err
    assert "all.npz and" in told
    assert words in told


def test_two_models_in_one_file_are_refused(tmp_path):
    traces = [TRACES[0], dataclasses.replace(TRACES[1], model="big")]
    (tmp_path / "a.npz").write_bytes(formats.dump_npz(traces))
    with pytest.raises(
        CommandError, match=r"a.npz: it holds routes of several models \(tiny,.*; big,"
    ):
        rows_of(tmp_path / "a.npz")


def test_a_log_that_does_not_name_its_model_goes_with_one_that_does(files):
    lines = (files / "routes.jsonl").read_bytes().splitlines(keepends=True)
    meta = orjson.loads(lines[0]) | {"model_id": None}
    (files / "bare.jsonl").write_bytes(orjson.dumps(meta) + b"\n" + b"".join(lines[1:]))
    _, values = analyzed(files, files / "bare.jsonl", files / "all.npz")
    assert values["model"] == "tiny"
    assert values["requests"] == 6  # the same ones


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no nowhere"),
        (["*.npy"], r"no file matches \*.npy"),
        (["some.txt"], "cannot tell what some.txt is"),
        (["empty"], "empty holds no moe_routes.jsonl"),
        (["a=all.npz", "half-1.npz"], "half-1.npz has no label"),
        (["=all.npz"], "expected a path, or label=path"),
    ],
)
def test_inputs_that_cannot_be_read_are_said(files, monkeypatch, arguments, words):
    monkeypatch.chdir(files)
    (files / "some.txt").touch()
    (files / "empty").mkdir()
    with pytest.raises(CommandError, match=words):
        inputs.find(arguments)


def test_labels_globs_and_names_with_an_equals_sign(files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "x=1.npz").write_bytes(b"")
    found = inputs.find(["x=1.npz"])
    assert [(one.label, one.path.name) for one in found] == [("", "x=1.npz")]
    found = inputs.find(["a=half-*.npz", "b=run", "a=half-1.npz"])
    assert [(one.label, one.path.name) for one in found] == [
        ("a", "half-1.npz"), ("a", "half-2.npz"), ("b", "moe_routes.jsonl")
    ]  # fmt: skip


def test_nothing_to_analyze(tmp_path, capsys):
    trace = make_trace("a", [[[0, 1]]], missing=[0])
    (tmp_path / "a.npz").write_bytes(formats.dump_npz([trace]))
    assert run_command(tmp_path / "a.npz", "-o", tmp_path / "out") == 1
    assert "no routed token (1 rows are missing)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_texts_of_tokens(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(orjson.dumps({
        "model": {"vocab": {"Ġapples": 0, "Ċ": 1, "Ã¼": 2, "Ã": 3}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]},
        "added_tokens": [{"id": 4, "content": "<|end|>"}],
    }))  # fmt: skip
    assert token_texts.read(tmp_path) == {0: " apples", 1: "\n", 2: "ü", 3: "�", 4: "<|end|>"}
    file.write_bytes(orjson.dumps({"model": {"vocab": [["▁a", -1.0], ["b", -2.0]]}}))
    assert token_texts.read(file) == {0: "▁a", 1: "b"}
    file.write_bytes(b"[]")
    with pytest.raises(FormatError, match=r"is no tokenizer.json"):
        token_texts.read(file)


def test_a_model_of_one_layer_and_one_expert_a_token(tmp_path):
    traces = [make_trace(one, [[[2]], [[1]]], num_experts=3) for one in "ab"]
    (tmp_path / "a.npz").write_bytes(formats.dump_npz(traces))
    out, _ = analyzed(tmp_path, tmp_path / "a.npz")
    made = {one.stem for one in out.glob("*.png")}
    assert made == {"load", "balance", "coverage", "phases", "positions"}


def test_a_profile_of_files_is_that_of_their_traces(files):
    options = run.Options()
    from rich.console import Console

    subject = run.read(inputs.find([str(files / "half-*.npz")]), options, Console(quiet=True))
    expected = Profile(*SHAPE)
    for trace in TRACES:
        expected.add(Rows.of(trace))
    assert (subject.profile.load.counts == expected.load.counts).all()
    assert (subject.profile.transitions.counts == expected.transitions.counts).all()
    assert subject.profile.replicate.counts == pytest.approx(expected.replicate.counts)
