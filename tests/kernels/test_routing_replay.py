"""What kernels with routing replay select is written, with the weights of vLLM's own routers.

The kernels are made up, what calls them is vLLM's: no GPU that runs FlashInfer's was at hand.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from vllm import forward_context
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.modular_kernel import (
    FusedMoEExpertsMonolithic,
    FusedMoEKernelMonolithicImpl,
)
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsSink
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk
from vllm.model_executor.models.cohere2_moe import token_choice_with_bias
from vllm.model_executor.models.llama4 import Llama4MoE

from moescope_service.capture.cuda.buffers import RoutingBuffers
from moescope_service.capture.own_rows import OwnRows
from moescope_service.capture.routing_replay import RoutingReplay, kernel_of, unknown_weights

TOKENS, EXPERTS, TOP_K, RANKS = 12, 8, 3, 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def vllms_router(method, logits, top_k, bias, scale):
    """Return what vLLM's router does, by its code in PyTorch: weights, ids."""
    if method == "Llama4":
        return Llama4MoE.custom_routing_function(logits, logits, top_k, renormalize=False)
    if method in ("Sigmoid", "SigmoidRenorm"):
        return token_choice_with_bias(logits, logits, top_k, method == "SigmoidRenorm")
    is_softmax = method in ("Renormalize", "RenormalizeNaive")
    groups = (4, 2) if method == "DeepSeekV3" else (1, 1)
    return inspect.unwrap(grouped_topk)(
        logits, logits.float(), top_k, True, *groups, "softmax" if is_softmax else "sigmoid",
        scale, None if is_softmax else bias,
    )  # fmt: skip


class Kernel(FusedMoEExpertsMonolithic):
    """Selects as vLLM's router, and tells the ids in the order of their numbers."""

    expects_unquantized_inputs = True
    is_silent = False

    def __init__(self, method, top_k, *, has_replay=True):
        self.moe_config = SimpleNamespace(
            routing_method=RoutingMethodType[method], max_num_tokens=TOKENS, use_ep=False,
            dp_size=RANKS, ep_size=1, experts_per_token=top_k, device=DEVICE,
        )  # fmt: skip
        self.quant_config, self.has_replay = None, has_replay

    def supports_routing_replay_capture(self):
        return self.has_replay

    def apply(
        self, hidden_states, w1, w2, router_logits, activation, global_num_experts, expert_map,
        a1q_scale, apply_router_weight_on_input, num_expert_group=None,
        e_score_correction_bias=None, routed_scaling_factor=None, topk_group=None,
        routing_replay_out=None,
    ):  # fmt: skip
        weights, ids = vllms_router(
            self.moe_config.routing_method.name, router_logits,
            self.moe_config.experts_per_token, e_score_correction_bias, routed_scaling_factor,
        )  # fmt: skip
        if routing_replay_out is not None and not self.is_silent:
            assert routing_replay_out.shape == ids.shape
            assert routing_replay_out.is_contiguous()
            routing_replay_out.copy_(ids.sort(-1).values)
        return weights.sum(-1, keepdim=True) * hidden_states


Kernel.__abstractmethods__ = frozenset()  # of those only what runs it is here


