"""One real server of the bundled model for all code of the documents, without an API key."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from moescope.servers import Server, captured_command, free_ports, wait_ready
from moescope_service import bundled_model

START_TIMEOUT_S = 300.0
# The last one stands in the documents in place of a model of the reader's.
NAMES = ("moescope-demo", "Qwen/Qwen1.5-MoE-A2.7B-Chat")


@pytest.fixture(scope="package")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps its archive."""
    return tmp_path_factory.mktemp("docs") / "archive"


@pytest.fixture(scope="package")
def server(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    (port,) = free_ports(1)
    flags = ["--served-model-name", *NAMES, "--enforce-eager", "--max-model-len", "1024"]
    flags += ["--host", "127.0.0.1", "--port", str(port)]
    flags += ["--routes-archive", str(archive), "--routes-archive-interval", "0.1"]
    server = Server(
        "docs",
        captured_command([str(bundled_model.path()), *flags]),
        f"http://127.0.0.1:{port}",
        tmp_path_factory.mktemp("docs") / "server.log",
        {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    with server:
        wait_ready([server], START_TIMEOUT_S)
        yield server
