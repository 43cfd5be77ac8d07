"""A rollout loop as trainers have it: turns, weights that change meanwhile, routes to replay.

A step samples 64 prompts 8 times, in two turns. Each turn's routes come in one batch, of every
conversation those rows alone that are not here yet. With `--weights` the weights change in each
step while its last turn runs, which wants a server with `VLLM_SERVER_DEV_MODE=1`. Each row says
which weights computed it: a row that is too old is replayed as missing, or its sample left out.
"""

import argparse
import asyncio
import collections
import dataclasses
import itertools
import os
from collections.abc import AsyncIterator, Sequence

import httpx
import numpy as np
import openai

import moescope
from moescope import FormatError, RouteTrace, Source, replay_formats

URL = os.environ.get("MOESCOPE_URL", "http://localhost:8000")
QUESTION = "Leo reads {} pages a day for {} days. How many pages?"
FURTHER = " And in a week?"


@dataclasses.dataclass
class Sample:
    """One conversation."""

    tokens: list[int] | str  # text before its first turn
    is_output: list[bool] = dataclasses.field(default_factory=list)  # of each token
    turns: list[RouteTrace] = dataclasses.field(default_factory=list)  # each with its new rows
    left_out: str = ""  # why

    @property
    def num_rows(self) -> int:
        """Rows that are here: all but that of the last token, which the next turn computes."""
        return sum(turn.num_rows for turn in self.turns)

    def add(self, turn: RouteTrace) -> None:
        """Put the rows and tokens of a turn behind those of the turns before."""
        known = self.tokens[: turn.start] if turn.start else []
        self.tokens = [*known, *turn.token_ids.tolist()]
        self.is_output += [False] * (turn.prompt_len - len(self.is_output))
        self.is_output += [True] * (turn.num_tokens - turn.prompt_len)
        self.turns.append(turn)

    def trace(self) -> RouteTrace:
        """Return the whole conversation as one trace, each row as its turn computed it."""
        return dataclasses.replace(
            self.turns[-1],
            start=0,
            topk_ids=np.concatenate([turn.topk_ids for turn in self.turns]),
            source=np.concatenate([turn.source for turn in self.turns]),
            weights_versions=np.concatenate([turn.weights_versions for turn in self.turns]),
            token_ids=np.array(self.tokens, np.int32),
            complete=all(turn.complete for turn in self.turns),
        )


@dataclasses.dataclass
class Step:
    """What a step of training has to learn from."""

    samples: list[Sample]
    weights_version: int = 0  # at its end
    rows: int = 0  # that were fetched
    size_bytes: int = 0  # of them


