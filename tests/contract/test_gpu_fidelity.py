"""What the GPU's measurements compare routes with, and the models that they serve."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from benchmarks.gpu import shapes
from benchmarks.gpu.fidelity import Agreement
from benchmarks.gpu.judged import against_vllm, make_prompts
from moescope import RouteTrace
from moescope_service import bundled_model
from moescope_service.verify.completions import RoutedCompletion
from moescope_service.verify.schemes import Scheme, scheme_of

EPS = {dtype: float(torch.finfo(dtype).eps) for dtype in (torch.bfloat16, torch.float32)}
ROWS, EXPERTS = 40, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes") / "gpt-oss"
    shapes.write("gpt-oss", out, bundled_model.path())
    return out


@pytest.fixture(scope="module")
def scheme(model: Path) -> Scheme:
    return scheme_of(transformers.AutoConfig.from_pretrained(model))


def test_a_shape_is_the_model_with_the_vocabulary_of_its_tokenizer(
    model: Path, scheme: Scheme
) -> None:
    config = transformers.AutoConfig.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert (config.model_type, config.num_local_experts) == ("gpt_oss", EXPERTS)
    assert config.vocab_size >= len(tokenizer)
    assert scheme.name == "softmax top-4, renormalized"


def served(scheme: Scheme, logits: np.ndarray, dtype: torch.dtype) -> RouteTrace:
    """A trace of what follows from logits, its weights rounded to a dtype."""
    exact = torch.from_numpy(logits.astype(np.float64))
    ids, weights = scheme.route(exact, torch.zeros(()), None)
    return traced(
        ids.numpy().astype(np.uint8), weights.to(dtype).float().numpy().astype(np.float16)
    )


def traced(ids: np.ndarray, weights: np.ndarray | None = None) -> RouteTrace:
    """A whole trace of ids and weights, ``[num_rows, num_layers, top_k]``."""
    num_rows, num_layers, _ = ids.shape
    return RouteTrace(
        request_id="r",
        index=0,
        model="m",
        num_experts=EXPERTS,
        num_hidden_layers=num_layers,
        layers=np.arange(num_layers, dtype=np.int32),
        topk_ids=ids,
        topk_weights=weights,
        source=np.ones(num_rows, np.uint8),
        token_ids=None,
        num_tokens=num_rows + 1,
        prompt_len=num_rows,
        cached_len=0,
        finish_reason="length",
        created_s=0.0,
        complete=True,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_route_is_judged_by_its_logits(dtype: torch.dtype, scheme: Scheme) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (ROWS, 2, EXPERTS)).astype(np.float32)
    trace = served(scheme, logits, dtype)

    def agreement(one: RouteTrace) -> Agreement:
        found = Agreement()
        for position in range(ROWS):
            found.add(one, position, logits[position], scheme, EPS[dtype])
        return found

    right = agreement(trace)
    assert (right.rows, right.not_top_k) == (ROWS, 0)
    assert 0.3 < right.largest_error_in_spacings <= 0.6
    ids = trace.topk_ids.copy()
    ids[7, 1, 0] = np.argmin(logits[7, 1])
    assert agreement(dataclasses.replace(trace, topk_ids=ids)).not_top_k == 1
    assert trace.topk_weights is not None
    swapped = trace.topk_weights[..., [1, 0, 2, 3]]
    assert agreement(dataclasses.replace(trace, topk_weights=swapped)).largest_error > 0.05


def test_prompts_beside_a_connector_begin_alike() -> None:
    prompts = make_prompts(200, 5, 1000)
    assert len({tuple(prompt[:64]) for prompt in prompts}) == 5
    assert len({tuple(prompt) for prompt in prompts}) == 200
    assert {len(prompt) >= 65 for prompt in prompts} == {True}


def answered(tokens: list[int], ids: list[int], own: list[int]) -> RoutedCompletion:
    """A request of one layer and one expert a row, and what vLLM's capture says of it."""
    trace = traced(np.array(ids, np.uint8)[:, None, None])
    file = io.BytesIO()
    np.save(file, np.array(own, np.uint8)[:, None, None])
    return RoutedCompletion("r", np.array(tokens, np.int32), trace, file.getvalue())


def test_rows_that_vllm_kept_of_another_request_are_told_from_wrong_ones() -> None:
    first = answered([5, 6, 7], [1, 2, 3], [1, 2, 3])
    again = answered([5, 6, 8], [1, 9, 4], [1, 2, 4])  # the second row is the first request's
    other = answered([4, 6, 8], [1, 2, 7], [1, 2, 3])  # the third row is nobody's
    found = against_vllm([first, again, other])
    assert found == {"requests": 3, "rows": 9, "equal_rows": 7, "equal_elsewhere": 1}
