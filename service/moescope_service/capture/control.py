"""Makes control values of vLLM's scheduler output; gives each sequence a small handle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moescope_service.capture.rows import Batch, PendingRows, StepRows
from moescope_service.messages import Admission, Frames, Step, pack_steps

CONTROL_BYTES = 1024
"""What a step's control is taken to hold while it waits."""


class NewSequence(NamedTuple):
    """A sequence that is scheduled for the first time."""

    request_id: str
    prompt_len: int
    num_computed: int
    block_ids: tuple[list[int], ...]
    """By KV-cache group."""


@dataclasses.dataclass(slots=True)
class StepMessage:
    """A step as the worker's thread leaves it; the link's thread makes a message of it."""

    encoder: ControlEncoder
    seq: int
    time_s: float
    host_s: float
    finished: Iterable[str] = ()
    """Internal ids of sequences that ended."""
    new: Iterable[NewSequence] = ()
    cached: Any = None
    """vLLM's ``CachedRequestData``."""
    block_copies: Any = ()
    batch: Batch | None = None
    rows: PendingRows | str | None = None
    """The rows, or why they were lost."""

    @property
    def size_bytes(self) -> int:
        """What it holds while it waits, in bytes."""
        return CONTROL_BYTES + (0 if self.pending is None else self.pending.size_bytes)

    @property
    def pending(self) -> PendingRows | None:
        """The rows, if there are any."""
        return None if isinstance(self.rows, str) else self.rows

    def encode(self) -> Frames:
        """Return the frames; waits for the rows where they are still on their way."""
        return self.encoder.pack([self])

    def discard(self) -> None:
        """Give up its rows: it was not taken to be sent."""
        if self.pending is not None:
            self.pending.discard()


class ControlEncoder:
    """Turns what the worker's thread left into `Step` messages; runs in the link's thread.

    Relies on vLLM 0.32.0, ``v1/core/sched/output.py``: ``CachedRequestData`` is a new object in
    each step, so that it can be read after the step. A sequence whose admission was given up gets
    a handle that the collector does not know.

    Args:
        group: Number of the KV-cache group whose block tables the arena follows.
        max_overshoot: By how many tokens a scheduled position may be too high (speculation).
    """

    def __init__(self, group: int, max_overshoot: int = 0) -> None:
        self._group = group
        self._max_overshoot = max_overshoot
        self._handles: dict[str, int] = {}
        self._free: list[int] = []
        # Most steps have the sequences of the step before.
        self._last_ids: list[str] = []
        self._last_handles = np.empty(0, np.int32)

    def pack(self, messages: Sequence[StepMessage]) -> Frames:
        """Return the frames of consecutive steps; waits for rows that are still on their way."""
        pending = [message.pending for message in messages if message.pending is not None]
        if pending:
            pending[-1].wait()
        frames = pack_steps([self.encode(message) for message in messages])
        for rows in pending:
            rows.release()
        return frames

    def encode(self, message: StepMessage) -> Step:
        """Return the step that a message describes; its rows are those of the message."""
        spans = np.empty((0, 3), np.int32)
        step = Step(seq=message.seq, time_s=message.time_s, host_s=message.host_s, spans=spans)
        self._fill_control(step, message)
        if message.batch is not None:
            self._fill_rows(step, message.batch, message.rows)
        return step

    def _fill_control(self, step: Step, message: StepMessage) -> None:
        for request_id in message.finished:
            handle = self._handles.pop(request_id, None)
            if handle is None:
                step.finished_unseen.append(request_id)
            else:
                step.finished.append(handle)
        self._free += step.finished
        if step.finished:
            self._last_ids = []
        step.admitted = [self._admission(*new) for new in message.new]
        if message.cached is not None:
            self._fill_cached(step, message.cached)
        step.block_copies = [
            (copy.src_block_id, copy.dst_block_id) for copy in message.block_copies
        ]

    def _fill_cached(self, step: Step, cached: Any) -> None:
        for i, request_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                step.resumed.append(
                    self._admission(request_id, 0, cached.num_computed_tokens[i], blocks)
                )
            elif blocks is not None and blocks[self._group]:
                step.grown.append((self._handle(request_id), blocks[self._group]))

    def _fill_rows(self, step: Step, batch: Batch, rows: PendingRows | str | None) -> None:
        if batch.request_ids != self._last_ids:
            self._last_ids = batch.request_ids
            self._last_handles = np.array([*map(self._handle, self._last_ids)], np.int32)
        step.spans = spans = np.empty((len(self._last_handles), 3), np.int32)
        spans[:, 0] = self._last_handles
        spans[:, 2] = batch.first_row[1:] - batch.first_row[:-1]
        found: StepRows | None = None
        if isinstance(rows, str):
            step.lost = rows
        elif rows is not None and (found := rows.read()) is None:
            step.lost = "hook_missed"
        if found is not None:
            spans[:, 1] = found.positions[batch.first_row[:-1]]
            step.topk_ids, step.topk_weights = found.topk_ids, found.topk_weights
        else:
            # Where the rows were is only known roughly: rather one too many is missing.
            spans[:, 1] = np.maximum(batch.scheduled_position - self._max_overshoot, 0)
            spans[:, 2] += batch.scheduled_position - spans[:, 1]

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
