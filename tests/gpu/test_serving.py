"""Real servers on the GPU, with CUDA graphs: routes are what the routers computed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from benchmarks.gpu import fidelity, tap
from moescope import Client, datasets, http, replay
from moescope.servers import Server, captured_command, free_ports, wait_ready
from moescope_service import bundled_model
from moescope_service.bundled_model.problems import final_answer

# Given, not profiled: other programs on the GPU may take and free memory meanwhile.
MEMORY = ("--kv-cache-memory-bytes", str(2**30), "--gpu-memory-utilization", "0.1")


@pytest.mark.parametrize("runner", ["v2", "v1"])
def test_routes_are_what_the_routers_computed(runner: str, tmp_path: Path) -> None:
    tap.install(tmp_path)
    port = str(*free_ports(1))
    command = captured_command([str(bundled_model.path()), *MEMORY, "--port", port])
    if runner == "v2":
        command.append("--enable-return-routed-experts")
    env = {
        **os.environ,
        **tap.environment(tmp_path),
        **tap.saving(tmp_path, 2000),
        **fidelity.runner_env(runner),
        # Where Inductor pads the logits of 60 experts, vLLM misreads them (vLLM issue 56900).
        "TORCHINDUCTOR_SHAPE_PADDING": "0",
    }
    log = tmp_path / "server.log"
    with Server(runner, command, f"http://127.0.0.1:{port}", log, env) as server:
        wait_ready([server], 300)
        questions = [item.question for item in datasets.sample()]
        answers = asyncio.run(fidelity.ask_all(server.url, questions, concurrency=32))
        agreement = fidelity.compare_logits(server.url, tmp_path, bundled_model.path())
        with Client(server.url) as client:
            assert client.info().router_types == ("FusedTopKRouter",)
        responses = asyncio.run(replay_all(server.url, questions))
        coverage = fidelity.coverage(server.url, answers)
    assert coverage == {"traces": len(questions), "coverage_1": len(questions)}
    if runner == "v2":
        same = fidelity.compare_ids(answers)
        assert same["byte_equal"] == same["requests"] == len(questions)
    assert agreement.rows > 1500
    assert agreement.not_top_k == 0
    assert agreement.largest_error_in_spacings <= 1.0
    # The model still computes what it was trained to: nothing of the capture got in its way.
    right = [
        final_answer(response.text or "") == final_answer(item.answer)
        for response, item in zip(responses, datasets.sample(), strict=True)
    ]
    assert sum(right) >= 98


async def replay_all(url: str, questions: list[str]) -> list[replay.Response]:
    async with http.connect_async(url) as client:
        return await replay.replay(questions, client, replay.ReplayOptions(concurrency=32))
