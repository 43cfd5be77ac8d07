"""``moescope diff``: which sequences and rows it compares."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from analysis_reference import make_trace
from diff_runs import (
    CHANGED,
    NUM,
    SAME,
    A,
    compare,
    run_command,
    served,
    with_other_experts,
    with_other_tokens,
    write_run,
)


@pytest.fixture
def compared(tmp_path):
    """Return a function that compares traces: (diff.json, the tables)."""
    return functools.partial(compare, tmp_path)


def test_rows_after_a_divergence_of_texts_are_not_compared(compared, capsys):
    others = [with_other_tokens(one, 8) if n < 4 else one for n, one in enumerate(SAME)]
    values, _, sequences = compared(A, others)
    found = values["compared"]
    assert (found["texts_diverged"], found["rows_after_divergence"]) == (4, 4 * 12)
    assert found["rows"] == NUM * 20 - 4 * 12
    assert values["by_layer"]["jaccard"]["values"] == [1, 1, 1, 1]
    assert [one["text_position"] for one in sequences] == ["8"] * 4 + [""] * 8
    assert values["totals"]["texts"] == pytest.approx(4 / 12)
    told = capsys.readouterr().out
    assert "texts: 4 of 12 diverge, the first at token 8, half of them up to 8" in told


def test_the_last_token_has_no_row_but_can_be_another(compared):
    """A text that ends early ends with a token that the other one does not have."""
    ended = [
        dataclasses.replace(
            one.page(0, 10), num_tokens=11, token_ids=np.array([*one.token_ids[:10], 2], np.int32)
        )
        for one in SAME
    ]
    values, _, sequences = compared(A, ended)
    assert {one["text_position"] for one in sequences} == {"10"}
    assert values["compared"]["rows"] == 10 * NUM
    assert values["compared"]["rows_after_divergence"] == 10 * NUM


def test_a_text_that_is_only_shorter_does_not_diverge(compared):
    shorter = [
        dataclasses.replace(one.page(0, 10), num_tokens=11, token_ids=one.token_ids[:11])
        for one in SAME
    ]
    values, *_ = compared(A, shorter)
    found = values["compared"]
    assert (found["texts_diverged"], found["rows"], found["rows_of_a_alone"]) == (0, 120, 120)
    assert (found["rows_of_b_alone"], found["rows_after_divergence"]) == (0, 0)


def test_missing_rows_are_counted_and_the_others_compared(compared):
    trace = make_trace("a-0", [[[0, 1]] * 4] * 5, weights=[[[0.6, 0.4]] * 4] * 5,
                       tokens=[1, 2, 3, 4, 5, 6], missing=[1, 2])  # fmt: skip
    whole = dataclasses.replace(trace, source=np.zeros(5, np.uint8), complete=True)
    values, *_ = compared([whole], [trace])
    assert values["compared"]["rows"] == 3
    assert (values["compared"]["rows_of_a_alone"], values["b"]["missing_rows"]) == (2, 2)


def test_requests_are_paired_by_id_before_their_prompt(compared):
    """Prompt 0 is asked twice: each goes with its own, whatever the order."""
    a = [served(0, request_id="x"), served(0, request_id="y"), served(1)]
    b = [with_other_experts(a[1], 0, [0]), a[0], served(1, server="b"), served(2, server="b")]
    values, _, sequences = compared(a, b)
    assert [(one["request_id_a"], one["request_id_b"]) for one in sequences] == [
        ("x", "x"), ("y", "y"), ("a-1", "b-1")
    ]  # fmt: skip
    assert [one["experts_position"] for one in sequences] == ["", "0", ""]
    assert values["compared"]["paired_by_id"] == 2
    assert (values["a"]["sequences"], values["b"]["sequences"]) == (3, 4)


def test_the_same_id_with_another_prompt_is_another_request(compared):
    a = [served(0, request_id="0"), served(1, request_id="1")]
    b = [served(1, request_id="0"), served(0, request_id="1")]
    values, _, sequences = compared(a, b)
    assert values["compared"]["paired_by_id"] == 0
    assert [(one["request_id_a"], one["request_id_b"]) for one in sequences] == [
        ("0", "1"), ("1", "0")
    ]  # fmt: skip


def test_requests_of_one_prompt_are_paired_in_their_order(compared):
    a, b = ([served(0, request_id=f"{side}{n}") for n in range(3)] for side in "xy")
    _, _, sequences = compared(a, b)
    assert [one["request_id_a"] + one["request_id_b"] for one in sequences] == [
        "x0y0", "x1y1", "x2y2"
    ]  # fmt: skip


def test_pages_of_a_sequence_are_one(compared):
    pages = [page for one in SAME for page in (one.page(0, 8), one.page(8, 99))]
    values, _, sequences = compared(A, pages)
    assert (values["b"]["sequences"], values["compared"]["rows"]) == (NUM, 20 * NUM)
    assert {one["text_position"] for one in sequences} == {""}


def test_choices_are_sequences_of_their_own(compared):
    a = [served(0, request_id="x", index=index) for index in (0, 1)]
    b = [with_other_experts(one, 2, [5]) if one.index else one for one in a]
    _, _, sequences = compared(a, b)
    assert [(one["index"], one["experts_position"]) for one in sequences] == [("0", ""), ("1", "5")]


def test_bare_logs_are_paired_by_id_alone(tmp_path, capsys):
    paths = []
    for name, traces in (("a", A), ("b", [dataclasses.replace(one, request_id=f"a-{number}")
                                          for number, one in enumerate(CHANGED)])):  # fmt: skip
        paths.append(write_run(tmp_path / name, traces) / "moe_routes.jsonl")
    assert run_command(*paths, "-o", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "the token ids of 12 are not known" in told
    assert "experts: differ from layer 4 on" in told
