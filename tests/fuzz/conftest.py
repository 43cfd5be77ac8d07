"""One deployment for all of them: what is asked of it is not to break what is asked later."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator

import pytest

with warnings.catch_warnings():  # torch's and vLLM's own, at their import
    warnings.simplefilter("ignore")
    from tests.contract.deployment import Deployment


class Served:
    """A deployment with a few requests, and the thread of its event loop."""

    def __init__(self, deployment: Deployment, thread: threading.Thread) -> None:
        self.deployment, self.thread = deployment, thread


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    before = set(threading.enumerate())
    with Deployment().running() as deployment:
        new = [one for one in threading.enumerate() if one not in before]
        (thread,) = [one for one in new if "(run)" in one.name]
        for number in range(4):
            deployment.complete(f"known-{number}", n=1 + number % 2)
        (name,) = deployment.frontend.add("running")
        deployment.engine.start(name)
        yield Served(deployment, thread)
