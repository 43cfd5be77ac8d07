"""Routers of vLLM write the static buffers, and return what they returned before."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router import fused_topk_router
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from moescope_service.capture.cuda.buffers import RoutingBuffers

TOKENS, EXPERTS, TOP_K = 12, 8, 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def torch_topk(activation):
    """Return what stands in for vLLM's CUDA ops: it writes its arguments and returns them."""

    def topk(topk_weights, topk_ids, token_expert, logits, renormalize):
        weights, ids = activation(logits).topk(TOP_K)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return topk_weights.copy_(weights), topk_ids.copy_(ids)

    return topk


@pytest.fixture(autouse=True)
def _ops(monkeypatch):
    for name, activation in (("softmax", lambda x: x.softmax(-1)), ("sigmoid", torch.sigmoid)):
        monkeypatch.setattr(
            fused_topk_router,
            f"dispatch_topk_{name}_func",
            lambda use_rocm_aiter=False, activation=activation: torch_topk(activation),
        )
    is_enabled = fused_topk_router.rocm_aiter_ops
    monkeypatch.setattr(is_enabled, "is_fused_moe_enabled", lambda: False)


def make_router(scoring_func="softmax", renormalize=True):
    return fused_topk_router.FusedTopKRouter(
        TOP_K, EXPERTS, scoring_func=scoring_func, renormalize=renormalize
    )


def make_buffers(index_dtype=None):
    return RoutingBuffers(3, TOKENS, TOP_K, index_dtype, DEVICE)


def route(router, num_tokens=5, indices_type=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, EXPERTS, generator=generator).to(DEVICE)
    hidden_states = torch.zeros(num_tokens, 4, device=DEVICE)
    return router._compute_routing(hidden_states, logits, indices_type)


def assert_written(buffers, column, weights, ids):
    rows = slice(len(ids))
    torch.testing.assert_close(buffers.topk_ids[column, rows], ids, check_dtype=False)
    torch.testing.assert_close(buffers.topk_weights[column, rows], weights, check_dtype=False)
    assert (buffers.topk_ids[column, len(ids) :] == -1).all()
    others = [number for number in range(3) if number != column]
    assert (buffers.topk_ids[others] == -1).all()


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("index_dtype", [None, torch.int32, torch.int64])
def test_fused_topk_writes_in_place(scoring_func, renormalize, index_dtype):
    router = make_router(scoring_func, renormalize)
    want = route(router, indices_type=index_dtype)
    buffers = make_buffers(index_dtype)
    buffers.hook(1, router)
    weights, ids = route(router, indices_type=index_dtype)
    torch.testing.assert_close((weights, ids), want)
    assert_written(buffers, 1, *want)
    # Nothing was copied: these are the buffers.
    assert ids.data_ptr() == buffers.topk_ids[1].data_ptr()
    assert weights.data_ptr() == buffers.topk_weights[1].data_ptr()


def test_another_index_dtype_than_expected_is_copied():
    router, buffers = make_router(), make_buffers(None)
    want = route(router, indices_type=torch.int64)
    buffers.hook(1, router)
    weights, ids = route(router, indices_type=torch.int64)
    torch.testing.assert_close((weights, ids), want)
    assert ids.dtype == torch.int64
    assert_written(buffers, 1, *want)


def test_more_tokens_than_fit_are_routed_all_the_same():
    router, buffers = make_router(), make_buffers()
    want = route(router, TOKENS + 3)
    buffers.hook(1, router)
    torch.testing.assert_close(route(router, TOKENS + 3), want)


class OddRouter(BaseRouter):
    """Transposed results, one column too many, as routers with fused shared experts give them."""

    routing_method_type = None

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        weights, ids = router_logits.softmax(-1).topk(TOP_K + 1)
        return weights.t().contiguous().t(), ids


def test_another_routers_results_are_copied():
    router, buffers = OddRouter(TOP_K, EXPERTS), make_buffers()
    weights, ids = route(router)
    buffers.hook(2, router)
    torch.testing.assert_close(route(router), (weights, ids))
    assert_written(buffers, 2, weights[:, :TOP_K], ids[:, :TOP_K])


def test_a_subclass_of_fused_topk_may_route_otherwise():
    class Changed(fused_topk_router.FusedTopKRouter):
        def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
            weights, ids = super()._compute_routing(hidden_states, router_logits, indices_type)
            return weights * 3, ids

    router, buffers = Changed(TOP_K, EXPERTS), make_buffers()
    want = route(router)
    buffers.hook(0, router)
    torch.testing.assert_close(route(router), want)
    assert_written(buffers, 0, *want)


@pytest.mark.parametrize("make", [make_router, lambda: OddRouter(TOP_K, EXPERTS)])
def test_padded_logits_which_vllm_misreads_are_told_of_once(make, caplog):
    router, buffers = make(), make_buffers()
    buffers.hook(0, router)
    route(router)
    assert not caplog.records
    logits = torch.zeros(5, EXPERTS + 4, device=DEVICE)[:, :EXPERTS]
    for _ in range(2):
        router._compute_routing(torch.zeros(5, 4, device=DEVICE), logits, None)
    (record,) = caplog.records
    assert "8 experts, to rows of 12" in record.getMessage()
