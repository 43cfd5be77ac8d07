"""A KV connector: blocks leave the cache and come back, and their rows with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moescope import Source
from tests.fidelity.bundled import Tally
from tests.fidelity.situations.served import BLOCK, Served, random_prompt, serve

FLAGS = (
    *("--num-gpu-blocks-override", "16", "--max-model-len", "448"),
    # vLLM's example of a connector takes whole prompts.
    *("--max-num-batched-tokens", "448", "--max-num-seqs", "2"),
)


def connector(directory: Path) -> str:
    """vLLM's example: it writes each prompt's KV entries to a file, and loads them."""
    extra = {"shared_storage_path": str(directory)}
    values = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    return json.dumps({**values, "kv_connector_extra_config": extra})


@pytest.fixture(scope="module")
def connected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("connected")
    flags = [*FLAGS, "--kv-transfer-config", connector(directory / "kv")]
    with serve(directory / "connected.log", *flags) as served:
        yield served


def test_a_connector_brings_blocks_back(connected: Served, rng: np.random.Generator) -> None:
    tally = Tally("KV connector: blocks go out and come back")
    prompts = [random_prompt(rng, 6 * BLOCK + 8) for _ in range(4)]  # 28 blocks of 15
    counts = np.zeros(len(Source), int)
    for number in [0, 0, 1, 2, 3, 0, 1, 2, 3, 3]:
        response = connected.complete(prompts[number])
        (trace,) = connected.routes(response["id"])
        tally.add(trace)
        counts += np.bincount(trace.source, minlength=len(Source))
    assert counts[Source.CACHED] > 5 * BLOCK
    assert counts[Source.RECALLED] > 20 * BLOCK
    assert (
        connected.metric("moescope_trace_rows_total", source="recalled") == counts[Source.RECALLED]
    )
    assert connected.metric("moescope_prefix_bytes") > 0
    tally.record()


def test_what_another_machine_computed_is_missing(
    connected: Served, tmp_path_factory: pytest.TempPathFactory, rng: np.random.Generator
) -> None:
    """A second server has the first one's files, and none of its rows."""
    prompt = random_prompt(rng, 4 * BLOCK + 8)
    connected.complete(prompt)
    directory = tmp_path_factory.mktemp("another")
    flags = [*FLAGS, "--kv-transfer-config", connector(connected.server.log.parent / "kv")]
    with serve(directory / "another.log", *flags) as another:
        response = another.complete(prompt)
        (trace,) = another.routes(response["id"])
        missing = trace.source == Source.MISSING
        assert missing.nonzero()[0].tolist() == [*range(4 * BLOCK)]
        assert not trace.complete
        assert another.metric("moescope_trace_rows_missing_total", cause="not_captured") == (
            4 * BLOCK
        )
        tally = Tally("KV connector: entries of another machine")
        tally.add(trace, missing=4 * BLOCK)
        tally.record()