class Rollouts:
    """A server, and what is wanted of it."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        self.args = args
        self.client = moescope.AsyncClient(url)
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
        # After an error vLLM ends the connection, and the request behind it must not be lost.
        headers = {"Connection": "close"}
        self.http = httpx.AsyncClient(base_url=url, timeout=600, headers=headers)

    async def steps(self) -> AsyncIterator[Step]:
        """Roll out step by step."""
        async with self.client, self.openai, self.http:
            self.model = (await self.client.info()).model
            body = {"model": self.model, "prompt": FURTHER, "add_special_tokens": False}
            further = (await self.http.post("/tokenize", json=body)).raise_for_status()
            self.further = further.json()["tokens"]
            for number in range(self.args.steps):
                yield await self.step(number)

    async def step(self, number: int) -> Step:
        """Sample every prompt, turn by turn."""
        prompts = [QUESTION.format(n + 3, n + number + 2) for n in range(self.args.prompts)]
        groups = [[Sample(prompt) for _ in range(self.args.samples)] for prompt in prompts]
        step = Step([sample for group in groups for sample in group])
        checkpoint = self.args.weights[number % len(self.args.weights)] if self.args.weights else ""
        for turn in range(self.args.turns):
            if turn:  # from the second turn on each sample is a request of its own
                groups = [[sample] for sample in step.samples if not sample.left_out]
                for (sample,) in groups:
                    sample.tokens += self.further
            is_last = turn == self.args.turns - 1
            request_ids = await self.complete(groups, checkpoint if is_last else "")
            await self.fetch(step, dict(zip(request_ids, groups, strict=True)))
        step.weights_version = (await self.client.info()).weights_version
        return step

    async def complete(self, groups: Sequence[list[Sample]], checkpoint: str) -> list[str]:
        """Ask for a request's answers a group; half-way, change the weights. Return the ids."""

        async def answer(group: list[Sample]) -> str:
            response = await self.openai.completions.create(
                model=self.model, prompt=group[0].tokens, n=len(group), temperature=1,
                max_tokens=self.args.max_tokens,
            )  # fmt: skip
            return response.id

        running = [asyncio.create_task(answer(group)) for group in groups]
        if checkpoint:
            for one in itertools.islice(asyncio.as_completed(running), len(running) // 2):
                await one
            await self.change_weights(checkpoint)
        return await asyncio.gather(*running)

    async def change_weights(self, checkpoint: str) -> None:
        """Load other weights as vLLM does; the requests that run wait, and go on with them."""
        params = {"mode": "keep", "clear_cache": False}  # what was computed is not computed again
        (await self.http.post("/pause", params=params)).raise_for_status()
        try:
            body = {"method": self.args.load_method, "kwargs": {"weights_path": checkpoint}}
            (await self.http.post("/collective_rpc", json=body)).raise_for_status()
        finally:
            (await self.http.post("/resume")).raise_for_status()

    async def fetch(self, step: Step, groups: dict[str, list[Sample]]) -> None:
        """Fetch a turn's new rows of all conversations, by the id of their request."""
        starts = {request_id: group[0].num_rows for request_id, group in groups.items()}
        batch = await self.client.routes_batch([*groups], start=starts, weights=False, wait_s=10)
        for request_id, group in groups.items():
            traces = batch.traces.get(request_id, [])
            step.rows += sum(trace.num_rows for trace in traces)
            step.size_bytes += sum(trace.size_bytes for trace in traces)
            for trace in traces:
                group[trace.index].add(trace)
                if not trace.present.any():
                    group[trace.index].left_out = "no row was captured"
            if not traces:
                for sample in group:
                    sample.left_out = batch.status[request_id]


def fresh(trace: RouteTrace, oldest: int) -> RouteTrace:
    """Mark rows missing that older weights computed, as `max_staleness` of a fetch does.

    A row may be new enough when it is fetched and too old when it is trained on. Rows of no one
    version have the number -1, and are too old.
    """
    too_old = trace.present & (trace.weights_version < max(oldest, 0))
    source = np.where(too_old, np.uint8(Source.MISSING), trace.source)
    return dataclasses.replace(trace, source=source, complete=trace.complete and not too_old.any())


def replayed(step: Step, args: argparse.Namespace) -> list:
    """Return what the trainer reads of each sample, and say why others are left out."""
    made = []
    for sample in step.samples:
        if sample.left_out:
            continue
        trace = fresh(sample.trace(), step.weights_version - args.max_staleness)
        try:
            made.append(getattr(replay_formats, args.format)(trace))
        except FormatError:
            sample.left_out = "rows are too old" if sample.trace().complete else "rows are missing"
    return made


def show(number: int, step: Step, made: list) -> None:
    """Print a step's row of the table."""
    versions, left_out = collections.Counter(), collections.Counter()
    for sample in step.samples:
        left_out.update([sample.left_out] if sample.left_out else [])
        for turn in sample.turns:
            if turn.present.any():
                versions.update(turn.weights_version[turn.present].tolist())
    tokens = sum(sample.turns[-1].num_tokens for sample in step.samples if sample.turns)
    print(
        f"{number:>4} {len(made):>7,} {tokens:>8,} {step.rows:>8,} {step.size_bytes:>9,}  "
        f"{dict(sorted(versions.items()))}  {dict(left_out) or '-'}"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--weights", nargs="*", help="Checkpoints, one a step, in turn.")
    parser.add_argument("--load-method", default="reload_weights", help="The workers' method.")
    parser.add_argument("--max-staleness", type=int, default=1, help="Changes of the weights.")
    parser.add_argument("--format", default="nemo_rl", help="A function of replay_formats.")
    return parser.parse_args(argv)


async def main() -> None:
    """Print a table, a row a step."""
    args = parse()
    print("step samples   tokens     rows     bytes  rows by version, samples left out")
    number = 0
    async for step in Rollouts(URL, args).steps():
        show(number, step, replayed(step, args))
        number += 1


if __name__ == "__main__":
    asyncio.run(main())
