"""Reads what a kernel with routing replay selects, in layers whose kernel routes inside.

vLLM serves many models so by default on Blackwell, with FlashInfer's TRT-LLM kernels: the layer
never calls its router. Relies on vLLM 0.32.0, ``model_executor/layers/fused_moe/modular_kernel.py``
(``FusedMoEExpertsMonolithic``: ``supports_routing_replay_capture``; ``apply`` writes each token's
ids to the leading rows of ``routing_replay_out``, and is called by keyword, behind the gathering of
other ranks' tokens: hidden states, logits and ids are of the same rows), on
``…/routed_experts_capturer.py`` (``RoutedExpertsSink``: shape and dtype of that buffer) and on
``…/routed_experts.py`` (``RoutedExperts.forward_monolithic`` runs the layer, whichever kernel
object a reload made; ``routed_scaling_factor`` is what vLLM's router would scale with).

The kernels tell ids alone. `weights_of` computes the weights from the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moescope_service.capture.shown_router import ShownRouter
from moescope_service.vllm_contract.patching import preceded_by, wrap_once

_SOFTMAX = {"Renormalize", "RenormalizeNaive"}
_SCALED = {"DeepSeekV3", "MiniMax2"}
_RENORMALIZED = {"SigmoidRenorm", *_SCALED}
ROUTING_METHODS = {*_SOFTMAX, *_RENORMALIZED, "Sigmoid", "Llama4"}
"""Names of vLLM's ``RoutingMethodType`` whose weights `weights_of` knows."""


class RoutingReplay(ShownRouter):
    """Is shown the ids that the layer's kernel wrote, and their weights.

    Args:
        routed_experts: The layer's ``RoutedExperts``.
        kernel: Its ``FusedMoEExpertsMonolithic``, of which `unknown_weights` finds nothing.
        top_k: Experts a token.
    """

    def __init__(self, routed_experts: Any, kernel: Any, top_k: int) -> None:
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsSink

        super().__init__(top_k)
        self._routed_experts = routed_experts
        self._method = kernel.moe_config.routing_method.name
        self._scale = routed_experts.routed_scaling_factor
        # vLLM's sink holds a buffer for the rows of all ranks. Only the buffer is used.
        self._buffer = RoutedExpertsSink(kernel.moe_config, self._showing).buffer
        wrap_once(routed_experts, "forward_monolithic", preceded_by(self._hook_kernel))

    def _hook_kernel(self, *_: Any, **__: Any) -> None:
        kernel = kernel_of(self._routed_experts.quant_method)
        if kernel is not None:
            wrap_once(kernel, "apply", self._showing)

    def _showing(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        def apply_and_show(
            *, hidden_states: Any, router_logits: Any, routing_replay_out: Any = None, **kwargs: Any
        ) -> Any:
            if routing_replay_out is None:  # else vLLM's own capture wants the ids as well
                routing_replay_out = self._buffer[: len(hidden_states)]
            routing_replay_out.fill_(-1)  # a row that the kernel leaves out is missing
            output = apply(
                hidden_states=hidden_states,
                router_logits=router_logits,
                routing_replay_out=routing_replay_out,
                **kwargs,
            )
            ids = routing_replay_out.long()
            logits = router_logits.gather(-1, ids.clamp(min=0)).float()
            self.show(weights_of(self._method, logits, self._scale), ids)
            return output

        return apply_and_show


def kernel_of(quant_method: Any) -> Any:
    """Return the kernel with routing replay that a layer's ``quant_method`` runs; None: another.

    Only where `compat.offers_routing_replay`.
    """
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsMonolithic

    impl = getattr(getattr(quant_method, "moe_kernel", None), "impl", None)
    kernel = getattr(impl, "fused_experts", None)
    if isinstance(kernel, FusedMoEExpertsMonolithic) and kernel.supports_routing_replay_capture():
        return kernel
    return None


def unknown_weights(routed_experts: Any, kernel: Any) -> str | None:
    """Return by what a layer's kernel routes, if `weights_of` does not know its weights.

    FlashInfer scales the weights of two routing methods alone.
    """
    method, scale = kernel.moe_config.routing_method.name, routed_experts.routed_scaling_factor
    if method not in ROUTING_METHODS:
        return f"the routing method {method}"
    if scale != 1 and method not in _SCALED:
        return f"the routing method {method} with a routed_scaling_factor of {scale}"
    return None


def weights_of(method: str, logits: Any, scale: float) -> Any:
    """Return the weights that vLLM's router gives experts.

    A bias and groups take part in the selection alone.

    Args:
        method: One of `ROUTING_METHODS`.
        logits: Router logits of the selected experts, ``[num_tokens, top_k]``, float32.
        scale: ``routed_scaling_factor``; 1 where vLLM scales the experts' sum instead.

    Returns:
        ``[num_tokens, top_k]``, float32.
    """
    if method in _SOFTMAX:
        return logits.softmax(-1)
    weights = logits.sigmoid()
    if method in _RENORMALIZED:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale
