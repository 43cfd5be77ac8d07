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
