"""Measures a checkpoint on held-out problems: right answers, and the experts it selects."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from moescope_service.bundled_model.problems import Problem, final_answer

MAX_NEW_TOKENS = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one checkpoint."""

    exact_match: float
    """Share of the questions whose final number is right."""
    stopped: float
    """Share of the answers that ended with an end token, not at the length limit."""
    normalized_entropy: list[float]
    """Entropy of each layer's histogram of selected experts, 0 to 1; 1 is uniform."""
    active_experts: list[int]
    """Experts of each layer that any token selected."""


def normalized_entropy(counts: torch.Tensor) -> torch.Tensor:
    """Return the entropy of a histogram over that of a uniform one."""
    return torch.special.entr(counts / counts.sum()).sum() / math.log(len(counts))


def load_problems(path: Path) -> list[Problem]:
    """Return the problems of a file of JSON lines."""
    return [Problem(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


@torch.inference_mode()
def evaluate(checkpoint: Path, problems: Sequence[Problem], device: str) -> Evaluation:
    """Answer the problems greedily and count the experts of all their tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16")
    model = model.to(device).eval()
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": problem.question}] for problem in problems],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device)
    tokens = model.generate(**prompts, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    answers = tokens[:, prompts["input_ids"].shape[1] :]
    ended = (answers == tokenizer.eos_token_id).long()
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = [
        final_answer(text) == final_answer(problem.answer)
        for text, problem in zip(texts, problems, strict=True)
    ]
    real = torch.cat([prompts["attention_mask"], ended.cumsum(1) - ended == 0], 1)
    counts = _count_experts(model, tokens, real)
    return Evaluation(
        exact_match=sum(right) / len(right),
        stopped=ended.any(1).float().mean().item(),
        normalized_entropy=[round(normalized_entropy(layer).item(), 4) for layer in counts],
        active_experts=[int((layer > 0).sum()) for layer in counts],
    )


def _count_experts(
    model: transformers.PreTrainedModel, tokens: torch.Tensor, real: torch.Tensor
) -> list[torch.Tensor]:
    """Return each layer's histogram of the experts that the real tokens select."""
    outputs = model.model(tokens, attention_mask=real, output_router_logits=True, use_cache=False)
    config = model.config
    return [
        logits[real.flatten().bool()]
        .topk(config.num_experts_per_tok)
        .indices.flatten()
        .bincount(minlength=config.num_experts)
        for logits in outputs.router_logits
    ]
