"""Layers that do not call vLLM's router: what is captured, and what is refused."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.version import Version
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe import (
    OAITritonMxfp4ExpertsMonolithic,
)
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsMonolithic

from moescope_service.capture.mega_moe import is_given_experts
from moescope_service.capture.routers import check_runner, find_routed_layers
from moescope_service.errors import RefusedError
from moescope_service.vllm_contract.compat import offers_routing_replay
from moescope_service.vllm_contract.versions import vllm_version

from .routed_model import Model, Router, Runner, hook, make_sink


class Source(torch.nn.Module):
    """Routes by itself, and offers vLLM's own capture a hook."""

    layer_id, capture_fn = 4, None

    def forward(self, hidden_states, router_logits):
        raise NotImplementedError


def test_a_layer_that_routes_without_vllms_runner():
    with pytest.raises(RefusedError, match=r"layer 4 is a Source, .* not called with the experts'"):
        find_routed_layers(Model(Runner(3), Source()))


class MegaMoEExperts(Source):
    """DeepSeek-V4's and Kimi-K3's, as they are called."""

    top_k, num_logical_experts, num_experts = 2, 8, 10

    def __init__(self, layer_id):
        super().__init__()
        self.layer_id = layer_id

    def forward(self, hidden_states, topk_weights, topk_ids, *, activation_clamp, fast_math=True):
        if self.capture_fn is not None:
            self.capture_fn(topk_ids)
        return hidden_states * topk_weights.sum(-1, keepdim=True)


def vllms_mega_moe_classes():
    """Since 0.33 one class serves both models."""
    names = [
        ("vllm.model_executor.layers.fused_moe.deep_gemm_mega_moe", "DeepGemmMegaMoEExperts"),
        ("vllm.models.deepseek_v4.nvidia.model", "DeepseekV4MegaMoEExperts"),
        ("vllm.models.kimi_k3.nvidia.model", "KimiK3MegaMoEExperts"),
    ]
    for module, name in names:
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            yield getattr(importlib.import_module(module), name)


def test_vllms_own_layers_are_given_experts():
    classes = list(vllms_mega_moe_classes())
    assert classes
    assert all(is_given_experts(one.__new__(one)) for one in classes)


def test_layers_that_are_given_experts():
    model, draft = Model(MegaMoEExperts(5), MegaMoEExperts(2)), MegaMoEExperts(5)
    layers = find_routed_layers(model)
    assert [(one.layer, one.num_experts, one.router.top_k) for one in layers] == [
        (2, 8, 2), (5, 8, 2)]  # fmt: skip
    sink = make_sink()
    hook(layers, sink)
    told = []
    model.runners[0].capture_fn = told.append
    weights = torch.tensor([[0.5, 2.0], [1.0, 0.25], [0.5, 0.5]])
    ids = torch.tensor([[7, 0], [1, 2], [3, 6]])
    x = torch.ones(3, 4)
    sink.start_step()
    draft(x, weights * 2, ids + 1, activation_clamp=None)
    for runner, shift in zip(model.runners, (1, 0), strict=True):
        given = (ids + shift) % 8
        output = runner(x, weights, given, activation_clamp=None)
        torch.testing.assert_close(output, x * weights.sum(-1, keepdim=True))
    rows = sink.take(3)
    np.testing.assert_array_equal(rows.topk_ids[:, 0], ids)  # layer 2
    np.testing.assert_array_equal(rows.topk_ids[:, 1], (ids + 1) % 8)
    np.testing.assert_array_equal(rows.topk_weights, weights[:, None].expand(3, 2, 2))
    torch.testing.assert_close(told, [(ids + 1) % 8])


