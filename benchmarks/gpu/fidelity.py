"""Captured routing against vLLM's own capture, and against the router logits, in one engine run."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from moescope import Client, RouteTrace
from moescope.errors import RequestNotFoundError

TIMEOUT_S = 300.0
TOKENS = 128
"""Output tokens of each question."""


def runner_env(runner: str) -> dict[str, str]:
    """Return the variable that chooses vLLM's model runner: ``v1`` or ``v2``."""
    return {"VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0"}


@dataclasses.dataclass
class Answer:
    """What the server said of one question."""

    request_id: str
    num_tokens: int
    vllm_npy: bytes | None
    """vLLM's ``choices[].routed_experts``; None where the server does not return them."""
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
                "max_tokens": TOKENS,
                "temperature": 0.0,
                "ignore_eos": True,
            }
            async with gate:
                reply = await http.post("/v1/chat/completions", json=body)
                reply.raise_for_status()
                values = reply.json()
                route = await http.get(f"/routes/{values['id']}", params={"format": "npy"})
                route.raise_for_status()
            experts = values["choices"][0].get("routed_experts")
            return Answer(
                values["id"],
                values["usage"]["total_tokens"],
                experts and base64.b64decode(experts),
                route.content,
            )

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


@dataclasses.dataclass
class Agreement:
    """How a route agrees with the logits that the routers were given."""

    rows: int = 0
    requests: int = 0
    not_top_k: int = 0
    """(Token, layer) pairs in which an unselected expert is more probable than a selected one, by
    more than the router's float32 can hide."""
    largest_error: float = 0.0
    """Of a weight, against the softmax in float64."""
    largest_error_in_spacings: float = 0.0
    """The same in units of the weights' dtype: up to 0.5 is rounding alone."""

    def add(self, trace: RouteTrace, position: int, logits: np.ndarray) -> None:
        """Compare one row.

        Args:
            trace: A trace whose weights are a softmax over all experts.
            position: The row.
            logits: ``[num_layers, num_experts]``.
        """
        ids = trace.topk_ids[position].astype(np.int64)
        scores = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        want = np.take_along_axis(scores, ids, -1)
        np.put_along_axis(scores, ids, 0.0, -1)  # what is left was not selected
        hidden = 1.0 - 8 * np.finfo(np.float32).eps
        self.not_top_k += int((want.min(-1) < scores.max(-1) * hidden).sum())
        if trace.topk_weights is None:
            raise ValueError(f"{trace.request_id} has no weights to compare")
        error = np.abs(trace.topk_weights[position].astype(np.float64) - want)
        if not np.isfinite(error).all():
            raise ValueError(f"{trace.request_id}, row {position}: the logits are not finite")
        spacing = np.spacing(want.astype(trace.topk_weights.dtype)).astype(np.float64)
        self.rows += 1
        self.largest_error = max(self.largest_error, float(error.max()))
        in_spacings = float((error / spacing).max())
        self.largest_error_in_spacings = max(self.largest_error_in_spacings, in_spacings)


def compare_logits(url: str, tapped: Path) -> Agreement:
    """Compare routes with the softmax and top-k of the logits that `benchmarks.gpu.tap` saved."""
    traces: dict[str, RouteTrace | None] = {}
    agreement = Agreement()
    with Client(url) as client:
        for path in sorted(tapped.glob("*.npz")):
            with np.load(path) as saved:
                columns = [saved[key] for key in ("request_ids", "positions", "logits")]
            for name, position, logits in zip(*columns, strict=True):
                if name not in traces:
                    traces[name] = _trace(client, str(name))
                trace = traces[name]
                if trace is not None and position < trace.num_rows:
                    agreement.add(trace, int(position), logits)
    agreement.requests = sum(trace is not None for trace in traces.values())
    return agreement


def _trace(client: Client, name: str) -> RouteTrace | None:
    try:
        return client.routes(name)[0]
    except RequestNotFoundError:  # the server's own warm-up
        return None


def compare_stock(urls: Mapping[str, str], prompts: Sequence[str]) -> dict[str, Any]:
    """Compare the routes of several servers, as vLLM's own capture returns them.

    Prompts go one by one, so that all servers run the same batches. What capture might do to the
    model would show here, and nowhere else: within one engine both captures see the same.

    Args:
        urls: Servers with ``--enable-return-routed-experts`` by name; the first is the reference,
            and a second one like it tells how far two servers agree at all.
        prompts: What to ask.

    Returns:
        (Token, layer) pairs of each, and in how many the set of experts is the reference's.
    """
    routes: dict[str, list[np.ndarray]] = {name: [] for name in urls}
    for name, url in urls.items():
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
            for prompt in prompts:
                body = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0}
                reply = http.post("/v1/completions", json=body).raise_for_status().json()
                content = base64.b64decode(reply["choices"][0]["routed_experts"])
                routes[name].append(np.sort(np.load(io.BytesIO(content)), -1))
    reference, *others = urls
    found: dict[str, Any] = {"prompts": len(prompts)}
    for name in others:
        pairs = zip(routes[name], routes[reference], strict=True)
        same = np.concatenate([(ours == theirs).all(-1) for ours, theirs in pairs])
        found[name] = {
            "token_layer_pairs": same.size,
            "equal_sets": int(same.sum()),
            "equal_share_by_layer": same.mean(0).round(4).tolist(),
        }
    return found
