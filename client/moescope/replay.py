"""Replays prompts against an OpenAI-compatible server, one chat completion each."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import orjson

from moescope import files, http
from moescope.errors import ConnectionFailedError, FormatError
from moescope.received import check_fields, shown

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """How every prompt is sent."""

    model: str | None = None
    """The model's name; the first that the server lists where None."""
    max_tokens: int = 128
    """Most output tokens of a request."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int | None = None
    """The sampling seed; where None, the requests carry none."""
    concurrency: int = 8
    """Most requests in flight at a time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """The response to one prompt, or why there is none."""

    index: int
    """The prompt's number, from 0."""
    prompt: str
    request_id: str | None = None
    """The id under which the server keeps the routes."""
    model: str | None = None
    """The model that was asked."""
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
    """Seconds from sending the request to the end of its response."""
    error: str | None = None
    """Why there is no response; None where there is one."""

    @property
    def end_s(self) -> float:
        """When the response ended, in seconds since the replay's start."""
        return self.started_s + self.latency_s


async def replay(
    prompts: Sequence[str],
    client: httpx.AsyncClient,
    options: ReplayOptions,
    on_response: Callable[[Response], Awaitable[None]] | None = None,
    clock: Clock = time.perf_counter,
    *,
    skip: Collection[int] = (),
    offset_s: float = 0.0,
) -> list[Response]:
    """Send every prompt once; a request that fails is recorded, not repeated.

    Args:
        prompts: The user messages.
        client: From `moescope.http.connect_async`.
        options: How every prompt is sent.
        on_response: Awaited after each response or failure, before the next prompt is sent in its
            place.
        clock: Seconds from a monotonic clock.
        skip: Numbers of prompts that are not sent, from 0.
        offset_s: Seconds that the replay has taken before, where it was stopped and goes on.

    Returns:
        One response a prompt, in the order of the prompts.

    Raises:
        MoescopeError: The model is not given, and the server does not name it.
    """
    model = options.model or http.first_model(await client.get("/v1/models"))
    start_s = clock() - offset_s
    waiting = ((index, prompt) for index, prompt in enumerate(prompts) if index not in skip)
    responses: list[Response] = []

    async def work() -> None:
        for index, prompt in waiting:
            sent_s = clock()
            fields = await _send(client, _body(prompt, model, options))
            response = Response(
                index=index,
                prompt=prompt,
                model=model,
                started_s=sent_s - start_s,
                latency_s=clock() - sent_s,
                **fields,
            )
            responses.append(response)
            if on_response:
                await on_response(response)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(options.concurrency, len(prompts))):
            group.create_task(work())
    return sorted(responses, key=lambda response: response.index)


def _body(prompt: str, model: str, options: ReplayOptions) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "return_token_ids": True,  # vLLM's extension; other servers ignore it
    }
    return body if options.seed is None else {**body, "seed": options.seed}


async def _send(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Response` that a response or failure gives."""
    try:
        response = await client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            return {"error": f"HTTP {response.status_code}: {http.error_message(response)}"}
        return _parsed(http.json_object(response))
    except (ConnectionFailedError, FormatError) as error:
        return {"error": str(error)}


def _parsed(values: dict[str, Any]) -> dict[str, Any]:
    try:
        choice, usage = values["choices"][0], values["usage"]
        fields = {
            "request_id": values["id"],
            "text": choice["message"]["content"] or "",
            "finish_reason": choice["finish_reason"],
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "prompt_token_ids": values.get("prompt_token_ids"),
            "token_ids": choice.get("token_ids"),
        }
        check_fields(Response, fields)
    except (AttributeError, LookupError, TypeError) as error:
        raise FormatError(f"not a chat completion: {shown(error)}") from error
    if min(fields["prompt_tokens"], fields["completion_tokens"]) < 0:
        raise FormatError(f"not a chat completion: its usage is {shown(usage)}")
    return fields


def write_responses(path: Path, responses: Iterable[Response]) -> None:
    """Write one response a line, as JSON."""
    lines = (orjson.dumps(response, option=orjson.OPT_APPEND_NEWLINE) for response in responses)
    files.write(path, b"".join(lines))


def read_responses(path: Path) -> list[Response]:
    """Read what `write_responses` wrote.

    Raises:
        FormatError: The file cannot be read, or a line holds something else.
    """
    try:
        return [Response(**orjson.loads(line)) for line in path.read_bytes().splitlines()]
    except (OSError, TypeError, orjson.JSONDecodeError) as error:
        raise FormatError(f"{path} is not a file of responses: {error}") from error
