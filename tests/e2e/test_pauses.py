"""Engines that pause or sleep: what ran, came meanwhile, and came after has its routes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import httpx
import openai
import pytest

from benchmarks.simulation.server import API_KEY, MODEL
from moescope import Client
from moescope.servers import Server
from tests.waiting import scrape, wait_until


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def chat(eager_server: Server) -> Iterator[openai.OpenAI]:
    url = f"{eager_server.url}/v1"
    with openai.OpenAI(base_url=url, api_key=API_KEY, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, request_id: str, **fields: Any) -> Any:
    return client.completions.create(
        model=MODEL,
        prompt="Tom has three red apples.",
        extra_headers={"X-Request-Id": request_id},
        extra_body={"ignore_eos": True},
        **fields,
    )


def post(server: Server, path: str) -> None:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    httpx.post(server.url + path, headers=headers, timeout=60).raise_for_status()


@pytest.mark.parametrize(
    ("stop", "go"),
    [
        ("/pause?mode=abort", "/resume"),
        ("/pause?mode=keep", "/resume"),
        ("/sleep?level=0&mode=keep", "/wake_up?tags=scheduling"),
        ("/sleep?level=1", "/wake_up"),  # a CPU keeps its memory; the caches are cleared
    ],
)
def test_an_engine_that_stops_for_a_while(
    stop: str,
    go: str,
    eager_server: Server,
    eager: Client,
    chat: openai.OpenAI,
    threads: ThreadPoolExecutor,
) -> None:
    before, meanwhile, after = (f"{name} {stop}" for name in ("before", "meanwhile", "after"))
    stream = ask(chat, before, max_tokens=300, stream=True)
    for _ in range(3):
        next(stream)
    post(eager_server, stop)
    answer: Future[Any] = threads.submit(ask, chat, meanwhile, max_tokens=4)
    wait([answer], timeout=1.0)
    post(eager_server, go)

    reasons = [chunk.choices[0].finish_reason for chunk in stream]
    (trace,) = eager.routes(before, wait_s=30)
    assert reasons[-1] == trace.finish_reason == ("length" if "keep" in stop else "abort")
    assert trace.coverage == 1.0
    assert (trace.num_tokens == trace.prompt_len + 300) == ("keep" in stop)

    refusal = answer.exception(timeout=60)
    (trace,) = eager.routes(meanwhile, wait_s=30)
    if refusal is None:
        assert trace.complete
        assert trace.num_tokens == trace.prompt_len + 4
    else:  # since 0.33, where the engine does not keep what runs
        assert isinstance(refusal, openai.InternalServerError)
        assert refusal.status_code == 503
        assert "keep" not in stop
        assert (trace.finish_reason, trace.coverage) == ("error", 0.0)

    ask(chat, after, max_tokens=4)
    assert eager.routes(after)[0].complete
    running = f'moescope_sequences_running{{model_name="{MODEL}"}} 0.0'
    wait_until(lambda: running in scrape(eager_server.url), "no sequence is left")
