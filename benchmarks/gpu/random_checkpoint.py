"""Writes a checkpoint of random weights in the shape of a model, for `moescope verify`.

It needs the weights that are served; those of ``--load-format dummy`` are in the server alone. A
router's weights are larger than a new model's: logits then have a standard deviation of about 2,
and experts are told apart. The same seed, torch and device write the same weights::

    python -m benchmarks.gpu.random_checkpoint SHAPE OUT --layers 8 --device cuda
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from moescope_service.verify.schemes import scheme_of

LOGITS_STD = 2.0


def write(
    shape: Path,
    out: Path,
    *,
    layers: int,
    seed: int = 0,
    device: str = "cpu",
    drafter: bool = False,
) -> None:
    """Write a checkpoint in the dtype that the configuration names.

    Args:
        shape: A directory with a configuration, and a tokenizer.
        out: The directory to make.
        layers: How many layers it shall have, at most those of the shape.
        seed: Of the random numbers.
        device: Where they are drawn.
        drafter: Whether one more layer predicts the token after the next (DeepSeek-V3's MTP).
    """
    out.mkdir(parents=True)
    for file in shape.iterdir():
        if file.is_file() and file.suffix in {".json", ".jinja", ".txt", ".model"}:
            shutil.copy(file, out)
    values = json.loads((shape / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(_cut(values, layers + drafter)))
    config = transformers.AutoConfig.from_pretrained(out)
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    router = f".{scheme_of(config).gate}.weight"
    routers = [weight for name, weight in model.named_parameters() if name.endswith(router)]
    with torch.no_grad():
        for weight in routers:
            weight.normal_(std=LOGITS_STD / weight.shape[-1] ** 0.5)
    model.save_pretrained(out)
    if drafter:
        _make_last_layer_a_drafter(model, out, layers)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{out}: {size / 1e6:,.1f} million parameters, {len(routers)} layers with experts")


def _make_last_layer_a_drafter(model: Any, out: Path, layers: int) -> None:
    """Add what DeepSeek-V3's MTP layer has beyond the model's own layers."""
    head, norm = model.lm_head.weight.data, model.model.norm.weight.data
    hidden_size = head.shape[-1]
    joined = torch.empty(hidden_size, 2 * hidden_size, dtype=head.dtype)
    own = {
        "embed_tokens": model.model.embed_tokens.weight.data,
        "enorm": norm,
        "hnorm": norm,
        "eh_proj": joined.normal_(std=model.config.initializer_range),
        "shared_head.norm": norm,
        "shared_head.head": head,
    }
    named = {f"model.layers.{layers}.{name}.weight": one.cpu() for name, one in own.items()}
    save_file({name: one.clone() for name, one in named.items()}, out / "drafter.safetensors")
    config = out / "config.json"
    values = {"num_hidden_layers": layers, "num_nextn_predict_layers": 1}
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def _cut(values: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return a configuration with the first layers alone."""
    kinds = {"layer_types": values["layer_types"][:layers]} if "layer_types" in values else {}
    return {**values, **kinds, "num_hidden_layers": min(layers, values["num_hidden_layers"])}


def main() -> None:
    """Write the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", type=Path, help="A directory with config.json and a tokenizer.")
    parser.add_argument("out", type=Path, help="The directory to make.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="Where random numbers are drawn.")
    args = parser.parse_args()
    write(args.shape, args.out, layers=args.layers, seed=args.seed, device=args.device)


if __name__ == "__main__":
    main()
