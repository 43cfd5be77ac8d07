"""Fetch a batch of rollouts for training: samples, their tokens and routes, and what is missing.

A trainer that replays the routes of the rollouts gives each token the experts that it had. It needs
to know which rows it does not have: those must be routed anew, or their sequences left out.
"""

import os

import numpy as np
import openai

import moescope

URL = os.environ.get("MOESCOPE_URL", "http://localhost:8000")
SAMPLES = 4
PROMPTS = [f"Leo reads {n} pages a day for {n + 2} days. How many pages?" for n in range(3, 9)]

server = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
with moescope.Client(URL) as client:
    model = client.info().model
    responses = [
        server.completions.create(model=model, prompt=p, n=SAMPLES, max_tokens=48, temperature=1)
        for p in PROMPTS
    ]
    # One call for all of them; it waits for requests that are still running.
    batch = client.routes_batch([one.id for one in responses], weights=False, wait_s=10)

rollouts = [
    {
        "request_id": trace.request_id,
        "sample": trace.index,
        "token_ids": trace.token_ids,  # [num_tokens]
        "is_output": np.arange(trace.num_tokens) >= trace.prompt_len,  # what the loss is of
        "experts": trace.topk_ids,  # [num_tokens - 1, num_layers, top_k]
        "has_experts": trace.present,  # [num_tokens - 1]; False: this row is missing
    }
    for traces in batch.traces.values()
    for trace in traces
]
rows = sum(len(one["has_experts"]) for one in rollouts)
missing = rows - sum(int(one["has_experts"].sum()) for one in rollouts)
whole = sum(bool(one["has_experts"].all()) for one in rollouts)
print(f"{len(rollouts)} of {len(PROMPTS) * SAMPLES} samples, {whole} of them with every route")
print(f"{sum(int(one['is_output'].sum()) for one in rollouts):,} sampled tokens")
print(f"{missing:,} of {rows:,} rows are missing; requests without routes: {batch.failed}")
