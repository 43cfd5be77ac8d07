"""What a client of the eager server sees: ids, traces, counts, metrics, the log, errors."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text

from benchmarks.simulation.server import API_KEY, MODEL
from moescope import Client, RouteTrace, Source, formats
from moescope.errors import AuthenticationError, InvalidQueryError, RequestNotFoundError
from moescope.servers import Server
from moescope_service.frontend.collector_client import QUERY_TIMEOUT_S
from tests.groups import commands, is_suspended
from tests.waiting import scrape, wait_until

from .prometheus import prometheus

QUESTION = [{"role": "user", "content": "Tom has 3 apples and buys 4. How many has he now?"}]


@pytest.fixture
def chat(eager_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{eager_server.url}/v1", api_key=API_KEY) as client:
        yield client


def check(traces: list[RouteTrace], usage: object) -> None:
    """Every trace is complete, and together they hold the tokens that the response counted."""
    for trace in traces:
        assert trace.complete
        assert trace.coverage == 1.0
        assert trace.num_rows == trace.num_tokens - 1
        assert trace.topk_weights is not None
        assert (trace.topk_weights > 0).all()
        assert trace.counts().sum() == trace.num_rows * trace.num_layers * trace.top_k
    outputs = sum(trace.num_tokens - trace.prompt_len for trace in traces)
    assert outputs == usage.completion_tokens  # type: ignore[attr-defined]


def test_chat(chat: openai.OpenAI, eager: Client) -> None:
    response = chat.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=40)
    traces = eager.routes(response.id)
    check(traces, response.usage)
    (trace,) = traces
    assert trace.request_id == response.id
    assert trace.prompt_len == response.usage.prompt_tokens
    assert trace.finish_reason == response.choices[0].finish_reason


def test_the_text_of_tokens(chat: openai.OpenAI, eager: Client) -> None:
    prompt = "Tom has 3 <apples> and buys 4.\n"
    response = chat.completions.create(model=MODEL, prompt=prompt, max_tokens=20)
    (trace,) = eager.routes(response.id, tokens=True)
    assert trace.tokens is not None
    assert "".join(trace.tokens[: trace.prompt_len]) == prompt
    output = "".join(trace.tokens[trace.prompt_len :])
    assert output.removesuffix("<|im_end|>") == response.choices[0].text


def test_a_server_that_was_suspended_goes_on_as_before(
    chat: openai.OpenAI, eager: Client, eager_server: Server
) -> None:
    """As `moescope overhead` suspends servers; for longer than what waits for the collector."""
    for _ in range(3):
        response = chat.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=40)
        eager_server.suspend()  # its engine and its collector are at work on the rest
        assert is_suspended(eager_server)
        names = " ".join(commands(eager_server))
        assert "collector" in names
        assert "EngineCore" in names
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"{eager_server.url}/health", timeout=1.5 * QUERY_TIMEOUT_S)
        eager_server.resume()
        check(eager.routes(response.id), response.usage)
    wait_until(lambda: "moescope_collector_up 1" in scrape(eager_server.url), "the collector is up")


def test_streaming(chat: openai.OpenAI, eager: Client) -> None:
    stream = chat.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Request-Id": "a stream"},
    )
    *_, last = stream
    for request_id in (last.id, "a stream"):
        check(eager.routes(request_id), last.usage)


def test_three_samples_and_two_prompts(chat: openai.OpenAI, eager: Client) -> None:
    response = chat.completions.create(
        model=MODEL,
        prompt=["Tom has", "Sara has three red"],
        n=3,
        max_tokens=12,
        temperature=1,
        seed=1,
        extra_body={"return_token_ids": True},
    )
    traces = eager.routes(response.id)
    check(traces, response.usage)
    assert [trace.index for trace in traces] == [choice.index for choice in response.choices]
    for trace, choice in zip(traces, response.choices, strict=True):
        assert trace.token_ids is not None
        got = trace.token_ids.tolist()
        assert got[trace.prompt_len :] == choice.token_ids  # type: ignore[attr-defined]
    assert eager.routes(response.id, index=3)[0].index == 3


def test_a_repeated_request_id_finds_all_newest_first(chat: openai.OpenAI, eager: Client) -> None:
    headers = {"X-Request-Id": "again/and again"}
    for max_tokens in (3, 5):
        response = chat.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            max_tokens=max_tokens,
            extra_headers=headers,
            extra_body={"ignore_eos": True},
        )
    for request_id in ("again/and again", response.id):
        traces = eager.routes(request_id)
        assert [trace.num_tokens - trace.prompt_len for trace in traces] == [5, 3]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "Tom has 3 apples.", "max_output_tokens": 6}),
        ("/v1/messages", {"messages": QUESTION, "max_tokens": 6}),
        ("/v1/completions", {"prompt": "Tom has", "max_tokens": 6}),
    ],
)
def test_every_id_that_a_client_sees(
    path: str, body: dict[str, object], eager_server: Server, eager: Client
) -> None:
    response = httpx.post(
        eager_server.url + path,
        json={"model": MODEL, **body},
        headers={"Authorization": f"Bearer {API_KEY}"},
        timeout=60,
    )
    assert response.status_code == 200
    (by_id,) = eager.routes(response.json()["id"])
    (by_header,) = eager.routes(response.headers["x-request-id"])
    assert by_id.complete
    np.testing.assert_array_equal(by_id.topk_ids, by_header.topk_ids)


def test_opting_out_leaves_no_routes(chat: openai.OpenAI, eager: Client) -> None:
    for wish in (
        {"extra_headers": {"X-Moescope": "off"}},
        {"extra_body": {"vllm_xargs": {"moescope": "off"}}},
    ):
        response = chat.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=4, **wish
        )
        with pytest.raises(RequestNotFoundError):
            eager.routes(response.id)


def test_a_client_that_disconnects(eager_server: Server, eager: Client) -> None:
    baseline = eager.info().store.bytes
    body = {
        "model": MODEL,
        "prompt": "Tom has",
        "max_tokens": 900,
        "stream": True,
        "ignore_eos": True,
    }
    headers = {"Authorization": f"Bearer {API_KEY}", "X-Request-Id": "leaves-early"}
    with httpx.stream(
        "POST", f"{eager_server.url}/v1/completions", json=body, headers=headers, timeout=60
    ) as response:
        lines = (line for line in response.iter_lines() if line)
        for _ in range(5):
            next(lines)
    (trace,) = eager.routes("leaves-early", wait_s=30)
    assert trace.finish_reason == "abort"
    assert trace.num_tokens < 900
    assert trace.coverage == trace.present.mean() == 1.0
    eager.delete("leaves-early")
    assert eager.info().store.bytes == baseline
    with pytest.raises(RequestNotFoundError):
        eager.routes("leaves-early")


def our_lines(text: str) -> str:
    """Return moescope's part of an exposition: vLLM's own does not pass the strict parser."""
    ours = [line for line in text.splitlines() if re.match(r"(# \w+ )?moescope_|# EOF", line)]
    return "\n".join(ours) + "\n"


def expert_totals(text: str, parse: Callable[[str], Iterator[object]]) -> dict[str, float]:
    totals = {"prefill": 0.0, "decode": 0.0}
    for family in parse(our_lines(text)):
        for sample in family.samples:  # type: ignore[attr-defined]
            if sample.name == "moescope_expert_tokens_total":
                totals[sample.labels["phase"]] += sample.value
    return totals


def test_counts_are_rows_times_top_k(
    chat: openai.OpenAI, eager: Client, eager_server: Server
) -> None:
    before = expert_totals(scrape(eager_server.url), parse_text)
    eager.reset()
    prompts = ["Tom has 3 apples. " * 10, "Sara walks. " * 30]
    response = chat.completions.create(model=MODEL, prompt=prompts, max_tokens=20)
    again = chat.completions.create(model=MODEL, prompt=prompts, max_tokens=20)
    traces = eager.routes(response.id) + eager.routes(again.id)
    computed = [int((trace.source == Source.COMPUTED).sum()) for trace in traces]
    cached = [int((trace.source == Source.CACHED).sum()) for trace in traces]
    assert sum(cached) > 0
    experts = eager.experts()
    assert experts.num_rows == sum(computed)
    assert (experts.counts.sum(axis=1) == sum(computed) * traces[0].top_k).all()
    prefill, decode = eager.experts("prefill"), eager.experts("decode")
    np.testing.assert_array_equal(prefill.counts + decode.counts, experts.counts)
    for parse, accept in ((parse_text, "text/plain"), (parse_open, "application/openmetrics-text")):
        text = scrape(eager_server.url, accept)
        assert "\nvllm:num_requests_running{" in text  # named as vLLM's own server names it
        after = expert_totals(text, parse)
        assert after["prefill"] - before["prefill"] == prefill.counts.sum()
        assert after["decode"] - before["decode"] == decode.counts.sum()


def test_pause_and_resume(chat: openai.OpenAI, eager: Client) -> None:
    def trace() -> RouteTrace:
        response = chat.completions.create(model=MODEL, prompt="Tom has", max_tokens=4)
        (trace,) = eager.routes(response.id)
        assert trace.complete == bool(trace.present.all())
        return trace

    eager.pause()
    wait_until(lambda: trace().coverage == 0.0, "the worker pauses")
    eager.resume()
    wait_until(lambda: trace().complete, "the worker goes on")


def test_the_log_has_one_request_a_row_and_logged_layer(
    chat: openai.OpenAI, eager: Client, eager_server: Server
) -> None:
    response = chat.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=10)
    (trace,) = eager.routes(response.id)

    def logged() -> list[dict[str, Any]]:
        whole, _, _ = (eager_server.log.parent / "routes.jsonl").read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def written() -> list[dict[str, Any]]:
        found = [record for record in logged()[1:] if record["req_id"] == response.id]
        return found if len(found) >= trace.num_rows * 2 else []

    mine = wait_until(written, "the request is in the log")
    meta = logged()[0]
    assert meta["type"] == "meta"
    assert meta["layers_logged"] == [0, 2]
    assert {"model_id", "vllm_version", "torch_version", "device", "seed", "top_k"} <= set(meta)
    assert len(mine) == trace.num_rows * 2
    for record in mine:
        row, column = record["token_idx"], trace.layers.tolist().index(record["layer"])
        assert record["topk_ids"] == trace.topk_ids[row, column].tolist()
        assert trace.topk_weights is not None
        np.testing.assert_allclose(record["topk_weights"], trace.topk_weights[row, column])


def test_npy_has_every_layer_of_the_model(
    chat: openai.OpenAI, eager: Client, eager_server: Server
) -> None:
    response = chat.completions.create(model=MODEL, prompt="Tom has", max_tokens=4)
    answer = httpx.get(
        f"{eager_server.url}/routes/{response.id}?format=npy",
        headers={"Authorization": f"Bearer {API_KEY}"},
    )
    (trace,) = eager.routes(response.id)
    assert trace.num_hidden_layers == eager.info().num_hidden_layers == 6
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), trace.topk_ids)
    assert answer.content == formats.dump_npy(trace)


def test_many_requests_at_once(chat: openai.OpenAI, eager: Client) -> None:
    def complete(number: int) -> openai.types.Completion:
        prompt = f"{number}. " + "Tom has " * (1 + number % 7)
        return chat.completions.create(model=MODEL, prompt=prompt, max_tokens=4, n=2)

    with ThreadPoolExecutor(48) as threads:
        responses = list(threads.map(complete, range(48)))
    found = eager.routes_batch([*(response.id for response in responses), "never-seen"])
    assert found.failed == {"never-seen": "unknown"}
    for response in responses:
        check(found.traces[response.id], response.usage)


def test_bad_input(chat: openai.OpenAI, eager: Client, eager_server: Server) -> None:
    response = chat.completions.create(model=MODEL, prompt="Tom has", max_tokens=2)
    url = f"{eager_server.url}/routes/{response.id}"
    key = {"Authorization": f"Bearer {API_KEY}"}
    for query, says in {
        "layers=0,x": "invalid layers '0,x': expected layer numbers",
        "layers=99": "captured layers: 0, 1, 2, 3",
        "format=xml": "'json', 'jsonl', 'npz', 'npy', 'arrow' or 'parquet'",
        "wait_s=-1": "wait_s",
        "index=5": "index",
    }.items():
        answer = httpx.get(f"{url}?{query}", headers=key)
        assert answer.status_code == 422
        assert says in answer.json()["error"]["message"]
    with pytest.raises(InvalidQueryError):
        eager.routes(response.id, layers=[99])
    with pytest.raises(RequestNotFoundError, match="never-seen"):
        eager.routes("never-seen")


def test_endpoints_want_the_servers_key(eager_server: Server) -> None:
    for method, path in [
        ("GET", "/routes/any"),
        ("GET", "/routes"),
        ("DELETE", "/routes/any"),
        ("GET", "/experts"),
        ("GET", "/moescope/info"),
        ("POST", "/routes/batch"),
        ("POST", "/routes/pause"),
        ("POST", "/routes/resume"),
        ("POST", "/routes/reset"),
    ]:
        answer = httpx.request(method, eager_server.url + path)
        assert answer.status_code == 401, path
        assert "--api-key" in answer.json()["error"]["message"]
    with Client(eager_server.url, api_key="wrong") as client, pytest.raises(AuthenticationError):
        client.recent()
    assert httpx.get(f"{eager_server.url}/metrics").status_code == 200


def test_docs_show_the_endpoints(eager_server: Server) -> None:
    paths = httpx.get(f"{eager_server.url}/openapi.json").json()["paths"]
    ours = {"/routes", "/routes/{request_id}", "/routes/batch"}
    ours |= {"/experts", "/moescope/info", "/metrics"}
    assert ours <= set(paths)
    assert "/v1/chat/completions" in paths


def test_prometheus_scrapes_it(
    eager_server: Server, tmp_path: Path, chat: openai.OpenAI, eager: Client
) -> None:
    chat.completions.create(model=MODEL, prompt="Tom has", max_tokens=2)
    total = eager.experts().counts.sum()  # since the last reset: Prometheus sees at least as many
    with prometheus([eager_server], tmp_path) as ask:
        for wanted in (
            'up{job="moescope"} == 1',
            "moescope_collector_up == 1",
            f"sum(moescope_expert_tokens_total) >= {total}",
            "count(vllm:num_requests_running) == 1",
        ):
            wait_until(lambda wanted=wanted: ask(wanted), wanted)


def test_names_and_labels_are_fit_for_prometheus(eager_server: Server) -> None:
    text = scrape(eager_server.url)
    assert "_created" not in our_lines(text)
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=our_lines(text),
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr + checked.stdout
