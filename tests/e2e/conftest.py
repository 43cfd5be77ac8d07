"""Real vLLM servers on the CPU, with the bundled model in float32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from moescope import Client
from moescope.servers import Server, captured_command, free_ports, stock_command, wait_ready
from moescope_service import bundled_model

START_TIMEOUT_S = 300.0
API_KEY = "e2e-key"
MODEL = "bundled"
"""The name that both servers give the model."""

# Small steps and blocks: prompts are cut into chunks, and prefixes are shared.
FLAGS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "1024"),
    *("--max-num-batched-tokens", "128", "--max-num-seqs", "8", "--block-size", "32"),
    *("--api-key", API_KEY, "--host", "127.0.0.1"),
)
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}


@contextlib.contextmanager
def serving(command: Sequence[str], env: dict[str, str], log: Path) -> Iterator[Server]:
    (port,) = free_ports(1)
    server = Server(
        log.stem,
        [*command, *FLAGS, "--port", str(port)],
        f"http://127.0.0.1:{port}",
        log,
        {**os.environ, **ENV, **env},
    )
    with server:
        wait_ready([server], START_TIMEOUT_S)
        yield server


@pytest.fixture(scope="session")
def eager_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``moescope serve``, eager, with a route log and response headers with ids."""
    directory = tmp_path_factory.mktemp("eager")
    command = captured_command([str(bundled_model.path()), "--enforce-eager"])
    command += ["--routes-weights-dtype", "float32", "--enable-request-id-headers"]
    env = {"VLLM_LOG_MOE": str(directory / "routes.jsonl"), "VLLM_LOG_MOE_LAYER": "0,2"}
    with serving(command, env, directory / "eager.log") as server:
        yield server


@pytest.fixture(scope="module")
def compiled_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM's own server with the plugin, compiled, with a store of 512 KiB and a route log."""
    directory = tmp_path_factory.mktemp("compiled")
    (directory / "logs").mkdir()
    command = stock_command(["--model", str(bundled_model.path())])
    env = {
        "MOESCOPE_ENABLE": "1",
        "MOESCOPE_ROUTES_LOG": str(directory / "logs" / "routes.jsonl"),
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
