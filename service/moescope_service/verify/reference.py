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
    """A checkpoint in HF transformers, and once more in the dtype of the server as a yardstick.

    Args:
        model: The checkpoint: a directory, or a name on the hub.
        layers: Global numbers of the layers with experts.
        dtype: ``float64``, whose rounding does not count, or ``float32``, in half of the memory.
        server_dtype: What the server computes in; where None, the checkpoint's, as in vLLM.
        device: Where it runs.

    Raises:
        CommandError: The model cannot be loaded, or there is no reference for its type.
    """

    def __init__(
        self, model: str, layers: Sequence[int], dtype: str, server_dtype: str | None, device: str
    ) -> None:
        try:
            config = transformers.AutoConfig.from_pretrained(model)
            self.scheme: Scheme = scheme_of(config)
            own = str(config.get_text_config().dtype or "float32").split(".")[-1]
            self.server_dtype = server_dtype or own
            self._exact, self._rough = (
                transformers.AutoModelForCausalLM.from_pretrained(
                    model, dtype=getattr(torch, one), experts_implementation="eager"
                ).to(device)
                for one in (dtype, self.server_dtype)
            )
        except (OSError, ValueError) as error:
            raise CommandError(f"HF transformers cannot load {model}: {error}") from None
        self._device = device
        self._layers = tuple(layers)
        self._inputs: dict[int, Any] = {}
        for layer in self._layers:
            for loaded in (self._exact, self._rough):
                self._watch(loaded, layer)

    def _watch(self, model: Any, layer: int) -> None:
        def keep(_: Any, inputs: tuple[Any, ...]) -> None:
            self._inputs[layer] = inputs[0].reshape(-1, inputs[0].shape[-1])

        _module(model, layer, self.scheme.gate).register_forward_pre_hook(keep)

    def routes(self, token_ids: npt.NDArray[np.int32]) -> Routes:
        """Compute the routes of a sequence, ``[num_tokens]``."""
        with torch.inference_mode():
            rough = self._logits(self._rough, token_ids)
            exact = self._logits(self._exact, token_ids)
            found = [self._route(*one) for one in zip(self._layers, exact, strict=True)]
        ids, weights, scores = (np.stack([one[i] for one in found], axis=1) for i in range(3))
        noise = [float((a - b).abs().max()) for a, b in zip(exact, rough, strict=True)]
        return Routes(ids, weights, scores, np.array(noise))

    def _logits(self, model: Any, token_ids: npt.NDArray[np.int32]) -> list[Any]:
        """Return the router logits of each layer, ``[num_tokens, num_experts]`` in float64."""
        model(torch.from_numpy(token_ids)[None].long().to(self._device))
        found = []
        for layer in self._layers:
            router = _module(model, layer, self.scheme.gate)
            own = getattr(router, "bias", None)
            found.append(
                torch.nn.functional.linear(
                    self._inputs[layer].double(),
                    router.weight.double(),
                    None if own is None else own.double(),
                )
            )
        return found

    def _route(self, layer: int, logits: Any) -> tuple[Any, ...]:
        bias = torch.zeros((), dtype=torch.float64, device=logits.device)
        scores = logits
        if self.scheme.bias is not None:
            owner, _, name = self.scheme.bias.rpartition(".")
            bias = getattr(_module(self._exact, layer, owner), name).double().flatten()
            # The sigmoid moves by at most a quarter of what the logit does.
            scores = 4.0 * (logits.sigmoid() + bias)
        ids, weights = self.scheme.route(logits, bias)
        return tuple(values.cpu().numpy() for values in (ids, weights, scores))


def _module(model: Any, layer: int, name: str) -> Any:
    path = f"model.layers.{layer}.{name}"
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise CommandError(
            f"the checkpoint has no router {path}, but the server captures layer {layer}: is it "
            "the checkpoint that is served?"
        ) from None
