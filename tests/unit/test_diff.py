"""``moescope diff``: what it says, what it writes and what it refuses."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import orjson
import pytest
from analysis_reference import make_trace
from diff_runs import (
    AGAIN,
    CHANGED,
    NUM,
    SAME,
    A,
    compare,
    run_command,
    with_other_experts,
    with_other_tokens,
    write_arrow,
    write_npz,
    write_parquet,
    write_run,
)

from moescope import formats
from moescope.analyze import inputs
from moescope.diff import bounds
from moescope.errors import FormatError
from moescope.trace import Source


@pytest.fixture
def compared(tmp_path):
    """Return a function that compares traces: (diff.json, the tables)."""
    return functools.partial(compare, tmp_path)


def test_the_first_changed_layer_is_named(compared, tmp_path, capsys):
    values, by_layer, sequences = compared(A, CHANGED, again=AGAIN)
    first = values["first_changed_layer"]
    assert (first["rows"], first["weights"]) == (4, 4)
    assert values["by_layer"]["rows"]["values"] == pytest.approx([0, 0, 3 / 20, 3 / 20])
    assert values["by_layer"]["first"]["values"] == pytest.approx([0, 0, 3 / 20, 0])
    assert values["by_layer"]["rows"]["noise"] == [0, 0, 0, 0]
    assert values["by_layer"]["rows"]["changed"] == [False, False, True, True]
    assert [line["layer"] for line in by_layer] == ["0", "2", "4", "6"]
    assert [float(line["rows"]) for line in by_layer] == values["by_layer"]["rows"]["values"]
    assert [line["rows_changed"] for line in by_layer] == ["0", "0", "1", "1"]
    for number, line in enumerate(sequences):
        assert (line["request_id_a"], line["request_id_b"]) == (f"a-{number}", f"b-{number}")
        assert (line["experts_position"], line["experts_layer"]) == ("3", "4")
        assert line["text_position"] == ""
    assert (tmp_path / "out" / "diff.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert "experts: changed from layer 4 on, 2 of 4 layers by more than the noise" in told
    assert "12 of 12 and 12 sequences are paired: 12 by prompt" in told
    assert str(tmp_path / "out" / "diff.json") in told
    assert {one.name for one in (tmp_path / "out").iterdir()} == {
        *("diff.json", "diff.png", "diff.csv", "sequences.csv")
    }


def test_noise_is_no_change(compared):
    """The same server differs in as many rows as the other one: in others."""
    noisy = [with_other_experts(one, 2, [number % 7]) for number, one in enumerate(AGAIN)]
    other = [with_other_experts(one, 2, [number % 5 + 8]) for number, one in enumerate(SAME)]
    values, *_ = compared(A, other, again=noisy)
    assert values["by_layer"]["rows"]["values"][1] > 0
    assert values["first_changed_layer"] == {"rows": None, "weights": None, "loads": None}


def test_noise_is_taken_off_request_by_request(compared):
    """Requests are noisy as they are, and each has one row more: that is no chance."""
    noise = {number: [*range(number)] for number in range(NUM)}
    again = [with_other_experts(one, 2, noise[n]) for n, one in enumerate(AGAIN)]
    other = [with_other_experts(one, 2, [*noise[n], 19]) for n, one in enumerate(SAME)]
    values, *_ = compared(A, other, again=again)
    assert values["by_layer"]["rows"]["changed"] == [False, True, True, True]


def test_without_a_second_run_it_says_so(compared, capsys):
    values, by_layer, _ = compared(A, CHANGED)
    assert values["by_layer"]["rows"]["noise"] is None
    assert "rows_noise" not in by_layer[0]
    told = capsys.readouterr().out
    assert "experts: differ from layer 4 on, 2 of 4 layers; --again tells noise" in told


def test_of_few_requests_nothing_is_claimed(compared, capsys):
    values, *_ = compared(A[:5], CHANGED[:5])
    assert values["first_changed_layer"]["rows"] is None
    assert values["totals"]["changed"] is None
    assert "experts: fewer than 8 requests: too few to tell" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("write", "suffix"),
    [(write_run, ""), (write_parquet, ".parquet"), (write_arrow, ".arrow")],
)
@pytest.mark.parametrize("batch_rows", [2**16, 28])
def test_every_kind_of_input_says_the_same(compared, write, suffix, batch_rows, monkeypatch):
    monkeypatch.setattr("moescope.analyze.batches.Model.batch_rows", batch_rows)
    others = [with_other_tokens(one, 8) if n < 4 else one for n, one in enumerate(CHANGED)]
    values, by_layer, sequences = compared(A, others)
    again = compared(A, others, "--force", write=write, suffix=suffix)
    assert again[0]["compared"] == values["compared"]
    assert again[2] == sequences
    for line, other in zip(by_layer, again[1], strict=True):
        assert {name: float(value) for name, value in other.items()} == pytest.approx(
            {name: float(value) for name, value in line.items()}, abs=1e-6
        )


def test_near_ties_are_apart(compared):
    ids, weights = A[0].topk_ids, np.full(A[0].topk_weights.shape, 0.4, np.float32)
    weights[..., 0] = 0.5
    light = ids.copy()
    light[2, 1, 1] = next(e for e in range(7) if e not in ids[2, 1])
    a = [dataclasses.replace(A[0], topk_weights=weights)]
    b = [dataclasses.replace(SAME[0], topk_ids=light, topk_weights=weights)]
    values, _, (sequence,) = compared(a, b)
    assert values["by_layer"]["near_ties"]["values"] == pytest.approx([0, 1 / 20, 0, 0])
    assert values["by_layer"]["rows"]["values"] == [0, 0, 0, 0]
    assert (sequence["experts_position"], sequence["beyond_position"]) == ("2", "")
    heavy = ids.copy()
    heavy[2, 1, 0] = light[2, 1, 1]
    b = [dataclasses.replace(SAME[0], topk_ids=heavy, topk_weights=weights)]
    assert compared(a, b, "--force")[0]["by_layer"]["near_ties"]["values"] == [0, 0, 0, 0]
    values, *_ = compared(a, b, "--force", "--near-tie", "0.26")
    assert values["by_layer"]["near_ties"]["values"] == pytest.approx([0, 1 / 20, 0, 0])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"num_experts": 9}, "experts a layer are 7 and 9"),
        ({"layers": np.array([0, 2, 4, 7], np.int32)}, "layers are [0, 2, 4, 6] and [0, 2, 4, 7]"),
    ],
)
def test_servers_of_two_architectures_are_refused(tmp_path, capsys, other, words):
    a = write_npz(tmp_path / "a.npz", A[:1])
    b = write_npz(tmp_path / "b.npz", [dataclasses.replace(SAME[0], **other)])
    assert run_command(a, b, "-o", tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert "a.npz" in told
    assert "cannot be compared" in told
    assert words in told
    assert not (tmp_path / "out").exists()


def test_another_name_of_the_model_is_taken(compared):
    values, *_ = compared(A, [dataclasses.replace(one, model="tiny-fp8") for one in SAME])
    assert (values["a"]["model"], values["b"]["model"]) == ("tiny", "tiny-fp8")


def bare(trace):
    return dataclasses.replace(trace, token_ids=None)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (A[:2], SAME[2:4], "b.npz have no request in common: they are paired"),
        (A[:2], [bare(one) for one in SAME[:2]], "paired by request id, or by the token ids"),
        (A[:1], [make_trace("b", [[[0, 1]] * 4], missing=[0])], "b.npz has no routed token (1 "),
        (A[:1] * 2, SAME[:1], "a.npz has position 0 of request a-0, choice 0, twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said(tmp_path, capsys, a, b, words):
    paths = [write_npz(tmp_path / "a.npz", a), write_npz(tmp_path / "b.npz", b)]
    assert run_command(*paths, "-o", tmp_path / "out") == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_texts_that_differ_at_once_are_said(tmp_path, capsys):
    """A request of the same id whose prompt's first token is missing on one side."""
    other = dataclasses.replace(A[0].page(1, 10))
    paths = [
        write_npz(tmp_path / "a.npz", [A[0].page(0, 1)]), write_npz(tmp_path / "b.npz", [other])
    ]  # fmt: skip
    assert run_command(*paths, "-o", tmp_path / "out") == 1
    assert (
        "1 sequences in common, and no row with the same tokens before it"
        in capsys.readouterr().err
    )