class Experts(torch.nn.Module):
    """The part of vLLM's ``RoutedExperts`` that runs the layer."""

    def __init__(self, method="Renormalize", top_k=TOP_K, scale=1.0, *, ranks=1):
        super().__init__()
        self.routed_scaling_factor, self.routing_sink = scale, None
        self.bias = torch.linspace(-1, 1, EXPERTS, device=DEVICE)
        prepare = SimpleNamespace(
            prepare=lambda x, router_logits, **_: (
                x.repeat(ranks, 1),
                None,
                torch.cat([-router_logits] * (ranks - 1) + [router_logits + 0.25]),
            ),
            finalize=lambda output: output[-(len(output) // ranks) :],
        )
        impl = FusedMoEKernelMonolithicImpl(prepare, Kernel(method, top_k))
        self.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(impl=impl))

    @property
    def kernel(self):
        return kernel_of(self.quant_method)

    def forward_monolithic(self, x, router_logits, input_ids=None):
        return self.quant_method.moe_kernel.impl.apply(
            x, None, None, router_logits, "silu", EXPERTS, None, False,
            e_score_correction_bias=self.bias, routed_scaling_factor=self.routed_scaling_factor,
            routing_sink=self.routing_sink,
        )  # fmt: skip


def make_logits(seed=0, num_tokens=5, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, EXPERTS, generator=generator).to(DEVICE, dtype)


def run(layer, logits):
    return layer.forward_monolithic(
        x=torch.ones(len(logits), 4, device=DEVICE), router_logits=logits
    )


def want(layer, logits):
    """Return the expected weights and ids, of the logits that the kernel gets."""
    config = layer.kernel.moe_config
    weights, ids = vllms_router(
        config.routing_method.name, logits + 0.25, config.experts_per_token, layer.bias,
        layer.routed_scaling_factor,
    )  # fmt: skip
    weights, order = weights.float().sort(dim=-1, descending=True)
    return weights, ids.gather(-1, order).int()


def assert_written(buffers, column, layer, logits):
    weights, ids = want(layer, logits)
    rows = slice(len(logits))
    torch.testing.assert_close(buffers.topk_ids[column, rows], ids, rtol=0, atol=0)
    torch.testing.assert_close(buffers.topk_weights[column, rows], weights, rtol=1e-6, atol=0)


def make_buffers(num_layers=1, top_k=TOP_K, own_rows=None):
    return RoutingBuffers(num_layers, TOKENS, top_k, None, DEVICE, own_rows)


def hook(buffers, *layers):
    for column, layer in enumerate(layers):
        top_k = layer.kernel.moe_config.experts_per_token
        buffers.hook(column, RoutingReplay(layer, layer.kernel, top_k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("method", "top_k", "scale"),
    [
        ("Renormalize", TOP_K, 1.0),
        ("RenormalizeNaive", TOP_K, 1.0),
        ("DeepSeekV3", TOP_K, 1.0),
        ("DeepSeekV3", TOP_K, 2.5),
        ("MiniMax2", TOP_K, 1.0),
        ("MiniMax2", TOP_K, 2.5),
        ("SigmoidRenorm", TOP_K, 1.0),
        ("Sigmoid", TOP_K, 1.0),
        ("Llama4", 1, 1.0),
    ],
)
def test_each_layer_writes_its_column_and_computes_what_it_did(method, top_k, scale, dtype):
    layers = [Experts(method, top_k, scale) for _ in range(2)]
    assert unknown_weights(layers[0], layers[0].kernel) is None
    logits = [make_logits(seed, dtype=dtype) for seed in range(2)]
    outputs = [run(*pair) for pair in zip(layers, logits, strict=True)]
    buffers = make_buffers(2, top_k)
    hook(buffers, *layers)
    for column, layer in enumerate(layers):
        torch.testing.assert_close(run(layer, logits[column]), outputs[column], rtol=0, atol=0)
    for column, layer in enumerate(layers):
        assert_written(buffers, column, layer, logits[column])
    assert (buffers.topk_ids[:, 5:] == -1).all()


@pytest.mark.parametrize(
    ("method", "scale", "words"),
    [
        ("Default", 1.0, "method Default"),
        ("DeepseekV4", 1.0, "method DeepseekV4"),
        ("Simulated", 1.0, "method Simulated"),
        ("Custom", 1.0, "method Custom"),
        ("Unspecified", 1.0, "method Unspecified"),
        ("Renormalize", 2.5, "method Renormalize with a routed_scaling_factor of 2.5"),
        ("Sigmoid", 0.5, "method Sigmoid with a routed_scaling_factor of 0.5"),
    ],
)
def test_routing_methods_of_unknown_weights(method, scale, words):
    layer = Experts(method, scale=scale)
    assert unknown_weights(layer, layer.kernel).endswith(words)


@pytest.mark.parametrize("is_hooked_first", [True, False])
def test_beside_vllms_own_capture_both_get_the_ids(is_hooked_first):
    layer, logits, buffers, told = Experts(), make_logits(), make_buffers(), []
    sink = RoutedExpertsSink(layer.kernel.moe_config, lambda ids: told.append(ids.clone()))
    if not is_hooked_first:
        layer.routing_sink = sink
    hook(buffers, layer)
    layer.routing_sink = sink
    run(layer, logits)
    assert_written(buffers, 0, layer, logits)
    (ids,) = told
    torch.testing.assert_close(ids.int(), want(layer, logits)[1].sort(-1).values, rtol=0, atol=0)


def test_a_kernel_that_writes_no_ids_leaves_rows_missing():
    layer, buffers = Experts(), make_buffers()
    hook(buffers, layer)
    run(layer, make_logits(num_tokens=7))
    layer.kernel.is_silent = True
    run(layer, make_logits(1))
    assert (buffers.topk_ids[0, :5] == -1).all()


def test_smaller_and_larger_steps():
    layer, buffers = Experts(), make_buffers()
    hook(buffers, layer)
    for num_tokens in (3, TOKENS, 1):
        logits = make_logits(num_tokens, num_tokens)
        run(layer, logits)
        assert_written(buffers, 0, layer, logits)


def test_a_kernel_that_gets_the_tokens_of_all_ranks(monkeypatch):
    metadata = SimpleNamespace(num_tokens_across_dp_cpu=torch.tensor([TOKENS, TOKENS]))
    context = SimpleNamespace(dp_metadata=metadata)
    monkeypatch.setattr(forward_context, "get_forward_context", lambda: context)
    layer, buffers = Experts(ranks=RANKS), make_buffers(own_rows=OwnRows(1, 1))
    hook(buffers, layer)
    logits = make_logits(num_tokens=TOKENS)
    run(layer, logits)
    assert_written(buffers, 0, layer, logits)


def test_a_draft_models_layer_writes_nothing():
    buffers = make_buffers()
    hook(buffers, Experts())
    run(Experts(), make_logits())
    assert (buffers.topk_ids == -1).all()


def test_a_reload_of_weights_makes_another_kernel():
    layer, buffers, logits = Experts(), make_buffers(), make_logits()
    hook(buffers, layer)
    impl = layer.quant_method.moe_kernel.impl
    impl.fused_experts = Kernel("Renormalize", TOP_K)
    run(layer, logits)
    assert_written(buffers, 0, layer, logits)
    buffers.topk_ids.fill_(-1)
    impl.fused_experts = Kernel("Renormalize", TOP_K, has_replay=False)
    run(layer, logits)
    assert (buffers.topk_ids == -1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")
@pytest.mark.parametrize("method", ["Renormalize", "MiniMax2", "Sigmoid"])
def test_a_cuda_graph_replays_it(method):
    layer, buffers, logits = Experts(method), make_buffers(), make_logits()
    hook(buffers, layer)
    run(layer, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(layer, logits)
    for seed in (1, 2):
        logits.copy_(make_logits(seed))
        buffers.topk_ids.fill_(-1)
        graph.replay()
        assert_written(buffers, 0, layer, logits)
