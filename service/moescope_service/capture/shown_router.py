"""Stands in a router's place where a layer does not call its router."""

from __future__ import annotations

from typing import Any


class ShownRouter:
    """Is shown what a layer selected; `_compute_routing`, which sinks hook, returns it.

    What is shown has experts in any order: sinks for GPUs sort each row by descending weight.

    Args:
        top_k: Experts a token.
    """

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self._selected: tuple[Any, Any] | None = None

    def _compute_routing(
        self, hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
    ) -> Any:
        return self._selected

    def show(self, topk_weights: Any, topk_ids: Any) -> None:
        """Hand over what the layer has just selected, ``[num_tokens, top_k]`` each."""
        self._selected = topk_weights, topk_ids
        self._compute_routing(None, None, None)
        self._selected = None
