"""Requests completions from a running server, and the routes of each."""

from __future__ import annotations

import base64
import collections
import dataclasses
import itertools
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
import numpy.typing as npt

from moescope import Client, RouteTrace, http
from moescope.addresses import Verify
from moescope.errors import CommandError, FormatError
from moescope.received import MALFORMED, is_int, shown

_WAIT_S = 60.0
_MAX_CONNECTIONS = 64
_MAX_REPEATED_TOKENS = 8192
_USUAL_BLOCK_TOKENS = 128
"""vLLM's largest default block, that of CPUs, where a server does not tell its own."""
_MISSING = re.compile(
    r'^moescope_trace_rows_missing_total\{[^}]*cause="(\w+)"[^}]*\} (\S+)$', re.MULTILINE
)
_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)


@dataclasses.dataclass(frozen=True, slots=True)
class RoutedCompletion:
    """One completion and its routes."""

    request_id: str
    token_ids: npt.NDArray[np.int32]
    """Of the prompt and the output, as the response has them."""
    trace: RouteTrace
    vllm_npy: bytes | None
    """vLLM's ``choices[].routed_experts``; None where the server does not return them."""


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixCache:
    """What a server says of its prefix cache (vLLM's ``vllm:cache_config_info``)."""

    is_on: bool = True
    block_tokens: int = _USUAL_BLOCK_TOKENS
    """Only whole blocks of a prompt are found again."""


class VerifiedServer:
    """A server that is verified; a context manager that closes the connections.

    Args:
        url: Its address, with or without ``/v1``.
        api_key: Its API key, if it needs one.
        timeout_s: Seconds to wait for each part of a response.
        transport: httpx's transport, in place of the network.
        verify: How an ``https`` server's certificate is verified, as `moescope.Client` takes it.

    Raises:
        ConnectionFailedError: The address is malformed.
        CommandError: A header cannot carry the API key.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        *,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
        verify: Verify = True,
    ) -> None:
        self._http = http.connect(url, api_key, timeout_s, transport, verify=verify)
        self.client = Client(url, api_key, timeout_s, transport, verify=verify)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()
        self.client.close()

    def complete(
        self, prompts: Sequence[str | list[int]], max_tokens: int
    ) -> list[RoutedCompletion]:
        """Complete all prompts, texts or tokens, at most 64 at once.

        Raises:
            MoescopeError: The server does not respond, or not with completions and their routes.
        """
        name = http.first_model(self._http.get("/v1/models"))
        with ThreadPoolExecutor(min(max(len(prompts), 1), _MAX_CONNECTIONS)) as pool:
            responses = list(pool.map(lambda one: self._complete(name, one, max_tokens), prompts))
        return [self._with_routes(values) for values in responses]

    def repeat(
        self, completions: Sequence[RoutedCompletion], max_tokens: int
    ) -> list[RoutedCompletion]:
        """Complete a prompt twice, so that the second finds the first one's rows in the cache.

        It consists of the completions' tokens, and of more than one block: only whole blocks are
        found, and never the last token. The second is sent when the first has ended.

        Args:
            completions: At least one.
            max_tokens: Output tokens at most.

        Returns:
            Two, or none where the server has no prefix cache, or no room for such a prompt.

        Raises:
            MoescopeError: The server does not respond, or not with completions and their routes.
        """
        cache, models = self.prefix_cache(), self._http.get("/v1/models")
        room = _max_model_len(models) - max_tokens
        length = min(2 * cache.block_tokens + 1, room, _MAX_REPEATED_TOKENS)
        if not cache.is_on or length <= cache.block_tokens:
            return []
        tokens = itertools.chain.from_iterable(
            one.token_ids.tolist() for one in itertools.cycle(completions)
        )
        name, prompt = http.first_model(models), list(itertools.islice(tokens, length))
        return [self._with_routes(self._complete(name, prompt, max_tokens)) for _ in range(2)]

    def prefix_cache(self) -> PrefixCache:
        """Return what the server says of its prefix cache; vLLM's defaults where it says nothing.

        Raises:
            MoescopeError: The server does not respond.
        """
        told = _CACHE.search(self.metrics())
        labels = dict(re.findall(r'(\w+)="([^"]*)"', told[1])) if told else {}
        block = labels.get("block_size", "")
        return PrefixCache(
            labels.get("enable_prefix_caching") != "False",
            int(block) if re.fullmatch(r"[1-9]\d{0,8}", block) else _USUAL_BLOCK_TOKENS,
        )

    def npy(self, request_id: str) -> bytes:
        """Return ``?format=npy`` of a request."""
        response = self._http.get(http.routes_path(request_id), params={"format": "npy"})
        http.check(response, one_request=True)
        return response.content

    def missing(self) -> dict[str, int]:
        """Return how many rows of all finished traces are missing, by cause.

        Raises:
            MoescopeError: The server does not respond, or not with counts.
        """
        found: collections.Counter[str] = collections.Counter()
        try:
            for cause, count in _MISSING.findall(self.metrics()):
                found[cause] += int(float(count))
        except MALFORMED as error:
            raise FormatError(f"/metrics has a count that is none: {shown(error)}") from error
        return dict(found)

    def metrics(self) -> str:
        """Return the server's metrics as text.

        Raises:
            MoescopeError: The server does not respond.
        """
        response = self._http.get("/metrics")
        http.check(response)
        return response.text

    def _complete(self, model: str, prompt: str | list[int], max_tokens: int) -> dict[str, Any]:
        response = self._http.post(
            "/v1/completions",
            headers={"X-Moescope": "on"},
            json={
                "model": model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0.0,
                "return_token_ids": True,
            },
        )
        http.check_openai(response)
        return http.json_object(response)

    def _with_routes(self, values: dict[str, Any]) -> RoutedCompletion:
        request_id, tokens, vllm_npy = _parse(values)
        traces = self.client.routes(request_id, wait_s=_WAIT_S)
        if len(traces) != 1:
            raise CommandError(
                f"expected one trace of {shown(request_id)}, which has one choice, got "
                f"{len(traces)}"
            )
        (trace,) = traces
        if len(tokens) != trace.num_tokens or (
            trace.token_ids is not None and not np.array_equal(trace.token_ids, tokens)
        ):
            raise CommandError(
                f"the trace of {shown(request_id)} has other tokens than the response: "
                f"{trace.num_tokens} and {len(tokens)}"
            )
        return RoutedCompletion(request_id, tokens, trace, vllm_npy)


def _parse(values: dict[str, Any]) -> tuple[str, npt.NDArray[np.int32], bytes | None]:
    """Return a completion's id, its tokens, and vLLM's own ``.npy``."""
    try:
        request_id, (choice,) = values["id"], values["choices"]
        tokens = [*choice["prompt_token_ids"], *choice["token_ids"]]
        experts = choice.get("routed_experts")
        vllm_npy = base64.b64decode(experts) if experts else None
        if not isinstance(request_id, str) or not request_id:
            raise ValueError(f"the id is {request_id!r}")
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens, of which none was routed")
        for token in tokens:
            if not is_int(token) or not 0 <= token < 2**31:
                raise ValueError(f"the token {token!r}")
    except MALFORMED as error:
        raise FormatError(f"not a completion with token ids: {shown(error)}") from error
    return request_id, np.array(tokens, np.int32), vllm_npy


def _max_model_len(models: httpx.Response) -> int:
    """Return how long a sequence may be, by a response of ``/v1/models`` that lists a model."""
    http.first_model(models)
    longest = http.json_object(models)["data"][0].get("max_model_len")
    return longest if is_int(longest) else _MAX_REPEATED_TOKENS
