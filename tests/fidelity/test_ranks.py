"""Several workers and API servers: one trace of every sequence, wherever its layers run.

Data parallelism is not among them: the all-to-all communication of vLLM 0.32.0's CPU build raises
``NotImplementedError`` in its MoE layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from moescope import Source
from tests.fidelity.bundled import Tally
from tests.fidelity.conftest import place, run_jobs
from tests.fidelity.schemes import SCHEMES, Scheme
from tests.fidelity.situations.served import BUDGET, Served, random_prompt, serve
from tests.fidelity.test_models import SITUATION, compare, load

# One core for each of two workers: vLLM cannot tell where there is a single NUMA node.
TWO_WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
TENSOR_PARALLEL = [scheme for scheme in SCHEMES if "Qwen2" in scheme.name or "V3" in scheme.name]


@pytest.fixture(scope="module")
def tensor_parallel(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the traces of models on two tensor-parallel workers."""
    out = tmp_path_factory.mktemp("tensor-parallel")
    jobs = [
        {
            "model": str(place(models, scheme)),
            "out": f"{place(out, scheme)}.npz",
            "options": {"enforce_eager": True, "tensor_parallel_size": 2, **scheme.llm_options},
        }
        for scheme in TENSOR_PARALLEL
    ]
    run_jobs(jobs, out, TWO_WORKERS)
    return out


@pytest.mark.parametrize("scheme", TENSOR_PARALLEL, ids=lambda scheme: scheme.name)
def test_tensor_parallel_workers_give_one_trace(
    scheme: Scheme, models: Path, tensor_parallel: Path
) -> None:
    traces = load(place(tensor_parallel, scheme).with_suffix(".npz"))
    assert all(trace.complete for trace in traces)
    compare(traces, place(models, scheme), scheme, SITUATION, "TP 2")


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two pipeline stages of three layers each, and two API servers.

    Compiled, since vLLM 0.32.0 does not run pipeline stages on the CPU with ``--enforce-eager``.
    """
    log = tmp_path_factory.mktemp("staged") / "staged.log"
    flags = ("--pipeline-parallel-size", "2", "--api-server-count", "2")
    flags += ("--enable-log-requests",)
    with serve(log, *flags, eager=False, env=TWO_WORKERS) as served:
        yield served


def test_stages_and_api_servers_give_one_trace(staged: Served, rng: np.random.Generator) -> None:
    shared = random_prompt(rng, 100)
    first = staged.complete([shared])
    rest = staged.complete(
        [shared + random_prompt(rng, 40), random_prompt(rng, 150)], n=2, temperature=1
    )
    traces = [trace for one in (first, rest) for trace in staged.routes(one["id"])]
    assert len(traces) == 5
    assert all(trace.layers.tolist() == list(range(6)) for trace in traces)
    assert any((trace.source == Source.CACHED).sum() > BUDGET for trace in traces)
    assert any(span.is_chunk for span in staged.spans())
    tally = Tally("chunks, prefix hits, n > 1", layout="PP 2, 2 API servers")
    tally.add(*traces)
    tally.record()


def log_of(served: Served) -> str:
    return served.server.log.read_text()


def test_every_api_server_answers_for_every_request(
    staged: Served, rng: np.random.Generator
) -> None:
    takers = {}
    while len(takers) < 8 or (len({*takers.values()}) < 2 and len(takers) < 80):
        request_id = staged.complete([random_prompt(rng, 20)])["id"]
        said = log_of(staged)
        takers[request_id] = re.search(rf"\(ApiServer_(\d) .*{request_id}", said)[1]
    assert {*takers.values()} == {"0", "1"}, "one API server took all requests"
    for request_id in takers:
        for _ in range(6):  # each a connection of its own, which either server may take
            answer = httpx.get(f"{staged.server.url}/routes/{request_id}", timeout=30)
            assert answer.status_code == 200
            (trace,) = answer.json()["traces"]
            assert (trace["complete"], trace["layers"]) == (True, list(range(6)))


def test_one_id_for_many_requests_at_once(staged: Served, rng: np.random.Generator) -> None:
    """Which API server takes which is the kernel's choice; any of them finds them all."""
    prompts = [random_prompt(rng, length) for length in range(20, 100, 10)]
    takers: set[str] = set()
    for number in range(10):
        header = {"X-Request-Id": f"same-{number}"}
        with ThreadPoolExecutor(len(prompts)) as pool:
            responses = list(pool.map(lambda one: staged.complete([one], header), prompts))  # noqa: B023
        (request_id,) = {one["id"] for one in responses}
        takers = {*re.findall(rf"\(ApiServer_(\d) .*Received request {request_id}", log_of(staged))}
        if takers == {"0", "1"}:
            break
    assert takers == {"0", "1"}, "one API server took all requests"
    traces = staged.routes(request_id)
    assert all(trace.complete for trace in traces)
    assert sorted(trace.token_ids.tolist() for trace in traces) == sorted(
        one["choices"][0]["prompt_token_ids"] + one["choices"][0]["token_ids"] for one in responses
    )
    tally = Tally("8 requests of one X-Request-Id at once", layout="PP 2, 2 API servers")
    tally.add(*traces)
    tally.record()


def test_every_layer_is_counted_once(staged: Served) -> None:
    counts = staged.client.experts().counts
    assert counts.shape == (6, 60)
    assert len({*counts.sum(-1).tolist()}) == 1
    rows = staged.metric("moescope_rows_total")
    assert rows == staged.metric("moescope_rows_captured_total") == counts[0].sum() / 4
    info = httpx.get(f"{staged.server.url}/moescope/info", timeout=30).json()
    assert json.dumps(info["layers"]) == json.dumps(list(range(6)))
