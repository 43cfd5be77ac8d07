"""The router logits that HF transformers computes, after the experts that were served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from moescope import RouteTrace
from moescope.errors import CommandError
from moescope.received import shown
from moescope_service.verify.comparison import Expected, Floats, Ids
from moescope_service.verify.schemes import Scheme, scheme_of


class Reference:
    """A checkpoint in HF transformers, and once more in the dtype of the server as a yardstick.

    Args:
        model: The checkpoint: a directory, or a name on the hub.
        layers: Global numbers of the layers with experts.
        dtype: ``float64``, whose rounding does not count, or ``float32``, in half of the memory.
        server_dtype: What the server computes in; where None, what vLLM chooses for the checkpoint:
            its own, and bfloat16 for float32 (`vllm.config.model._resolve_auto_dtype`, 0.32.0).
        device: Where it runs.

    Raises:
        CommandError: The model cannot be loaded, there is no reference for its type, or it would
            be no more exact than the server.
    """

    def __init__(
        self, model: str, layers: Sequence[int], dtype: str, server_dtype: str | None, device: str
    ) -> None:
        try:
            config = transformers.AutoConfig.from_pretrained(model)
            self.scheme: Scheme = scheme_of(config)
            text = config.get_text_config()
            own = str(text.dtype or "float32").split(".")[-1]
            self.server_dtype = server_dtype or ("bfloat16" if own == "float32" else own)
            self.vocab_size = int(text.vocab_size)
            if self.server_dtype == dtype:
                raise CommandError(
                    f"a reference in {dtype} is no yardstick for a server in {dtype}: take "
                    "--reference-dtype float64, or name the server's --dtype"
                )
            exact, rough = (
                transformers.AutoModelForCausalLM.from_pretrained(
                    model, dtype=getattr(torch, one), experts_implementation="eager"
                ).to(device)
                for one in (dtype, self.server_dtype)
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CommandError(f"HF transformers cannot load {model}: {error}") from None
        self.eps = float(torch.finfo(getattr(torch, self.server_dtype)).eps)
        """Of the server's dtype."""
        self._device = device
        self._layers = tuple(layers)
        self._exact = _Follower(exact, self.scheme, self._layers, torch.float64)
        self._rough = _Follower(rough, self.scheme, self._layers, None)
        self._biases = [bias.to(device) for bias in self._exact.biases]

    def follow(self, token_ids: npt.NDArray[np.int32], trace: RouteTrace) -> Expected:
        """Compute the logits of a sequence whose experts are those of a trace.

        Where rows are missing the model goes on with experts of its own.

        Args:
            token_ids: ``[num_rows]``.
            trace: The trace of these tokens.

        Raises:
            CommandError: The trace or the tokens are not of this model.
        """
        self._check(token_ids, trace)
        tokens = torch.from_numpy(token_ids)[None].long().to(self._device)
        served = torch.from_numpy(trace.topk_ids.astype(np.int64)).to(self._device)
        present = torch.from_numpy(trace.present)[:, None].to(self._device)
        with torch.inference_mode():
            exact, rough = (
                model.logits(tokens, served, present) for model in (self._exact, self._rough)
            )
        error = [float((a - b).abs().max()) for a, b in zip(exact, rough, strict=True)]
        if not np.isfinite(error).all():
            raise CommandError(
                f"{trace.request_id} overflows in HF transformers in {self.server_dtype}: how "
                "exact the server may be is not known"
            )
        return Expected(torch.stack(exact, 1).cpu().numpy(), np.array(error))

    def route(self, column: int, logits: Floats, ids: Ids | None) -> tuple[Ids, Floats]:
        """Apply the model's formula: a `moescope_service.verify.comparison.Route`."""
        given = None if ids is None else torch.from_numpy(ids).to(self._device)
        seen = torch.from_numpy(logits).to(self._device)
        found, weights = self.scheme.route(seen, self._biases[column], given)
        return found.cpu().numpy(), weights.cpu().numpy()

    def _check(self, token_ids: npt.NDArray[np.int32], trace: RouteTrace) -> None:
        served = (trace.layers.tolist(), trace.top_k, trace.num_experts)
        own = (list(self._layers), self.scheme.top_k, self._exact.num_experts)
        if served != own:
            raise CommandError(
                f"the trace of {trace.request_id} has the {trace.num_layers} layers "
                f"{shown(served[0])} with {served[1]} of {served[2]} experts, the checkpoint the "
                f"{len(own[0])} layers {shown(own[0])} with {own[1]} of {own[2]}: is it the "
                "checkpoint that is served?"
            )
        if int(token_ids.max()) >= self.vocab_size:
            raise CommandError(
                f"{trace.request_id} has the token {int(token_ids.max())}, the checkpoint's "
                f"vocabulary {self.vocab_size:,} tokens: is it the checkpoint that is served?"
            )


