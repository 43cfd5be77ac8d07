"""The plugin in vLLM's own server, compiled: fidelity, eviction, and the collector's death."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.faults.served import collector_pid
from benchmarks.simulation.server import API_KEY, MODEL
from moescope import Client
from moescope.errors import CollectorDownError, TraceEvictedError
from moescope.servers import Server
from tests.waiting import SCRAPE_TIMEOUT_S, scrape

from .fidelity import check_fidelity


def complete(server: Server, prompt: object = "Tom has 3 apples.", **params: object) -> str:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY) as client:
        response = client.completions.create(model=MODEL, prompt=prompt, **params)  # type: ignore[call-overload]
        return str(response.id)


def test_routes_equal_those_of_hf_transformers(compiled_server: Server, compiled: Client) -> None:
    check_fidelity(compiled_server, compiled)


def test_oldest_traces_are_evicted(compiled_server: Server, compiled: Client) -> None:
    first = complete(compiled_server, max_tokens=1)
    assert compiled.routes(first)
    limit = compiled.info().store.limit_bytes
    assert limit == 512 * 1024
    for _ in range(12):
        complete(compiled_server, [7] * 900, max_tokens=1)
    assert compiled.info().store.bytes <= limit
    with pytest.raises(TraceEvictedError, match="--routes-memory"):
        compiled.routes(first)


def test_serving_goes_on_without_the_collector(compiled_server: Server) -> None:
    pid = collector_pid(compiled_server)
    assert pid is not None
    address = next(word for word in psutil.Process(pid).cmdline() if word.startswith("ipc://"))
    directory = Path(address.removeprefix("ipc://")).parent
    away = directory.rename(directory.with_name(f"{directory.name}-away"))
    os.kill(pid, signal.SIGKILL)  # and no other one can start
    with (
        Client(compiled_server.url, api_key=API_KEY, retries=0) as client,
        pytest.raises(CollectorDownError, match="serving goes on"),
    ):
        client.routes("any")
    text = httpx.get(f"{compiled_server.url}/metrics", timeout=SCRAPE_TIMEOUT_S).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["moescope_collector_up"].samples[0].value == 0.0
    assert "vllm:num_requests_running" in families
    assert not [name for name in families if name.startswith("moescope_expert")]
    complete(compiled_server, max_tokens=8)
    away.rename(directory)
    scrape(compiled_server.url)  # another one is there
