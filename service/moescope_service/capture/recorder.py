"""Ships each step's rows to the collector.

`Recorder.record_step` runs on the worker's thread and only copies; the link's thread does the rest:
handles, control, encoding, sending.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moescope_service.link import Link
from moescope_service.messages import (
    Admission,
    Frames,
    Hello,
    Step,
    pack_dataclass,
    pack_step,
    unpack,
)

_CONTROL_BYTES = 1024
"""What a step's control is taken to hold while it waits."""
_MAX_CONTROL_BYTES = 64 * 2**20

Batch = tuple[list[str], npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""Request ids, first positions and numbers of rows, in row order."""


class StepSink(Protocol):
    """Holds the rows of the step that runs."""

    def start_step(self) -> None:
        """Forget earlier rows."""

    def take(self, num_tokens: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
        """Return copies of (ids, weights), or None where the rows are not all of this step."""


@dataclasses.dataclass(slots=True)
class _HelloMessage:
    hello: Hello
    size_bytes: int = _CONTROL_BYTES

    def encode(self) -> Frames:
        return pack_dataclass("hello", self.hello)


@dataclasses.dataclass(slots=True)
class _StepMessage:
    """A step as the worker's thread leaves it; `ControlEncoder` makes a message of it."""

    encoder: ControlEncoder
    step: Step
    finished: Iterable[str] = ()
    """Internal ids of sequences that ended."""
    new: list[tuple[str, int, int, Any]] = dataclasses.field(default_factory=list)
    """(internal id, prompt length, computed tokens, block ids by group)."""
    cached: Any = None
    """vLLM's ``CachedRequestData``."""
    block_copies: Any = ()
    batch: Batch | None = None

    @property
    def size_bytes(self) -> int:
        """What it holds while it waits, in bytes."""
        return self.step.rows_bytes + _CONTROL_BYTES

    def encode(self) -> Frames:
        self.encoder.fill(self)
        return pack_step(self.step)


class ControlEncoder:
    """Makes control values of vLLM's scheduler output; gives each sequence a small handle.

    Relies on vLLM 0.32.0, ``v1/core/sched/output.py``: ``CachedRequestData`` is a new object in
    each step, so that it can be read after the step. Runs in the link's thread. A sequence whose
    admission was given up gets a handle that the collector does not know.

    Args:
        group: Number of the KV-cache group whose block tables the arena follows.
    """

    def __init__(self, group: int) -> None:
        self._group = group
        self._handles: dict[str, int] = {}
        self._free: list[int] = []

    def fill(self, message: _StepMessage) -> None:
        """Fill in the control values of a message's step."""
        step = message.step
        for request_id in message.finished:
            handle = self._handles.pop(request_id, None)
            if handle is None:
                step.finished_unseen.append(request_id)
            else:
                step.finished.append(handle)
        self._free += step.finished
        step.admitted = [self._admission(*new) for new in message.new]
        if message.cached is not None:
            self._fill_cached(step, message.cached)
        step.block_copies = [
            (copy.src_block_id, copy.dst_block_id) for copy in message.block_copies
        ]
        if message.batch is not None:
            request_ids, starts, lengths = message.batch
            handles = np.array([self._handle(name) for name in request_ids], np.int32)
            step.spans = np.stack([handles, starts, lengths], axis=1)

    def _fill_cached(self, step: Step, cached: Any) -> None:
        for i, request_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                step.resumed.append(
                    self._admission(request_id, 0, cached.num_computed_tokens[i], blocks)
                )
            elif blocks is not None and blocks[self._group]:
                step.grown.append((self._handle(request_id), blocks[self._group]))

    def _admission(
        self, request_id: str, prompt_len: int, num_computed: int, blocks: Any
    ) -> Admission:
        handle = self._handle(request_id)
        return Admission(handle, request_id, prompt_len, num_computed, blocks[self._group])

    def _handle(self, request_id: str) -> int:
        handle = self._handles.get(request_id)
        if handle is None:
            handle = self._free.pop() if self._free else len(self._handles)
            self._handles[request_id] = handle
        return handle


def _copied(block_ids: tuple[list[int], ...]) -> tuple[list[int], ...]:
    return tuple(map(list, block_ids))


class Recorder:
    """Takes each step's rows and sends them, never blocking the worker.

    Args:
        address: Where the collector is bound.
        hello: What this worker captures.
        sink: Holds the rows of the step that runs.
        read_batch: Says which rows are whose, right after a step.
        group: Number of the KV-cache group whose block tables the arena follows.
        max_rows_bytes: Rows that may wait to be sent; beyond it rows are dropped and counted.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        *,
        sink: StepSink,
        read_batch: Callable[[], Batch],
        group: int,
        max_rows_bytes: int,
    ) -> None:
        self._sink = sink
        self._read_batch = read_batch
        self._encoder = ControlEncoder(group)
        self._max_rows_bytes = max_rows_bytes
        self._is_capturing = True
        self._seq = 0
        self._link = Link(
            address,
            self._on_message,
            max_bytes=max_rows_bytes + _MAX_CONTROL_BYTES,
            name="moescope-recorder",
        )
        self._link.put(_HelloMessage(hello))

    def start_step(self, scheduler_output: Any) -> None:
        """Prepare for a step; called on the worker's thread before the model runs.

        Tells at once which sequences have ended: all their rows are on their way, and the step
        that begins may take long.
        """
        self._sink.start_step()
        if scheduler_output.finished_req_ids:
            message = self._message()
            message.finished = scheduler_output.finished_req_ids
            self._link.put(message)

    def record_step(self, scheduler_output: Any) -> None:
        """Take the rows of the step that just ran; called on the worker's thread."""
        num_tokens = scheduler_output.total_num_scheduled_tokens
        if not num_tokens:
            return
        started_s = time.perf_counter()
        message = self._message()
        message.batch = self._read_batch()
        # Only what control needs: a scheduler output also holds prompts and images. Block tables
        # are copied: the model runner keeps these very lists and lets them grow.
        message.new = [
            (new.req_id, new.prompt_len, new.num_computed_tokens, _copied(new.block_ids))
            for new in scheduler_output.scheduled_new_reqs
        ]
        message.cached = cached = scheduler_output.scheduled_cached_reqs
        if cached.resumed_req_ids:
            blocks = [ids and _copied(ids) for ids in cached.new_block_ids]
            message.cached = dataclasses.replace(cached, new_block_ids=blocks)
        message.block_copies = scheduler_output.kv_cache_block_copies or ()
        self._take_rows(message.step, num_tokens)
        is_large = self._link.waiting_bytes > self._max_rows_bytes // 4
        message.step.host_s = time.perf_counter() - started_s
        self._link.put(message, at_once=is_large)

    def _message(self) -> _StepMessage:
        spans = np.empty((0, 3), np.int32)
        step = Step(seq=self._seq, time_s=time.time(), host_s=0.0, spans=spans)
        self._seq += 1
        return _StepMessage(self._encoder, step)

    def close(self) -> None:
        """Send what waits and stop."""
        self._link.close()

    def _take_rows(self, step: Step, num_tokens: int) -> None:
        if not self._is_capturing:
            step.lost = "paused"
        elif self._link.waiting_bytes > self._max_rows_bytes:
            step.lost = "queue_full"
        elif (rows := self._sink.take(num_tokens)) is None:
            step.lost = "hook_missed"
        else:
            step.topk_ids, step.topk_weights = rows

    def _on_message(self, frames: Frames) -> None:
        kind, values = unpack(frames)
        if kind == "capture":
            self._is_capturing = bool(values["on"])
