"""Which formula a model routes by, according to its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from moescope.errors import CommandError
from moescope_service.verify.formulas import (
    Routing,
    grouped_softmax_topk,
    sigmoid_topk,
    softmax_topk,
    sparse_mixer,
    topk_sigmoid,
)

Route = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Routing]
"""(logits ``[num_tokens, num_experts]``, selection bias, ids to take or None) -> (ids, weights)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """How a model routes, and where HF transformers (5.x) keeps its routers and experts."""

    name: str
    top_k: int
    route: Route
    gate: str
    """Name of the routers' modules, behind the layer."""
    experts: str | None = "mlp.experts"
    """Name of the experts' modules, which take (hidden states, ids, weights). Where None, they take
    what the router returns first: the weights of all experts, 0 for those not selected."""
    bias: str | None = None
    """Name of the selection bias, behind the layer."""
    scale: float = 1.0
    """What HF transformers multiplies the weights with, beyond vLLM's router."""


def scheme_of(config: Any) -> Scheme:
    """Return the scheme of a model.

    Args:
        config: Its configuration in HF transformers (5.x).

    Raises:
        CommandError: There is no reference for this type of model.
    """
    config = config.get_text_config()
    make = _SCHEMES.get(config.model_type)
    if make is None:
        known = ", ".join(sorted(_SCHEMES))
        raise CommandError(
            f"unknown model type {config.model_type!r}: expected one of {known}; on a GPU, "
            "--against vllm compares with vLLM's own expert ids"
        )
    return make(config)


def _softmax(
    gate: str,
    experts: str = "mlp.experts",
    *,
    renormalize: bool | None = None,
    top_k: str = "num_experts_per_tok",
    bias: str | None = None,
) -> Callable[[Any], Scheme]:
    def make(config: Any) -> Scheme:
        best = getattr(config, top_k)
        norm = config.norm_topk_prob if renormalize is None else renormalize
        name = f"softmax top-{best}{', selection bias' if bias else ''}"
        return Scheme(
            f"{name}{', renormalized' if norm else ''}",
            best,
            lambda logits, added, ids: softmax_topk(logits, best, added, renormalize=norm, ids=ids),
            gate,
            experts,
            bias,
        )

    return make


def _deepseek_v2(config: Any) -> Scheme:
    if config.topk_method == "greedy":
        scheme = _softmax("mlp.gate")(config)
        return dataclasses.replace(scheme, scale=config.routed_scaling_factor)
    if config.norm_topk_prob:
        raise CommandError("unknown routing: grouped top-k with norm_topk_prob has no reference")
    top_k, groups, best = config.num_experts_per_tok, config.n_group, config.topk_group
    return Scheme(
        f"softmax top-{top_k} of {best} of {groups} groups",
        top_k,
        lambda logits, _, ids: grouped_softmax_topk(
            logits, top_k, num_groups=groups, topk_groups=best, ids=ids
        ),
        "mlp.gate",
        scale=config.routed_scaling_factor,
    )


def _sigmoid(config: Any) -> Scheme:
    if not config.norm_topk_prob:
        raise CommandError("unknown routing: sigmoid without norm_topk_prob has no reference")
    top_k, groups, best = config.num_experts_per_tok, config.n_group, config.topk_group
    return Scheme(
        f"sigmoid top-{top_k} of {best} of {groups} groups, selection bias, renormalized",
        top_k,
        lambda logits, bias, ids: sigmoid_topk(
            logits, top_k, bias, num_groups=groups, topk_groups=best, ids=ids
        ),
        "mlp.gate",
        bias="mlp.gate.e_score_correction_bias",
        scale=config.routed_scaling_factor,
    )


def _afmoe(config: Any) -> Scheme:
    if config.n_group > 1:
        raise CommandError("unknown routing: AFMoE with groups of experts has no reference")
    top_k, scale = config.num_experts_per_tok, config.route_scale
    return Scheme(
        f"sigmoid top-{top_k}, selection bias, renormalized, scaled",
        top_k,
        lambda logits, bias, ids: sigmoid_topk(logits, top_k, bias, scale=scale, ids=ids),
        "mlp.router.gate",
        bias="mlp.expert_bias",
    )


def _llama4(config: Any) -> Scheme:
    top_k = config.num_experts_per_tok
    return Scheme(
        f"top-{top_k}, sigmoid",
        top_k,
        lambda logits, _, ids: topk_sigmoid(logits, top_k, ids=ids),
        "feed_forward.router",
        experts=None,
    )


def _phimoe(config: Any) -> Scheme:
    eps = config.router_jitter_noise
    return Scheme(
        "sparse mixer",
        2,
        lambda logits, _, ids: sparse_mixer(logits, jitter_eps=eps, ids=ids),
        "mlp.router",
    )


_SCHEMES: dict[str, Callable[[Any], Scheme]] = {
    "afmoe": _afmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _sigmoid,
    "ernie4_5_moe": _softmax(
        "mlp.gate",
        renormalize=True,
        top_k="moe_k",
        bias="mlp.gate.moe_statics.e_score_correction_bias",
    ),
    "glm4_moe": _sigmoid,
    "gpt_oss": _softmax("mlp.router", renormalize=True),
    "granitemoe": _softmax("block_sparse_moe.router", "block_sparse_moe.experts", renormalize=True),
    "llama4_text": _llama4,
    "mixtral": _softmax("mlp.gate", renormalize=True),
    "olmoe": _softmax("mlp.gate"),
    "phimoe": _phimoe,
    "qwen2_moe": _softmax("mlp.gate"),
    "qwen3_moe": _softmax("mlp.gate"),
    "qwen3_next": _softmax("mlp.gate"),
}
