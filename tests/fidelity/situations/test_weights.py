"""Weights that change while requests run: each row's number is that of the weights it is from."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.fidelity.cells import Cell, record
from benchmarks.fidelity.reference import reference_of_versions
from moescope import RouteTrace, Source
from moescope_service import bundled_model
from tests.fidelity.bundled import SCHEME, check
from tests.fidelity.situations.served import Served, random_prompt, serve

REQUESTS = 200
CHECKPOINTS = 3
CHANGED = r"layernorm|model\.norm|embed_tokens"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("weights") / "weights.log"
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    extension = "tests.fidelity.situations.extension.LoadsFiles"
    env = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}
    with serve(log, "--worker-extension-cls", extension, env=env) as served:
        yield served


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Norms and embeddings: those of the bundled model, and others near them.

    The CPU build of vLLM 0.32.0 computes with packed copies of other weights, which loading leaves;
    its ``reload_weights`` leaves a model whose experts are not those of the checkpoint.
    """
    (checkpoint,) = bundled_model.path().glob("*.safetensors")
    own = {name: one for name, one in load_file(checkpoint).items() if re.search(CHANGED, name)}
    made = []
    for number in range(CHECKPOINTS):
        generator = torch.Generator().manual_seed(number)
        noise = {name: torch.randn(one.shape, generator=generator) for name, one in own.items()}
        scale = 0.0 if number == 0 else 0.3
        path = tmp_path_factory.mktemp("files") / f"{number}.safetensors"
        changed = {name: one * (1 + scale * noise[name]).to(one.dtype) for name, one in own.items()}
        save_file(changed, path)
        made.append(path)
    return made


@pytest.fixture(scope="module")
def models(files: list[Path]) -> list[torch.nn.Module]:
    made = []
    for file in files:
        model = AutoModelForCausalLM.from_pretrained(
            bundled_model.path(), dtype=torch.float64, experts_implementation="eager"
        )
        model.load_state_dict(load_file(file), strict=False)
        made.append(model)
    return made


def test_every_row_is_of_the_weights_whose_number_it_has(
    served: Served, files: list[Path], models: list, rng: np.random.Generator
) -> None:
    loaded, ended = [0], threading.Event()

    def change_at_random() -> None:
        while not ended.wait(rng.uniform(0.1, 0.6)):
            loaded.append(len(loaded) % CHECKPOINTS)
            body = {"method": "load_file", "args": [str(files[loaded[-1]])]}
            url = f"{served.server.url}/collective_rpc"
            httpx.post(url, json=body, timeout=60).raise_for_status()

    traces = complete_while(change_at_random, ended, served)
    assert len(loaded) > 5
    assert all(trace.complete for trace in traces)
    assert any(len(trace.weights_versions) > 1 for trace in traces)
    assert any(has_older_prefix(trace) for trace in traces), "no prefix hit was on older weights"
    by_number = [models[checkpoint] for checkpoint in loaded]
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
    shifted = [*by_number[1:], models[(loaded[-1] + 1) % CHECKPOINTS]]
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
