"""Counts-only mode on a real server: counts are those of the routes that nobody kept."""

from __future__ import annotations

import httpx
import numpy as np
import pytest

from benchmarks.fidelity.reference import reference, reference_model
from moescope_service.histogram import count_selections
from tests.fidelity.situations.served import BUDGET, random_prompt, serve
from tests.waiting import wait_until


def test_counts_are_those_of_the_models_routes(
    tmp_path_factory: pytest.TempPathFactory, rng: np.random.Generator
) -> None:
    log = tmp_path_factory.mktemp("counts") / "counts.log"
    with serve(log, "--routes-mode", "counts") as served:
        prompts = [random_prompt(rng, length) for length in (BUDGET + 20, 3, 40)]
        response = served.complete(prompts)
        want = np.zeros((2, 6, 60), np.int64)
        for choice in response["choices"]:
            prompt_len = len(choice["prompt_token_ids"])
            tokens = np.array([*choice["prompt_token_ids"], *choice["token_ids"]])
            ids = reference(reference_model(), tokens[:-1]).topk_ids
            want += count_selections(ids, np.arange(len(ids)) >= prompt_len, 60)
        counts = served.client.experts
        wait_until(lambda: counts().counts.sum() >= want.sum(), "the report")
        np.testing.assert_array_equal(counts("prefill").counts, want[0])
        np.testing.assert_array_equal(counts("decode").counts, want[1])
        assert served.client.info().mode == "counts"
        assert served.metric("moescope_expert_tokens_total") == want.sum()
        assert served.metric("moescope_rows_total", phase="decode") == want[1, 0].sum() / 4
        assert served.metric("moescope_hook_seconds_total") > 0
        answer = httpx.get(f"{served.server.url}/routes/{response['id']}")
        assert answer.status_code == 409
