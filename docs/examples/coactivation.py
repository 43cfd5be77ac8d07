"""Which experts are selected together: the co-activation matrix of one layer."""

import os

import numpy as np
import openai

import moescope

URL = os.environ.get("MOESCOPE_URL", "http://localhost:8000")
PROMPTS = [f"Sara has {n} red and {n + 3} blue pens. How many pens?" for n in range(2, 22)]

server = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
with moescope.Client(URL) as client:
    response = server.completions.create(model=client.info().model, prompt=PROMPTS, max_tokens=32)
    traces = client.routes(response.id, weights=False)  # one for each prompt

layer = len(traces[0].layers) // 2
ids = np.concatenate([trace.topk_ids[trace.present, layer] for trace in traces])  # [rows, top_k]
chosen = np.zeros((len(ids), traces[0].num_experts), np.int64)
np.put_along_axis(chosen, ids.astype(np.int64), 1, axis=1)
together = chosen.T @ chosen  # [num_experts, num_experts]; the diagonal counts selections
by_chance = np.outer(together.diagonal(), together.diagonal()) / len(ids)
pairs = np.triu(together, k=1)

print(f"layer {traces[0].layers[layer]}, {len(ids):,} rows")
for flat in np.argsort(-pairs, axis=None, kind="stable")[:5]:
    a, b = np.unravel_index(flat, pairs.shape)
    print(f"  experts {a} and {b}: together {pairs[a, b]} times, {by_chance[a, b]:.1f} by chance")
