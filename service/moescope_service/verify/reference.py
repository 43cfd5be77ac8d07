"""The routes that HF transformers gives for tokens, from the checkpoint that is served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from moescope.errors import CommandError
from moescope_service.verify.comparison import Routes
from moescope_service.verify.schemes import Scheme, scheme_of


class Reference:
    """A checkpoint in HF transformers.

    Args:
        model: The checkpoint: a directory, or a name on the hub.
        layers: Global numbers of the layers with experts.
        dtype: ``float64``, whose rounding does not count, or ``float32``, in half of the memory.
        device: Where it runs.

    Raises:
        CommandError: The model cannot be loaded, or there is no reference for its type.
    """

    def __init__(self, model: str, layers: Sequence[int], dtype: str, device: str) -> None:
        try:
            config = transformers.AutoConfig.from_pretrained(model)
            self.scheme: Scheme = scheme_of(config)
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype=getattr(torch, dtype), experts_implementation="eager"
            ).to(device)
        except (OSError, ValueError) as error:
            raise CommandError(f"HF transformers cannot load {model}: {error}") from None
        self.checkpoint_dtype = str(config.get_text_config().dtype or "float32").split(".")[-1]
        """What vLLM computes in, unless it is told otherwise."""
        self._device = device
        self._layers = tuple(layers)
        self._inputs: dict[int, Any] = {}
        for layer in self._layers:
            self._watch(layer)

    def _watch(self, layer: int) -> None:
        def keep(_: Any, inputs: tuple[Any, ...]) -> None:
            self._inputs[layer] = inputs[0].reshape(-1, inputs[0].shape[-1])

        self._module(layer, self.scheme.gate).register_forward_pre_hook(keep)

    def _module(self, layer: int, name: str) -> Any:
        path = f"model.layers.{layer}.{name}"
        try:
            return self._model.get_submodule(path)
        except AttributeError:
            raise CommandError(
                f"the checkpoint has no router {path}, but the server captures layer {layer}: is "
                "it the checkpoint that is served?"
            ) from None

    def routes(self, token_ids: npt.NDArray[np.int32]) -> Routes:
        """Compute the routes of a sequence, ``[num_tokens]``."""
        with torch.inference_mode():
            self._model(torch.from_numpy(token_ids)[None].long().to(self._device))
            found = [self._layer(layer) for layer in self._layers]
        ids, weights, logits, scores = (
            np.stack([values[i] for values in found], axis=1) for i in range(4)
        )
        return Routes(ids, weights, logits, scores)

    def _layer(self, layer: int) -> tuple[Any, ...]:
        router = self._module(layer, self.scheme.gate)
        own = getattr(router, "bias", None)
        logits = torch.nn.functional.linear(
            self._inputs[layer].double(),
            router.weight.double(),
            None if own is None else own.double(),
        )
        bias = torch.zeros((), dtype=torch.float64, device=logits.device)
        scores = logits
        if self.scheme.bias is not None:
            owner, _, name = self.scheme.bias.rpartition(".")
            bias = getattr(self._module(layer, owner), name).double().flatten()
            # The sigmoid moves by at most a quarter of what the logit does.
            scores = 4.0 * (logits.sigmoid() + bias)
        ids, weights = self.scheme.route(logits, bias)
        return tuple(values.cpu().numpy() for values in (ids, weights, logits, scores))
