"""Makes messages of vLLM's scheduler output; gives each sequence a small number, its handle."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moescope_service.capture.rows import Batch, PendingRows, StepRows
from moescope_service.ids import short_id
from moescope_service.messages import Admission, Frames, Ongoing, Step, WorkerState, pack_all

CONTROL_BYTES = 1024
"""Bytes that a step's control is taken to hold while it waits."""
_REMEMBERED_ENDS = 1024
"""Ended sequences that a new collector is told of, at most: it may still wait for their end."""
_UNKNOWN = -1


class NewSequence(NamedTuple):
    """A sequence that is scheduled for the first time."""

    internal_id: str
    prompt_len: int
    num_cached: int
    block_ids: tuple[list[int], ...]
    """By KV-cache group."""


@dataclasses.dataclass(slots=True)
class StepMessage:
    """A step as the worker's thread leaves it; the link's thread makes a message of it."""

    number: int
    time_s: float
    hook_s: float
    finished: Iterable[str] = ()
    """Internal ids of sequences that ended."""
    new: Iterable[NewSequence] = ()
    cached: Any = None
    """vLLM's ``CachedRequestData``."""
    block_copies: Any = ()
    batch: Batch | None = None
    rows: PendingRows | str | None = None
    """The rows, or the cause of their loss."""
    loaded: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """As of `moescope_service.capture.loads.Notes`."""
    filled: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    weights_version: int = 0
    """As of `moescope_service.messages.Step`."""

    @property
    def size_bytes(self) -> int:
        """Bytes that it holds while it waits."""
        return CONTROL_BYTES + (0 if self.pending is None else self.pending.size_bytes)

    @property
    def pending(self) -> PendingRows | None:
        """The rows, if there are any."""
        return None if isinstance(self.rows, str) else self.rows

    def discard(self) -> None:
        """Give up its rows: the link did not take the message."""
        if self.pending is not None:
            self.pending.discard()


@dataclasses.dataclass(slots=True)
class _Followed:
    """A sequence of which every admission and block was seen: a new collector can be told of it."""

    handle: int
    prompt_len: int
    cached_len: int
    """Cached tokens when first admitted."""
    blocks: list[tuple[int, int]]
    """(block id, its generation when it came to the sequence)."""


class ControlEncoder:
    """Turns what the worker's thread left into `Step` messages; runs in the link's thread.

    It also follows the running sequences, so that a new collector can be told where the worker
    stands: see `worker_state`. Blocks have generations here as in the collector's arena: a
    preempted sequence does not own its blocks any more, and vLLM does not report when another
    sequence gets them.

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
        self._handles: dict[str, int] = {}  # by vLLM's own id, of any length
        self._free: list[int] = []
        # Most steps have the sequences of the step before.
        self._last_ids: list[str] = []
        self._last_handles = np.empty(0, np.int32)
        self._next_step = 0
        self._weights_version = 0
        self._followed: dict[str, _Followed] = {}  # by internal id
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
            self._next_step = _UNKNOWN
            raise
        for rows in pending:
            rows.release()
        return packed

    def encode(self, message: StepMessage) -> Step:
        """Return the step that a message describes; its rows are those of the message."""
        if message.number != self._next_step:  # steps were given up, with admissions and blocks
            self._forget()
        spans = np.empty((0, 3), np.int32)
        step = Step(
            number=message.number, time_s=message.time_s, hook_s=message.hook_s, spans=spans
        )
        self._fill_finished(step, message.finished)
        step.loaded, step.filled = message.loaded, message.filled
        step.weights_version = message.weights_version
        self._weights_version = max(self._weights_version, message.weights_version)
        self._fill_control(step, message)
        self._follow(step)
        if message.batch is not None:
            self._fill_rows(step, message.batch, message.rows)
        self._next_step = message.number + 1
        return step

    def worker_state(self) -> WorkerState | None:
        """Return where the worker stands; None where no step has run."""
        if self._next_step == 0:
            return None
        known = {} if self._next_step == _UNKNOWN else self._followed
        return WorkerState(
            next_step=self._next_step,
            ongoing=[self._ongoing(internal_id, one) for internal_id, one in known.items()],
            ended=list(self._ended),
            weights_version=self._weights_version,
        )

    def _forget(self) -> None:
        """Forget every sequence, as the collector does at a gap: it knows none of their handles."""
        self._followed.clear()
        self._handles.clear()
        self._free.clear()
        self._last_ids = []

    def _ongoing(self, internal_id: str, one: _Followed) -> Ongoing:
        own = itertools.takewhile(lambda b: self._generation[b[0]] == b[1], one.blocks)
        block_ids = [block_id for block_id, _ in own]
        admission = Admission(one.handle, internal_id, one.prompt_len, one.cached_len, block_ids)
        return Ongoing(admission, int(self._num_rows[one.handle]))

    def _fill_finished(self, step: Step, finished: Iterable[str]) -> None:
        for name in finished:
            internal_id = short_id(name)
            self._ended.append(internal_id)
            handle = self._handles.pop(name, None)
            if handle is not None:
                self._free.append(handle)
                self._last_ids = []
            if self._followed.pop(internal_id, None) is None or handle is None:
                step.finished_unseen.append(internal_id)
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
        for i, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                step.resumed.append(self._admission(name, 0, cached.num_computed_tokens[i], blocks))
            elif blocks is not None and blocks[self._group]:
                step.grown.append((self._handle(name), blocks[self._group]))
                self._add_blocks(self._followed.get(short_id(name)), blocks[self._group])

    def _follow(self, step: Step) -> None:
        self._add_blocks(None, [block_id for block_id, _ in step.loaded])
        for admission in (*step.admitted, *step.resumed):
            self._add_blocks(None, admission.block_ids[admission.num_cached // self._block_size :])
        for admission in (*step.admitted, *step.resumed):
            handle, num_cached = admission.handle, admission.num_cached
            one = self._followed.get(admission.internal_id)
            if one is None:
                one = _Followed(handle, admission.prompt_len, num_cached, [])
                self._followed[admission.internal_id] = one
                self._num_rows[handle] = 0
            one.blocks = [(block, self._generation[block]) for block in admission.block_ids]
            self._num_rows[handle] = max(self._num_rows[handle], num_cached)

    def _add_blocks(self, one: _Followed | None, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self._generation[block_id] += 1
            if one is not None:
                one.blocks.append((block_id, self._generation[block_id]))

    def _fill_rows(self, step: Step, batch: Batch, rows: PendingRows | str | None) -> None:
        if batch.internal_ids != self._last_ids:
            self._last_ids = batch.internal_ids
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
            # Which rows are lost is known within the overshoot: name rather too many than too few.
            spans[:, 1] = np.maximum(batch.scheduled_position - self._max_overshoot, 0)
            spans[:, 2] += batch.scheduled_position - spans[:, 1]
        handles, ends = self._last_handles, spans[:, 1] + spans[:, 2]
        self._num_rows[handles] = np.maximum(self._num_rows[handles], ends)

    def _admission(self, name: str, prompt_len: int, num_cached: int, blocks: Any) -> Admission:
        handle = self._handle(name)
        return Admission(handle, short_id(name), prompt_len, num_cached, blocks[self._group])

    def _handle(self, name: str) -> int:
        handle = self._handles.get(name)
        if handle is None:
            handle = self._free.pop() if self._free else len(self._handles)
            self._handles[name] = handle
            if handle >= len(self._num_rows):
                self._num_rows = np.pad(self._num_rows, (0, len(self._num_rows)))
        return handle
