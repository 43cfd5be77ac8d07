"""Weights that change while requests run: each row's number is that of the weights it is from."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.fidelity.cells import Cell, record
from benchmarks.fidelity.reference import reference_of_versions
from moescope import RouteTrace, Source
from moescope_service.vllm_contract.versions import vllm_version
from tests.fidelity.bundled import SCHEME, check
from tests.fidelity.situations.served import Served, random_prompt, serve_loading

REQUESTS = 200


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve_loading(tmp_path_factory.mktemp("weights") / "weights.log") as served:
        yield served


def test_every_row_is_of_the_weights_whose_number_it_has(
    served: Served,
    weights_files: list[Path],
    weights_models: list[Any],
    rng: np.random.Generator,
) -> None:
    loaded, ended = [0], threading.Event()

    def change_at_random() -> None:
        while not ended.wait(rng.uniform(0.1, 0.6)):
            loaded.append(len(loaded) % len(weights_files))
            load(served, weights_files[loaded[-1]])

    traces = complete_while(change_at_random, ended, served, REQUESTS)
    assert len(loaded) > 5
    assert all(trace.complete for trace in traces)
    assert any(len(trace.weights_versions) > 1 for trace in traces)
    assert any(has_older_prefix(trace) for trace in traces), "no prefix hit was on older weights"
    by_number = [weights_models[checkpoint] for checkpoint in loaded]
    found = [check(trace, reference_of_versions(trace, by_number)) for trace in traces]
    record(
        Cell(
            SCHEME,
            "weights loaded at random times, each row by those of its number",
            pairs := sum(trace.num_rows * trace.num_layers for trace in traces),
            pairs,
            missing=0,
            largest_weight_error=max(error for error, _ in found),
            ties=sum(ties for _, ties in found),
        )
    )
    # By the next checkpoint each trace must fail.
    shifted = [*by_number[1:], weights_models[(loaded[-1] + 1) % len(weights_files)]]
    for trace in traces[:20]:
        with pytest.raises(AssertionError):
            check(trace, reference_of_versions(trace, shifted))


@pytest.mark.skipif(
    vllm_version().startswith(("0.30.", "0.31.")), reason="labels came with vLLM 0.32"
)
def test_output_rows_are_of_the_weights_that_vllm_names(
    served: Served, weights_files: list[Path]
) -> None:
    first, ended = served.client.info().weights_version or 0, threading.Event()
    assert served.client.label_weights(str(first)) == str(first)

    def change_and_label() -> None:
        for number in itertools.count(first + 1):
            if ended.wait(0.4):
                return
            post(served, "/pause", params={"mode": "keep", "clear_cache": "false"})
            load(served, weights_files[number % len(weights_files)])
            served.client.label_weights(str(number))
            post(served, "/resume")

    traces = complete_while(change_and_label, ended, served, 60)
    for trace in traces:
        spans = trace.weight_labels
        lengths = [one["end"] - one["start"] for one in spans]
        named = np.repeat([int(one["version"]) for one in spans], lengths)
        numbers = trace.weights_version
        assert numbers is not None
        assert numbers[trace.prompt_len - 1 :].tolist() == named.tolist()
    assert any(len(trace.weight_labels) > 1 for trace in traces)


def load(served: Served, file: Path) -> None:
    """Load a file of weights, as a trainer does."""
    post(served, "/collective_rpc", json={"method": "load_file", "args": [str(file)]})


def post(served: Served, path: str, **request: Any) -> None:
    """Post to an endpoint of vLLM's development mode."""
    httpx.post(f"{served.server.url}{path}", timeout=60, **request).raise_for_status()


def complete_while(
    change: Callable[[], None], ended: threading.Event, served: Served, number: int
) -> list[RouteTrace]:
    """Send requests, many with the beginning of another one, while weights change."""
    rng = np.random.default_rng(3)
    texts = [random_prompt(rng, 160) for _ in range(4)]
    prompts = [
        texts[rng.integers(len(texts))][: rng.integers(32, 160)] + random_prompt(rng, 8)
        for _ in range(number)
    ]
    changing = threading.Thread(target=change)
    changing.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(lambda one: served.complete(one, max_tokens=24), prompts))
    finally:
        ended.set()
        changing.join()
    return [trace for one in responses for trace in served.routes(one["id"])]


def has_older_prefix(trace: RouteTrace) -> bool:
    numbers, is_cached = trace.weights_version, trace.source == Source.CACHED
    return bool(is_cached.any()) and int(numbers[is_cached].min()) < int(numbers[-1])
