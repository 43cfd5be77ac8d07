"""The check that routes are those of the model: the same tokens through HF transformers."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import openai
import torch
from transformers import AutoModelForCausalLM

from moescope import Client, RouteTrace, Source
from moescope.servers import Server
from moescope_service import bundled_model

from .conftest import API_KEY, MODEL

SENTENCE = "Leo reads 9 pages a day for 8 days. "
SHARED = SENTENCE * 12
PROMPTS = [
    *(SHARED + f"How many pages does child {n} read?" for n in range(3)),
    SHARED * 2 + "How many pages does he read in all?",
    *("A book has many pages. " + SENTENCE * repeat for repeat in (1, 3, 7, 20)),
]


async def _complete_all(url: str) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=API_KEY) as client:

        async def complete(prompt: str, max_tokens: int) -> str:
            response = await client.completions.create(
                model=MODEL,
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            return response.id

        first = await complete(SHARED, 4)  # fills the prefix cache
        rest = [complete(prompt, 10 + 7 * n) for n, prompt in enumerate(PROMPTS)]
        return [first, *await asyncio.gather(*rest)]


@functools.cache
def reference_model() -> Any:
    """Return the model in float64, whose rounding does not count beside float32's."""
    return AutoModelForCausalLM.from_pretrained(
        bundled_model.path(), dtype=torch.float64, experts_implementation="eager"
    )


def reference(token_ids: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return HF's (ids sorted, their weights), ``[num_tokens, num_layers, top_k]`` each."""
    model = reference_model()
    with torch.inference_mode():
        output = model(torch.from_numpy(token_ids)[None].long(), output_router_logits=True)
    probabilities = torch.stack(output.router_logits, dim=1).double().softmax(-1)
    weights, ids = probabilities.topk(top_k)
    if model.config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    ids, order = ids.sort(-1)
    return ids.numpy(), weights.gather(-1, order).numpy()


def compare(trace: RouteTrace) -> float:
    """Compare every row and layer of a trace with the reference; return the largest error."""
    assert trace.token_ids is not None
    assert trace.topk_weights is not None
    assert trace.topk_weights.dtype == np.float32
    want_ids, want_weights = reference(trace.token_ids[:-1], trace.top_k)
    order = np.argsort(trace.topk_ids, axis=-1)
    np.testing.assert_array_equal(np.take_along_axis(trace.topk_ids, order, -1), want_ids)
    got_weights = np.take_along_axis(trace.topk_weights, order, -1)
    np.testing.assert_allclose(got_weights, want_weights, rtol=0, atol=1e-6)
    return float(np.abs(got_weights - want_weights).max())


def steps_of(log: Path) -> list[list[tuple[str, int, int, int]]]:
    """Return (id, first position, rows, prompt length) of every step's sequences, from a log."""
    found = re.findall(r"moescope collector: step \d+ (\[.*\])$", log.read_text(), re.MULTILINE)
    return [json.loads(step) for step in found]


def check_fidelity(server: Server, client: Client) -> None:
    """Run 8 requests at once and compare all their routes; demand that the batches were hard."""
    steps_before = len(steps_of(server.log))
    ids = asyncio.run(_complete_all(server.url))
    traces = [trace for request_id in ids for trace in client.routes(request_id)]
    assert len(traces) == 1 + len(PROMPTS)
    assert len({trace.num_tokens for trace in traces}) > 5
    for trace in traces:
        assert trace.complete
        assert trace.coverage == 1.0
    errors = [compare(trace) for trace in traces]
    rows = sum(trace.num_rows for trace in traces)
    print(f"{rows} rows of {len(traces)} sequences equal; largest weight error {max(errors):.1e}")
    steps = steps_of(server.log)[steps_before:]
    assert any(len(step) > 3 for step in steps), "no step held several requests"
    chunks = [span for step in steps for span in step if 0 < span[2] < span[3] - span[1]]
    assert chunks, "no prompt was cut into chunks"
    cached = sum(int((trace.source == Source.CACHED).sum()) for trace in traces)
    assert cached > 100, "no rows came from the prefix cache"
