"""Real servers on the GPU, with CUDA graphs: routes are what the routers computed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from moescope import Client, datasets
from moescope.servers import Server, captured_command, wait_ready
from moescope_service import bundled_model
from tests.e2e.conftest import free_port
from tests.gpu import fidelity, tap


@pytest.mark.parametrize("runner", ["v2", "v1"])
def test_routes_are_what_the_routers_computed(runner: str, tmp_path: Path) -> None:
    tap.install(tmp_path)
    port = str(free_port())
    command = captured_command(
        [str(bundled_model.path()), "--gpu-memory-utilization", "0.1", "--port", port]
    )
    if runner == "v2":
        command.append("--enable-return-routed-experts")
    env = {**os.environ, **tap.environment(tmp_path, 2000), **fidelity.runner_env(runner)}
    log = tmp_path / "server.log"
    with Server(runner, command, f"http://127.0.0.1:{port}", log, env) as server:
        wait_ready([server], 300)
        questions = [item.question for item in datasets.sample()]
        answers = asyncio.run(fidelity.ask_all(server.url, questions, concurrency=32))
        agreement = fidelity.compare_logits(server.url, tmp_path)
        with Client(server.url) as client:
            assert client.info().router_types == ("FusedTopKRouter",)
        coverage = fidelity.coverage(server.url, answers)
    assert coverage == {"traces": len(questions), "coverage_1": len(questions)}
    if runner == "v2":
        same = fidelity.compare_ids(answers)
        assert same["byte_equal"] == same["requests"] == len(questions)
    assert agreement.rows > 1500
    assert agreement.not_top_k == 0
    assert agreement.largest_error_in_spacings <= 1.0
