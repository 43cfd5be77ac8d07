"""Asks a running server for completions, and for their routes."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from moescope import Client, RouteTrace
from moescope.errors import CommandError, ConnectionFailedError, ServerError

_WAIT_S = 60.0
_MISSING = re.compile(
    r'^moescope_trace_rows_missing_total\{[^}]*cause="(\w+)"[^}]*\} (\S+)$', re.MULTILINE
)


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One completion and its routes."""

    request_id: str
    token_ids: npt.NDArray[np.int32]
    """Of the prompt and the output, as the response has them."""
    trace: RouteTrace
    vllm_npy: bytes | None
    """vLLM's ``choices[].routed_experts``; None where the server does not return them."""


class Asker:
    """A server that is verified.

    Args:
        url: Its address, without ``/v1``.
        api_key: Its API key, if it wants one.
        transport: httpx's transport, in place of the network.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        *,
        timeout_s: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url
        headers = {"X-Moescope": "on"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=timeout_s, transport=transport
        )
        self.client = Client(url, api_key, timeout_s, transport)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self.client.close()

    def ask(self, prompts: Sequence[str], max_tokens: int) -> list[Answer]:
        """Complete all prompts at once, then the first again, which finds the prefix cache."""
        name = self._get("/v1/models").json()["data"][0]["id"]

        def one(prompt: str) -> dict[str, Any]:
            body = {
                "model": name,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0.0,
                "return_token_ids": True,
            }
            values: dict[str, Any] = self._send("POST", "/v1/completions", json=body).json()
            return values

        with ThreadPoolExecutor(max(len(prompts), 1)) as pool:
            responses = [*pool.map(one, prompts), *map(one, prompts[:1])]
        return [self._answer(response) for response in responses]

    def npy(self, request_id: str) -> bytes:
        """Return ``?format=npy`` of a request."""
        return self._get(f"/routes/{request_id}", format="npy").content

    def missing(self) -> dict[str, int]:
        """Return how many rows of all finished traces are missing, by cause."""
        return {cause: int(float(n)) for cause, n in _MISSING.findall(self._get("/metrics").text)}

    def _answer(self, response: dict[str, Any]) -> Answer:
        (choice,) = response["choices"]
        (trace,) = self.client.routes(response["id"], wait_s=_WAIT_S)
        tokens = np.array([*choice["prompt_token_ids"], *choice["token_ids"]], np.int32)
        if len(tokens) != trace.num_tokens or (
            trace.token_ids is not None and not np.array_equal(trace.token_ids, tokens)
        ):
            raise CommandError(
                f"the trace of {response['id']} has other tokens than the response: "
                f"{trace.num_tokens} and {len(tokens)}"
            )
        experts = choice.get("routed_experts")
        return Answer(response["id"], tokens, trace, experts and base64.b64decode(experts))

    def _get(self, path: str, **params: str) -> httpx.Response:
        return self._send("GET", path, params=params)

    def _send(self, method: str, path: str, **given: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **given)
        except httpx.TransportError as error:
            raise ConnectionFailedError(f"no answer from {self.url}: {error}") from error
        if response.is_error:
            raise ServerError(
                f"{method} {path}: {response.status_code} {response.text[:300]}",
                response.status_code,
            )
        return response
