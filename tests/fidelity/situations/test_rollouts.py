"""The documents' rollout loop in full size: every row that a trainer gets, against HF transformers.

64 prompts, 8 samples, two turns; in each step the weights change while the last turn runs.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.fidelity.cells import Cell, record
from benchmarks.fidelity.reference import Routes, reference_of_versions
from moescope import RouteTrace
from tests.fidelity.bundled import SCHEME, check
from tests.fidelity.conftest import IS_WHOLE
from tests.fidelity.situations.served import ROOT, Served, serve_loading

PROMPTS, SAMPLES, STEPS = 64, 8, 3
JUDGED_EVERY = 1 if IS_WHOLE else 7
TOLERANCE = 2e-5
"""Of weights: among half a million pairs errors reach further, to 5e-6, where norms are noisy."""
Wholes = dict[tuple[str, int], RouteTrace]
"""The whole traces of all turns, by request and index."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("rollouts") / "rollouts.log"
    with serve_loading(log, "--max-num-seqs", "64") as served:
        yield served


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sequences are so short that a second thread of PyTorch's only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def example() -> Any:
    """The example as a module."""
    path = ROOT / "docs" / "examples" / "rollouts.py"
    spec = importlib.util.spec_from_file_location("rollouts", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["rollouts"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def args(example: Any, weights_files: list[Path]) -> argparse.Namespace:
    """Each step loads the next checkpoint; the last one those that the server began with."""
    later = map(str, (*weights_files[1:], weights_files[0]))
    options = ["--steps", str(STEPS), "--prompts", str(PROMPTS), "--samples", str(SAMPLES)]
    options += ["--max-tokens", "12", "--load-method", "load_file", "--weights", *later]
    parsed: argparse.Namespace = example.parse(options)
    return parsed


@pytest.fixture(scope="module")
def steps(example: Any, args: argparse.Namespace, served: Served) -> list[Any]:
    async def collected() -> list[Any]:
        return [step async for step in example.Rollouts(served.server.url, args).steps()]

    return asyncio.run(collected())


@pytest.fixture(scope="module")
def samples(steps: list[Any]) -> list[Any]:
    return [sample for step in steps for sample in step.samples]


@pytest.fixture(scope="module")
def wholes(samples: list[Any], served: Served) -> Wholes:
    ids = {turn.request_id for sample in samples for turn in sample.turns}
    batch = served.client.routes_batch([*ids])
    assert not batch.failed
    return {(one.request_id, one.index): one for found in batch.traces.values() for one in found}


def turns_of(sample: Any, wholes: Wholes) -> list[tuple[RouteTrace, slice]]:
    """Return the whole trace of each turn, and which rows of it the sample has."""
    return [
        (wholes[turn.request_id, turn.index], slice(turn.start, turn.start + turn.num_rows))
        for turn in sample.turns
    ]


def judged(sample: Any, wholes: Wholes, models: Sequence[Any]) -> tuple[RouteTrace, float, int]:
    """Compare a sample with HF's routes; return its trace, the largest error of a weight, and ties.

    A row is that of the turn that brought it, with the keys and values that this turn saw.
    """
    turns = turns_of(sample, wholes)
    found = [(reference_of_versions(whole, models), rows) for whole, rows in turns]
    want = Routes(
        np.concatenate([routes.topk_ids[rows] for routes, rows in found]),
        np.concatenate([routes.topk_weights[rows] for routes, rows in found]),
        sum(routes.ties for routes, _ in found),
    )
    weights = np.concatenate([whole.topk_weights[rows] for whole, rows in turns])
    trace = dataclasses.replace(sample.trace(), topk_weights=weights)
    return trace, *check(trace, want, TOLERANCE)


def test_every_row_is_of_the_weights_whose_number_it_has(
    samples: list[Any], wholes: Wholes, weights_models: list[Any]
) -> None:
    by_number = [*weights_models, weights_models[0]]
    assert len(samples) == PROMPTS * SAMPLES * STEPS
    found = [judged(sample, wholes, by_number) for sample in samples[::JUDGED_EVERY]]
    assert all(trace.complete for trace, _, _ in found)
    pairs = sum(trace.num_rows * trace.num_layers for trace, _, _ in found)
    error, ties = max(error for _, error, _ in found), sum(ties for _, _, ties in found)
    what = "rollouts: 64 x 8, two turns by start, weights changed in mid-turn"
    record(Cell(SCHEME, what, pairs, pairs, missing=0, largest_weight_error=error, ties=ties))
    # By the next checkpoint each sample must fail.
    for sample in samples[:: PROMPTS * SAMPLES // 8]:
        with pytest.raises(AssertionError):
            judged(sample, wholes, by_number[1:] + by_number[1:2])


def test_the_weights_changed_while_requests_ran(
    samples: list[Any], steps: list[Any], wholes: Wholes
) -> None:
    assert [step.weights_version for step in steps] == [1, 2, 3]
    last = [wholes[sample.turns[-1].request_id, 0] for sample in samples]
    assert any(len(set(one.weights_version[one.prompt_len :].tolist())) > 1 for one in last)


def test_every_row_crossed_once(samples: list[Any], steps: list[Any], wholes: Wholes) -> None:
    for sample in samples:
        whole, _ = turns_of(sample, wholes)[-1]
        trace = sample.trace().check_values()
        assert trace.token_ids.tolist() == whole.token_ids.tolist() == sample.tokens
        assert trace.num_rows == whole.num_rows == len(sample.is_output) - 1
        assert sum(sample.is_output) == sum(
            turn.num_tokens - turn.prompt_len for turn in sample.turns
        )
    for step in steps:
        rows = [turns_of(sample, wholes)[-1][0].num_rows for sample in step.samples]
        assert step.rows == sum(rows)


def test_rows_that_are_too_old_are_not_replayed(
    example: Any, args: argparse.Namespace, steps: list[Any]
) -> None:
    def replayed(form: str, max_staleness: int) -> list[Any]:
        values = {**vars(args), "format": form, "max_staleness": max_staleness}
        made: list[Any] = example.replayed(step, argparse.Namespace(**values))
        return made

    for step in steps:
        arrays = replayed("nemo_rl", 0)
        assert any((array != -1).any() for array in arrays)
        for array, sample in zip(arrays, step.samples, strict=True):
            trace = sample.trace()
            too_old = trace.weights_version < step.weights_version
            assert (array[too_old] == -1).all()
            np.testing.assert_array_equal(array[~too_old], trace.topk_ids[~too_old])
        assert len(replayed("slime", 1)) == len(step.samples)
        assert not replayed("slime", 0)
        assert {sample.left_out for sample in step.samples} == {"rows are too old"}
