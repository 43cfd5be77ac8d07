"""Shows what the top-k kernel of ``triton_kernels`` selects, in layers whose kernel routes inside.

vLLM serves gpt-oss's MXFP4 weights so by default on Hopper: the layer never calls its router.
Relies on vLLM 0.32.0, ``model_executor/layers/fused_moe/routed_experts.py``
(``RoutedExperts.forward_monolithic`` runs the layer, whichever kernel object a reload made) and
``…/experts/gpt_oss_triton_kernels_moe.py`` (``triton_kernel_moe_forward`` imports ``topk`` of
``triton_kernels.topk`` when it is called, and so does ``triton_kernels.routing.routing``, which it
calls of the version that vLLM brings along). Its rows are those of the tokens, in their order; the
experts of a row are in the order of their ids, the weights in the dtype of the logits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from moescope_service.capture.shown_router import ShownRouter
from moescope_service.vllm_contract.patching import wrap_once

_running: TritonTopk | None = None
"""Of the layer that runs, in the thread that runs the model; None in a draft model's layers."""


class TritonTopk(ShownRouter):
    """Is shown what the layer's kernel selected.

    Args:
        routed_experts: The layer's ``RoutedExperts``.
        top_k: Experts a token.
    """

    def __init__(self, routed_experts: Any, top_k: int) -> None:
        super().__init__(top_k)
        wrap_once(routed_experts, "forward_monolithic", self._noting)
        wrap_once(_topk_module(), "topk", _showing)

    def _noting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def note_and_forward(*args: Any, **kwargs: Any) -> Any:
            global _running  # noqa: PLW0603, the kernel does not say for which layer it runs
            _running = self
            try:
                return forward(*args, **kwargs)
            finally:
                _running = None

        return note_and_forward


def is_of(experts_class: type | None) -> bool:
    """Return whether a class of kernels selects its experts here."""
    from vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe import (
        OAITritonMxfp4ExpertsMonolithic,
    )

    return experts_class is OAITritonMxfp4ExpertsMonolithic


def _topk_module() -> Any:
    from vllm.utils.import_utils import has_triton_kernels

    has_triton_kernels()  # makes those that vLLM brings along importable
    return importlib.import_module("triton_kernels.topk")


def _showing(topk: Callable[..., Any]) -> Callable[..., Any]:
    def select_and_show(router_logits: Any, *args: Any, **kwargs: Any) -> Any:
        selected = topk(router_logits, *args, **kwargs)
        if _running is not None:
            values = selected if isinstance(selected, tuple) else (selected.vals, selected.indx)
            _running.show(*values[:2])
        return selected

    return select_and_show
