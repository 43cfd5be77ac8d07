"""The reference itself: it follows a trace where experts are tied, and nowhere else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.fidelity import reference
from moescope import RouteTrace, Source
from tests.fidelity import bundled

TOKENS = np.random.default_rng(0).integers(3, 1000, 100).astype(np.int32)


@pytest.fixture(scope="module")
def closest() -> tuple[np.ndarray, float]:
    """The model's ids, with the last expert of one row replaced by the next; how close they are."""
    with torch.inference_mode():
        output = reference.reference_model()(
            torch.from_numpy(TOKENS)[None].long(), output_router_logits=True
        )
    best = torch.stack(output.router_logits, 1).double().softmax(-1).topk(5)
    gaps = (best.values[..., 3] - best.values[..., 4]).numpy()
    row, layer = np.unravel_index(gaps.argmin(), gaps.shape)
    ids = best.indices[..., :4].numpy()
    ids[row, layer, 3] = best.indices[row, layer, 4]
    return ids, float(gaps[row, layer])


def trace_of(topk_ids: np.ndarray, topk_weights: np.ndarray) -> RouteTrace:
    num_rows, num_layers, _ = topk_ids.shape
    return RouteTrace(
        request_id="cmpl-1",
        index=0,
        model="bundled",
        num_experts=60,
        num_hidden_layers=num_layers,
        layers=np.arange(num_layers, dtype=np.int32),
        topk_ids=topk_ids.astype(np.uint8),
        topk_weights=topk_weights.astype(np.float32),
        source=np.zeros(num_rows, np.uint8),
        prompt_len=num_rows,
        num_tokens=num_rows + 1,
        token_ids=np.append(TOKENS, 1),
        cached_len=0,
        finish_reason="length",
        complete=True,
        created_s=0.0,
    )


def test_either_of_two_tied_experts_is_right(
    closest: tuple[np.ndarray, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, gap = closest
    monkeypatch.setattr(reference, "WEIGHT_TOLERANCE", 1.01 * gap)
    routes = reference.reference_of(trace_of(ids, np.zeros(ids.shape)))
    assert routes.ties == 1
    assert bundled.compare(trace_of(routes.topk_ids, routes.topk_weights))[1] == 1
    own = reference.reference(reference.reference_model(), TOKENS)
    assert bundled.compare(trace_of(own.topk_ids, own.topk_weights))[1] == 0


def test_an_expert_that_is_not_tied_is_wrong(
    closest: tuple[np.ndarray, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, gap = closest
    monkeypatch.setattr(reference, "WEIGHT_TOLERANCE", 0.99 * gap)
    own = reference.reference(reference.reference_model(), TOKENS)
    with pytest.raises(AssertionError):
        bundled.compare(trace_of(ids, own.topk_weights))


def test_an_expert_twice_is_wrong() -> None:
    own = reference.reference(reference.reference_model(), TOKENS)
    ids = own.topk_ids.copy()
    ids[7, 2, 0] = ids[7, 2, 1]
    trace = trace_of(ids, own.topk_weights)
    with pytest.raises(AssertionError):
        bundled.compare(trace)
    missing = np.zeros(len(TOKENS), np.uint8)
    missing[7] = Source.MISSING
    assert bundled.compare(dataclasses.replace(trace, source=missing))[1] == 0
