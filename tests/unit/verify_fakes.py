"""The logits of a reference, and traces of servers that have them."""

from __future__ import annotations

import numpy as np

from moescope import RouteTrace
from moescope_service.verify.comparison import Expected

LOGITS = np.array([4.0, 3.0, 2.0, 1.0, 0.0, -1.0])


def route(_: int, logits: np.ndarray, ids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Softmax, then top-3."""
    ids = np.argsort(-logits, -1)[..., :3] if ids is None else ids
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return ids, np.take_along_axis(powers / powers.sum(-1, keepdims=True), ids, -1)


def reference(error: float = 1e-6, num_tokens: int = 6, num_layers: int = 2) -> Expected:
    """Six experts a layer; each token and layer prefers others."""
    logits = np.stack(
        [[np.roll(LOGITS, 2 * token + layer) for layer in range(num_layers)]
         for token in range(num_tokens)]
    )  # fmt: skip
    return Expected(logits, np.full(num_layers, error))


def trace_of(logits: np.ndarray, weights_dtype: str = "float32", **changes: object) -> RouteTrace:
    """The trace of a server whose routers have these logits."""
    num_rows, num_layers, num_experts = logits.shape
    ids, weights = route(0, logits, None)
    values = {
        "request_id": "cmpl-1", "index": 0, "model": "demo", "num_experts": num_experts,
        "num_hidden_layers": 8, "layers": np.arange(num_layers, dtype=np.int32) + 3,
        "topk_ids": ids[..., ::-1].astype(np.uint8),
        "topk_weights": weights[..., ::-1].astype(weights_dtype),
        "source": np.zeros(num_rows, np.uint8), "prompt_len": 4, "num_tokens": num_rows + 1,
        "token_ids": np.arange(num_rows + 1, dtype=np.int32), "cached_len": 0,
        "finish_reason": "length", "complete": True, "created_s": 0.0,
    }  # fmt: skip
    return RouteTrace(**{**values, **changes})
