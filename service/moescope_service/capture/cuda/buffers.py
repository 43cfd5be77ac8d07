"""Static buffers in which routers leave a step's routing on NVIDIA GPUs.

``moe_forward`` is an opaque op to torch.compile, so a router's Python runs at CUDA graph capture
and in every step that no graph replays; the kernels that it launched replay. The routers therefore
write tensors that stay where they are:

* `FusedTopKRouter` writes them itself: they are its kernel's outputs, in place of the fresh tensors
  that ``fused_topk`` allocates. This adds no kernel to vLLM's own.
* Other routers' results are copied by one small kernel a layer. It sorts those of a `ShownRouter`
  by weight, as other routers do.

Relies on vLLM 0.32.0, ``model_executor/layers/fused_moe/router/fused_topk_router.py``
(``fused_topk``, ``dispatch_topk_softmax_func``, ``dispatch_topk_sigmoid_func``), and on that no
kernel behind a router writes to ``topk_ids`` or ``topk_weights``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from moescope_service.capture.cuda import kernels
from moescope_service.capture.own_rows import OwnRows
from moescope_service.capture.shown_router import ShownRouter

logger = logging.getLogger("moescope.capture")

ComputeRouting = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class RoutingBuffers:
    """Ids and weights of every layer, ``[num_layers, max_tokens, top_k]``.

    Args:
        num_layers: Layers that route.
        max_tokens: Tokens of the largest step.
        top_k: Experts a token and layer.
        index_dtype: Dtype of ids that the MoE kernels need; None: any, then ``torch.int32``.
        device: The model's.
        own_rows: Finds this worker's rows where routers see those of other ranks too.
    """

    def __init__(
        self,
        num_layers: int,
        max_tokens: int,
        top_k: int,
        index_dtype: torch.dtype | None,
        device: torch.device,
        own_rows: OwnRows | None = None,
    ) -> None:
        shape = (num_layers, max_tokens, top_k)
        self.max_tokens = max_tokens
        self.topk_ids = torch.full(shape, -1, dtype=index_dtype or torch.int32, device=device)
        self.topk_weights = torch.zeros(shape, dtype=torch.float32, device=device)
        self._index_dtype = index_dtype
        self._own_rows = own_rows
        self._has_warned = False
        # An output of the routing kernels that moescope does not read: one for all layers.
        self._token_expert = torch.empty(shape[1:], dtype=torch.int32, device=device)

    def hook(self, column: int, router: Any) -> None:
        """Let a router write its layer; see `moescope_service.capture.rows.StepSink`."""
        from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

        hooked = self._copying(column, router)
        if type(router) is FusedTopKRouter:
            hooked = self._in_place(column, router, hooked)
        router._compute_routing = hooked

    def _copying(self, column: int, router: Any) -> ComputeRouting:
        to_ids, to_weights = self.topk_ids[column], self.topk_weights[column]
        compute_routing = router._compute_routing
        is_shown = isinstance(router, ShownRouter)

        def compute_and_copy(
            hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not is_shown:  # vLLM's top-k kernels did not run
                self._check_padding(router_logits)
            topk_weights, topk_ids = compute_routing(
                hidden_states, router_logits, indices_type, input_ids=input_ids
            )
            own = (topk_ids, topk_weights)
            if self._own_rows is not None:
                own = self._own_rows(*own)
            copy_routing(*own, to_ids, to_weights, by_weight=is_shown)
            return topk_weights, topk_ids

        return compute_and_copy

    def _in_place(
        self, column: int, router: Any, compute_and_copy: ComputeRouting
    ) -> ComputeRouting:
        from vllm.model_executor.layers.fused_moe.router import fused_topk_router as vllm_router

        topk = {
            "softmax": vllm_router.dispatch_topk_softmax_func,
            "sigmoid": vllm_router.dispatch_topk_sigmoid_func,
        }[router.scoring_func]()
        topk_ids, topk_weights = self.topk_ids[column], self.topk_weights[column]
        token_expert, renormalize = self._token_expert, router.renormalize

        def compute_in_place(
            hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            num_tokens = len(hidden_states)
            if (
                num_tokens > self.max_tokens
                or indices_type != self._index_dtype
                or not self._are_own(num_tokens)
            ):
                return compute_and_copy(
                    hidden_states, router_logits, indices_type, input_ids=input_ids
                )
            self._check_padding(router_logits)
            weights, ids = topk(
                topk_weights[:num_tokens],
                topk_ids[:num_tokens],
                token_expert[:num_tokens],
                router_logits,
                renormalize,
            )
            return weights, ids

        return compute_in_place

    def _check_padding(self, router_logits: torch.Tensor) -> None:
        """Say, once, that vLLM misreads its router logits; see vLLM's issue 56900."""
        if not (self._has_warned or router_logits.is_contiguous()):
            self._has_warned = True
            logger.warning(
                "torch.compile padded the router logits, %d experts, to rows of %d, and vLLM's "
                "top-k kernels read them as if it had not (vLLM issue 56900): with moescope or "
                "without, this server takes wrong experts for all but a step's first token. Start "
                "it with TORCHINDUCTOR_SHAPE_PADDING=0",
                router_logits.shape[1],
                router_logits.stride(0),
            )

    def _are_own(self, num_rows: int) -> bool:
        return self._own_rows is None or self._own_rows.span(num_rows) == slice(0, num_rows)


def copy_routing(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    to_ids: torch.Tensor,
    to_weights: torch.Tensor,
    *,
    by_weight: bool = False,
) -> None:
    """Copy one layer's routing, ids and weights in one kernel.

    Args:
        topk_ids: ``[num_tokens, >= top_k]``, any integer type and strides.
        topk_weights: ``[num_tokens, >= top_k]``, any floating type and strides.
        to_ids: ``[max_tokens, top_k]``, contiguous; more tokens than fit are left out.
        to_weights: ``[max_tokens, top_k]``, contiguous.
        by_weight: Whether to sort each row by descending weight.
    """
    top_k = to_ids.shape[1]
    num_tokens = min(len(topk_ids), len(to_ids))
    if num_tokens:
        kernels.copy_routing[(-(-num_tokens * top_k // kernels.COPY_BLOCK),)](
            topk_ids,
            topk_weights,
            to_ids,
            to_weights,
            num_tokens,
            *topk_ids.stride(),
            *topk_weights.stride(),
            TOP_K=top_k,
            BY_WEIGHT=by_weight,
            BLOCK=kernels.COPY_BLOCK,
        )
