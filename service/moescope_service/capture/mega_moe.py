"""Sees what MegaMoE layers are given: DeepSeek-V4 and Kimi-K3 route without vLLM's ``MoERunner``.

The model's own code selects the experts and calls the layer with them. Relies on vLLM 0.32.0,
``models/deepseek_v4/nvidia/model.py`` and ``models/kimi_k3/nvidia/model.py``
(``DeepseekV4MegaMoEExperts.forward`` gets ``topk_weights`` and logical ``topk_ids``, those that its
``capture_fn`` gets; ``top_k``, ``num_logical_experts``). Ids and weights are what vLLM's router
returns in the same models on other backends.
"""

from __future__ import annotations

import inspect
from typing import Any

from moescope_service.capture.shown_router import ShownRouter
from moescope_service.vllm_contract.patching import preceded_by, wrap_once


class MegaMoE(ShownRouter):
    """Is shown the experts that a layer is called with.

    Args:
        source: A ``RoutedExpertsCaptureSource`` that `is_given_experts`.
    """

    def __init__(self, source: Any) -> None:
        super().__init__(source.top_k)
        wrap_once(source, "forward", preceded_by(self._show_given))

    def _show_given(
        self, hidden_states: Any, topk_weights: Any, topk_ids: Any, *_: Any, **__: Any
    ) -> None:
        self.show(topk_weights, topk_ids)


def is_given_experts(source: Any) -> bool:
    """Return whether a ``RoutedExpertsCaptureSource`` is called with ids and weights of experts."""
    names = list(inspect.signature(source.forward).parameters)[:3]
    return names == ["hidden_states", "topk_weights", "topk_ids"]
