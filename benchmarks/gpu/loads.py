"""What is asked of servers on the GPU, and what is wanted of the capture under it.

Outputs are sampled at temperature 1. A step's time depends on how many experts its tokens load, and
greedy outputs of random weights run into loops that differ from server to server by rounding alone:
the same prompts then cost up to 70% more on one than on the other, with or without capture.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Final, Literal, cast

from moescope.bench import workload
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.workload import Conversation, RequestOptions, Turn
from moescope.errors import CommandError
from moescope.overhead import engine, rounds
from moescope.overhead.rounds import Load

TPOT: Final = "median_tpot_ms"
WALL: Final = "s_per_token"
ENGINE_ITL: Final = engine.ITL
"""What differs: the client's median time per output token and wall time per token, and the mean
time between tokens on the engine's clock."""
Shown = Literal["median_tpot_ms", "output_throughput", "prompt_throughput"]
"""What tells of a load: milliseconds, or tokens a second."""

WARM_UP_TURNS = 4
TARGET_PERCENT, MULTI_TURN_TARGET_PERCENT = 0.5, 1.0
"""How much slower than stock a server with capture may be."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked of a server in one round."""

    name: str
    num: int
    """Conversations."""
    concurrency: int
    """Of them, how many go on at a time."""
    output_len: int
    """Tokens of each answer."""
    rounds: int
    """Rounds that tell enough."""
    input_len: int = 0
    """Random tokens that each turn adds; 0 where there are texts."""
    turns: int = 1
    texts: Sequence[str] = ()
    """Prompts to ask in place of random tokens."""
    in_one: bool = False
    """Whether all prompts come in one request: how they arrive decides how many share a step, and
    that moves a prefill of half a second by a tenth."""
    shown: Shown = "output_throughput"
    target_percent: float = TARGET_PERCENT
    every_arm: bool = False
    """Whether it is put on all arms, not only on captures of every row."""
    crowded: bool = False
    """Whether three servers side by side have no room for its keys and values."""

    @property
    def compared(self) -> str:
        """The metric in which arms are compared: more is slower."""
        return TPOT if self.shown == TPOT else WALL

    def conversations(self, number: int) -> list[Conversation]:
        """Make a round's conversations; round 0, the warm-up, has the first turns of some."""
        if self.texts:
            made = workload.from_texts(
                self.texts, num_conversations=self.num, turns=1, max_tokens=self.output_len
            )
        else:
            made = workload.random_tokens(
                num_conversations=self.num,
                turns=self.turns,
                input_len=self.input_len,
                output_len=self.output_len,
                seed=number,
            )
        if self.in_one:
            prompts = [cast("list[int]", turn.content) for (turn,) in made]
            return [(Turn(prompts, self.output_len),)]
        if number:
            return made
        return [one[:WARM_UP_TURNS] for one in made[: self.concurrency]]

    def load(self) -> Load:
        """Return it as what `rounds.measure` puts on the arms."""
        return Load(
            conversations=self.conversations,
            options=RequestOptions(
                model="", endpoint="completions", temperature=1.0, ignore_eos=True
            ),
            pace=Pace(max_concurrency=self.concurrency),
        )

    def put(self, number: int, url: str, model: str) -> None:
        """Send all requests of one round to a server.

        Raises:
            MoescopeError: A request failed.
        """
        load = self.load()
        options = dataclasses.replace(load.options, model=model)
        run = Run(load.conversations(number), options, Target(base_url=url), load.pace)
        asyncio.run(run.go())
        rounds.summarize(run, url)


def workloads(questions: Sequence[str] = (), scale: float = 1.0) -> list[Workload]:
    """Return all of them.

    Args:
        questions: GSM8K's.
        scale: Shortens them: the share of the rounds.
    """
    every = [
        _decode("batch 1", 2, concurrency=1, rounds=40),
        _decode("64 concurrent", 64, concurrency=64, rounds=10),
        _decode("256 concurrent", 256, concurrency=256, rounds=12),
        _prefill(64, 1024),
        _prefill(16, 4096),
        Workload(name="GSM8K, 25 questions, 128 out", num=25, concurrency=25, output_len=128,
                 rounds=24, texts=questions, shown=TPOT),
        Workload(name="GSM8K, 1,319 questions, 128 out, 128 concurrent", num=1319,
                 concurrency=128, output_len=128, rounds=6, texts=questions, shown=TPOT),
        *map(_multi_turn, (64, 28, 4)),
    ]  # fmt: skip
    return [dataclasses.replace(one, rounds=max(3, round(one.rounds * scale))) for one in every]


def _decode(name: str, num: int, *, concurrency: int, rounds: int) -> Workload:
    return Workload(
        name=f"{name}, 128 in, 256 out",
        num=num,
        concurrency=concurrency,
        input_len=128,
        output_len=256,
        rounds=rounds,
        shown=TPOT,
        every_arm=concurrency <= 64,
        crowded=concurrency > 128,
    )


def _multi_turn(num: int) -> Workload:
    """Make a load of which the keys and values take 1.5 GB a conversation in the end."""
    return Workload(
        name=f"{num} conversations of 20 turns, 256 in, 128 out",
        num=num,
        concurrency=num,
        input_len=256,
        output_len=128,
        rounds=3,
        turns=20,
        target_percent=MULTI_TURN_TARGET_PERCENT,
        crowded=num > 8,
    )


def _prefill(num: int, input_len: int) -> Workload:
    return Workload(
        name=f"prefill {num} x {input_len:,}, 1 out",
        num=num,
        concurrency=1,
        input_len=input_len,
        output_len=1,
        rounds=48,
        shown="prompt_throughput",
        in_one=True,
    )


def pick(
    every: Sequence[Workload],
    starts: Sequence[str],
    *,
    rounds: int | None = None,
    concurrency: int | None = None,
    stream_interval: int | None = None,
) -> list[Workload]:
    """Choose workloads.

    Args:
        every: All of them.
        starts: How their names start; where none is given, all that are not crowded.
        rounds: Rounds of each, in place of its own.
        concurrency: Conversations at a time, in place of its own; the name then says so.
        stream_interval: Tokens that the servers send at a time, if not each; names then say so.

    Raises:
        CommandError: One start is that of no name.
    """
    for start in starts:
        if not any(one.name.startswith(start) for one in every):
            names = "; ".join(one.name for one in every)
            raise CommandError(f"no load starts with {start!r}: they are {names}")
    suffixes = [f"{concurrency} at a time"] if concurrency else []
    if stream_interval:
        suffixes.append(f"{stream_interval} tokens a chunk")
    return [
        dataclasses.replace(
            one,
            name=", ".join([one.name, *suffixes]),
            rounds=rounds or one.rounds,
            concurrency=concurrency or one.concurrency,
        )
        for one in every
        if (one.name.startswith(tuple(starts)) if starts else not one.crowded)
    ]
