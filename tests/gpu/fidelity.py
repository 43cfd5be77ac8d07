"""Captured routing against vLLM's own capture, and against the router logits, in one engine run."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from moescope import Client, RouteTrace
from moescope.errors import MoescopeError

TIMEOUT_S = 300.0


@dataclasses.dataclass
class Answer:
    """What the server said of one question."""

    request_id: str
    num_tokens: int
    vllm_npy: bytes
    """vLLM's ``choices[].routed_experts``."""
    our_npy: bytes
    """``GET /routes/{id}?format=npy``."""


async def ask_all(url: str, questions: Sequence[str], *, concurrency: int) -> list[Answer]:
    """Ask every question, and fetch the route of each answer at once."""
    limits = httpx.Limits(max_connections=None)
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as http:

        async def ask(question: str) -> Answer:
            body = {
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 128,
                "temperature": 0.0,
                "ignore_eos": True,
            }
            async with gate:
                reply = await http.post("/v1/chat/completions", json=body)
                reply.raise_for_status()
                values = reply.json()
                route = await http.get(f"/routes/{values['id']}", params={"format": "npy"})
                route.raise_for_status()
            vllm_npy = base64.b64decode(values["choices"][0]["routed_experts"])
            return Answer(values["id"], values["usage"]["total_tokens"], vllm_npy, route.content)

        return list(await asyncio.gather(*map(ask, questions)))


def compare_ids(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how many routes are byte-equal to vLLM's own."""
    equal = [answer.vllm_npy == answer.our_npy for answer in answers]
    return {
        "requests": len(answers),
        "byte_equal": sum(equal),
        "rows": sum(answer.num_tokens - 1 for answer in answers),
        "bytes_compared": sum(len(answer.our_npy) for answer in answers),
        "first_different": next(
            (a.request_id for a, same in zip(answers, equal, strict=True) if not same), None
        ),
    }


def coverage(url: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how many traces are whole, by the server's own list."""
    wanted, before = {answer.request_id for answer in answers}, None
    found: dict[str, float | None] = {}
    with Client(url) as client:
        while True:
            page = client.recent(limit=1000, before=before)
            found |= {one.request_id: one.coverage for one in page.sequences}
            before = page.next_before
            if before is None:
                break
    values = [found.get(request_id) for request_id in wanted]
    return {"traces": len(values), "coverage_1": sum(value == 1.0 for value in values)}


def compare_weights(url: str, tapped: Path) -> dict[str, Any]:
    """Compute weights again, in float64, from the logits that the routers were given.

    Returns:
        Rows compared, and the largest difference in units of the last place of float16.
    """
    traces: dict[str, RouteTrace | None] = {}
    rows, outside, largest, worst = 0, 0, 0.0, 0.0
    with Client(url) as client:
        for path in sorted(tapped.glob("*.npz")):
            with np.load(path) as saved:
                names, positions, logits = (
                    saved[key] for key in ("request_ids", "positions", "logits")
                )
            for name, position, row in zip(names.tolist(), positions.tolist(), logits, strict=True):
                trace = traces.get(name) or traces.setdefault(name, _trace(client, name))
                if trace is None or position >= trace.num_rows:
                    continue
                error, spacing = _error(trace, position, row)
                rows += 1
                largest = max(largest, float(error.max()))
                worst = max(worst, float((error / spacing).max()))
                outside += int((error > spacing).sum())
    return {
        "rows": rows,
        "requests": len(traces),
        "largest_error": largest,
        "largest_error_in_float16_spacings": worst,
        "values_beyond_one_spacing": outside,
    }


def _trace(client: Client, name: str) -> RouteTrace | None:
    try:
        return client.routes(name)[0]
    except MoescopeError:
        return None


def _error(trace: RouteTrace, position: int, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    ids = trace.topk_ids[position].astype(np.int64)
    want = np.take_along_axis(scores, ids, -1)
    assert trace.topk_weights is not None
    got = trace.topk_weights[position]
    spacing = np.spacing(want.astype(np.float16)).astype(np.float64)
    return np.abs(got.astype(np.float64) - want), spacing
