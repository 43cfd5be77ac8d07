"""Writes a 24-layer model whose steps take long on a CPU: ``python -m benchmarks.cpu.model DIR``.

The bundled model's configuration with more and wider layers, and its tokenizer, without weights:
serve it with ``--load-format dummy``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from moescope_service import bundled_model

CHANGES = {
    "num_hidden_layers": 24,
    "layer_types": ["full_attention"] * 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 16,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "dtype": "float32",
}


def write(directory: Path) -> None:
    """Write the model's files."""
    directory.mkdir(parents=True, exist_ok=True)
    source = bundled_model.path()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, directory)
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | CHANGES, indent=2))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