def test_the_same_run_is_no_second_run(tmp_path, capsys):
    a, b = write_npz(tmp_path / "a.npz", A), write_npz(tmp_path / "b.npz", SAME)
    for again in (a, b):  # B as the noise would hide every change
        assert run_command(a, b, "--again", again, "-o", tmp_path / "out") == 1
        told = capsys.readouterr().err
        assert f"{again} and {again} are the same files: expected two runs" in told
    assert run_command(f"x={a}", b, "-o", tmp_path / "out") == 1
    assert "a.npz has the label x: diff takes none" in capsys.readouterr().err


def test_an_earlier_comparison_is_kept_unless_forced(tmp_path, capsys):
    a, b = write_npz(tmp_path / "a.npz", A), write_npz(tmp_path / "b.npz", SAME)
    assert run_command(a, b, "-o", tmp_path / "out") == 0
    before = (tmp_path / "out" / "diff.json").stat().st_mtime_ns
    assert run_command(a, b, "-o", tmp_path / "out") == 1
    assert "holds an earlier comparison: --force replaces it" in capsys.readouterr().err
    assert (tmp_path / "out" / "diff.json").stat().st_mtime_ns == before


def test_a_broken_file_is_named_and_nothing_is_written(tmp_path, capsys):
    a, b = write_npz(tmp_path / "a.npz", A), write_npz(tmp_path / "b.npz", SAME)
    b.write_bytes(b.read_bytes()[:-500])
    assert run_command(a, b, "-o", tmp_path / "out") == 1
    assert "b.npz: no file of routes" in capsys.readouterr().err
    assert {one.name for one in tmp_path.iterdir()} == {"a.npz", "b.npz"}