def test_a_kernel_that_routes_inside_where_it_can_be_seen(monkeypatch):
    """gpt-oss by default; ``triton_kernels`` is in vLLM's CUDA builds alone."""
    kernels = types.ModuleType("triton_kernels.topk")
    kernels.topk = lambda *args, **kwargs: None
    monkeypatch.setitem(sys.modules, "triton_kernels", types.ModuleType("triton_kernels"))
    monkeypatch.setitem(sys.modules, "triton_kernels.topk", kernels)
    monkeypatch.setattr(Runner, "is_monolithic", True)
    runner = Runner(3)
    runner.routed_experts.forward_monolithic = forward = lambda x, router_logits: None
    runner.routed_experts.quant_method.experts_cls = OAITritonMxfp4ExpertsMonolithic
    found = check_runner(runner)
    assert (type(found.router).__name__, found.router.top_k) == ("TritonTopk", 2)
    assert runner.routed_experts.forward_monolithic is not forward
    runner.routed_experts.quant_method.experts_cls = Router
    with pytest.raises(RefusedError, match=r"monolithic kernel \(Router\).* or marlin for 4-bit"):
        check_runner(runner)


class Kernel(FusedMoEExpertsMonolithic):
    """One of FlashInfer's, by type alone."""

    has_replay = True

    def __init__(self, method):
        self.moe_config = SimpleNamespace(
            routing_method=RoutingMethodType[method], max_num_tokens=16, use_ep=True, ep_size=4,
            dp_size=2, experts_per_token=2, device="cpu",
        )  # fmt: skip

    def supports_routing_replay_capture(self):
        return self.has_replay


Kernel.__abstractmethods__ = frozenset()


@pytest.fixture
def make_runner(monkeypatch):
    def make(method, scale=1.0):
        runner, kernel = Runner(3), Kernel(method)
        routed_experts = runner.routed_experts
        routed_experts.quant_method.moe_kernel = SimpleNamespace(
            impl=SimpleNamespace(fused_experts=kernel)
        )
        routed_experts.quant_method.experts_cls = Kernel
        routed_experts.routed_scaling_factor = scale
        routed_experts.forward_monolithic = lambda x, router_logits: None
        return runner

    monkeypatch.setattr(Runner, "is_monolithic", True)
    return make


def test_vllm_offers_routing_replay_since_0_32():
    assert offers_routing_replay() == (Version(vllm_version()) >= Version("0.32"))


needs_routing_replay = pytest.mark.skipif(
    not offers_routing_replay(), reason="until 0.31 vLLM's kernels take no buffer for ids"
)


@needs_routing_replay
def test_a_kernel_with_routing_replay(make_runner):
    found = check_runner(make_runner("DeepSeekV3", 2.5))
    assert (type(found.router).__name__, found.router.top_k) == ("RoutingReplay", 2)
    assert found.router._buffer.shape == (4 * 16, 2)  # the tokens of all ranks


@needs_routing_replay
@pytest.mark.parametrize(
    ("method", "scale", "words"),
    [
        ("Simulated", 1.0, "by the routing method Simulated, whose weights moescope cannot tell"),
        ("Renormalize", 2.5, "method Renormalize with a routed_scaling_factor of 2.5, whose"),
    ],
)
def test_weights_that_cannot_be_told(make_runner, method, scale, words):
    with pytest.raises(
        RefusedError, match=rf"layer 3 .*\(Kernel\).* {words}.* or marlin for 4-bit"
    ):
        check_runner(make_runner(method, scale))


def test_a_kernel_without_routing_replay(make_runner, monkeypatch):
    monkeypatch.setattr(Kernel, "has_replay", False)
    with pytest.raises(
        RefusedError, match=r"layer 3 .*\(Kernel\) .*never calls its router; choose"
    ):
        check_runner(make_runner("Renormalize"))


def test_a_vllm_that_offers_no_routing_replay(make_runner, monkeypatch):
    """As 0.30 and 0.31 are."""
    monkeypatch.delattr(FusedMoEExpertsMonolithic, "apply")
    with pytest.raises(
        RefusedError, match=r"layer 3 .*\(Kernel\) .*never calls its router; choose"
    ):
        check_runner(make_runner("Renormalize"))
