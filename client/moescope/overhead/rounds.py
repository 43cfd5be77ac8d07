"""Puts the same load on every arm, in short rounds of shuffled order."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self

from moescope.bench import latency, session
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.workload import Conversation, RequestOptions, Turn
from moescope.errors import CommandError
from moescope.overhead.hosting import Arrangement
from moescope.replay import ReplayOptions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One arm's responses to the load of one round."""

    wall_s: float
    """Seconds from the first request to the end of the last response."""
    prompt_tokens: int
    completion_tokens: int
    metrics: dict[str, float]
    """By the names of `comparison.METRICS`."""
    token_ids: list[list[int] | None]
    """The outputs' token ids, in the order of the prompts; None where a server sends none."""
    counted: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """By how much each counter of `Hooks.counters` grew."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One pass of each arm."""

    order: tuple[str, ...]
    """The order of the visits."""
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is put on every arm."""

    conversations: Callable[[int], Sequence[Conversation]]
    """Makes those of a round by its number, from 1; those of number 0 warm the servers up."""
    options: RequestOptions
    """How every request is sent: to a server's first model where none is named. Each pass adds a
    cache salt."""
    pace: Pace

    @classmethod
    def of_prompts(cls, prompts: Sequence[str], options: ReplayOptions) -> Self:
        """Make a load of the same user messages in every round."""
        conversations = [(Turn(prompt, options.max_tokens),) for prompt in prompts]
        request = RequestOptions(
            model=options.model or "",
            temperature=options.temperature,
            seed=options.seed,
            token_ids=True,
        )
        pace = Pace(max_concurrency=options.concurrency)
        return cls(conversations=lambda number: conversations, options=request, pace=pace)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What is called during the measurement."""

    on_visit: Callable[[str, str], object] = lambda name, url: None
    """Called with an arm's name and address before load is put on it."""
    on_pass: Callable[[], object] = lambda: None
    """Called after each pass, warm-up included: for each load ``len(names) * (rounds + 1)`` times
    where the servers stay up, else ``2 * len(names) * rounds`` times."""
    counters: Callable[[str, str], Mapping[str, float]] = lambda name, url: {}
    """Called with an arm's name and address after each pass: reads counters of the server."""


def measure(
    loads: Sequence[Load],
    arrangement: Arrangement,
    names: Sequence[str],
    *,
    rounds: int,
    seed: int,
    api_key: str | None = None,
    hooks: Hooks = Hooks(),
) -> Iterator[list[Round]]:
    """Run the warm-up and all rounds; gives each round of every load when it is done.

    A visit puts all loads on an arm, one after the other: starting a server for each would take
    longer than measuring. Each pass has a cache salt of its own: no prompt is found in the
    prefix cache that an earlier round or run filled, or another arm on the same server. So prefill
    is measured as well.

    Args:
        loads: What to put on the arms.
        arrangement: How the arms are reached.
        names: The arms that are measured.
        rounds: Rounds that count.
        seed: Seed of the arms' order.
        api_key: The API key of all of them, if any.
        hooks: What to call during the measurement.

    Raises:
        MoescopeError: A request failed, an arm generated nothing, or with ``ignore_eos`` another
            number of tokens than was requested.
    """
    visits = _Visits(loads, arrangement, api_key, hooks)
    if arrangement.stays_up:
        for name in names:
            visits.visit(name, 0, warm_up=True)
    for number, order in enumerate(shuffled_orders(names, rounds, seed), start=1):
        made = {
            name: visits.visit(name, number, warm_up=not arrangement.stays_up) for name in order
        }
        yield [
            Round(order=order, passes={name: made[name][place] for name in names})
            for place in range(len(loads))
        ]


class _Visits:
    """Puts the loads on one arm after the other."""

    def __init__(
        self, loads: Sequence[Load], arrangement: Arrangement, api_key: str | None, hooks: Hooks
    ) -> None:
        self._loads, self._arrangement = loads, arrangement
        self._api_key, self._hooks = api_key, hooks
        self._run_id, self._passes = uuid.uuid4().hex, itertools.count()
        self._models: dict[str, str] = {}
        self._counters: dict[str, Mapping[str, float]] = {}  # by address: arms may share a server

    def visit(self, name: str, number: int, *, warm_up: bool) -> list[Pass]:
        """Put the loads of a round on an arm; number 0 is no round."""
        passes = []
        with self._arrangement.visit(name) as url:
            self._hooks.on_visit(name, url)
            for load in self._loads:
                if warm_up:
                    self._pass(name, url, load, 0)
                if number:
                    passes.append(self._pass(name, url, load, number))
        return passes

    def _pass(self, name: str, url: str, load: Load, number: int) -> Pass:
        target = Target(base_url=url, api_key=self._api_key)
        if name not in self._models:
            self._models[name] = load.options.model or session.served_model(target)
        salt = f"{self._run_id}-{next(self._passes)}"  # servers other than vLLM ignore it
        options = dataclasses.replace(
            load.options,
            model=self._models[name],
            extra_body={**load.options.extra_body, "cache_salt": salt},
        )
        conversations = load.conversations(number)
        run = Run(conversations, options, target, load.pace)
        asyncio.run(run.go())
        made = summarize(run, url)
        if options.ignore_eos:
            _require_lengths(run, conversations, url)
        self._hooks.on_pass()
        before, now = self._counters.get(url, {}), self._hooks.counters(name, url)
        self._counters[url] = now
        counted = {key: value - before.get(key, 0.0) for key, value in now.items()}
        return dataclasses.replace(made, counted=counted)


def _require_lengths(run: Run, conversations: Sequence[Conversation], where: str) -> None:
    """Check that all outputs have as many tokens as requested: the arms do the same work."""
    for request in run.requests:
        turn = conversations[request.conversation][request.turn]
        wanted = turn.num_prompts * turn.max_tokens
        if request.completion_tokens != wanted:
            raise CommandError(
                f"{where} generated {request.completion_tokens} tokens where {wanted} were "
                "requested: arms that do not do the same work cannot be compared"
            )


def summarize(run: Run, where: str) -> Pass:
    """Return the pass that a run was.

    Args:
        run: The run.
        where: The server, for messages.

    Raises:
        CommandError: A request failed, or no token was generated.
    """
    failed = [request for request in run.requests if request.error]
    if failed:
        raise CommandError(
            f"{len(failed)} of {len(run.requests)} requests to {where} failed: {failed[0].error}"
        )
    summary = latency.summarize(run.requests, run.duration_s, percentiles=(99.0,))
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
            request.token_ids for request in sorted(run.requests, key=lambda one: one.conversation)
        ],
    )
