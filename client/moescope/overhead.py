"""Measures what the capture costs: the same prompts against a server with it and one without.

Both arms answer all prompts once in every round, in an order shuffled with a seed, after one
warm-up round each that is not counted. The arm without capture is vLLM's own server in a process
of its own that has nothing of moescope enabled.
"""

from __future__ import annotations

import dataclasses
import random
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

import httpx
import numpy as np

from moescope import replay
from moescope.errors import CommandError

ArmName = Literal["no_log", "log"]
ARMS: tuple[ArmName, ArmName] = ("no_log", "log")
"""The arms: vLLM as it is, and with capture. The names are those of timing.json."""

_BOOTSTRAP_SAMPLES = 10_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One arm's answers to all prompts in one round."""

    wall_s: float
    """Seconds from the first request to the last answer."""
    prompt_tokens: int
    completion_tokens: int
    token_ids: list[list[int] | None]
    """The output's token ids, in the order of the prompts."""

    @property
    def s_per_token(self) -> float:
        """Wall seconds a completion token."""
        return self.wall_s / self.completion_tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One pass of each arm."""

    order: tuple[ArmName, ArmName]
    """Which arm went first."""
    passes: dict[ArmName, Pass]

    @property
    def overhead_percent(self) -> float:
        """How much longer a token took with capture than without, in percent."""
        ratio = self.passes["log"].s_per_token / self.passes["no_log"].s_per_token
        return (ratio - 1.0) * 100.0


def shuffled_orders(rounds: int, seed: int) -> list[tuple[ArmName, ArmName]]:
    """Return which arm goes first in each round: each as often as the other, or once more."""
    first, second = ARMS
    orders = [(first, second) if i % 2 else (second, first) for i in range(rounds)]
    random.Random(seed).shuffle(orders)  # noqa: S311
    return orders


async def measure(
    prompts: Sequence[str],
    arms: dict[ArmName, httpx.AsyncClient],
    options: replay.Options,
    *,
    rounds: int,
    on_pass: Callable[[], None] | None = None,
    clock: replay.Clock = time.perf_counter,
) -> list[Round]:
    """Run the warm-up and all rounds.

    Each round has a cache salt of its own: no prompt is answered from the prefix cache that an
    earlier round, or an earlier run, filled. So prefill is measured as well.

    Args:
        prompts: The user messages.
        arms: A client from `replay.connect` for each arm.
        options: How to ask; its seed shuffles the order too.
        rounds: Rounds that count.
        on_pass: Called after each pass, warm-up included: ``2 * (rounds + 1)`` times.
        clock: Seconds from a monotonic clock.

    Raises:
        MoescopeError: A request failed, or an arm generated nothing.
    """
    run_id = uuid.uuid4().hex

    async def run(name: ArmName, number: int) -> Pass:
        salted = dataclasses.replace(options, cache_salt=f"{run_id}-{number}")
        result = await _pass(prompts, arms[name], salted, clock)
        if on_pass:
            on_pass()
        return result

    for name in ARMS:
        await run(name, 0)
    return [
        Round(order=order, passes={name: await run(name, number) for name in order})
        for number, order in enumerate(shuffled_orders(rounds, options.seed), start=1)
    ]


async def _pass(
    prompts: Sequence[str],
    http: httpx.AsyncClient,
    options: replay.Options,
    clock: replay.Clock,
) -> Pass:
    start_s = clock()
    responses = await replay.replay(prompts, http, options, clock=clock)
    wall_s = clock() - start_s
    replay.require_all(responses)
    completion_tokens = sum(response.completion_tokens for response in responses)
    if not completion_tokens:
        raise CommandError(f"{http.base_url} generated no token: there is nothing to measure")
    return Pass(
        wall_s=wall_s,
        prompt_tokens=sum(response.prompt_tokens for response in responses),
        completion_tokens=completion_tokens,
        token_ids=[response.token_ids for response in responses],
    )


def bootstrap_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """Return the 95% interval of the mean, by the percentile bootstrap.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.

    Args:
        values: One value a round.
        seed: Seed of the resampling.
    """
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(values), size=(_BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values)[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def summarize(rounds: Sequence[Round], seed: int) -> dict[str, Any]:
    """Return the measured part of timing.json: the two arms, the overhead and every round.

    Args:
        rounds: What `measure` returned.
        seed: Seed of the bootstrap.
    """
    percents = [item.overhead_percent for item in rounds]
    low, high = bootstrap_interval(percents, seed)
    mean = float(np.mean(percents))
    distinguishable = not low <= 0.0 <= high
    statement = (
        f"capture changes the wall time per token by {mean:+.2f}% "
        f"(95% interval {low:+.2f}% to {high:+.2f}%, {len(rounds)} paired rounds)"
    )
    if not distinguishable:
        statement += ": not distinguishable from zero"
    return {
        **{name: _row([item.passes[name] for item in rounds]) for name in ARMS},
        "overhead": {
            "percent": mean,
            "interval_95_percent": [low, high],
            "distinguishable": distinguishable,
            "statement": statement,
        },
        "token_ids": _agreement(rounds),
        "rounds": [
            {
                "round": number,
                "order": item.order,
                **{name: _row([item.passes[name]]) for name in ARMS},
                "overhead_percent": item.overhead_percent,
            }
            for number, item in enumerate(rounds, start=1)
        ],
    }


def _row(passes: Sequence[Pass]) -> dict[str, float | int]:
    wall_s = sum(item.wall_s for item in passes)
    completion_tokens = sum(item.completion_tokens for item in passes)
    return {
        "wall_s": wall_s,
        "prompt_tokens": sum(item.prompt_tokens for item in passes),
        "completion_tokens": completion_tokens,
        "tokens_per_s": completion_tokens / wall_s,
    }


def _agreement(rounds: Sequence[Round]) -> dict[str, dict[str, int]]:
    """Count equal outputs between the arms, and within an arm from one round to the next.

    The second is the measure of the first: a batch's make-up alone can change a token.
    """
    between = [(item.passes["no_log"], item.passes["log"]) for item in rounds]
    within = [
        (rounds[i].passes[name], rounds[i + 1].passes[name])
        for i in range(len(rounds) - 1)
        for name in ARMS
    ]
    return {"between_arms": _equal(between), "within_arm": _equal(within)}


def _equal(pairs: Sequence[tuple[Pass, Pass]]) -> dict[str, int]:
    outputs = [
        (a, b)
        for one, other in pairs
        for a, b in zip(one.token_ids, other.token_ids, strict=True)
        if a is not None and b is not None
    ]
    return {"same": sum(a == b for a, b in outputs), "compared": len(outputs)}
