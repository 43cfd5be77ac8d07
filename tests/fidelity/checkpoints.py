"""Checkpoints of random weights, and the routes that HF transformers gives for their tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.fidelity.schemes import COMMON, Scheme

SEED = 7
_GATE_STD = 0.25
"""Logits then have a standard deviation of about 2: experts are told apart."""
_BIAS = 0.3
"""Biases are uniform up to this; sigmoid scores lie between 0 and 1."""


def make(scheme: Scheme, directory: Path) -> None:
    """Write a checkpoint of a scheme's model, in float32."""
    config = getattr(transformers, scheme.config_class)(**{**COMMON, **scheme.options})
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in scheme.layers:
            for parameter in gate(model, scheme, layer).parameters(recurse=False):
                parameter.normal_(std=_GATE_STD)
            if scheme.bias is not None:
                bias(model, scheme, layer).uniform_(-_BIAS, _BIAS)
    model.save_pretrained(directory)
    if scheme.architecture is not None:
        path = directory / "config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"architectures": [scheme.architecture]}))


def gate(model: Any, scheme: Scheme, layer: int) -> torch.nn.Module:
    """Return the router of a layer."""
    module: torch.nn.Module = model.get_submodule(f"model.layers.{layer}.{scheme.gate}")
    return module


def bias(model: Any, scheme: Scheme, layer: int) -> torch.Tensor:
    """Return the selection bias of a layer, or zero."""
    if scheme.bias is None:
        return torch.zeros(())
    owner, name = f"model.layers.{layer}.{scheme.bias}".rsplit(".", 1)
    tensor: torch.Tensor = getattr(model.get_submodule(owner), name)
    return tensor


class Reference:
    """A checkpoint in HF transformers, in float64 as far as the model allows it.

    Args:
        scheme: How it routes.
        directory: The checkpoint.
    """

    def __init__(self, scheme: Scheme, directory: Path) -> None:
        self._scheme = scheme
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float64, experts_implementation="eager"
        )
        if not scheme.has_bias_in_vllm:
            with torch.no_grad():
                for layer in scheme.layers:
                    bias(self._model, scheme, layer).zero_()
        self._inputs: dict[int, torch.Tensor] = {}
        for layer in scheme.layers:
            self._watch(layer)

    def _watch(self, layer: int) -> None:
        def keep(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            self._inputs[layer] = inputs[0].reshape(-1, inputs[0].shape[-1])

        gate(self._model, self._scheme, layer).register_forward_pre_hook(keep)

    @torch.inference_mode()
    def logits(self, token_ids: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each layer's (router logits ``[num_tokens, num_experts]``, bias)."""
        self._model(torch.from_numpy(token_ids)[None].long())
        for layer in self._scheme.layers:
            router = gate(self._model, self._scheme, layer)
            own = getattr(router, "bias", None)
            logits = torch.nn.functional.linear(
                self._inputs[layer].double(),
                router.weight.double(),
                None if own is None else own.double(),
            )
            yield logits, bias(self._model, self._scheme, layer).double().flatten()

    def routes(
        self, token_ids: np.ndarray, *, alternative: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids ascending, their weights), ``[num_tokens, num_layers, top_k]`` each.

        Args:
            token_ids: ``[num_tokens]``.
            alternative: By the scheme's alternative formula instead of its own.
        """
        route = self._scheme.alternative if alternative else self._scheme.route
        assert route is not None
        all_ids, all_weights = [], []
        for logits, selection_bias in self.logits(token_ids):
            ids, weights = route(logits, selection_bias)
            ids, order = ids.sort(-1)
            all_ids.append(ids.numpy())
            all_weights.append(weights.gather(-1, order).numpy())
        return np.stack(all_ids, 1), np.stack(all_weights, 1)
