"""The check that routes are those of the model: the same tokens through HF transformers."""

from __future__ import annotations

import asyncio

import openai

from benchmarks.simulation.server import API_KEY, MODEL
from moescope import Client, Source
from moescope.servers import Server
from tests.fidelity.bundled import compare, steps_in

SENTENCE = "Leo reads 9 pages a day for 8 days. "
SHARED = SENTENCE * 12
PROMPTS = [
    *(SHARED + f"How many pages does child {n} read?" for n in range(3)),
    SHARED * 2 + "How many pages does he read in all?",
    *("A book has many pages. " + SENTENCE * repeat for repeat in (1, 3, 7, 20)),
]

TOGETHER = 4


async def _complete_all(url: str) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=API_KEY) as client:

        async def complete(prompt: str | list[str], max_tokens: int) -> str:
            response = await client.completions.create(
                model=MODEL,
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            return response.id

        first = await complete(SHARED, 4)  # fills the prefix cache
        # Some come as one request: they share steps however slowly requests arrive.
        together = complete(PROMPTS[:TOGETHER], 60)
        rest = [complete(prompt, 10 + 7 * n) for n, prompt in enumerate(PROMPTS[TOGETHER:])]
        return [first, *await asyncio.gather(together, *rest)]


def check_fidelity(server: Server, client: Client) -> None:
    """Run 8 prompts at once and compare all their routes; demand that the batches were hard."""
    steps_before = len(steps_in(server.log.read_text()))
    ids = asyncio.run(_complete_all(server.url))
    traces = [trace for request_id in ids for trace in client.routes(request_id)]
    assert len(traces) == 1 + len(PROMPTS)
    assert len({trace.num_tokens for trace in traces}) > 5
    for trace in traces:
        assert trace.complete
        assert trace.coverage == 1.0
    errors = [compare(trace)[0] for trace in traces]
    rows = sum(trace.num_rows for trace in traces)
    print(f"{rows} rows of {len(traces)} sequences equal; largest weight error {max(errors):.1e}")
    steps = steps_in(server.log.read_text())[steps_before:]
    assert any(len(step) > 3 for step in steps), "no step held several requests"
    chunks = [span for step in steps for span in step if 0 < span[2] < span[3] - span[1]]
    assert chunks, "no prompt was cut into chunks"
    cached = sum(int((trace.source == Source.CACHED).sum()) for trace in traces)
    assert cached > 100, "no rows came from the prefix cache"
