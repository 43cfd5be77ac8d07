"""Endless batches of newly generated problems, tokenized for training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Set
from typing import NamedTuple

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset, get_worker_info

from moescope_service.bundled_model import problems
from moescope_service.bundled_model.problems import Problem

IGNORED = -100
"""The label of a token that the model is not trained to write."""


class Batch(NamedTuple):
    """Conversations of one turn, padded on the right; each tensor is ``[batch, tokens]``."""

    tokens: torch.Tensor
    labels: torch.Tensor
    """The tokens of the answers, `IGNORED` elsewhere."""
    real: torch.Tensor
    """False where a token is padding."""

    def to(self, device: str) -> Batch:
        """Return the batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Problems(IterableDataset):
    """Batches of problems that are generated as they are asked for.

    Args:
        tokenizer: The model's tokenizer.
        batch_size: Problems a batch.
        held_out: Questions that are never generated.
        seed: Seed of the generator; each worker adds its number.
    """

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        batch_size: int,
        held_out: Set[str],
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._held_out = held_out
        self._seed = seed
        self._prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "{}"}], tokenize=False, add_generation_prompt=True
        )

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = random.Random(f"{self._seed}/{worker.id if worker else 0}")  # noqa: S311
        while True:
            yield self._encode([self._draw(rng) for _ in range(self._batch_size)])

    def _draw(self, rng: random.Random) -> Problem:
        while (problem := problems.generate(rng)).question in self._held_out:
            pass
        return problem

    def _encode(self, drawn: list[Problem]) -> Batch:
        prompts = self._tokenizer([self._prompt.format(p.question) for p in drawn])["input_ids"]
        end = self._tokenizer.eos_token
        answers = self._tokenizer([problem.answer + end for problem in drawn])["input_ids"]
        rows = [
            (prompt + answer, [IGNORED] * len(prompt) + answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        tokens = [torch.tensor(row) for row, _ in rows]
        labels = [torch.tensor(row) for _, row in rows]
        return Batch(
            pad_sequence(tokens, batch_first=True, padding_value=self._tokenizer.pad_token_id),
            pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True).bool(),
        )
