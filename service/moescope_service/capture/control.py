"""Makes control values of vLLM's scheduler output; gives each sequence a small handle."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moescope_service.capture.rows import Batch, PendingRows, StepRows
from moescope_service.messages import Admission, Frames, Ongoing, Snapshot, Step, pack_all

CONTROL_BYTES = 1024
"""What a step's control is taken to hold while it waits."""
_REMEMBERED_ENDS = 1024
"""Ended sequences whose end a collector may have taken with it, at most."""
_UNKNOWN = -1


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

    def discard(self) -> None:
        """Give up its rows: it was not taken to be sent."""
        if self.pending is not None:
            self.pending.discard()


@dataclasses.dataclass(slots=True)
class _Followed:
    """A sequence whose every admission and block was seen, and so can be told of anew."""

    handle: int
    prompt_len: int
    cached_len: int
    """Cached tokens when first admitted."""
    blocks: list[tuple[int, int]]
    """(block id, its generation when it came to the sequence)."""


class ControlEncoder:
    """Turns what the worker's thread left into `Step` messages; runs in the link's thread.

    It also follows the running sequences, so that a new collector can be told where the worker
    stands: see `snapshot`. Blocks have generations here as in the collector's arena: a preempted
    sequence does not own its blocks any more, and nobody says when they go to another one.

    Relies on vLLM 0.32.0, ``v1/core/sched/output.py``: ``CachedRequestData`` is a new object in
    each step, so that it can be read after the step. A sequence whose admission was given up gets
    a handle that the collector does not know.

    Args:
        group: Number of the KV-cache group whose block tables the arena follows.
        block_size: Its tokens a block.
        max_overshoot: By how many tokens a scheduled position may be too high (speculation).
    """

    def __init__(self, group: int, block_size: int, max_overshoot: int = 0) -> None:
        self._group = group
        self._block_size = block_size
        self._max_overshoot = max_overshoot
        self._handles: dict[str, int] = {}
        self._free: list[int] = []
        # Most steps have the sequences of the step before.
        self._last_ids: list[str] = []
        self._last_handles = np.empty(0, np.int32)
        self._next_seq = 0
        self._followed: dict[str, _Followed] = {}
        self._generation: collections.defaultdict[int, int] = collections.defaultdict(int)
        self._num_rows = np.zeros(64, np.int64)  # by handle
        self._ended: collections.deque[str] = collections.deque(maxlen=_REMEMBERED_ENDS)

    def pack(self, messages: Sequence[StepMessage]) -> list[Frames]:
        """Return the messages of consecutive steps; waits for rows still on their way."""
        pending = [message.pending for message in messages if message.pending is not None]
        if pending:
            pending[-1].wait()
        try:
            packed = pack_all([self.encode(message) for message in messages])
        except Exception:
            self._next_seq = _UNKNOWN
            raise
        for rows in pending:
            rows.release()
        return packed

    def encode(self, message: StepMessage) -> Step:
        """Return the step that a message describes; its rows are those of the message."""
        if message.seq != self._next_seq:  # steps were given up, with admissions and blocks
            self._forget()
        spans = np.empty((0, 3), np.int32)
        step = Step(seq=message.seq, time_s=message.time_s, host_s=message.host_s, spans=spans)
        self._fill_finished(step, message.finished)
        self._fill_control(step, message)
        self._follow(step)
        if message.batch is not None:
            self._fill_rows(step, message.batch, message.rows)
        self._next_seq = message.seq + 1
        return step

    def snapshot(self) -> Snapshot | None:
        """Return where the worker stands; None where its first step is yet to come."""
        if self._next_seq == 0:
            return None
        known = {} if self._next_seq == _UNKNOWN else self._followed
        return Snapshot(
            next_seq=self._next_seq,
            ongoing=[self._ongoing(request_id, one) for request_id, one in known.items()],
            ended=list(self._ended),
        )

    def _forget(self) -> None:
        """Begin anew, as the collector does: running sequences have no handle that it knows."""
        self._followed.clear()
        self._handles.clear()
        self._free.clear()
        self._last_ids = []

    def _ongoing(self, request_id: str, one: _Followed) -> Ongoing:
        own = itertools.takewhile(lambda b: self._generation[b[0]] == b[1], one.blocks)
        block_ids = [block_id for block_id, _ in own]
        admission = Admission(one.handle, request_id, one.prompt_len, one.cached_len, block_ids)
        return Ongoing(admission, int(self._num_rows[one.handle]))

    def _fill_finished(self, step: Step, finished: Iterable[str]) -> None:
        for request_id in finished:
            self._ended.append(request_id)
            handle = self._handles.pop(request_id, None)
            if handle is not None:
                self._free.append(handle)
                self._last_ids = []
            if self._followed.pop(request_id, None) is None or handle is None:
                step.finished_unseen.append(request_id)
            else:
                step.finished.append(handle)

    def _fill_control(self, step: Step, message: StepMessage) -> None:
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
                self._add_blocks(self._followed.get(request_id), blocks[self._group])

    def _follow(self, step: Step) -> None:
        for admission in (*step.admitted, *step.resumed):
            for block_id in admission.block_ids[admission.num_computed // self._block_size :]:
                self._generation[block_id] += 1
        for admission in (*step.admitted, *step.resumed):
            handle, num_cached = admission.handle, admission.num_computed
            one = self._followed.get(admission.request_id)
            if one is None:
                one = _Followed(handle, admission.prompt_len, num_cached, [])
                self._followed[admission.request_id] = one
                self._num_rows[handle] = 0
            one.blocks = [(block, self._generation[block]) for block in admission.block_ids]
            self._num_rows[handle] = max(self._num_rows[handle], num_cached)

    def _add_blocks(self, one: _Followed | None, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self._generation[block_id] += 1
            if one is not None:
                one.blocks.append((block_id, self._generation[block_id]))

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
        handles, ends = self._last_handles, spans[:, 1] + spans[:, 2]
        self._num_rows[handles] = np.maximum(self._num_rows[handles], ends)

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
            if handle >= len(self._num_rows):
                self._num_rows = np.pad(self._num_rows, (0, len(self._num_rows)))
        return handle
