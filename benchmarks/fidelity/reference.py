"""The bundled model's reference: the same tokens through HF transformers, in float64."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from moescope import RouteTrace
from moescope_service import bundled_model

WEIGHT_TOLERANCE = 4e-6
"""What float32 leaves of a weight after six layers and some hundred tokens of context.

Experts whose probabilities are closer than that are *tied*: float32 may take either.
"""


@functools.cache
def reference_model() -> Any:
    """Return the model in float64, whose rounding does not count beside float32's."""
    return AutoModelForCausalLM.from_pretrained(
        bundled_model.path(), dtype=torch.float64, experts_implementation="eager"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Routes:
    """What the model does with a sequence."""

    topk_ids: np.ndarray
    """Sorted expert ids ``[num_tokens, num_layers, top_k]``."""
    topk_weights: np.ndarray
    """Their weights, float64, in the same order."""
    ties: int = 0
    """(Token, layer) pairs with experts that are not the gate's own but tied with them."""


_recent: collections.deque[tuple[Any, np.ndarray, Routes]]
_recent = collections.deque(maxlen=256)


def reference(model: Any, token_ids: np.ndarray) -> Routes:
    """Return HF's routes of a sequence.

    The model is causal: the beginning of a sequence of a moment ago is not computed again.
    """
    length = len(token_ids)
    for index, (of_model, known, routes) in enumerate(_recent):
        if of_model is model and np.array_equal(known[:length], token_ids):
            del _recent[index]
            _recent.appendleft((of_model, known, routes))
            return Routes(routes.topk_ids[:length], routes.topk_weights[:length])
    _recent.appendleft((model, token_ids, _run(model, token_ids)))
    return _recent[0][2]


def _run(
    model: Any, token_ids: np.ndarray, offered: np.ndarray | None = None, cache: Any = None
) -> Routes:
    """Run the model, with the experts offered (``[num_tokens, num_layers, top_k]``) where tied.

    A cache has the keys and values of the tokens before, and then of these too.
    """
    gates = [layer.mlp.gate for layer in model.model.layers]
    gated: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def route(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, gate_weights, own = output
        probabilities = logits.double().softmax(-1)
        ids = own.sort(-1).values
        if offered is not None:
            other = torch.from_numpy(offered[:, len(gated)].astype(np.int64)).sort(-1).values
            ids = torch.where(_are_tied(probabilities, other)[:, None], other, ids)
        weights = probabilities.gather(-1, ids)  # which the model does not renormalize
        gated.append((ids, weights, int((ids != own.sort(-1).values).any(-1).sum())))
        return logits, weights.to(gate_weights.dtype), ids

    hooks = [gate.register_forward_hook(route) for gate in gates]
    try:
        with torch.inference_mode():
            model(
                torch.from_numpy(token_ids)[None].long(),
                past_key_values=cache,
                use_cache=cache is not None,
            )
    finally:
        for hook in hooks:
            hook.remove()
    ids, weights, ties = zip(*gated, strict=True)
    return Routes(torch.stack(ids, 1).numpy(), torch.stack(weights, 1).numpy(), sum(ties))


def _are_tied(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return which rows of sorted ``ids`` are as good as the top-k: bool ``[num_tokens]``."""
    taken = probabilities.gather(-1, ids).amin(-1)
    left = probabilities.scatter(-1, ids, 0.0).amax(-1)
    return (ids.diff(dim=-1) > 0).all(-1) & (taken >= left - WEIGHT_TOLERANCE)


def reference_of(trace: RouteTrace, model: Any = None) -> Routes:
    """Return HF's routes of a trace's rows.

    Where experts are tied, the rest of the sequence depends on which are taken: beside a trace
    that differs the model goes on with the trace's experts there.

    Args:
        trace: The trace, with its tokens.
        model: A model in float64; `reference_model` where None.

    Raises:
        ValueError: The trace has no tokens.
    """
    token_ids, model = _routed_tokens(trace), model or reference_model()
    routes = reference(model, token_ids)
    ids = np.sort(trace.topk_ids, axis=-1)
    if not np.array_equal(ids[trace.present], routes.topk_ids[trace.present]):
        routes = _run(model, token_ids, offered=ids)
    return routes


def reference_of_versions(trace: RouteTrace, models: Sequence[Any]) -> Routes:
    """Return HF's routes of a trace's rows, each run of rows by the model that computed it.

    Its tokens attend to those before as the server's did: to the keys and values of the models that
    computed them.

    Args:
        trace: The trace, with its tokens, and no row missing.
        models: In float64, by the number of the weights.

    Raises:
        ValueError: The trace has no tokens.
    """
    token_ids, ids, cache = _routed_tokens(trace), np.sort(trace.topk_ids, axis=-1), DynamicCache()
    ends = [*trace.weights_versions[1:, 0].tolist(), trace.num_rows]
    parts = [
        _run(models[number], token_ids[first:end], ids[first:end], cache)
        for (first, number), end in zip(trace.weights_versions.tolist(), ends, strict=True)
    ]
    return Routes(
        np.concatenate([part.topk_ids for part in parts]),
        np.concatenate([part.topk_weights for part in parts]),
        sum(part.ties for part in parts),
    )


def _routed_tokens(trace: RouteTrace) -> np.ndarray:
    if trace.token_ids is None:
        raise ValueError(f"{trace.request_id} has no tokens to compare the rows of")
    return trace.token_ids[: trace.num_rows]
