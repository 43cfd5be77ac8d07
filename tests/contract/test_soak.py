"""A soak undoes its faults, sees what is wrong, and finds the same in several processes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import resource
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.fidelity.reference import reference, reference_model
from benchmarks.soak import simulated
from benchmarks.soak.__main__ import MIN_REQUESTS, problems
from benchmarks.soak.faults import Faults
from benchmarks.soak.judging import Judge
from moescope import RouteTrace, Source, formats
from tests.waiting import wait_until

from .deployment import Deployment

BEGUN = {"stop": "collector_stops", "fill_disk": "disks_full", "pause": "pauses"}


@pytest.mark.parametrize("fault", BEGUN)
def test_a_fault_that_began_is_undone_before_the_faults_end(fresh: Deployment, fault: str) -> None:
    server = SimpleNamespace(url=fresh.url, pid=os.getpid())
    load = SimpleNamespace(fault_s=0.0)
    faults = Faults(server, load, 0.01, hold_s=0.3, order=[fault])
    limit = resource.prlimit(fresh.collector.pid, resource.RLIMIT_FSIZE)

    async def end_in_the_middle() -> None:
        disturbing = asyncio.create_task(faults.run())
        await asyncio.to_thread(wait_until, lambda: faults.counts[BEGUN[fault]], "it begins")
        disturbing.cancel()
        await asyncio.wait([disturbing])
        assert disturbing.cancelled()

    asyncio.run(end_in_the_middle())
    assert faults.counts == {BEGUN[fault]: 1}
    assert psutil.Process(fresh.collector.pid).status() != psutil.STATUS_STOPPED
    assert resource.prlimit(fresh.collector.pid, resource.RLIMIT_FSIZE) == limit
    assert fresh.http.get("/moescope/info").json()["capture"] == "on"


def good() -> dict[str, Any]:
    """Return a result of real servers with which nothing is wrong."""
    ended = {"exit_status": 1, "processes_left": 0}
    return {
        "complete_and_wrong": 0,
        "wrong_rows": 0,
        "after_faults": {"traces": 10, "complete": 8},
        "load": {"requests": MIN_REQUESTS, "serving_errors": {"500": 1}, "unexplained": {}},
        "stock": {"serving_errors": {"500": 2}},
        "missing_rows_of_all_traces": 5,
        "missing_by_cause": {"paused": 2, "restart": 3},
        "api_server_killed": {"moescope": ended, "stock": ended},
        "grown_mib": {"collector": 32.0, "API server 0": 64.0, "VLLM::EngineCor": 500.0},
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"wrong_rows": 1},
        {"complete_and_wrong": 1},
        {"after_faults": {"traces": 10, "complete": 7}},
        {"after_faults": {"traces": 0, "complete": 0}},
        {"load": {"requests": 1, "serving_errors": {"502": 1}, "unexplained": {}}},
        {"load": {"requests": 1, "serving_errors": {}, "unexplained": {"404": 1}}},
        {"missing_by_cause": {"paused": 2}},
        {"api_server_killed": {"moescope": {"exit_status": None}, "stock": {"exit_status": 1}}},
        {"grown_mib": {"API server 1": 65.0}},
        {"grown_mib": {"collector": 33.0}},
    ],
)
def test_each_thing_that_is_not_to_be_is_a_problem(wrong: dict[str, Any]) -> None:
    assert problems("served", good()) == []
    assert len(problems("served", {**good(), **wrong})) == 1


def test_several_processes_simulate_what_one_does() -> None:
    found = [simulated.run(300, 5.0, 1, workers) for workers in (1, 2)]
    for one, workers in zip(found, (1, 2), strict=True):
        assert len(one["memory_mib"]) == workers
        for name in ("took_s", "workers", "memory_mib", "grown_mib"):
            del one[name]
    assert found[0] == found[1]
    assert found[0]["requests"] == 300


def test_a_wrong_row_among_right_ones_is_found() -> None:
    token_ids = np.arange(10, 22, dtype=np.int32)
    routes = reference(reference_model(), token_ids[:-1])
    ids = routes.topk_ids.astype(np.uint8)
    trace = RouteTrace(
        request_id="right",
        index=0,
        model="bundled",
        num_experts=60,
        num_hidden_layers=6,
        layers=np.arange(6, dtype=np.int32),
        topk_ids=ids,
        topk_weights=routes.topk_weights.astype(np.float32),
        source=np.full(len(ids), Source.COMPUTED, np.uint8),
        token_ids=token_ids,
        prompt_len=8,
        num_tokens=len(token_ids),
        cached_len=0,
        finish_reason="length",
        created_s=0.0,
        complete=True,
    )
    others = ids.copy()
    others[3, 2, 0] = next(expert for expert in range(60) if expert not in ids[3, 2])
    wrong = dataclasses.replace(trace, topk_ids=others)

    async def take_both(judge: Judge) -> None:
        for one in (trace, wrong):
            await judge.take(formats.dump_npz([one]))
        await judge.finish()

    with contextlib.closing(Judge(1)) as judge:
        asyncio.run(take_both(judge))
    assert (judge.counts["traces"], judge.counts["wrong_rows"]) == (2, 1)
    assert judge.counts["complete_and_wrong"] == 1
