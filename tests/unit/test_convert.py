"""``moescope convert``: from every format to every other, and what is refused or lost."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys

import numpy as np
import orjson
import pyarrow as pa
import pytest
from client_fakes import make_trace, same
from pyarrow import parquet

from moescope import arrow, convert, formats, replay, route_files, version_runs
from moescope.analyze import inputs
from moescope.cli import main
from moescope.errors import MoescopeError
from moescope.trace import Source

FORMATS = route_files.FORMATS
ARRAYS = FORMATS[1:]


def blank(trace):
    """The trace with zeros where its ids and weights mean nothing."""
    ids, weights = trace.topk_ids.copy(), trace.topk_weights
    ids[~trace.present] = 0
    if weights is not None:
        weights = weights.copy()
        weights[~trace.present] = 0
    return dataclasses.replace(trace, topk_ids=ids, topk_weights=weights)


TRACES = [
    blank(one)
    for one in (
        make_trace(0, num_rows=30, missing=0.3, tokens=True),
        make_trace(1, num_rows=5, request_id="b", index=1, token_ids=False),
        make_trace(2, num_rows=40, request_id="c").page(11, 20),
        make_trace(3, num_rows=0, request_id="empty"),
        make_trace(4, num_rows=9, request_id="lost", missing=1.1, versions=False),
    )
]
CASES = {
    "all": TRACES,
    "no weights": [one.select(weights=False) for one in TRACES],
    "512 experts": [make_trace(5, num_experts=512, top_k=8)],
    "one": TRACES[:1],
}


def run(*arguments):
    """The exit status of ``moescope convert``."""
    try:
        return main(["convert", *map(str, arguments)])
    except SystemExit as error:
        return error.code or 0


def log_of(traces):
    head = formats.meta_line(
        model="demo", versions={"vllm": "0.32.0"}, device="cpu", seed=7, layers=[0, 1, 3],
        top_k=traces[0].top_k, num_experts=traces[0].num_experts,
    )  # fmt: skip
    return head + b"".join(line for trace in traces for line in formats.route_lines(trace))


def traces_of(path):
    return [kept.trace for kept in route_files.read(path)[1]]


def wrote(path, traces):
    """The file of some traces, in the format of its suffix."""
    if path.suffix == ".jsonl":
        path.write_bytes(log_of(traces))
    else:
        with route_files.Spool(path.parent, {"device": "cpu", "seed": 7}) as spool:
            for trace in traces:
                spool.add(route_files.Kept(trace))
            route_files.write(path, spool.stored())
    return path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("first", "second"), [*itertools.product(ARRAYS, repeat=2)])
def test_arrays_and_tables_give_the_same_traces_back(tmp_path, name, first, second):
    source = wrote(tmp_path / f"a.{first}", CASES[name])
    assert run(source, "-o", tmp_path / f"b.{second}") == 0
    assert run(tmp_path / f"b.{second}", "-o", tmp_path / f"c.{first}") == 0
    found = traces_of(tmp_path / f"c.{first}")
    assert all(same(a, b) for a, b in zip(found, CASES[name], strict=True))
    assert route_files.read(tmp_path / f"c.{first}")[0] == {"device": "cpu", "seed": 7}


@pytest.mark.parametrize("form", FORMATS)
def test_ids_of_two_dtypes(tmp_path, form):
    wide = dataclasses.replace(TRACES[1], topk_ids=TRACES[1].topk_ids.astype(np.uint16))
    for name, trace in (("a", TRACES[0]), ("b", wide)):
        (tmp_path / f"{name}.npz").write_bytes(formats.dump_npz([trace]))
    assert run(tmp_path / "a.npz", tmp_path / "b.npz", "-o", tmp_path / f"c.{form}") == 0
    for found, trace in zip(traces_of(tmp_path / f"c.{form}"), (TRACES[0], wide), strict=True):
        assert found.topk_ids.tolist() == trace.topk_ids.tolist()


@pytest.mark.parametrize("form", FORMATS)
def test_a_log_comes_back_byte_for_byte(tmp_path, form):
    traces = [TRACES[0], TRACES[1], TRACES[2]]
    traces = [dataclasses.replace(one, tokens=None) for one in traces]
    source = wrote(tmp_path / "a.jsonl", traces)
    assert run(source, "-o", tmp_path / f"b.{form}") == 0
    assert run(tmp_path / f"b.{form}", "-o", tmp_path / "c.jsonl") == 0
    assert (tmp_path / "c.jsonl").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("form", ARRAYS)
def test_a_log_of_traces_is_that_of_the_server(tmp_path, form):
    source = wrote(tmp_path / f"a.{form}", TRACES)
    assert run(source, "-o", tmp_path / "b.jsonl") == 0
    assert (tmp_path / "b.jsonl").read_bytes() == log_of(TRACES)


@pytest.mark.parametrize("form", ARRAYS)
def test_small_batches_give_the_same_file(tmp_path, monkeypatch, form):
    source = wrote(tmp_path / "a.npz", [make_trace(n, num_rows=300, request_id=str(n))
                                        for n in range(5)])  # fmt: skip
    if form != "npz":
        from moescope.route_files import columns

        monkeypatch.setattr(columns, "_GROUP_CELLS", 1)
    assert run(source, "-o", tmp_path / f"b.{form}") == 0
    assert all(
        same(a, b)
        for a, b in zip(traces_of(tmp_path / f"b.{form}"), traces_of(source), strict=True)
    )


def test_what_other_programs_read(tmp_path):
    traces = [TRACES[0], TRACES[2]]
    wrote(tmp_path / "a.npz", traces)
    for form in ("arrow", "parquet"):
        assert run(tmp_path / "a.npz", "-o", tmp_path / f"b.{form}") == 0
    assert all(
        same(a, b)
        for a, b in zip(formats.load_npz((tmp_path / "a.npz").read_bytes()), traces, strict=True)
    )
    table = pa.ipc.open_file(tmp_path / "b.arrow").read_all()
    assert table.equals(parquet.read_table(tmp_path / "b.parquet"))
    assert table.to_pylist() == arrow.to_table(traces).to_pylist()
    assert table.schema.names == arrow.to_table(traces).schema.names
    assert all(same(a, b) for a, b in zip(arrow.from_table(table), traces, strict=True))


def test_an_arrow_stream_is_read_by_the_same_suffix(tmp_path):
    (tmp_path / "a.arrow").write_bytes(arrow.dump_arrow(TRACES))
    assert run(tmp_path / "a.arrow", "-o", tmp_path / "b.npz") == 0
    assert all(same(a, b) for a, b in zip(traces_of(tmp_path / "b.npz"), TRACES, strict=True))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_the_long_form(tmp_path, capsys, form, missing):
    wrote(tmp_path / "a.npz", TRACES)
    more = ["--missing"] if missing else []
    assert run(tmp_path / "a.npz", "-o", tmp_path / f"b.{form}", "--long", *more) == 0
    read = {"arrow": lambda path: pa.ipc.open_file(path).read_all(), "parquet": parquet.read_table}
    table = read[form](tmp_path / f"b.{form}")
    expected = arrow.to_long_table(TRACES, missing=missing)
    assert table.to_pylist() == expected.to_pylist()
    assert "traces cannot be made of it" in capsys.readouterr().out
    assert run(tmp_path / f"b.{form}", "-o", tmp_path / "c.npz") == 1
    assert "long form" in capsys.readouterr().err


class TestALog:
    def response(self, trace, index=0):
        tokens = trace.token_ids.tolist()
        return replay.Response(
            index=index, prompt="?", request_id=trace.request_id, text="", finish_reason="stop",
            prompt_tokens=trace.prompt_len,
            completion_tokens=trace.num_tokens - trace.prompt_len,
            prompt_token_ids=tokens[: trace.prompt_len], token_ids=tokens[trace.prompt_len :],
            started_s=0.0, latency_s=1.0,
        )  # fmt: skip

    @pytest.fixture
    def trace(self):
        return TRACES[0]

    @pytest.fixture
    def run_dir(self, tmp_path, trace):
        path = tmp_path / "run"
        path.mkdir()
        (path / "moe_routes.jsonl").write_bytes(log_of([trace]))
        replay.write_responses(path / "responses.jsonl", [self.response(trace)])
        return path

    def test_a_run_directory_knows_prompts_and_tokens(self, run_dir, tmp_path, trace):
        assert run(run_dir, "-o", tmp_path / "a.parquet") == 0
        (found,) = traces_of(tmp_path / "a.parquet")
        assert (found.prompt_len, found.num_tokens) == (trace.prompt_len, trace.num_tokens)
        assert found.token_ids.tolist() == trace.token_ids.tolist()
        assert found.tokens == [*trace.tokens[:-1], ""]
        assert (found.source == Source.MISSING).tolist() == (~trace.present).tolist()
        assert found.topk_ids.tolist() == trace.topk_ids.tolist()
        assert found.weights_version[found.present].tolist() == (
            trace.weights_version[trace.present].tolist()
        )
        assert not found.complete
        assert found.finish_reason == "stop"

    def test_the_last_token_has_the_text_of_the_same_token_before_it(
        self, run_dir, tmp_path, trace
    ):
        tokens = trace.token_ids.copy()
        tokens[-1] = tokens[4]
        again = dataclasses.replace(trace, token_ids=tokens)
        replay.write_responses(run_dir / "responses.jsonl", [self.response(again)])
        assert run(run_dir, "-o", tmp_path / "a.npz") == 0
        (found,) = traces_of(tmp_path / "a.npz")
        assert found.tokens == [*trace.tokens[:-1], trace.tokens[4]]

    def test_rows_that_it_lacks_are_missing(self, run_dir, tmp_path, trace):
        log = run_dir / "moe_routes.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(lines[:-6]))  # the last two tokens
        assert run(run_dir, "-o", tmp_path / "a.npz") == 0
        (found,) = traces_of(tmp_path / "a.npz")
        assert found.num_tokens == trace.num_tokens
        assert found.source[-2:].tolist() == [Source.MISSING] * 2

    @pytest.mark.parametrize("form", ARRAYS)
    def test_without_it_prompts_are_unknown_and_no_made_up_ones(
        self, run_dir, tmp_path, capsys, form
    ):
        path = tmp_path / f"a.{form}"
        assert run(run_dir / "moe_routes.jsonl", "-o", path) == 0
        assert "does not say where prompts end" in " ".join(capsys.readouterr().out.split())
        (one,) = inputs.find([str(path)])
        assert {phase for batch in inputs.read(one) for phase in batch.rows.phases.tolist()} == {2}
        (kept,) = route_files.read(path)[1]
        assert not kept.knows_prompt
        if form == "npz":
            with pytest.raises(ValueError, match="prompt_len"):
                formats.load_npz(path.read_bytes())
        else:
            table = pa.ipc.open_file(path).read_all() if form == "arrow" else (
                parquet.read_table(path))  # fmt: skip
            assert table["is_prompt"].null_count == len(table)
            with pytest.raises(ValueError, match="prompt_len"):
                arrow.from_table(table)

    def test_lines_of_requests_may_be_mixed_and_ids_used_again(self, tmp_path, trace):
        other = make_trace(9, num_rows=30, request_id="other", tokens=False)
        again = make_trace(10, num_rows=4)
        head, *lines = log_of([dataclasses.replace(trace, tokens=None), other]).splitlines(True)
        half = len(lines) // 2
        mixed = [line for pair in zip(lines[:half], lines[half:], strict=True) for line in pair]
        more = b"".join(formats.route_lines(again))
        (tmp_path / "a.jsonl").write_bytes(head + b"".join(mixed) + more)
        found = [kept.trace for kept in route_files.read(tmp_path / "a.jsonl")[1]]
        assert [one.request_id for one in found] == ["chatcmpl-1", "other", "chatcmpl-1"]
        for one, expected in zip(found, (trace, other, again), strict=True):
            assert one.topk_ids.tolist() == expected.topk_ids.tolist()
            assert np.array_equal(one.present, expected.present)

    def test_its_rows_lie_in_the_folder_that_is_named(self, run_dir, tmp_path):
        """A log may be where nothing can be written."""
        _, traces = route_files.read(run_dir / "moe_routes.jsonl", folder=tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            next(traces)
        run_dir.chmod(0o555)  # which root may write to all the same
        assert run(run_dir, "-o", tmp_path / "a.npz") == 0

    @pytest.mark.parametrize(("num_rows", "top_k"), [(2**30, 1), (2**25, 8)])
    def test_positions_far_apart_are_refused(self, tmp_path, capsys, num_rows, top_k):
        ids = [*range(top_k)]
        lines = [
            {"type": "route", "req_id": "a", "token_idx": one, "layer": 0, "topk_ids": ids}
            for one in (0, num_rows - 1)
        ]
        (tmp_path / "a.jsonl").write_bytes(b"".join(orjson.dumps(one) + b"\n" for one in lines))
        assert run(tmp_path / "a.jsonl", "-o", tmp_path / "b.npz") == 1
        assert f"'a' has lines of 2 of {num_rows} tokens" in capsys.readouterr().err

    def test_a_log_without_weights_and_versions(self, tmp_path, trace):
        bare = dataclasses.replace(
            trace, topk_weights=None, weights_versions=version_runs.unknown(), tokens=None
        )
        (tmp_path / "a.jsonl").write_bytes(log_of([bare]))
        (found,) = traces_of(tmp_path / "a.jsonl")
        assert found.topk_weights is None
        assert found.weights_version is None

    def test_a_weight_that_is_nan_is_a_weight(self, tmp_path, trace):
        weights = trace.topk_weights.copy()
        weights[np.flatnonzero(trace.present)[1], 1, 0] = np.nan
        broken = dataclasses.replace(trace, topk_weights=weights)
        (tmp_path / "a.jsonl").write_bytes(log_of([broken]))
        (found,) = traces_of(tmp_path / "a.jsonl")
        assert np.array_equal(found.topk_weights, weights, equal_nan=True)

    def test_what_it_is_of_may_be_given(self, tmp_path):
        line = {"type": "route", "req_id": "a", "token_idx": 0, "layer": 0, "topk_ids": [1, 2]}
        (tmp_path / "a.jsonl").write_bytes(orjson.dumps(line) + b"\n")
        assert run(tmp_path / "a.jsonl", "-o", tmp_path / "b.npz", "--num-experts", 9) == 0
        (kept,) = route_files.read(tmp_path / "b.npz")[1]
        assert kept.trace.num_experts == 9


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_are_read_or_refused(tmp_path, form, seed):
    path = wrote(tmp_path / f"a.{form}", TRACES)
    random, data = np.random.default_rng(seed), bytearray(path.read_bytes())
    for place in random.integers(0, len(data), 1 + seed % 3):
        data[place] = random.integers(0, 256)
    path.write_bytes(data[: len(data) // 2] if seed % 8 == 0 else data)
    with contextlib.suppress(MoescopeError), route_files.named(path):
        assert len(traces_of(path)) <= 2 * len(TRACES)
    (one,) = inputs.find([str(path)])
    with contextlib.suppress(MoescopeError):
        assert [*inputs.read(one)]


@pytest.mark.parametrize("splits", [[1, 6, 12, 18], [0, 6, 12, 15], [0, 6, 3, 18]])
def test_rows_that_no_trace_has_are_refused(tmp_path, capsys, splits):
    traces = [make_trace(one, num_rows=6, missing=0, token_ids=False) for one in range(3)]
    arrays = formats.arrays_of([dataclasses.replace(one, complete=False) for one in traces])
    np.savez(tmp_path / "a.npz", **{**arrays, "row_splits": np.array(splits)})
    assert run(tmp_path / "a.npz", "-o", tmp_path / "b.npz") == 1
    assert "row_splits must rise from 0 to 18" in capsys.readouterr().err


class TestRefusals:
    @pytest.fixture
    def source(self, tmp_path):
        return wrote(tmp_path / "a.npz", TRACES)

    @pytest.mark.parametrize(
        ("out", "more", "message"),
        [
            ("b.txt", (), "end it in .jsonl, .npz, .arrow, .parquet, or add --format"),
            ("b.npz", ("--format", "csv"), "invalid format 'csv': expected jsonl, npz, arrow or"),
            ("b.npz", ("--long",), "--long is a form of tables"),
            ("b.parquet", ("--missing",), "--missing is for --long"),
            ("nowhere/b.npz", (), "there is no directory"),
        ],
    )
    def test_what_cannot_be_written(self, source, tmp_path, capsys, out, more, message):
        assert run(source, "-o", tmp_path / out, *more) == 1
        assert message in capsys.readouterr().err
        assert names_in(tmp_path) == ["a.npz"]

    def test_a_file_stays_without_force(self, source, tmp_path, capsys):
        (tmp_path / "b.npz").write_bytes(b"old")
        assert run(source, "-o", tmp_path / "b.npz") == 1
        assert "exists: --force replaces it" in capsys.readouterr().err
        assert (tmp_path / "b.npz").read_bytes() == b"old"
        assert run(source, "-o", tmp_path / "b.npz", "--force") == 0
        assert len(traces_of(tmp_path / "b.npz")) == len(TRACES)

    def test_its_own_input_may_be_replaced(self, source, tmp_path):
        assert run(source, "-o", source, "--force") == 0
        assert all(same(a, b) for a, b in zip(traces_of(source), TRACES, strict=True))

    @pytest.mark.parametrize("form", FORMATS)
    def test_nothing_half_written_stays(self, source, tmp_path, capsys, form):
        broken = tmp_path / "z.npz"
        broken.write_bytes(source.read_bytes()[:-400])
        assert run(source, broken, "-o", tmp_path / f"b.{form}") == 1
        assert "z.npz" in capsys.readouterr().err
        assert names_in(tmp_path) == ["a.npz", "z.npz"]

    @pytest.mark.parametrize("form", FORMATS)
    def test_a_write_that_fails_leaves_the_old_file(self, source, tmp_path, monkeypatch, form):
        out = tmp_path / f"b.{form}"
        out.write_bytes(b"old")
        write = route_files.write

        def fail(path, stored, **options):
            write(path, stored, **options)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(convert.route_files, "write", fail)
        assert run(source, "-o", out, "--force") == 1
        assert out.read_bytes() == b"old"
        assert names_in(tmp_path) == ["a.npz", f"b.{form}"]

    def test_other_models_and_layers(self, source, tmp_path, capsys):
        other = wrote(tmp_path / "z.npz", [make_trace(num_experts=8)])
        assert run(source, other, "-o", tmp_path / "b.npz") == 1
        assert "must share num_experts: 'chatcmpl-1' has 8" in capsys.readouterr().err
        other = wrote(tmp_path / "y.npz", [make_trace(layers=(0, 1))])
        assert run(source, other, "-o", tmp_path / "b.npz") == 1
        assert "must share layers" in capsys.readouterr().err

    def test_labels_and_nothing(self, source, tmp_path, capsys):
        assert run(f"math={source}", "-o", tmp_path / "b.npz") == 1
        assert "has a label" in capsys.readouterr().err
        nothing = wrote(tmp_path / "z.npz", [])
        assert run(nothing, "-o", tmp_path / "b.npz") == 1
        assert "no trace" in capsys.readouterr().err

    def test_without_pyarrow(self, source, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        assert run(source, "-o", tmp_path / "b.parquet") == 1
        assert "pip install pyarrow" in capsys.readouterr().err
        assert run(source, "-o", tmp_path / "b.jsonl") == 0