class _Follower:
    """A model whose experts are those that it is told.

    Args:
        model: Any of HF transformers with the scheme.
        scheme: How it routes.
        layers: Global numbers of the layers with experts.
        dtype: What the logits are computed in, from the routers' inputs; where None, as the model
            does it: a router's logits are then rounded to its dtype too.
    """

    def __init__(
        self, model: Any, scheme: Scheme, layers: Sequence[int], dtype: torch.dtype | None
    ) -> None:
        self._model, self._scheme, self._dtype = model, scheme, dtype
        self._logits: dict[int, torch.Tensor] = {}
        self._served = self._present = torch.empty(0)
        self.biases: list[torch.Tensor] = []
        """Of each layer, in float64."""
        self.num_experts = 0
        for layer in layers:
            self._watch(layer)

    def logits(
        self, tokens: torch.Tensor, served: torch.Tensor, present: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the router logits of each layer, ``[num_tokens, num_experts]`` in float64.

        Args:
            tokens: ``[1, num_tokens]``.
            served: The experts, ``[num_tokens, num_layers, top_k]``.
            present: Which of them to follow, ``[num_tokens, 1]``.
        """
        self._served, self._present = served, present
        self._model(tokens)
        return [self._logits[column] for column in range(len(self.biases))]

    def _watch(self, layer: int) -> None:
        router, column = self._module(layer, self._scheme.gate), len(self.biases)
        bias = torch.zeros((), dtype=torch.float64)
        if self._scheme.bias is not None:
            owner, _, name = self._scheme.bias.rpartition(".")
            bias = getattr(self._module(layer, owner), name).double().flatten()
        self.biases.append(bias)
        self.num_experts = int(router.weight.shape[0])

        def keep(_: Any, inputs: tuple[Any, ...]) -> None:
            dtype = self._dtype or router.weight.dtype
            states = inputs[0].reshape(-1, inputs[0].shape[-1]).to(dtype)
            own = getattr(router, "bias", None)
            logits = torch.nn.functional.linear(
                states, router.weight.to(dtype), None if own is None else own.to(dtype)
            )
            self._logits[column] = logits.double()

        def follow(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            states, _, weights, *others = inputs
            ids, wanted = self._routing(column)
            return states, ids, wanted.to(weights.dtype), *others

        def scatter(_: Any, __: Any, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
            scores, *others = outputs
            ids, wanted = self._routing(column)
            return torch.zeros_like(scores).scatter(1, ids, wanted.to(scores.dtype)), *others

        router.register_forward_pre_hook(keep)
        if self._scheme.experts is None:
            router.register_forward_hook(scatter)
        else:
            self._module(layer, self._scheme.experts).register_forward_pre_hook(follow)

    def _routing(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts to take in a layer whose logits are there, and their factors."""
        logits, bias = self._logits[column], self.biases[column].to(self._present.device)
        own, _ = self._scheme.route(logits, bias, None)
        ids = torch.where(self._present, self._served[:, column], own)
        return ids, self._scheme.scale * self._scheme.route(logits, bias, ids)[1]

    def _module(self, layer: int, name: str) -> Any:
        path = f"model.layers.{layer}.{name}"
        try:
            return self._model.get_submodule(path)
        except AttributeError:
            raise CommandError(
                f"the checkpoint has no router {path}, but the server captures layer {layer}: is "
                "it the checkpoint that is served?"
            ) from None
