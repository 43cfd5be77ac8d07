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
import torch
import transformers

from moescope import Client, RouteTrace
from moescope.errors import RequestNotFoundError
from moescope_service.verify.schemes import Scheme, scheme_of

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
                "prompt": question,
                "max_tokens": TOKENS,
                "temperature": 0.0,
                "ignore_eos": True,
            }
            async with gate:
                reply = await http.post("/v1/completions", json=body)
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
    """Of a weight, against the model's formula in float64."""
    largest_error_in_spacings: float = 0.0
    """The same in units of the weights' dtype: up to 0.5 is rounding alone."""

    def add(
        self, trace: RouteTrace, position: int, logits: np.ndarray, scheme: Scheme, eps: float
    ) -> None:
        """Compare one row.

        Args:
            trace: A trace.
            position: The row.
            logits: ``[num_layers, num_experts]``.
            scheme: The model's, which selects the experts of the largest logits.
            eps: Of the dtype that the weights were rounded to, the coarsest one.
        """
        ids = trace.topk_ids[position].astype(np.int64)
        rest = logits.astype(np.float64)
        exact = torch.from_numpy(rest.copy())
        want = scheme.route(exact, torch.zeros(()), torch.from_numpy(ids))[1].numpy()
        selected = np.take_along_axis(rest, ids, -1)
        np.put_along_axis(rest, ids, -np.inf, -1)  # what is left was not selected
        hidden = 8 * np.finfo(np.float32).eps
        self.not_top_k += int((selected.min(-1) < rest.max(-1) - hidden).sum())
        if trace.topk_weights is None:
            raise ValueError(f"{trace.request_id} has no weights to compare")
        error = np.abs(trace.topk_weights[position].astype(np.float64) - want)
        if not np.isfinite(error).all():
            raise ValueError(f"{trace.request_id}, row {position}: the logits are not finite")
        stored = np.spacing(want.astype(trace.topk_weights.dtype)).astype(np.float64)
        spacing = np.maximum(stored, np.exp2(np.floor(np.log2(want))) * eps)
        self.rows += 1
        self.largest_error = max(self.largest_error, float(error.max()))
        in_spacings = float((error / spacing).max())
        self.largest_error_in_spacings = max(self.largest_error_in_spacings, in_spacings)


def compare_logits(url: str, tapped: Path, model: Path) -> Agreement:
    """Compare routes with what follows from the logits that `benchmarks.gpu.tap` saved.

    Args:
        url: The server.
        tapped: The directory of the logits.
        model: The model's directory.
    """
    scheme = scheme_of(transformers.AutoConfig.from_pretrained(model))
    traces: dict[str, RouteTrace | None] = {}
    agreement = Agreement()
    with Client(url) as client:
        # vLLM's own routers give weights in float32, `TritonTopk` in the dtype of the logits.
        is_triton = "TritonTopk" in client.info().router_types
        eps = float(torch.finfo(torch.bfloat16 if is_triton else torch.float32).eps)
        for path in sorted(tapped.glob("*.npz")):
            with np.load(path) as saved:
                columns = [saved[key] for key in ("request_ids", "positions", "logits")]
            for name, position, logits in zip(*columns, strict=True):
                if name not in traces:
                    traces[name] = _trace(client, str(name))
                trace = traces[name]
                if trace is not None and position < trace.num_rows:
                    agreement.add(trace, int(position), logits, scheme, eps)
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
