"""A KV cache too small for the traffic: preemption and recomputation, with drafts and without."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from moescope import Source
from moescope.errors import RequestNotFoundError
from moescope_service.vllm_contract.versions import vllm_version
from tests.fidelity.bundled import Tally
from tests.fidelity.situations.served import BLOCK, Served, check_tokens, random_prompt, serve

KEEP = {"X-Moescope": "on"}
SMALL_CACHE = ("--num-gpu-blocks-override", "40")
"""1,248 tokens, beside vLLM's null block."""
SHARE = 0.5


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A small KV cache; half of the requests that say nothing are kept."""
    log = tmp_path_factory.mktemp("small") / "small.log"
    with serve(log, *SMALL_CACHE, "--routes-sample", str(SHARE)) as served:
        yield served


@pytest.fixture(scope="module")
def drafting_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same with n-gram drafts, without async scheduling; requests are kept that ask for it."""
    if vllm_version().startswith("0.30."):
        pytest.skip("the CPU build of vLLM 0.30 dies of drafts: it inspects a Triton kernel")
    log = tmp_path_factory.mktemp("drafting") / "drafting.log"
    drafts = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, '
    drafts += '"prompt_lookup_min": 1}'
    flags = [*SMALL_CACHE, "--no-async-scheduling", "--routes-default", "off"]
    with serve(log, *flags, "--speculative-config", drafts) as served:
        yield served


def crowd(served: Served, tally: Tally, rng: np.random.Generator) -> None:
    """Run 12 prompts of up to 340 tokens in a cache of 1,248; demand preemptions; take them in."""
    preempted = served.metric("vllm:num_preemptions_total")
    shared = random_prompt(rng, 2 * BLOCK)
    prompts = [shared[: 40 * (number % 3)] + random_prompt(rng, 60) for number in range(12)]

    def ask(temperature: int) -> Any:
        half = prompts[6 * temperature :][:6]  # six at once: the engine has them all to run
        return served.complete(half, KEEP, max_tokens=200, temperature=temperature)

    with ThreadPoolExecutor() as pool:
        responses = list(pool.map(ask, (0, 1)))
    assert served.metric("vllm:num_preemptions_total") > preempted + 2
    recomputed = 0
    for response in responses:
        traces = served.routes(response["id"])
        check_tokens(traces, response)
        tally.add(*traces)
        by_sequence: dict[str, list[int]] = {}
        for span in served.spans(response["id"]):
            by_sequence.setdefault(span.internal_id, []).append(span.start)
        recomputed += sum(starts != sorted(starts) for starts in by_sequence.values())
    assert recomputed > 2, "no sequence started anew"


def test_preemption_and_recomputation(small_server: Served, rng: np.random.Generator) -> None:
    tally = Tally("preemption and recomputation")
    crowd(small_server, tally, rng)
    tally.record()


def test_blocks_that_went_round(small_server: Served, rng: np.random.Generator) -> None:
    """Prefixes that come again after their blocks had other owners."""
    tally = Tally("prefix-cache hits on reused blocks")
    prompts = [random_prompt(rng, 3 * BLOCK + 7) for _ in range(16)]  # 48 blocks of 39
    cached = []
    for number in [*range(16), 15, 14, 0, 13, 1, 15]:
        response = small_server.complete(prompts[number], KEEP)
        (trace,) = small_server.routes(response["id"])
        check_tokens([trace], response)
        tally.add(trace)
        cached.append(trace.cached_len)
    assert cached[16:18] == [3 * BLOCK] * 2
    assert cached[18] < 3 * BLOCK, "no block went round"
    tally.record()


def test_sampling(small_server: Served, rng: np.random.Generator) -> None:
    """All choices of a request are kept, or none; and none that is kept lacks a row."""
    tally = Tally("sampling")
    shared = random_prompt(rng, 2 * BLOCK)
    kept = 0
    for number in range(16):
        prompts = [[*shared, 100 + number], [*shared[:BLOCK], 200 + number]]
        ours = {"X-Request-Id": f"sample-{number}"}  # ids choose: the same in every run
        response = small_server.complete(prompts, ours, n=2, temperature=1, max_tokens=3)
        try:
            traces = small_server.routes(response["id"])
        except RequestNotFoundError:
            continue
        kept += 1
        check_tokens(traces, response)
        tally.add(*traces)
    assert 2 <= kept <= 14, f"{kept} of 16 were kept"
    tally.record()


def test_drafts(drafting_server: Served, rng: np.random.Generator) -> None:
    tally = Tally("n-gram speculation, async scheduling off")
    drafted, accepted = (
        drafting_server.metric(f"vllm:spec_decode_num_{what}_tokens_total")
        for what in ("draft", "accepted")
    )
    motif = random_prompt(rng, 7)
    for temperature in (0, 0.5, 1):
        response = drafting_server.complete(
            motif * 12, KEEP, temperature=temperature, max_tokens=120, n=1 + (temperature > 0)
        )
        traces = drafting_server.routes(response["id"])
        check_tokens(traces, response)
        tally.add(*traces)
    drafted = drafting_server.metric("vllm:spec_decode_num_draft_tokens_total") - drafted
    accepted = drafting_server.metric("vllm:spec_decode_num_accepted_tokens_total") - accepted
    assert accepted > 20
    assert drafted - accepted > 20, "no draft was rejected"
    tally.record()


def test_preemption_with_drafts(drafting_server: Served, rng: np.random.Generator) -> None:
    tally = Tally("preemption with n-gram speculation")
    crowd(drafting_server, tally, rng)
    tally.record()


def test_opting_in(drafting_server: Served, rng: np.random.Generator) -> None:
    tally = Tally("opt-in")
    prompt = random_prompt(rng, 3 * BLOCK + 4)
    for number, wish in enumerate(({"headers": KEEP}, {"vllm_xargs": {"moescope": "on"}})):
        tail = [500 + number] * 5
        silent = drafting_server.complete(prompt + tail)
        with pytest.raises(RequestNotFoundError):
            drafting_server.client.routes(silent["id"])
        response = drafting_server.complete(prompt + tail, **wish)
        (trace,) = drafting_server.routes(response["id"])
        check_tokens([trace], response)
        assert (trace.source == Source.CACHED).sum() == 3 * BLOCK  # the silent request's
        tally.add(trace)
    tally.record()
