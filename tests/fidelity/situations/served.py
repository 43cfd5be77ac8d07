"""A server of the bundled model, and what the situations ask of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
from prometheus_client.parser import text_string_to_metric_families

from moescope import Client, RouteTrace
from moescope.servers import Server, captured_command, free_ports, wait_ready
from moescope_service import bundled_model
from tests.fidelity.bundled import steps_in
from tests.fidelity.situations.extension import LoadsFiles
from tests.waiting import DEADLINE_S, scrape

ROOT = Path(__file__).parents[3]
MODEL = "bundled"
START_TIMEOUT_S = 300.0
BLOCK = 32
"""Tokens a KV block."""
BUDGET = 64
"""Tokens a step: longer prompts are cut into chunks."""

# The engine tells each step's rows in the log, which is how situations are proved to have occurred.
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}
FLAGS = (
    *("--served-model-name", MODEL, "--dtype", "float32"),
    *("--max-model-len", "1024", "--max-num-batched-tokens", str(BUDGET), "--max-num-seqs", "8"),
    *("--block-size", str(BLOCK), "--host", "127.0.0.1", "--routes-weights-dtype", "float32"),
    *("--enable-prompt-tokens-details", "--enable-request-id-headers"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence in one step."""

    step: int
    internal_id: str
    start: int
    rows: int
    prompt_len: int

    @property
    def is_chunk(self) -> bool:
        """Whether it is a part of a prompt that goes on in a later step."""
        return self.start + self.rows < self.prompt_len


@dataclasses.dataclass
class Served:
    """A running server and its clients."""

    server: Server
    client: Client
    openai: openai.OpenAI
    _spans: list[Span] = dataclasses.field(default_factory=list)
    _num_steps: int = 0
    _read_bytes: int = 0

    def post(self, path: str, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
        """Send a request with the model's name; return the answer's JSON."""
        response = httpx.post(
            self.server.url + path, json={"model": MODEL, **body}, headers=headers, timeout=300
        )
        assert response.status_code == 200, response.text
        values: dict[str, Any] = response.json()
        return values

    def complete(self, prompt: Any, headers: dict[str, str] | None = None, **body: Any) -> Any:
        """Complete a prompt, greedily and past its end unless the body says otherwise."""
        given = {"max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return self.post("/v1/completions", headers, prompt=prompt, **{**given, **body})

    def routes(self, request_id: str, *, wait_s: float = DEADLINE_S) -> list[RouteTrace]:
        """Return the traces of a request that may still be ending."""
        return self.client.routes(request_id, wait_s=wait_s)

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(scrape(self.server.url))
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def spans(self, request_id: str = "") -> list[Span]:
        """Return the spans of all steps so far of sequences whose internal id contains a text."""
        with self.server.log.open("rb") as log:
            log.seek(self._read_bytes)
            lines, end, _ = log.read().rpartition(b"\n")
        self._read_bytes += len(lines + end)
        for step in steps_in(lines.decode()):
            self._spans += [Span(self._num_steps, *span) for span in step]
            self._num_steps += 1
        return [span for span in self._spans if request_id in span.internal_id]


def check_tokens(traces: Sequence[RouteTrace], response: dict[str, Any]) -> None:
    """Check that the traces hold the tokens of the response's choices, in their order."""
    assert [trace.index for trace in traces] == [one["index"] for one in response["choices"]]
    for trace, choice in zip(traces, response["choices"], strict=True):
        assert trace.token_ids is not None
        assert trace.token_ids[: trace.prompt_len].tolist() == choice["prompt_token_ids"]
        assert trace.token_ids[trace.prompt_len :].tolist() == choice["token_ids"]


def random_prompt(rng: np.random.Generator, num_tokens: int) -> list[int]:
    """Return a prompt that no other request shares."""
    prompt: list[int] = rng.integers(16, 1000, num_tokens).tolist()
    return prompt


@contextlib.contextmanager
def serve(
    log: Path, *flags: str, eager: bool = True, env: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Serve the bundled model in float32 with moescope, and further flags."""
    (port,) = free_ports(1)
    flags = (*FLAGS, *flags, *(["--enforce-eager"] if eager else []), "--port", str(port))
    command = captured_command([str(bundled_model.path()), *flags])
    url = f"http://127.0.0.1:{port}"
    with Server(log.stem, command, url, log, {**os.environ, **ENV, **(env or {})}) as server:
        wait_ready([server], START_TIMEOUT_S)
        with (
            Client(url) as client,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as chat,
        ):
            yield Served(server, client, chat)


@contextlib.contextmanager
def serve_loading(log: Path, *flags: str) -> Iterator[Served]:
    """Serve with `LoadsFiles`, and the endpoint that calls it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}
    extension = f"{LoadsFiles.__module__}.{LoadsFiles.__qualname__}"
    with serve(log, "--worker-extension-cls", extension, *flags, env=env) as served:
        yield served
