"""The contract: the real app, collector process, recorder and client around a fake engine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

with warnings.catch_warnings():  # torch's and vLLM's own, at their import
    warnings.simplefilter("ignore")
    from benchmarks.simulation.app import server_args
    from moescope_service.vllm_contract.compat import keep_warnings

    from .deployment import Deployment
    from .disks import mounted

keep_warnings()  # as the plugin does
server_args()  # vLLM's command line changes handlers of the root logger: here pytest has none yet

if TYPE_CHECKING:
    from moescope import Client


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """One that the tests of a module share; they use ids of their own."""
    with Deployment().running() as running:
        yield running


@pytest.fixture
def fresh() -> Iterator[Deployment]:
    """One of the test's own, to break."""
    with Deployment().running() as running:
        yield running


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    from moescope import Client

    with Client(deployment.url) as client:
        yield client


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    with mounted(tmp_path / "disk"):
        yield tmp_path / "disk"
