"""Writes a model's configuration, for ``--load-format dummy``: ``python -m benchmarks.gpu.shapes``.

Figures are those that the model's makers publish, with fewer layers: its routing and the kernels
that vLLM chooses are the model's own. The vocabulary is that of the tokenizer that it is given::

    python -m benchmarks.gpu.shapes gpt-oss runs/gpt-oss --tokenizer DIRECTORY
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

LAYERS = 12

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-moe": {  # Qwen1.5-MoE-A2.7B, which has 24 layers
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "dtype": "bfloat16",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    "qwen3-moe": {  # Qwen3-30B-A3B, which has 48 layers
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    "qwen3-next": {  # Qwen3-Next-80B-A3B, which has 48 layers, and experts of twice the width
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "dtype": "bfloat16",
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 262144,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": False,
    },
    "deepseek-v3": {  # DeepSeek-V3, which has 61 layers, and is three and four times as wide
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "moe_intermediate_size": 512,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 163840,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
    "gpt-oss": {  # gpt-oss-20b, which has 24 layers
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "attention_bias": True,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    },
}


def write(name: str, out: Path, tokenizer: Path) -> None:
    """Write a configuration, with a tokenizer.

    Args:
        name: Of `SHAPES`.
        out: The directory to make.
        tokenizer: A model's directory, of which the tokenizer and the vocabulary are taken.
    """
    out.mkdir(parents=True)
    for file in tokenizer.iterdir():
        if file.is_file() and file.name != "config.json" and file.suffix != ".safetensors":
            shutil.copy(file, out)
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    values = {**SHAPES[name], "vocab_size": vocabulary, "eos_token_id": 0, "pad_token_id": 0}
    (out / "config.json").write_text(json.dumps(values, indent=1))


def main() -> None:
    """Write what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("out", type=Path, help="The directory to make.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="A model's directory.")
    args = parser.parse_args()
    write(args.name, args.out, args.tokenizer)


if __name__ == "__main__":
    main()
