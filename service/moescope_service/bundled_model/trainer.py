"""One step of the training."""

from __future__ import annotations

from typing import NamedTuple

import torch
import transformers

from moescope_service.bundled_model.dataset import IGNORED, Batch
from moescope_service.bundled_model.evaluate import normalized_entropy

_MAX_GRADIENT_NORM = 1.0


class Losses(NamedTuple):
    """Losses and entropies of one step."""

    answers: torch.Tensor
    """Cross-entropy of the answers' tokens."""
    imbalance: torch.Tensor
    """Balance loss of the layers whose entropy is below the target."""
    entropies: torch.Tensor
    """Normalized entropy of each layer's selected experts."""


class Trainer:
    """Trains a bfloat16 model through float32 copies of its weights.

    Args:
        model: The model; its weights are changed in place.
        learning_rate: The highest learning rate.
        balance_weight: Weight of the experts' balance in the loss.
        target_entropy: Normalized entropy at which a layer's experts need no more balance.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        *,
        learning_rate: float,
        balance_weight: float,
        target_entropy: float,
    ) -> None:
        self._model = model
        self._learning_rate = learning_rate
        self._balance_weight = balance_weight
        self._target_entropy = target_entropy
        self._weights = list(model.parameters())
        self._masters = [weight.detach().float() for weight in self._weights]
        for master in self._masters:
            master.grad = torch.zeros_like(master)
        self._optimizer = torch.optim.AdamW(
            self._masters, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )

    def step(self, batch: Batch, scale: float) -> Losses:
        """Take one step at ``scale`` times the learning rate."""
        losses = self._losses(batch)
        self._model.zero_grad()
        (losses.answers + self._balance_weight * losses.imbalance).backward()
        with torch.no_grad():
            gradients = [master.grad for master in self._masters]
            torch._foreach_copy_(gradients, [weight.grad for weight in self._weights])
            torch.nn.utils.clip_grad_norm_(self._masters, _MAX_GRADIENT_NORM)
            self._optimizer.param_groups[0]["lr"] = scale * self._learning_rate
            self._optimizer.step()
            torch._foreach_copy_(self._weights, self._masters)
        return losses

    def _losses(self, batch: Batch) -> Losses:
        outputs = self._model.model(batch.tokens, output_router_logits=True, use_cache=False)
        labels = batch.labels[:, 1:]
        written = labels != IGNORED
        logits = self._model.lm_head(outputs.last_hidden_state[:, :-1][written])
        answers = torch.nn.functional.cross_entropy(logits.float(), labels[written])
        top_k = self._model.config.num_experts_per_tok
        weights = batch.real.flatten() / batch.real.sum()
        layers = [_balance(logits, weights, top_k) for logits in outputs.router_logits]
        imbalances, entropies = (torch.stack(values) for values in zip(*layers, strict=True))
        imbalance = (imbalances * (entropies < self._target_entropy)).mean()
        return Losses(answers, imbalance, entropies)


def _balance(
    logits: torch.Tensor, weights: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one layer's balance loss, 1 if balanced, and its normalized entropy."""
    probabilities = logits.float().softmax(-1)
    selected = probabilities.topk(top_k).indices
    load = weights @ torch.zeros_like(probabilities).scatter_(1, selected, 1 / top_k)
    return len(load) * load @ (weights @ probabilities), normalized_entropy(load)
