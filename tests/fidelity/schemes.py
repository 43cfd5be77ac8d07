"""Routing schemes, each with a small model of random weights that HF transformers can make.

Layers, heads and experts are few; what decides about routing is as the published models have it:
grouping, biases, scaling, shared experts, dense first layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from moescope_service.verify.formulas import (
    Routing,
    grouped_softmax_topk,
    sigmoid_topk,
    softmax_topk,
    sparse_mixer,
    topk_sigmoid,
)

VOCAB_SIZE = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """How a model routes, and the model."""

    name: str
    config_class: str
    """Name of a configuration class of HF transformers."""
    options: dict[str, Any]
    """What differs from `COMMON`."""
    gate: str
    """Name of the routers' modules, behind the layer."""
    layers: tuple[int, ...]
    """The layers with experts."""
    num_experts: int
    top_k: int
    route: Callable[[torch.Tensor, torch.Tensor], Routing]
    """The formula: (logits, bias) -> (ids, weights)."""
    bias: str | None = None
    """Name of the selection bias, behind the layer."""
    has_bias_in_vllm: bool = True
    """Whether vLLM's CPU build applies the bias; where not, the reference goes without as well."""
    has_prefix_cache: bool = True
    """Whether vLLM's CPU build caches prefixes of the model; not with MLA."""
    architecture: str | None = None
    """vLLM's name of the architecture, where it is not that of HF transformers."""
    llm_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of ``vllm.LLM`` without which vLLM does not compute the published model."""
    alternative: Callable[[torch.Tensor, torch.Tensor], Routing] | None = None
    """What a capture would show that missed the scheme's point; it must differ."""


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MLA = {  # vLLM's kernels want the published sizes
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
# The CPU kernel of vLLM 0.32.0 for rotary embeddings is wrong for queries [num_tokens, num_heads,
# head_dim] with more than one head, which DeepSeek's attention alone hands it; PyTorch's is right.
# On CPUs with AMX vLLM takes an attention kernel for them that refuses float32.
_FOR_DEEPSEEK = {
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
    "attention_backend": "CPU_MLA",
}
_V3 = {
    **_MLA,
    "q_lora_rank": 48,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}

SCHEMES = (
    Scheme(
        "softmax, shared expert (Qwen2-MoE)",
        "Qwen2MoeConfig",
        {
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "norm_topk_prob": False,
        },
        "mlp.gate",
        (0, 1, 2),
        60,
        4,
        lambda logits, _: softmax_topk(logits, 4, renormalize=False),
    ),
    Scheme(
        "softmax (OLMoE)",
        "OlmoeConfig",
        {"num_experts": 64, "num_experts_per_tok": 8},
        "mlp.gate",
        (0, 1, 2),
        64,
        8,
        lambda logits, _: softmax_topk(logits, 8, renormalize=False),
    ),
    Scheme(
        "softmax, renormalized (Mixtral)",
        "MixtralConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        "mlp.gate",
        (0, 1, 2),
        8,
        2,
        lambda logits, _: softmax_topk(logits, 2, renormalize=True),
    ),
    Scheme(
        "softmax, renormalized, dense layers between (Qwen3-MoE)",
        "Qwen3MoeConfig",
        {
            "num_experts": 32,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "num_hidden_layers": 5,
            "mlp_only_layers": [0, 2],
            "head_dim": 32,
        },
        "mlp.gate",
        (1, 3, 4),
        32,
        8,
        lambda logits, _: softmax_topk(logits, 8, renormalize=True),
    ),
    Scheme(
        "softmax, renormalized, 320 experts (Qwen3-MoE)",
        "Qwen3MoeConfig",
        {
            "num_experts": 320,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "head_dim": 32,
        },
        "mlp.gate",
        (0, 1, 2),
        320,
        8,
        lambda logits, _: softmax_topk(logits, 8, renormalize=True),
    ),
    Scheme(
        "softmax over the selected (Granite MoE)",
        "GraniteMoeConfig",
        {"num_local_experts": 16, "num_experts_per_tok": 4},
        "block_sparse_moe.router",
        (0, 1, 2),
        16,
        4,
        lambda logits, _: softmax_topk(logits, 4, renormalize=True),
    ),
    Scheme(
        "softmax with the router's own bias (GPT-OSS)",
        "GptOssConfig",
        {"num_local_experts": 16, "num_experts_per_tok": 4, "head_dim": 32, "sliding_window": 16},
        "mlp.router",
        (0, 1, 2),
        16,
        4,
        lambda logits, _: softmax_topk(logits, 4, renormalize=True),
    ),
    Scheme(
        "grouped softmax, dense first layer (DeepSeek-V2)",
        "DeepseekV2Config",
        {
            **_MLA,
            "n_routed_experts": 32,
            "num_experts_per_tok": 6,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "n_shared_experts": 2,
            "routed_scaling_factor": 16.0,
            "norm_topk_prob": False,
            # In float16 vLLM divides hidden states by the scaling factor, and those of a new model
            # are so small already that the usual epsilon would count beside them.
            "rms_norm_eps": 1e-12,
        },
        "mlp.gate",
        (1, 2),
        32,
        6,
        lambda logits, _: grouped_softmax_topk(logits, 6, num_groups=8, topk_groups=3),
        has_prefix_cache=False,
        llm_options=_FOR_DEEPSEEK,
        alternative=lambda logits, _: softmax_topk(logits, 6, renormalize=False),
    ),
    Scheme(
        "grouped sigmoid with bias, dense first layer (DeepSeek-V3)",
        "DeepseekV3Config",
        _V3,
        "mlp.gate",
        (1, 2),
        32,
        4,
        lambda logits, bias: sigmoid_topk(logits, 4, bias, num_groups=4, topk_groups=2),
        bias="mlp.gate.e_score_correction_bias",
        has_prefix_cache=False,
        llm_options=_FOR_DEEPSEEK,
        alternative=lambda logits, bias: sigmoid_topk(logits, 4, bias),
    ),
    Scheme(
        "sigmoid with bias, shared expert (GLM-4 MoE)",
        "Glm4MoeConfig",
        {
            "n_routed_experts": 24,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
            "head_dim": 32,
        },
        "mlp.gate",
        (1, 2),
        24,
        4,
        lambda logits, bias: sigmoid_topk(logits, 4, bias),
        bias="mlp.gate.e_score_correction_bias",
        alternative=lambda logits, bias: sigmoid_topk(logits, 4, 0 * bias),
    ),
    Scheme(
        "sigmoid with bias, scaled in the router (AFMoE)",
        "AfmoeConfig",
        {
            "num_experts": 24,
            "num_experts_per_tok": 4,
            "num_dense_layers": 1,
            "moe_intermediate_size": 32,
            "num_shared_experts": 1,
            "route_scale": 2.5,
            "route_norm": True,
            "score_func": "sigmoid",
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 32,
            "sliding_window": 16,
            "global_attn_every_n_layers": 3,
        },
        "mlp.router.gate",
        (1, 2),
        24,
        4,
        lambda logits, bias: sigmoid_topk(logits, 4, bias, scale=2.5),
        bias="mlp.expert_bias",
        alternative=lambda logits, bias: sigmoid_topk(logits, 4, 0 * bias, scale=2.5),
    ),
    Scheme(
        "custom function: top-1, sigmoid (Llama 4)",
        "Llama4TextConfig",
        {
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 64,
            "head_dim": 32,
            "attention_chunk_size": 64,
        },
        "feed_forward.router",
        (1, 3),
        16,
        1,
        lambda logits, _: topk_sigmoid(logits, 1),
    ),
    Scheme(
        "custom function: sparse mixer (Phi-3.5-MoE)",
        "PhimoeConfig",
        {
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.01,
            "attention_bias": True,  # as published; vLLM has these without asking
            "lm_head_bias": True,
        },
        "mlp.router",
        (0, 1, 2),
        16,
        2,
        lambda logits, _: sparse_mixer(logits, jitter_eps=0.01),
        architecture="PhiMoEForCausalLM",
        alternative=lambda logits, _: softmax_topk(logits, 2, renormalize=True),
    ),
    Scheme(
        "softmax, the published bias left out (Ernie 4.5)",
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 16,
            "moe_k": 4,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        "mlp.gate",
        (1, 2),
        16,
        4,
        lambda logits, _: softmax_topk(logits, 4, renormalize=True),
        bias="mlp.gate.moe_statics.e_score_correction_bias",
        has_bias_in_vllm=False,
    ),
)

UNSERVED = Scheme(
    "sigmoid with bias, no groups (MiniMax-M2)",
    "MiniMaxM2Config",
    {
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 32,
        "rotary_dim": 32,
        "use_routing_bias": True,
        "scoring_func": "sigmoid",
    },
    "mlp.gate",
    (0, 1, 2),
    16,
    4,
    lambda logits, bias: sigmoid_topk(logits, 4, bias),
    bias="mlp.e_score_correction_bias",
)
"""vLLM's CPU router takes sigmoid scores with grouped top-k alone."""

HYBRID = Scheme(
    "softmax, renormalized, linear attention in three layers of four (Qwen3-Next)",
    "Qwen3NextConfig",
    {
        "num_experts": 320,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_hidden_layers": 4,
        # vLLM makes the blocks of attention as large as the state of linear attention: 96 tokens.
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    "mlp.gate",
    (0, 1, 2, 3),
    320,
    10,
    lambda logits, _: softmax_topk(logits, 10, renormalize=True),
    llm_options={"enable_prefix_caching": True},
)
"""vLLM's CPU build computes linear attention in bfloat16 alone."""
