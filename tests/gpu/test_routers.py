"""What vLLM's own CUDA routers return is what arrives in host memory, eager and replayed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.fused_moe.router import router_factory

from moescope_service.capture import triton_topk
from moescope_service.capture.cuda.sink import CudaSink

HIDDEN, LAYERS, MAX_TOKENS, TOP_K = 64, 3, 256, 6


def sigmoid_routing(hidden_states, gating_output, topk, renormalize):
    """A custom routing function, as Llama 4 has one."""
    scores, ids = gating_output.float().topk(topk)
    return scores.sigmoid(), ids.to(torch.int32)


SCHEMES = {
    "softmax": ("FusedTopKRouter", {"renormalize": False}),
    "softmax, renormalized": ("FusedTopKRouter", {}),
    "sigmoid": ("FusedTopKRouter", {"scoring_func": "sigmoid"}),
    "grouped": (
        "GroupedTopKRouter",
        {"use_grouped_topk": True, "num_expert_group": 8, "topk_group": 3},
    ),
    "grouped, biased": (
        "GroupedTopKRouter",
        {"use_grouped_topk": True, "num_expert_group": 8, "topk_group": 4,
         "scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "bias": True},
    ),
    "biased": ("FusedTopKBiasRouter", {"scoring_func": "sigmoid", "bias": True}),
    "custom": ("CustomRoutingRouter", {"custom_routing_function": sigmoid_routing}),
    "zero experts": (
        "ZeroExpertRouter",
        {"zero_expert_type": "identity", "num_logical_experts": 48, "bias": True},
    ),
}  # fmt: skip


def make_router(options, num_experts):
    options = dict(options)
    if options.pop("bias", False):
        bias = torch.linspace(-0.2, 0.2, num_experts, device="cuda")
        options["e_score_correction_bias"] = torch.nn.Parameter(bias, requires_grad=False)
    return router_factory.create_fused_moe_router(TOP_K, num_experts, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("num_experts", "id_dtype"), [(60, "uint8"), (64, "uint8"), (512, "uint16")]
)
def test_a_router_of_vllm(scheme, num_experts, id_dtype):
    kind, options = SCHEMES[scheme]
    torch.manual_seed(0)
    positions = torch.arange(1000, 1000 + MAX_TOKENS, device="cuda")
    sink = CudaSink(
        positions=positions, num_layers=LAYERS, top_k=TOP_K, num_experts=num_experts,
        index_dtype=None, id_dtype=id_dtype, weights_dtype="float32", queue_bytes=2**20,
    )  # fmt: skip
    plain = [make_router(options, num_experts) for _ in range(LAYERS)]
    hooked = [make_router(options, num_experts) for _ in range(LAYERS)]
    assert {type(router).__name__ for router in hooked} == {kind}
    for column, router in enumerate(hooked):
        sink.hook(column, router)
    hidden = torch.randn(MAX_TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(LAYERS, MAX_TOKENS, num_experts, device="cuda")

    def run(routers, num_tokens):
        return [
            router._compute_routing(hidden[:num_tokens], logits[column, :num_tokens], None)
            for column, router in enumerate(routers)
        ]

    def check(num_rows):
        want = run(plain, num_rows)
        taken = sink.take(num_rows)
        taken.wait()
        rows = taken.read()
        assert rows is not None
        np.testing.assert_array_equal(rows.positions, np.arange(1000, 1000 + num_rows))
        for column, (weights, ids) in enumerate(want):
            np.testing.assert_array_equal(rows.topk_ids[:, column], ids.cpu().numpy())
            np.testing.assert_array_equal(
                rows.topk_weights[:, column], weights.float().cpu().numpy()
            )
        taken.release()

    for num_tokens in (1, 37, 64, MAX_TOKENS):
        run(hooked, num_tokens)
        check(num_tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(hooked, 64)
    for num_rows in (64, 50):  # a replay is padded
        logits.copy_(torch.randn_like(logits))
        graph.replay()
        check(num_rows)
    taken = sink.take(50)
    taken.wait()
    assert taken.read() is None, "a step in which no router wrote"


class Experts(torch.nn.Module):
    """The part of vLLM's ``RoutedExperts`` that routes; it imports as vLLM does."""

    def forward_monolithic(self, x, router_logits, input_ids=None):
        from vllm.utils.import_utils import get_triton_kernels_version

        if get_triton_kernels_version() == "3.5.1":  # the one that vLLM brings along
            from triton_kernels.routing import routing

            return routing(router_logits, 4, sm_first=False)
        from triton_kernels.topk import topk

        return topk(router_logits, 4, apply_softmax=True)


@pytest.mark.parametrize("num_experts", [32, 128])
def test_the_kernel_of_gpt_oss_selects_as_vllms_router(num_experts):
    """10,000 rows; its weights are those of the router in the logits' dtype."""
    rows, top_k = 10_000, 4
    sink = CudaSink(
        positions=torch.arange(rows, device="cuda"), num_layers=1, top_k=top_k,
        num_experts=num_experts, index_dtype=None, id_dtype="uint8", weights_dtype="float32",
        queue_bytes=2**20,
    )  # fmt: skip
    layer, generator = Experts(), torch.Generator("cuda").manual_seed(0)
    sink.hook(0, triton_topk.TritonTopk(layer, top_k))
    router = router_factory.create_fused_moe_router(top_k, num_experts)
    logits = torch.empty(rows, num_experts, device="cuda", dtype=torch.bfloat16)

    def fill():
        logits.copy_(torch.randn(logits.shape, device="cuda", generator=generator) * 2)

    def check(num_rows):
        weights, ids = router._compute_routing(logits, logits, None)
        taken = sink.take(num_rows)
        taken.wait()
        got = taken.read()
        assert got is not None
        np.testing.assert_array_equal(got.positions, np.arange(num_rows))
        there = torch.from_numpy(got.topk_ids[:, 0].astype(np.int64)).cuda()
        assert (there.sort(-1).values == ids[:num_rows].long().sort(-1).values).all()
        want = weights.float().cpu().numpy()[:num_rows]  # by descending weight, as ours
        eps = torch.finfo(torch.bfloat16).eps
        error = np.abs(got.topk_weights[:, 0] - want) / np.exp2(np.floor(np.log2(want)))
        assert error.max() <= eps / 2 * 1.01
        assert (np.diff(got.topk_weights[:, 0]) <= 0).all()
        taken.release()

    fill()
    layer.forward_monolithic(None, logits)
    check(rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.forward_monolithic(None, logits)
    for num_rows in (rows, 37):
        fill()
        graph.replay()
        check(num_rows)
