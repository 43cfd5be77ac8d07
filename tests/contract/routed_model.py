"""Modules by which vLLM would route, without a model; and a sink for them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from moescope_service.capture.cpu.sink import CpuSink


class Router(torch.nn.Module):
    """A top-k router with the signature of vLLM's."""

    def __init__(self, top_k=2, num_experts=8):
        super().__init__()
        self.top_k, self.global_num_experts = top_k, num_experts

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        weights, ids = torch.topk(torch.softmax(router_logits, -1), self.top_k)
        return weights, ids.to(indices_type or torch.int32)

    def forward(self, hidden_states, router_logits):
        return self._compute_routing(hidden_states, router_logits, torch.int32)


class Runner(MoERunner):
    """A `MoERunner` by type alone."""

    layer_id = 0
    is_monolithic = False
    enable_dbo = False

    def __init__(self, layer_id, router=None):
        torch.nn.Module.__init__(self)
        self.layer_id, self.router = layer_id, router or Router()
        self.moe_config = SimpleNamespace(num_logical_experts=8, num_local_experts=8, tp_size=1)
        self.routed_experts = torch.nn.Identity()
        self.routed_experts.quant_method = SimpleNamespace(topk_indices_dtype=None)


class Model(torch.nn.Module):
    def __init__(self, *runners):
        super().__init__()
        self.runners = torch.nn.ModuleList(runners)

    def forward(self, x):
        for runner in self.runners:
            weights, ids = runner.router(x, x)
            x = x + weights.sum(-1, keepdim=True) + ids.sum(-1, keepdim=True)
        return x


def make_sink(max_tokens=16, num_layers=2, weights_dtype="float16"):
    positions = torch.arange(max_tokens)
    return CpuSink(positions=positions, num_layers=num_layers, top_k=2, id_dtype="uint8",
                   weights_dtype=weights_dtype)  # fmt: skip


def hook(layers, sink):
    for column, found in enumerate(layers):
        sink.hook(column, found.router)