@pytest.mark.parametrize(
    ("bound", "status", "words"),
    [
        ("rows=0.2", 0, ""),
        ("rows=0.1", 1, "moescope: rows is 0.15, above 0.1\n"),
        ("changed=1", 1, "changed is 2, above 1"),
        ("texts=0", 0, ""),
        ("speed=1", 2, "got 'speed=1', expected NAME=NUMBER"),
        ("rows=many", 2, "got 'rows=many', expected NAME=NUMBER"),
    ],
)
def test_bounds(tmp_path, capsys, bound, status, words):
    a, b = write_npz(tmp_path / "a.npz", A), write_npz(tmp_path / "b.npz", CHANGED)
    assert run_command(a, b, "-o", tmp_path / "out", "--fail-above", bound) == status
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split()) + "\n"
    assert (tmp_path / "out" / "diff.json").exists() == (status < 2)


def test_weights_that_one_side_lacks_are_not_known(compared, capsys):
    for again in (None, AGAIN):
        bare = [dataclasses.replace(one, topk_weights=None) for one in CHANGED]
        values, *_ = compared(A, bare, "--force", again=again)
        assert values["totals"]["weights"] is None
        told = capsys.readouterr().out
        assert "weights: not known" in told
        assert "weights, mean difference" not in told


def test_weights_that_are_nan_hide_nothing(compared, tmp_path, capsys):
    """A broken router: in half of the rows of one layer."""
    weights = CHANGED[0].topk_weights.copy()
    weights[1::2, 2] = np.nan
    broken = [dataclasses.replace(CHANGED[0], topk_weights=weights), *CHANGED[1:]]
    values, *_ = compared(A, broken)
    assert values["by_layer"]["near_ties"]["values"] == [0, 0, 0, 0]
    assert [one is None for one in values["by_layer"]["weights"]["values"]] == [
        *(False, False, True, False)
    ]
    bound = ("--fail-above", "weights=1", "--force", "-o", tmp_path / "out")
    assert run_command(tmp_path / "a.npz", tmp_path / "b.npz", *bound) == 1
    assert "weights is not known" in capsys.readouterr().err


def test_what_is_not_known_is_above_every_bound():
    assert bounds.exceeded({"weights": 5.0}, {"weights": float("nan")}) == [
        "weights is not known, so it cannot be held to 5"
    ]


def test_tokens_of_pages_come_together(tmp_path):
    pages = [A[0].page(0, 8), A[0].page(8, 99)]
    for number, page in enumerate(pages):
        write_npz(tmp_path / f"{number}.npz", [page])
    found = [batch.text for one in inputs.find([str(tmp_path)]) for batch in inputs.read(one)]
    assert [one.start for one in found] == [0, 8]
    assert [*found[0].token_ids, *found[1].token_ids] == A[0].token_ids.tolist()


def test_the_prompt_is_known_though_its_rows_are_missing(compared):
    """Of two pages the first has it; ids differ, so that sequences are paired by prompts."""
    pages = []
    for one in SAME:
        source = one.source.copy()
        source[:3] = Source.MISSING
        whole = dataclasses.replace(one, source=source, complete=False)
        pages += [whole.page(0, 3), whole.page(3, 99)]
    values, *_ = compared(A, pages)
    assert (values["compared"]["sequences"], values["compared"]["paired_by_id"]) == (NUM, 0)


@pytest.mark.parametrize("name", ["start", "prompt_len", "num_tokens"])
@pytest.mark.parametrize("value", [-1, 10**12, "1"])
def test_positions_that_no_token_has_are_refused(tmp_path, capsys, name, value):
    """Before memory is taken for all tokens up to there."""
    path = write_npz(tmp_path / "a.npz", A)
    arrays = formats.arrays_of(SAME)
    metas = orjson.loads(arrays["meta"].tobytes())
    metas[3][name] = value
    np.savez(tmp_path / "b.npz", **{**arrays, "meta": np.frombuffer(orjson.dumps(metas), np.uint8)})
    assert run_command(path, tmp_path / "b.npz", "-o", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "b.npz: not an .npz of traces" in said
    assert name in said
    assert str(value) in said


def test_a_parquet_file_that_lost_rows_is_refused(tmp_path):
    arrow = pytest.importorskip("moescope.arrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    path.write_bytes(arrow.dump_parquet(A))
    found = {batch.key: batch.text for batch in inputs.read(*inputs.find([str(path)]))}
    assert found["a-3", 0].token_ids.tolist() == A[3].token_ids.tolist()
    parquet.write_table(parquet.read_table(path)[5:], path)
    with pytest.raises(FormatError, match=r"a.parquet: .*rows were left out"):
        list(inputs.read(*inputs.find([str(path)])))
