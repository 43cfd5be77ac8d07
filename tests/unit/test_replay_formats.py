"""Traces as trainers read them; the readers here follow what the trainers' sources say."""

from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
import pytest
from client_fakes import make_trace

from moescope import FormatError, RouteTrace, replay_formats

LAYERS, TOP_K = 8, 4
"""Of the model: the trace has some of the layers."""


def expected(trace: RouteTrace) -> np.ndarray:
    array = np.zeros((trace.num_rows, LAYERS, TOP_K), int)
    array[:, trace.layers] = trace.topk_ids
    return array


def from_row(trace: RouteTrace, start: int) -> RouteTrace:
    """What a client fetches with ``start``."""
    rows = slice(start, None)
    return dataclasses.replace(
        trace,
        start=start,
        topk_ids=trace.topk_ids[rows],
        topk_weights=trace.topk_weights[rows],
        source=trace.source[rows],
        token_ids=trace.token_ids[rows],
    )


def read_slime(fields: dict, num_tokens: int, existing: np.ndarray) -> np.ndarray:
    """As ``slime/utils/types.py``: rows behind a start, whose number the tokens give."""
    start = fields["routed_experts_start_len"]
    numbers = np.frombuffer(base64.b64decode(fields["routed_experts"]), np.int32)
    rows = numbers.reshape(num_tokens - 1 - start, LAYERS, TOP_K)
    return np.concatenate([existing[:start], rows])


def read_prime_rl(value: dict, nodes: list[int]) -> list[np.ndarray]:
    """As verifiers' ``graph.py``: each node of a path takes the rows of its tokens."""
    data = np.frombuffer(base64.b64decode(value["data"]), value["dtype"]).reshape(value["shape"])
    ends = np.cumsum(nodes) - value["start"]
    parts = [data[max(end - size, 0) : end] for size, end in zip(nodes, ends, strict=True)]
    parts[-1] = np.concatenate([parts[-1], parts[-1][-1:]])  # the token that was never routed
    return parts


def read_nemo_gym(text: str) -> np.ndarray:
    """As ``nemo_rl/utils/routed_experts_codec.py``."""
    magic, dtype, shape, data = text.split(":")
    assert magic == "nrlre1"
    assert dtype in {"int8", "int16", "int32"}
    return np.frombuffer(base64.b64decode(data), dtype).reshape([*map(int, shape.split("x"))])


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_vllm(num_experts, dtype):
    trace = make_trace(num_experts=num_experts)
    array = np.load(io.BytesIO(base64.b64decode(replay_formats.vllm(trace))), allow_pickle=False)
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, expected(trace))


def test_slime_joins_turns():
    trace = make_trace(num_rows=20)
    whole = read_slime(replay_formats.slime(trace), 21, np.zeros((0, LAYERS, TOP_K)))
    np.testing.assert_array_equal(whole, expected(trace))
    later = replay_formats.slime(from_row(trace, 7))
    np.testing.assert_array_equal(read_slime(later, 21, whole[:9]), expected(trace))


@pytest.mark.parametrize(
    ("num_experts", "highest", "dtype"),
    [(60, 59, "uint8"), (300, 255, "uint8"), (300, 299, "uint16")],
)
def test_prime_rl(num_experts, highest, dtype):
    trace = make_trace(num_rows=20, num_experts=num_experts)
    ids = np.minimum(trace.topk_ids, highest)
    ids[0, 0, 0] = highest
    trace = dataclasses.replace(trace, topk_ids=ids)
    value = replay_formats.prime_rl(trace)
    assert value["dtype"] == dtype
    prompt, completion = read_prime_rl(value, [5, 16])
    np.testing.assert_array_equal(prompt, expected(trace)[:5])
    np.testing.assert_array_equal(completion[:-1], expected(trace)[5:])
    (turn,) = read_prime_rl(replay_formats.prime_rl(from_row(trace, 12)), [21])
    np.testing.assert_array_equal(turn[:-1], expected(trace)[12:])


@pytest.mark.parametrize(
    ("num_experts", "dtype"), [(128, np.int8), (129, np.int16), (2**15, np.int16)]
)
def test_nemo_rl_marks_missing_rows(num_experts, dtype):
    trace = make_trace(num_rows=12, num_experts=num_experts, missing=0.5)
    array = replay_formats.nemo_rl(trace)
    assert array.dtype == dtype
    want = expected(trace)
    want[np.ix_(~trace.present, trace.layers)] = -1
    np.testing.assert_array_equal(array, want)
    sent = read_nemo_gym(replay_formats.nemo_gym(trace))
    assert sent.dtype == dtype
    np.testing.assert_array_equal(sent[:-1], array)
    assert (sent[-1] == np.arange(TOP_K)).all()


WHOLE = [replay_formats.vllm, replay_formats.slime, replay_formats.prime_rl]


@pytest.mark.parametrize("make", WHOLE)
def test_what_has_no_word_for_missing_rows_refuses_them(make):
    with pytest.raises(FormatError, match=r"\d+ of 30 rows of 'chatcmpl-1', index 0, are missing"):
        make(make_trace(num_rows=30, missing=0.5))


@pytest.mark.parametrize("make", [*WHOLE, replay_formats.nemo_rl, replay_formats.nemo_gym])
def test_a_page_is_no_sequence(make):
    trace = make_trace(num_rows=20)
    page = dataclasses.replace(
        trace,
        topk_ids=trace.topk_ids[:8],
        topk_weights=trace.topk_weights[:8],
        source=trace.source[:8],
        token_ids=trace.token_ids[:8],
    )
    with pytest.raises(FormatError, match="end at 8, not at 20: this is a page"):
        make(page)


def test_nemo_rl_takes_whole_sequences():
    with pytest.raises(FormatError, match="begin at 7, and NeMo-RL takes whole"):
        replay_formats.nemo_rl(from_row(make_trace(num_rows=20), 7))
