"""Finds the model's routers.

Relies on vLLM 0.32.0: ``model_executor/layers/fused_moe/runner/moe_runner.py`` (``MoERunner``:
``layer_id``, ``router``, ``is_monolithic``, ``enable_dbo``, ``_quant_method``, ``moe_config``) and
``…/router/base_router.py`` (``BaseRouter._compute_routing`` returns
``(topk_weights, topk_ids)``, ids logical, before the expert-parallel load balancer's map;
``top_k``). A router's own ``global_num_experts`` counts the balancer's redundant experts too.
`TritonTopk`, `RoutingReplay` and `MegaMoE` stand in the place of routers that their layers never
call; ``experts_cls`` of the ``_quant_method`` is the class of the layer's kernel.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from moescope_service.capture import routing_replay, triton_topk
from moescope_service.capture.mega_moe import MegaMoE, is_given_experts
from moescope_service.capture.shown_router import ShownRouter
from moescope_service.errors import RefusedError
from moescope_service.vllm_contract.compat import offers_routing_replay

_PARAMETERS = ["hidden_states", "router_logits", "indices_type", "input_ids"]
_OTHER_BACKEND = (
    "choose a MoE backend that calls its router, such as --moe-backend triton, or marlin for 4-bit "
    "weights"
)


@dataclasses.dataclass(frozen=True, slots=True)
class RoutedLayer:
    """A layer whose routing can be captured."""

    layer: int
    """The model's own layer number."""
    router: Any
    num_experts: int
    """Logical experts, those that ids name."""
    index_dtype: Any
    """``torch.dtype`` of ids that the layer's MoE kernel needs; None: any."""
    expert_bytes: int = 0
    """Bytes of one expert's weights, whole; 0 where that is not known."""


def find_routed_layers(model: Any, *, may_lack: bool = False) -> list[RoutedLayer]:
    """Return a model's routed layers in order.

    Args:
        model: A loaded ``torch.nn.Module``.
        may_lack: Whether it may have none, as a stage of a model.

    Raises:
        RefusedError: The model has no routed layer, or one whose routing cannot be seen.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
        RoutedExpertsCaptureSource,
    )
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    layers = []
    for module in model.modules():
        if isinstance(module, MoERunner):
            layers.append(check_runner(module))
        elif isinstance(module, RoutedExpertsCaptureSource):
            layers.append(_check_source(module))
    layers.sort(key=lambda found: found.layer)
    if not layers and not may_lack:
        raise RefusedError(
            f"{type(model).__name__} has no mixture-of-experts layer that vLLM routes; a model "
            "that calls its experts' kernels itself cannot be captured: serve it with vLLM itself"
        )
    shapes = {(found.router.top_k, found.num_experts) for found in layers}
    if len(shapes) > 1:
        raise RefusedError(
            "the model's layers differ in (top-k, experts): "
            f"{sorted(shapes)}; moescope captures models that route all layers alike"
        )
    return layers


def check_runner(runner: Any) -> RoutedLayer:
    """Return a ``MoERunner``'s layer, if its router is called where a hook can see it.

    Raises:
        RefusedError: The routing of this layer cannot be seen.
    """
    layer, router = runner.layer_id, runner.router
    if runner.is_monolithic:
        router = _router_inside(runner)
    if runner.enable_dbo:
        raise RefusedError("dual batch overlap routes halves of a step; start without --enable-dbo")
    compute = getattr(router, "_compute_routing", None)
    if compute is None or list(inspect.signature(compute).parameters) != _PARAMETERS:
        raise RefusedError(
            f"layer {layer} has the router {type(router).__name__}, whose _compute_routing"
            f"({', '.join(_PARAMETERS)}) moescope does not find"
        )
    return RoutedLayer(
        layer,
        router,
        num_experts=runner.moe_config.num_logical_experts,
        index_dtype=runner._quant_method.topk_indices_dtype,
        expert_bytes=_expert_bytes(runner),
    )


def _expert_bytes(runner: Any) -> int:
    """Return the bytes of one expert's weights on all workers that share it.

    A kernel may keep them in a form of its own, which is not looked into.
    """
    num_local = runner.moe_config.num_local_experts
    weights = [
        one for one in runner.routed_experts.parameters() if one.dim() > 1 and len(one) == num_local
    ]
    shard = sum(one.nbytes for one in weights) // num_local
    return shard * int(runner.moe_config.tp_size)


def _router_inside(runner: Any) -> ShownRouter:
    """Return what stands in the place of a router that the layer's kernel never calls."""
    routed_experts = runner.routed_experts
    experts_class = getattr(runner._quant_method, "experts_cls", None)
    if triton_topk.is_of(experts_class):
        return triton_topk.TritonTopk(routed_experts, runner.router.top_k)
    kernel = routing_replay.kernel_of(runner._quant_method) if offers_routing_replay() else None
    if kernel is None:
        name = (experts_class or type(routed_experts)).__name__
        raise RefusedError(
            f"layer {runner.layer_id} runs a monolithic kernel ({name}) that routes inside and "
            f"never calls its router; {_OTHER_BACKEND}"
        )
    unknown = routing_replay.unknown_weights(routed_experts, kernel)
    if unknown is not None:
        raise RefusedError(
            f"layer {runner.layer_id} runs a monolithic kernel ({type(kernel).__name__}) that "
            f"routes inside by {unknown}, whose weights moescope cannot tell; {_OTHER_BACKEND}"
        )
    return routing_replay.RoutingReplay(routed_experts, kernel, runner.router.top_k)


def _check_source(source: Any) -> RoutedLayer:
    if not is_given_experts(source):
        raise RefusedError(
            f"layer {source.layer_id} is a {type(source).__name__}, which routes without vLLM's "
            "MoERunner and is not called with the experts' weights; choose another MoE backend "
            "(--moe-backend)"
        )
    return RoutedLayer(
        source.layer_id, MegaMoE(source), num_experts=source.num_logical_experts, index_dtype=None
    )
