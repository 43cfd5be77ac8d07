r"""Train the bundled model, from its tokenizer to its checkpoint.

The model computes in bfloat16, as it is saved and served; only the optimizer uses float32::

    python -m moescope_service.bundled_model.train \
        --held-out client/moescope/data/sample.jsonl --out runs/bundled --duration-s 300
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import math
import os
import platform
import random
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch.utils.data import DataLoader

from moescope_service.bundled_model import problems, tokenizer
from moescope_service.bundled_model.dataset import Problems
from moescope_service.bundled_model.evaluate import Evaluation, evaluate, load_problems
from moescope_service.bundled_model.trainer import Trainer

_TOKENIZER_PROBLEMS = 50_000
_WARMUP_STEPS = 100


def build_tokenizer(seed: int) -> transformers.PreTrainedTokenizerBase:
    """Return a tokenizer trained on problems."""
    rng = random.Random(seed)  # noqa: S311
    return tokenizer.train(
        text for _ in range(_TOKENIZER_PROBLEMS) for text in problems.generate(rng)
    )


def build_model(vocabulary: transformers.PreTrainedTokenizerBase) -> transformers.PreTrainedModel:
    """Return an untrained model."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=len(vocabulary),
        hidden_size=96,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_experts=60,
        num_experts_per_tok=4,
        max_position_embeddings=4096,
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=vocabulary.convert_tokens_to_ids([tokenizer.END, tokenizer.END_OF_TEXT]),
        pad_token_id=vocabulary.pad_token_id,
    )
    return model


def train(
    model: transformers.PreTrainedModel, batches: DataLoader, options: argparse.Namespace
) -> int:
    """Train until the steps or the seconds are used up; return the number of steps."""
    trainer = Trainer(
        model,
        learning_rate=options.learning_rate,
        balance_weight=options.balance_weight,
        target_entropy=options.target_entropy,
    )
    started_s = saved_s = time.monotonic()
    for step, batch in enumerate(batches):
        now_s = time.monotonic()
        progress = max(step / options.steps, (now_s - started_s) / options.duration_s)
        if progress >= 1:
            break
        losses = trainer.step(batch.to(options.device), _learning_rate_scale(step, progress))
        if step % options.log_every_steps == 0:
            low, high = losses.entropies.aminmax()
            print(
                f"{now_s - started_s:6.1f} s  step {step:6}  loss {losses.answers:.4f}"
                f"  entropy {low:.3f} to {high:.3f}",
                flush=True,
            )
        if now_s - saved_s > options.save_every_s:
            model.save_pretrained(options.out)
            saved_s = now_s
    return step


def _learning_rate_scale(step: int, progress: float) -> float:
    """Rise for some steps, then fall along a cosine as the share of the training done goes to 1."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))


def report(evaluation: Evaluation, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the record of a training: hardware, versions, options and figures."""
    on_gpu = options.device.startswith("cuda")
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "tokenizers": tokenizers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": options.seed,
        "steps": steps,
        "duration_s": options.duration_s,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "balance_weight": options.balance_weight,
        "target_entropy": options.target_entropy,
        "held_out": dataclasses.asdict(evaluation),
    }


def print_table(evaluation: Evaluation) -> None:
    """Print an evaluation."""
    print(f"exact match {evaluation.exact_match:.0%}, stopped {evaluation.stopped:.0%}")
    print("layer  normalized entropy  active experts")
    figures = zip(evaluation.normalized_entropy, evaluation.active_experts, strict=True)
    for layer, (entropy, active) in enumerate(figures):
        print(f"{layer:5}  {entropy:18.4f}  {active:14}")


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description="Train the bundled model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--held-out",
        type=Path,
        required=True,
        help="JSON lines of problems to evaluate with; never trained on",
    )
    add("--out", type=Path, required=True, help="directory to write the checkpoint to")
    add("--steps", type=int, default=20_000, help="steps of training at most")
    add("--duration-s", type=float, default=300, help="seconds of training at most")
    add("--batch-size", type=int, default=512, help="problems in one step")
    add("--learning-rate", type=float, default=3e-3, help="highest learning rate")
    add("--balance-weight", type=float, default=0.01, help="weight of the balance loss")
    add(
        "--target-entropy",
        type=float,
        default=0.94,
        help="normalized entropy above which a layer has no balance loss",
    )
    add("--seed", type=int, default=0, help="seed of the weights and the problems")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="torch device to train on",
    )
    add("--workers", type=int, default=4, help="number of processes that make batches")
    add("--log-every-steps", type=int, default=200, help="steps between two printed lines")
    add("--save-every-s", type=float, default=60, help="seconds between two saves")
    return parser.parse_args()


def main() -> None:
    """Train, save, evaluate what was saved and write ``training.json`` beside it."""
    options = parse_options()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.manual_seed(options.seed)
    held_out = load_problems(options.held_out)
    vocabulary = build_tokenizer(options.seed)
    vocabulary.save_pretrained(options.out)
    model = build_model(vocabulary).to(options.device)
    questions = {problem.question for problem in held_out}
    dataset = Problems(vocabulary, options.batch_size, questions, options.seed)
    steps = train(model, DataLoader(dataset, None, num_workers=options.workers), options)
    model.save_pretrained(options.out)
    evaluation = evaluate(options.out, held_out, options.device)
    print_table(evaluation)
    summary = json.dumps(report(evaluation, steps, options), indent=2)
    (options.out / "training.json").write_text(f"{summary}\n", "utf-8")


if __name__ == "__main__":
    main()
