"""A LoRA adapter on the attention: its traces name it and hold its routes, not the base model's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.fidelity.reference import reference_model
from tests.fidelity.bundled import Tally
from tests.fidelity.situations.served import Served, check_tokens, random_prompt, serve

RANK, SCALE = 4, 2.0
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_adapter(directory: Path) -> Any:
    """Write a random adapter; return the model in float64 with the adapter in its weights."""
    model = copy.deepcopy(reference_model())
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, layer in enumerate(model.model.layers):
        for name in PROJECTIONS:
            weight = getattr(layer.self_attn, name).weight
            a = 0.3 * torch.randn(RANK, weight.shape[1], generator=generator)
            b = 0.3 * torch.randn(weight.shape[0], RANK, generator=generator)
            with torch.no_grad():
                weight += SCALE * b.double() @ a.double()
            prefix = f"base_model.model.model.layers.{number}.self_attn.{name}"
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "bundled",
              "r": RANK, "lora_alpha": SCALE * RANK, "bias": "none",
              "target_modules": list(PROJECTIONS)}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return model


def test_lora(tmp_path: Path, rng: np.random.Generator) -> None:
    model = make_adapter(tmp_path / "adapter")
    flags = ["--enable-lora", "--max-lora-rank", "8"]
    flags += ["--lora-modules", f"adapter={tmp_path / 'adapter'}"]
    with serve(tmp_path / "lora.log", *flags) as served:
        if served.client.info().device == "cpu":
            check_that_vllm_cannot(served)
            pytest.skip(
                "with --enable-lora vLLM's MoE layers need Triton, which its CPU build lacks"
            )
        tallies = {"bundled": Tally("LoRA, base model"), "adapter": Tally("LoRA", model)}
        prompts = [random_prompt(rng, length) for length in (20, 100, 200)]
        for prompt in prompts:  # the same tokens: an adapter has a prefix cache of its own
            for name, tally in tallies.items():
                response = served.complete(prompt, model=name, max_tokens=40)
                (trace,) = served.routes(response["id"])
                check_tokens([trace], response)
                assert trace.lora == ("adapter" if name == "adapter" else None)
                assert trace.cached_len == 0
                tally.add(trace)
    for tally in tallies.values():
        tally.record()


def check_that_vllm_cannot(served: Served) -> None:
    """The engine ends with the first request, whatever model it names."""
    body = {"model": "bundled", "prompt": "Tom has", "max_tokens": 2}
    answer = httpx.post(f"{served.server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 500
    log = served.server.log.read_text()
    assert "Using TRITON Unquantized MoE LoRA backend" in log
    assert "module 'triton.language' has no attribute" in log
