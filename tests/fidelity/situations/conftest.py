"""The server that most situations share, and weights to load instead of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moescope_service import bundled_model
from tests.fidelity.situations.served import Served, serve

CHECKPOINTS = 3
CHANGED = r"layernorm|model\.norm|embed_tokens"


@pytest.fixture(scope="package")
def default_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """vLLM's defaults, and a parser of tool calls."""
    log = tmp_path_factory.mktemp("default") / "default.log"
    flags = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with serve(log, *flags) as served:
        yield served


@pytest.fixture(scope="package")
def weights_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Norms and embeddings: those of the bundled model, and others near them.

    The CPU build of vLLM 0.32.0 computes with packed copies of other weights, which loading leaves;
    its ``reload_weights`` leaves a model whose experts are not those of the checkpoint.
    """
    (checkpoint,) = bundled_model.path().glob("*.safetensors")
    own = {name: one for name, one in load_file(checkpoint).items() if re.search(CHANGED, name)}
    made = []
    for number in range(CHECKPOINTS):
        generator = torch.Generator().manual_seed(number)
        noise = {name: torch.randn(one.shape, generator=generator) for name, one in own.items()}
        scale = 0.0 if number == 0 else 0.3
        path = tmp_path_factory.mktemp("files") / f"{number}.safetensors"
        changed = {name: one * (1 + scale * noise[name]).to(one.dtype) for name, one in own.items()}
        save_file(changed, path)
        made.append(path)
    return made


@pytest.fixture(scope="package")
def weights_models(weights_files: list[Path]) -> list[Any]:
    """The models of `weights_files`, in float64."""
    made = []
    for file in weights_files:
        model = AutoModelForCausalLM.from_pretrained(
            bundled_model.path(), dtype=torch.float64, experts_implementation="eager"
        )
        model.load_state_dict(load_file(file), strict=False)
        made.append(model)
    return made
