"""Steps of an engine that is busy, as its worker's messages tell them, and who runs in them.

Rows are cut from random ones made beforehand, so that replaying costs no more than sending.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope_service.messages import Admission, CaptureSpec, Step

SPEC = CaptureSpec(
    engine=0, num_engines=1, stage=0, num_stages=1, layers=list(range(24)), num_hidden_layers=24,
    num_experts=60, top_k=4, id_dtype="uint8", weights_dtype="float16",
    router_types=["FusedTopKRouter"], block_size=16, num_blocks=24_000, trust_prefix_hits=True,
    model="qwen1.5-moe-shape", device="none", seed=0, versions={},
)  # fmt: skip
"""The shape of Qwen1.5-MoE-A2.7B, with a KV cache of 384,000 tokens."""
ROW_BYTES = len(SPEC.layers) * SPEC.top_k * 3
_POOL_ROWS = 3 * 8192


@dataclasses.dataclass(slots=True)
class Running:
    """A sequence, and every row of it where it is watched."""

    number: int
    handle: int
    prompt_len: int
    output_len: int
    blocks: list[int]
    num_rows: int = 0
    rows: list[slice] = dataclasses.field(default_factory=list)
    """Where in the pool its rows are."""

    @property
    def internal_id(self) -> str:
        """The engine's id."""
        return f"{self.request_id}-0-{self.number:08x}"

    @property
    def request_id(self) -> str:
        """The id that its client sees."""
        return f"cmpl-{self.number}"

    @property
    def total_rows(self) -> int:
        """Rows of the whole sequence."""
        return self.prompt_len + self.output_len - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Happening:
    """One step, and the requests that came before it and were answered after it."""

    step: Step
    started: list[Running]
    answered: list[Running]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A closed loop of equal requests: where one ends, another is admitted in the next step."""

    name: str
    concurrency: int
    prompt_len: int
    output_len: int
    steps_per_s: float
    """Steps a second that are asked for."""
    growth: int = 0
    """Tokens by which each prompt is longer than the one before it: the turns of a conversation."""

    @property
    def rows_per_step(self) -> int:
        """Rows of a step: prompts in whole where answers have one token."""
        return self.concurrency * (self.prompt_len if self.output_len == 1 else 1)


PREFILL = Load(
    name="prefill",
    concurrency=2,
    prompt_len=4096,
    output_len=1,
    steps_per_s=200e6 / 8192 / ROW_BYTES,
)
"""200 MB/s of rows, in steps of 8,192."""
DECODE = Load(name="decode", concurrency=256, prompt_len=1, output_len=1024, steps_per_s=1000.0)
"""256 rows a step, 1,000 steps a second; a request ends every fourth step."""


class Traffic:
    """The steps of a load, one after the other, without end.

    Args:
        load: What runs.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        generator = np.random.default_rng(0)
        shape = (_POOL_ROWS, len(SPEC.layers), SPEC.top_k)
        self.topk_ids: npt.NDArray[Any] = np.argsort(
            generator.random((_POOL_ROWS, len(SPEC.layers), SPEC.num_experts), np.float32), -1
        )[..., : SPEC.top_k].astype(SPEC.id_dtype)
        self.topk_weights: npt.NDArray[Any] = generator.random(shape, np.float32).astype(
            SPEC.weights_dtype
        )
        self._numbers = itertools.count()
        self._free = collections.deque(range(1, SPEC.num_blocks))
        self._running: dict[int, Running] = {}  # by handle

    def __iter__(self) -> Iterator[Happening]:
        ended: list[Running] = []
        for number in itertools.count():
            step = Step(number=number, spans=np.empty((0, 3), np.int32))
            for one in ended:
                step.finished.append(one.handle)
                self._free.extend(one.blocks)
                del self._running[one.handle]
            started = [
                self._start(number) for _ in range(self._load.concurrency - len(self._running))
            ]
            step.admitted = [
                Admission(one.handle, one.internal_id, one.prompt_len, 0, list(one.blocks))
                for one in started
            ]
            ended = self._run(step)
            yield Happening(step, started, ended)

    def _start(self, step_number: int) -> Running:
        load, handle = self._load, 0
        while handle in self._running:
            handle += 1
        number = next(self._numbers)
        # The first ones are of all lengths, so that later ends do not come together.
        share = (number % load.concurrency + 1) / load.concurrency if step_number == 0 else 1.0
        output_len = max(1, round(load.output_len * share))
        prompt_len = load.prompt_len + number * load.growth
        one = Running(number, handle, prompt_len, output_len, self._blocks(prompt_len))
        self._running[handle] = one
        return one

    def _run(self, step: Step) -> list[Running]:
        spans, first, ended = [], 0, []
        # Steps of one row a sequence begin at another place of the pool each.
        start = step.number * self._load.concurrency % (_POOL_ROWS - self._load.rows_per_step)
        for handle, one in self._running.items():
            count = one.prompt_len if one.num_rows == 0 else 1
            spans.append((handle, one.num_rows, count))
            if one.num_rows and one.num_rows % SPEC.block_size == 0:
                blocks = self._blocks(1)
                one.blocks += blocks
                step.grown.append((handle, blocks))
            one.rows.append(slice(start + first, start + first + count))
            one.num_rows += count
            first += count
            if one.num_rows == one.total_rows:
                ended.append(one)
        step.spans = np.array(spans, np.int32)
        step.topk_ids = self.topk_ids[start : start + first]
        step.topk_weights = self.topk_weights[start : start + first]
        return ended

    def _blocks(self, num_tokens: int) -> list[int]:
        return [self._free.popleft() for _ in range(-(-num_tokens // SPEC.block_size))]
