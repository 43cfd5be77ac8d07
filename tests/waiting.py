"""Waits of the tests: each for a condition, and with a bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

DEADLINE_S = 60.0
"""Long on a machine that is busy with other things, too."""
SCRAPE_TIMEOUT_S = 10.0
"""How long Prometheus waits for an answer unless it is told otherwise."""


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until something holds and return it; fail when it never does."""
    end_s = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > end_s:
            pytest.fail(f"{what}: not within {deadline_s:g} s")
        time.sleep(0.01)
    return value


def scrape(url: str, accept: str = "text/plain") -> str:
    """Return what ``/metrics`` answers once the collector has time for a scrape.

    A server gives up on a collector that is late, and then shows nothing of ours but that.
    """

    def answered() -> str | None:
        answer = httpx.get(f"{url}/metrics", headers={"Accept": accept}, timeout=DEADLINE_S)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(accept.split(";", maxsplit=1)[0])
        return answer.text if "\nmoescope_collector_up 1.0\n" in answer.text else None

    text: str = wait_until(answered, "the collector answers a scrape")
    return text
