"""Real vLLM servers on the CPU, with the bundled model in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.simulation.server import API_KEY, serving
from moescope import Client
from moescope.servers import Server, captured_command, stock_command
from moescope_service import bundled_model


@pytest.fixture(scope="session")
def eager_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``moescope serve``, eager, with a route log and response headers with ids."""
    directory = tmp_path_factory.mktemp("eager")
    command = captured_command([str(bundled_model.path()), "--enforce-eager"])
    command += ["--routes-weights-dtype", "float32", "--enable-request-id-headers"]
    env = {"VLLM_LOG_MOE": str(directory / "routes.jsonl"), "VLLM_LOG_MOE_LAYER": "0,2"}
    env["VLLM_SERVER_DEV_MODE"] = "1"  # for /pause and /sleep
    with serving(command, env, directory / "eager.log") as server:
        yield server


@pytest.fixture(scope="module")
def compiled_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM's own server with the plugin, compiled, with a store of 512 KiB and a route log."""
    directory = tmp_path_factory.mktemp("compiled")
    command = stock_command(["--model", str(bundled_model.path())])
    env = {
        "MOESCOPE_ENABLE": "1",
        "MOESCOPE_ROUTES_LOG": str(directory / "routes.jsonl"),
        "MOESCOPE_ROUTES_MEMORY": "512KiB",
        "MOESCOPE_ROUTES_WEIGHTS_DTYPE": "float32",
        "VLLM_PLUGINS": "moescope",
    }
    with serving(command, env, directory / "compiled.log") as server:
        yield server


@pytest.fixture
def eager(eager_server: Server) -> Iterator[Client]:
    with Client(eager_server.url, api_key=API_KEY) as client:
        yield client


@pytest.fixture
def compiled(compiled_server: Server) -> Iterator[Client]:
    with Client(compiled_server.url, api_key=API_KEY) as client:
        yield client
