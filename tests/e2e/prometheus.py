"""Debian's Prometheus beside a server."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from moescope.servers import Server, free_ports
from tests.waiting import wait_until


class Query(Protocol):
    """Returns the series that a PromQL expression finds, now or at a Unix time."""

    def __call__(self, expression: str, at_s: float | None = None) -> list[Any]:
        """Ask for them."""


@contextlib.contextmanager
def prometheus(servers: Sequence[Server], directory: Path, **config: Any) -> Iterator[Query]:
    """Run a Prometheus that scrapes servers every second; gives what queries it.

    Args:
        servers: What is scraped.
        directory: Where its files go.
        config: More of its configuration.
    """
    targets = [instance(server) for server in servers]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "scrape_configs": [{"job_name": "moescope", "static_configs": [{"targets": targets}]}],
        **config,
    }
    with running(directory, config) as query:
        yield query


def instance(server: Server) -> str:
    """Return the label of what is scraped of a server."""
    return server.url.removeprefix("http://")


@contextlib.contextmanager
def running(directory: Path, config: dict[str, Any]) -> Iterator[Query]:
    """Run a Prometheus on ``directory / "data"``; gives what queries it.

    Args:
        directory: Where its files go.
        config: Its whole configuration.
    """
    (port,) = free_ports(1)
    (directory / "prometheus.yml").write_text(json.dumps(config))
    command = ["prometheus", f"--config.file={directory / 'prometheus.yml'}",
               f"--storage.tsdb.path={directory / 'data'}",
               f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (directory / "prometheus.log").open("wb") as log:
        try:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        except FileNotFoundError:
            pytest.skip("prometheus is not installed (Debian's package prometheus)")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10.0) as http:
            wait_until(lambda: _is_ready(http), f"Prometheus is ready ({log.name} says why not)")
            yield functools.partial(_ask, http)
    finally:
        process.terminate()
        process.wait(20)


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def _ask(http: httpx.Client, expression: str, at_s: float | None = None) -> list[Any]:
    params = {"query": expression} | ({} if at_s is None else {"time": f"{at_s:.3f}"})
    body = http.get("/api/v1/query", params=params).json()
    assert body["status"] == "success", f"{expression}: {body}"
    return list(body["data"]["result"])
