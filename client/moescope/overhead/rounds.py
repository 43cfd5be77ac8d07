"""Puts the same load on every arm, in short rounds of shuffled order."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import uuid
from collections.abc import Callable, Iterator, Sequence

from moescope.bench import latency, session
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.workload import Ask, Turn
from moescope.errors import CommandError
from moescope.overhead.hosting import Host
from moescope.replay import Options


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One arm's answers to all prompts in one round."""

    wall_s: float
    """Seconds from the first request to the end of the last answer."""
    prompt_tokens: int
    completion_tokens: int
    metrics: dict[str, float]
    """By the names of `comparison.METRICS`."""
    token_ids: list[list[int] | None]
    """The outputs' token ids, in the order of the prompts; None where a server sends none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One pass of each arm."""

    order: tuple[str, ...]
    """In which order they went."""
    passes: dict[str, Pass]
    """By arm, in the order in which the arms were given."""


def shuffled_orders(names: Sequence[str], rounds: int, seed: int) -> list[tuple[str, ...]]:
    """Return the order of the arms in each round.

    In as many rounds as there are arms each has each place once; the order within is shuffled.
    """
    generator = random.Random(seed)  # noqa: S311
    orders: list[tuple[str, ...]] = []
    while len(orders) < rounds:
        base = list(names)
        generator.shuffle(base)
        block = [tuple(base[i:] + base[:i]) for i in range(len(base))]
        generator.shuffle(block)
        orders += block
    return orders[:rounds]


def measure(
    prompts: Sequence[str],
    host: Host,
    names: Sequence[str],
    options: Options,
    *,
    rounds: int,
    api_key: str | None = None,
    on_visit: Callable[[str, str], object] = lambda name, url: None,
    on_pass: Callable[[], object] = lambda: None,
) -> Iterator[Round]:
    """Run the warm-up and all rounds; gives each round when it is done.

    Each round has a cache salt of its own: no prompt is answered from the prefix cache that an
    earlier round, or an earlier run, filled. So prefill is measured as well.

    Args:
        prompts: The user messages.
        host: Where the arms are.
        names: The arms.
        options: How to ask.
        rounds: Rounds that count.
        api_key: The key that all of them want, if any.
        on_visit: Called with an arm's name and address before load is put on it.
        on_pass: Called after each pass, warm-up included: ``len(names) * (rounds + 1)`` times
            where the servers stay up, else ``2 * len(names) * rounds`` times.

    Raises:
        MoescopeError: A request failed, or an arm generated nothing.
    """
    run_id = uuid.uuid4().hex
    models: dict[str, str] = {}

    def one(name: str, number: int, *, warm_up: bool) -> Pass | None:
        with host.visit(name) as url:
            on_visit(name, url)
            target = Target(base_url=url, api_key=api_key)
            if name not in models:
                models[name] = options.model or session.served_model(target)
            made = None
            salts = ([f"{run_id}-{number}-warm-up"] if warm_up else []) + (
                [f"{run_id}-{number}"] if number else []
            )
            for salt in salts:
                made = _pass(prompts, target, models[name], options, salt)
                on_pass()
        return made

    if host.stays_up:
        for name in names:
            one(name, 0, warm_up=True)
    for number, order in enumerate(shuffled_orders(names, rounds, options.seed), start=1):
        made = {name: one(name, number, warm_up=not host.stays_up) for name in order}
        yield Round(order=order, passes={name: done for name in names if (done := made[name])})


def _pass(prompts: Sequence[str], target: Target, model: str, options: Options, salt: str) -> Pass:
    ask = Ask(
        model=model,
        temperature=options.temperature,
        seed=options.seed,
        token_ids=True,
        extra_body={"cache_salt": salt},  # vLLM's; other servers ignore it
    )
    conversations = [(Turn(prompt, options.max_tokens),) for prompt in prompts]
    run = Run(conversations, ask, target, Pace(max_concurrency=options.concurrency))
    asyncio.run(run.go())
    return summarize(run, target.base_url)


def summarize(run: Run, where: str) -> Pass:
    """Make a pass of a run.

    Args:
        run: The run.
        where: The server, for messages.

    Raises:
        CommandError: A request failed, or no token was generated.
    """
    failed = [record for record in run.records if record.error]
    if failed:
        raise CommandError(
            f"{len(failed)} of {len(run.records)} requests to {where} failed: {failed[0].error}"
        )
    summary = latency.summarize(run.records, run.duration_s, percentiles=(99.0,))
    if not summary.total_output_tokens:
        raise CommandError(f"{where} generated no token: there is nothing to measure")
    metrics = {
        "s_per_token": run.duration_s / summary.total_output_tokens,
        "output_throughput": summary.output_throughput,
        "request_throughput": summary.request_throughput,
    }
    for name, one in summary.latencies.items():
        metrics[f"mean_{name}_ms"] = one.mean_ms
        metrics[f"median_{name}_ms"] = one.median_ms
        metrics[f"p99_{name}_ms"] = one.percentiles_ms[99.0]
    return Pass(
        wall_s=run.duration_s,
        prompt_tokens=summary.total_input_tokens,
        completion_tokens=summary.total_output_tokens,
        metrics=metrics,
        token_ids=[
            record.token_ids for record in sorted(run.records, key=lambda one: one.conversation)
        ],
    )
