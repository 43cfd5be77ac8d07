"""Which formula a model routes by, told from its configuration."""

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

Route = Callable[[torch.Tensor, torch.Tensor], Routing]
"""(logits ``[num_tokens, num_experts]``, selection bias) -> (ids, weights)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """How a model routes, and where HF transformers keeps its routers."""

    name: str
    route: Route
    gate: str
    """Name of the routers' modules, behind the layer."""
    bias: str | None = None
    """Name of the selection bias, behind the layer."""


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
            f"there is no reference for models of type {config.model_type!r} (there is one for "
            f"{known}); on a GPU, --against vllm compares with vLLM's own expert ids"
        )
    return make(config)


def _softmax(gate: str, *, renormalize: bool | None = None) -> Callable[[Any], Scheme]:
    def make(config: Any) -> Scheme:
        top_k = config.num_experts_per_tok
        norm = config.norm_topk_prob if renormalize is None else renormalize
        name = f"softmax top-{top_k}{', renormalized' if norm else ''}"
        return Scheme(name, lambda logits, _: softmax_topk(logits, top_k, renormalize=norm), gate)

    return make


def _deepseek_v2(config: Any) -> Scheme:
    if config.topk_method == "greedy":
        return _softmax("mlp.gate")(config)
    if config.norm_topk_prob:
        raise CommandError("there is no reference for grouped top-k with norm_topk_prob")
    top_k, groups, best = config.num_experts_per_tok, config.n_group, config.topk_group
    return Scheme(
        f"softmax top-{top_k} of {best} of {groups} groups",
        lambda logits, _: grouped_softmax_topk(logits, top_k, num_groups=groups, topk_groups=best),
        "mlp.gate",
    )


def _sigmoid(config: Any) -> Scheme:
    if not config.norm_topk_prob:
        raise CommandError("there is no reference for sigmoid routing without norm_topk_prob")
    top_k, groups, best = config.num_experts_per_tok, config.n_group, config.topk_group
    return Scheme(
        f"sigmoid top-{top_k} of {best} of {groups} groups, selection bias, renormalized",
        lambda logits, bias: sigmoid_topk(logits, top_k, bias, num_groups=groups, topk_groups=best),
        "mlp.gate",
        "mlp.gate.e_score_correction_bias",
    )


def _llama4(config: Any) -> Scheme:
    top_k = config.num_experts_per_tok
    return Scheme(
        f"top-{top_k}, sigmoid", lambda logits, _: topk_sigmoid(logits, top_k),
        "feed_forward.router",
    )  # fmt: skip


def _phimoe(config: Any) -> Scheme:
    eps = config.router_jitter_noise
    return Scheme(
        "sparse mixer", lambda logits, _: sparse_mixer(logits, jitter_eps=eps), "mlp.router"
    )


_SCHEMES: dict[str, Callable[[Any], Scheme]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _sigmoid,
    "glm4_moe": _sigmoid,
    "gpt_oss": _softmax("mlp.router", renormalize=True),
    "granitemoe": _softmax("block_sparse_moe.router", renormalize=True),
    "llama4_text": _llama4,
    "mixtral": _softmax("mlp.gate", renormalize=True),
    "olmoe": _softmax("mlp.gate"),
    "phimoe": _phimoe,
    "qwen2_moe": _softmax("mlp.gate"),
    "qwen3_moe": _softmax("mlp.gate"),
}
