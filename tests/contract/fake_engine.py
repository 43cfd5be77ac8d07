"""Says what was scheduled and which rows came of it; its steps go through the real recorder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from moescope_service.addresses import Address
from moescope_service.capture.control import ControlEncoder
from moescope_service.capture.recorder import Recorder
from moescope_service.capture.rows import Batch, StepRows
from moescope_service.capture.weights import WeightsVersion
from moescope_service.messages import CaptureSpec

PROMPT, OUTPUT = [11, 12, 13, 14, 15], [21, 22, 23]
SPEC = CaptureSpec(
    engine=0, num_engines=1, stage=0, num_stages=1,
    layers=[1, 3], num_hidden_layers=5, num_experts=8, top_k=2,
    id_dtype="uint8", weights_dtype="float16", router_types=["CPURouter"], block_size=4,
    num_blocks=4096, trust_prefix_hits=True, model="tiny", device="cpu", seed=7,
    versions={"moescope": "0", "vllm": "0.32.0", "torch": "2"}, expert_bytes=[600, 700],
)  # fmt: skip


def rows_of(start: int, count: int) -> tuple[Any, Any]:
    """The rows of positions from ``start`` on: (ids, weights)."""
    position = np.arange(start, start + count)[:, None, None]
    place = np.arange(4).reshape(1, 2, 2)
    return ((position * 3 + place) % 8).astype(np.uint8), (place / 8 + position * 0).astype(
        np.float16
    )


class Sink:
    """Rows as the hook would leave them; `rows` None: a layer did not write."""

    def __init__(self) -> None:
        self.rows: tuple[Any, Any, Any] | None = None

    def start_step(self) -> None:
        self.rows = None

    def take(self, num_rows: int) -> StepRows | str:
        if self.rows is None:
            return "hook_missed"
        return StepRows(*(array[:num_rows].copy() for array in self.rows))


@dataclasses.dataclass
class Running:
    """A sequence of the fake engine."""

    internal_id: str
    num_rows: int = 0
    block_ids: list[int] = dataclasses.field(default_factory=list)


class Engine:
    """Schedules what it is told; its steps go through the real recorder."""

    def __init__(
        self,
        address: Address | str,
        spec: CaptureSpec = SPEC,
        max_rows_bytes: int = 2**20,
        rows_of: Callable[[int, int], tuple[Any, Any]] = rows_of,
    ) -> None:
        self.sink = Sink()
        self.spec = spec
        self.rows_of = rows_of
        self.batch: Any = None
        self._next_block = 1
        self.weights = WeightsVersion()
        self.recorder = Recorder(
            address, spec, sink=self.sink, read_batch=lambda: self.batch,
            encoder=ControlEncoder(0, SPEC.block_size), weights=self.weights,
            max_rows_bytes=max_rows_bytes,
        )  # fmt: skip

    def start(self, internal_id: str, prompt: list[int] = PROMPT) -> Running:
        """Admit a sequence and route its prompt."""
        running = Running(internal_id, block_ids=self._blocks(len(prompt)))
        new = NewRequestData(internal_id, prompt, [], None, None, (running.block_ids,), 0, None)
        self.step([(running, len(prompt))], new=[new])
        return running

    def step(
        self, spans: list[tuple[Running, int]] = (), *, new: Any = (), finished: Any = (),
        hooked: bool = True,
    ) -> None:  # fmt: skip
        """Run one step of so many rows each."""
        output = SchedulerOutput.make_empty()
        output.finished_req_ids = {running.internal_id for running in finished}
        output.scheduled_new_reqs = list(new)
        cached = CachedRequestData.make_empty()
        known = {one.req_id for one in new}
        for running, count in spans:
            if running.internal_id not in known:
                needed = -(-(running.num_rows + count) // 4) - -(-running.num_rows // 4)
                cached.req_ids.append(running.internal_id)
                blocks = self._blocks(4 * needed)
                running.block_ids.extend(blocks)  # as vLLM's runner does with the very list
                cached.new_block_ids.append((blocks,) if blocks else None)
                cached.num_computed_tokens.append(running.num_rows)
        output.scheduled_cached_reqs = cached
        output.total_num_scheduled_tokens = sum(count for _, count in spans)
        self.batch = Batch(
            [running.internal_id for running, _ in spans],
            np.cumsum([0, *(count for _, count in spans)]).astype(np.int32),
            np.array([running.num_rows for running, _ in spans], np.int32),
        )
        self.recorder.start_step(output)
        if spans and hooked:
            parts = [
                (np.arange(running.num_rows, running.num_rows + count),
                 *self.rows_of(running.num_rows, count))
                for running, count in spans
            ]  # fmt: skip
            self.sink.rows = tuple(np.concatenate(part) for part in zip(*parts, strict=True))
        self.recorder.record_step(output)
        for running, count in spans:
            running.num_rows += count

    def _blocks(self, num_tokens: int) -> list[int]:
        first, count = self._next_block, -(-num_tokens // 4)
        self._next_block += count
        return list(range(first, first + count))
