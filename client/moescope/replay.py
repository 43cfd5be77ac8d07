"""Replays prompts against an OpenAI-compatible server, one chat completion each."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import orjson

from moescope import _http
from moescope.errors import CommandError, ConnectionFailedError, FormatError

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to ask."""

    model: str | None = None
    """The model's name; the first that the server lists where None."""
    max_tokens: int = 128
    """Output tokens at most."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 1234
    """The sampling seed."""
    concurrency: int = 8
    """Requests in flight at most."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What came of one prompt."""

    index: int
    """The prompt's number, from 0."""
    prompt: str
    request_id: str | None = None
    """The id under which the server keeps the routes."""
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_token_ids: list[int] | None = None
    """None where the server does not return them."""
    token_ids: list[int] | None = None
    """The output's token ids; None where the server does not return them."""
    started_s: float
    """When the request was sent, in seconds since the replay's start."""
    latency_s: float
    """Seconds from sending the request to its whole answer."""
    error: str | None = None
    """Why there is no answer; None where there is one."""


def connect(
    base_url: str,
    api_key: str | None = None,
    timeout_s: float = 600.0,
    transport: httpx.AsyncBaseTransport | None = None,
) -> httpx.AsyncClient:
    """Return an HTTP client whose connections only `Options.concurrency` bounds.

    Raises:
        ConnectionFailedError: The address is malformed.
    """
    with _http.transport_errors(base_url):
        return httpx.AsyncClient(
            base_url=base_url,
            headers=_http.headers(api_key),
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=None),
            transport=transport,
            trust_env=_http.uses_environment(base_url),
        )


async def served_model(http: httpx.AsyncClient) -> str:
    """Return the name of the first model that the server lists.

    Raises:
        MoescopeError: The server does not answer, or lists none.
    """
    with _http.transport_errors(str(http.base_url)):
        response = await http.get("/v1/models")
    _http.check(response)
    try:
        return str(_http.json_object(response)["data"][0]["id"])
    except (LookupError, TypeError) as error:
        raise FormatError(f"{http.base_url} lists no model: {response.text[:300]!r}") from error


async def replay(
    prompts: Sequence[str],
    http: httpx.AsyncClient,
    options: Options,
    on_response: Callable[[Response], None] | None = None,
    clock: Clock = time.perf_counter,
) -> list[Response]:
    """Send every prompt once; a request that fails is recorded, not repeated.

    Args:
        prompts: The user messages.
        http: A client from `connect`.
        options: How to ask.
        on_response: Called after each answer or failure.
        clock: Seconds from a monotonic clock.

    Returns:
        One response a prompt, in the order of the prompts.

    Raises:
        MoescopeError: The model is not given, and the server does not name it.
    """
    model = options.model or await served_model(http)
    start_s = clock()
    waiting = iter(enumerate(prompts))
    responses: list[Response] = []

    async def work() -> None:
        for index, prompt in waiting:
            sent_s = clock()
            answer = await _ask(http, _body(prompt, model, options))
            response = Response(
                index=index,
                prompt=prompt,
                started_s=sent_s - start_s,
                latency_s=clock() - sent_s,
                **answer,
            )
            responses.append(response)
            if on_response:
                on_response(response)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(options.concurrency, len(prompts))):
            group.create_task(work())
    return sorted(responses, key=lambda response: response.index)


def _body(prompt: str, model: str, options: Options) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "return_token_ids": True,  # vLLM's extension; other servers ignore it
    }


async def _ask(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Response` that the answer, or its failure, gives."""
    try:
        with _http.transport_errors(str(http.base_url)):
            response = await http.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            return {"error": f"HTTP {response.status_code}: {_http.error_message(response)}"}
        return _answer(_http.json_object(response))
    except (ConnectionFailedError, FormatError) as error:
        return {"error": str(error)}


def _answer(values: dict[str, Any]) -> dict[str, Any]:
    try:
        choice, usage = values["choices"][0], values["usage"]
        return {
            "request_id": values["id"],
            "text": choice["message"]["content"] or "",
            "finish_reason": choice["finish_reason"],
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "prompt_token_ids": values.get("prompt_token_ids"),
            "token_ids": choice.get("token_ids"),
        }
    except (LookupError, TypeError) as error:
        raise FormatError(f"not a chat completion: {error!r}") from error


def require_all(responses: Iterable[Response]) -> None:
    """Raise if a request failed.

    Raises:
        CommandError: It names how many failed, and the first of them.
    """
    every = list(responses)
    failed = [response for response in every if response.error]
    if failed:
        raise CommandError(
            f"{len(failed)} of {len(every)} requests failed; "
            f"prompt {failed[0].index + 1}: {failed[0].error}"
        )


def write_responses(path: Path, responses: Iterable[Response]) -> None:
    """Write one response a line, as JSON."""
    path.write_bytes(
        b"".join(orjson.dumps(response, option=orjson.OPT_APPEND_NEWLINE) for response in responses)
    )


def read_responses(path: Path) -> list[Response]:
    """Read what `write_responses` wrote.

    Raises:
        FormatError: The file cannot be read, or a line holds something else.
    """
    try:
        return [Response(**orjson.loads(line)) for line in path.read_bytes().splitlines()]
    except (OSError, TypeError, orjson.JSONDecodeError) as error:
        raise FormatError(f"{path} is no file of responses: {error}") from error
