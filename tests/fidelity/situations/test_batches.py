"""How the engine cuts requests into steps, and which rows it finds in its prefix cache."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from moescope import Source
from tests.fidelity.bundled import Tally
from tests.fidelity.situations.served import (
    BLOCK,
    BUDGET,
    Served,
    Span,
    check_tokens,
    random_prompt,
)


def test_chunked_prefill(default_server: Served, rng: np.random.Generator) -> None:
    tally = Tally("chunked prefill")
    prompts = [random_prompt(rng, length) for length in (500, 300, 129, 65, 40, 7)]
    response = default_server.complete(prompts)  # as one request: they arrive together
    traces = default_server.routes(response["id"])
    check_tokens(traces, response)
    tally.add(*traces)
    spans = default_server.spans(response["id"])
    for length in map(len, prompts):
        chunks = [span for span in spans if span.prompt_len == length and span.is_chunk]
        assert len(chunks) >= (length - 1) // BUDGET
    assert any(
        len(list(together)) > 1 for _, together in itertools.groupby(spans, lambda span: span.step)
    ), "no step held several sequences"
    tally.record()


def test_prefix_hits_across_requests(default_server: Served, rng: np.random.Generator) -> None:
    tally = Tally("prefix-cache hits across requests")
    shared = random_prompt(rng, 5 * BLOCK + 3)
    cached = []
    for tail in (0, 1, 40, 100, 0):
        response = default_server.complete(shared + random_prompt(rng, tail))
        (trace,) = default_server.routes(response["id"])
        check_tokens([trace], response)
        tally.add(trace)
        told = response["usage"]["prompt_tokens_details"] or {"cached_tokens": 0}
        assert trace.cached_len == told["cached_tokens"], "vLLM says otherwise"
        assert (trace.source == Source.CACHED).sum() == trace.cached_len
        cached.append(trace.cached_len)
    assert cached == [0, *[5 * BLOCK] * 4]
    tally.record()


def test_prefix_hits_within_a_step(default_server: Served, rng: np.random.Generator) -> None:
    """The second of two equal prompts shares blocks that the first fills in the same step."""
    tally = Tally("prefix-cache hits within a step")
    length, samples, found = BLOCK + 6, 4, 0
    for _ in range(20):
        with ThreadPoolExecutor() as pool:  # the engine is busy while the samples arrive
            other = pool.submit(default_server.complete, random_prompt(rng, 4 * BUDGET))
            response = default_server.complete(random_prompt(rng, length), n=samples, temperature=1)
            other.result()
        traces = default_server.routes(response["id"])
        check_tokens(traces, response)
        tally.add(*traces)
        first = [span for span in default_server.spans(response["id"]) if span.start < length]
        found += any(_shares_a_step(a, b, length) for a, b in itertools.permutations(first, 2))
        if found >= 2:
            break
    assert found >= 2, "no prompt found blocks of its own step"
    tally.record()


def _shares_a_step(filler: Span, user: Span, length: int) -> bool:
    """Whether one span fills the first block in the very step in which the other one uses it."""
    return (
        filler.step == user.step
        and (filler.start, filler.rows) == (0, length)
        and (user.start, user.rows) == (BLOCK, length - BLOCK)
    )


def test_a_chat_of_20_turns(default_server: Served) -> None:
    tally = Tally("chat of 20 turns")
    messages: list[dict[str, str]] = []
    cached = []
    for turn in range(20):
        messages.append({"role": "user", "content": f"Tom has {turn} apples and buys {turn + 3}."})
        response = default_server.post(
            "/v1/chat/completions", messages=messages, max_tokens=24, temperature=0
        )
        messages.append(response["choices"][0]["message"])
        (trace,) = default_server.routes(response["id"])
        assert trace.prompt_len == response["usage"]["prompt_tokens"]
        tally.add(trace)
        cached.append(trace.cached_len)
    assert cached == sorted(cached)
    assert cached[-1] > 10 * BLOCK, "later turns did not find the earlier ones"
    tally.record()


def test_several_samples_of_several_prompts(
    default_server: Served, rng: np.random.Generator
) -> None:
    tally = Tally("n = 3, several prompts a request")
    prompts = [random_prompt(rng, length) for length in (5, 70, 150)]
    response = default_server.complete(prompts, n=3, temperature=2, max_tokens=20)
    traces = default_server.routes(response["id"])
    assert [trace.index for trace in traces] == list(range(9))
    check_tokens(traces, response)
    outputs = {tuple(choice["token_ids"]) for choice in response["choices"]}
    assert len(outputs) > len(prompts), "samples of one prompt are the same"
    tally.add(*traces)
    tally.record()


def test_beam_search(default_server: Served, rng: np.random.Generator) -> None:
    tally = Tally("beam search")
    width, length = 3, 12
    prompt = random_prompt(rng, 45)
    response = default_server.complete(
        prompt, use_beam_search=True, n=width, max_tokens=length, return_token_ids=False
    )
    assert len(response["choices"]) == width
    traces = default_server.routes(response["id"])
    assert len(traces) == 1 + width * (length - 1), "one trace a beam and token"
    by_length: dict[int, list[Any]] = {}
    for trace in traces:
        assert trace.token_ids is not None
        assert trace.token_ids[: len(prompt)].tolist() == prompt
        by_length.setdefault(trace.num_tokens, []).append(tuple(trace.token_ids[:-1].tolist()))
    assert sorted(by_length) == list(range(len(prompt) + 1, len(prompt) + length + 1))
    assert any(len(set(beams)) == width for beams in by_length.values()), "one beam alone"
    tally.add(*traces)
    tally.record()


def test_mixed_traffic(default_server: Served, rng: np.random.Generator) -> None:
    """Everything at once: chunks beside decodes, shared prefixes, early ends."""
    tally = Tally("mixed traffic, 40 requests at once")
    shared = random_prompt(rng, 3 * BLOCK)

    def ask(number: int) -> Any:
        prompt = shared[: 10 * (number % 11)] + random_prompt(np.random.default_rng(number), 9)
        return default_server.complete(
            prompt, n=1 + number % 2, max_tokens=1 + number, temperature=number % 2,
            ignore_eos=number % 3 == 0,
        )  # fmt: skip

    with ThreadPoolExecutor(40) as pool:
        responses = list(pool.map(ask, range(40)))
    for response in responses:
        traces = default_server.routes(response["id"])
        check_tokens(traces, response)
        tally.add(*traces)
    tally.record()
