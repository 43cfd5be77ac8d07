"""Weights that change while requests run: each row's number is that of the weights it is from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.fidelity.cells import Cell, record
from benchmarks.fidelity.reference import reference_of_versions
from moescope import RouteTrace, Source
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
            body = {"method": "load_file", "args": [str(weights_files[loaded[-1]])]}
            url = f"{served.server.url}/collective_rpc"
            httpx.post(url, json=body, timeout=60).raise_for_status()

    traces = complete_while(change_at_random, ended, served)
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


def complete_while(change: object, ended: threading.Event, served: Served) -> list[RouteTrace]:
    """Send requests, many with the beginning of another one, while weights change."""
    rng = np.random.default_rng(3)
    texts = [random_prompt(rng, 160) for _ in range(4)]
    prompts = [
        texts[rng.integers(len(texts))][: rng.integers(32, 160)] + random_prompt(rng, 8)
        for _ in range(REQUESTS)
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
