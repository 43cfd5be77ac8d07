"""The same prompts on several servers, and what ``moescope diff`` says of them."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
import orjson
import pytest
from analysis_reference import random_trace

from moescope import formats, replay
from moescope.cli import main

NUM = 12
PROMPTS = [[number, number + 1, 5] for number in range(NUM)]
SHAPE = (20, 4, 2)
LAYERS = [0, 2, 4, 6]


def served(number, *, server="a", **changes):
    """The trace of a prompt: the same on all servers, under another id."""
    trace = random_trace(number, *SHAPE)
    tokens = [*PROMPTS[number], *range(100, 100 + trace.num_tokens - 3)]
    fields = {
        "request_id": f"{server}-{number}",
        "prompt_len": 3,
        "token_ids": np.array(tokens, np.int32),
        "source": np.zeros(trace.num_rows, np.uint8),
    }
    return dataclasses.replace(trace, **(fields | changes))


def with_other_experts(trace, layer, rows):
    """Other experts from a layer on, in some rows; none of them a near-tie."""
    ids, weights = trace.topk_ids.copy(), trace.topk_weights.copy()
    column = LAYERS.index(layer)
    ids[rows, column:] = (ids[rows, column:] + 2) % trace.num_experts
    weights[rows, column:, 0], weights[rows, column:, 1] = 0.9, 0.1
    return dataclasses.replace(trace, topk_ids=ids, topk_weights=weights)


def with_other_tokens(trace, position):
    """Another token from a position on, and other experts from there on."""
    tokens = trace.token_ids.copy()
    tokens[position:] += 1000
    return dataclasses.replace(
        with_other_experts(trace, 0, slice(position, None)), token_ids=tokens
    )


A = [served(number) for number in range(NUM)]
AGAIN = [served(number, server="again") for number in range(NUM)]
SAME = [served(number, server="b") for number in range(NUM)]
CHANGED = [with_other_experts(one, 4, [3, 9, 11]) for one in SAME]


def write_npz(path, traces):
    path.write_bytes(formats.dump_npz(traces))
    return path


def write_run(path, traces):
    """A run directory."""
    path.mkdir()
    head = formats.meta_line(
        model="tiny", versions={}, device="cpu", seed=0, layers=LAYERS, top_k=2, num_experts=7
    )
    lines = b"".join(line for one in traces for line in formats.route_lines(one))
    (path / "moe_routes.jsonl").write_bytes(head + lines)
    replay.write_responses(path / "responses.jsonl", [
        replay.Response(
            index=index, prompt="?", request_id=one.request_id, text="", finish_reason="stop",
            prompt_tokens=one.prompt_len, completion_tokens=one.num_tokens - one.prompt_len,
            prompt_token_ids=one.token_ids[: one.prompt_len].tolist(),
            token_ids=one.token_ids[one.prompt_len :].tolist(), started_s=0.0, latency_s=1.0,
        )
        for index, one in enumerate(traces)
    ])  # fmt: skip
    return path


def write_parquet(path, traces):
    arrow = pytest.importorskip("moescope.arrow")
    path.write_bytes(arrow.dump_parquet(traces))
    return path


def write_arrow(path, traces):
    arrow = pytest.importorskip("moescope.arrow")
    path.write_bytes(arrow.dump_arrow(traces))
    return path


def compare(tmp_path, a, b, *options, again=None, write=write_npz, suffix=".npz"):
    """Compare traces: (diff.json, the tables)."""
    paths = [write(tmp_path / f"a{suffix}", a), write(tmp_path / f"b{suffix}", b)]
    if again is not None:
        paths += ["--again", write(tmp_path / f"again{suffix}", again)]
    out = tmp_path / "out"
    assert run_command(*paths, *options, "-o", out) == 0
    names = ("diff.csv", "sequences.csv")
    return orjson.loads((out / "diff.json").read_bytes()), *(table(out / one) for one in names)


def run_command(*arguments):
    """The exit status of ``moescope diff``."""
    try:
        return main(["diff", *map(str, arguments)])
    except SystemExit as error:
        return error.code or 0


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
