"""Routing schemes by their published formulas, in float64.

Each takes router logits ``[num_tokens, num_experts]`` and returns ``(ids, weights)``, both
``[num_tokens, top_k]``: what vLLM's router returns for the scheme, which is not always what the
experts' outputs are multiplied with. They say so. Where ``ids`` are given, they are taken in place
of those that the formula selects.
"""

from __future__ import annotations

import torch

Routing = tuple[torch.Tensor, torch.Tensor]


def softmax_topk(
    logits: torch.Tensor,
    top_k: int,
    bias: torch.Tensor | None = None,
    *,
    renormalize: bool,
    ids: torch.Tensor | None = None,
) -> Routing:
    """Softmax, then top-k; renormalized weights sum to 1.

    A bias (Ernie 4.5) takes part in the selection alone, as in `sigmoid_topk`.
    Renormalizing is the same as top-k first and softmax over the selected logits (Mixtral, Granite,
    GPT-OSS). Source: Jiang et al., Mixtral of Experts (2024), section 2.1; Muennighoff et al.,
    OLMoE (2024), section 2, without renormalization.
    """
    scores = logits.softmax(-1)
    ids = _best(scores if bias is None else scores + bias, top_k) if ids is None else ids
    weights = scores.gather(-1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) if renormalize else weights


def grouped_softmax_topk(
    logits: torch.Tensor,
    top_k: int,
    *,
    num_groups: int,
    topk_groups: int,
    ids: torch.Tensor | None = None,
) -> Routing:
    """Softmax; top-k among the experts of the groups with the highest best expert.

    The router's weights are neither renormalized nor scaled: vLLM multiplies the experts' sum with
    ``routed_scaling_factor`` afterwards (``apply_routed_scale_to_output``).
    Source: DeepSeek-AI, DeepSeek-V2 (2024), section 2.2.2, device-limited routing.
    """
    scores = logits.softmax(-1)
    best = _by_group(scores, num_groups).amax(-1)
    ids = _best(_in_best_groups(scores, best, topk_groups), top_k) if ids is None else ids
    return ids, scores.gather(-1, ids)


def sigmoid_topk(
    logits: torch.Tensor,
    top_k: int,
    bias: torch.Tensor,
    *,
    num_groups: int = 1,
    topk_groups: int = 1,
    scale: float = 1.0,
    ids: torch.Tensor | None = None,
) -> Routing:
    """Sigmoid; a bias takes part in the selection alone; weights renormalized, then scaled.

    A group's score is the sum of its two best biased experts. ``scale`` is 1 where vLLM scales the
    experts' sum instead (DeepSeek-V3, GLM-4 MoE), ``route_scale`` where the router does it (AFMoE).
    Source: DeepSeek-AI, DeepSeek-V3 (2024), section 2.1.2, equations 12 to 16.
    """
    scores = logits.sigmoid()
    biased = scores + bias
    if num_groups > 1:
        best = _by_group(biased, num_groups).topk(2).values.sum(-1)
        biased = _in_best_groups(biased, best, topk_groups)
    ids = _best(biased, top_k) if ids is None else ids
    weights = scores.gather(-1, ids)
    return ids, scale * weights / weights.sum(-1, keepdim=True)


def topk_sigmoid(logits: torch.Tensor, top_k: int, *, ids: torch.Tensor | None = None) -> Routing:
    """Top-k of the logits; each one's sigmoid is its weight.

    vLLM multiplies the experts' *inputs* with it (``apply_router_weight_on_input``).
    Source: Llama 4 as published, ``Llama4Router`` of HF transformers.
    """
    ids = _best(logits, top_k) if ids is None else ids
    return ids, logits.gather(-1, ids).sigmoid()


def sparse_mixer(
    logits: torch.Tensor, *, jitter_eps: float, ids: torch.Tensor | None = None
) -> Routing:
    """Take the best expert, then the best of the others, each with a softmax of its own.

    A softmax is over the logits within ``2 * jitter_eps`` of its maximum, relative to the larger of
    that maximum and the logit's magnitude. The two weights do not sum to 1.
    Source: Liu et al., GRIN (2024), section 2.2; Phi-3.5-MoE as published.
    """
    ids = _best(logits, 2) if ids is None else ids
    weights = []
    left = logits
    for selected in ids.split(1, dim=-1):
        best = left.amax(-1, keepdim=True)
        distance = (best - logits) / torch.maximum(logits.abs(), best)
        near = left.masked_fill(distance > 2 * jitter_eps, -torch.inf)
        weights.append(near.softmax(-1).gather(-1, selected))
        left = left.scatter(-1, selected, -torch.inf)
    return ids, torch.cat(weights, -1)


def _best(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    return scores.topk(top_k).indices


def _by_group(scores: torch.Tensor, num_groups: int) -> torch.Tensor:
    return scores.unflatten(-1, (num_groups, -1))


def _in_best_groups(scores: torch.Tensor, group_scores: torch.Tensor, best: int) -> torch.Tensor:
    """Return the scores with those outside of the best groups at minus infinity."""
    chosen = torch.zeros_like(group_scores, dtype=torch.bool)
    chosen.scatter_(-1, group_scores.topk(best).indices, True)
    grouped = _by_group(scores, group_scores.shape[-1])
    return grouped.masked_fill(~chosen.unsqueeze(-1), -torch.inf).flatten(-2)
