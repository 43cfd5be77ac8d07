"""The server that most situations share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fidelity.situations.served import Served, serve


@pytest.fixture(scope="package")
def default_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """vLLM's defaults, and a parser of tool calls."""
    log = tmp_path_factory.mktemp("default") / "default.log"
    flags = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with serve(log, *flags) as served:
        yield served
