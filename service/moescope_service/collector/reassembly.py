"""Turns one worker's steps into the rows of each sequence.

Rows are keyed by (sequence, position) and the last write wins. That one rule settles chunked
prefill, preemption and recomputation, rejected drafts and surplus rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope.trace import Source
from moescope.version_runs import MIXED
from moescope_service.collector.arena import EMPTY, FILLED, RECALLED, Arena
from moescope_service.collector.prefixes import HeldPrefixes, PrefixStore
from moescope_service.collector.rows import CAUSES, Rows, Written
from moescope_service.collector.settled import SettledRows
from moescope_service.messages import (
    Admission,
    CaptureSpec,
    Ongoing,
    Step,
    WorkerState,
)

_STALE = -1  # generation of a table entry that was never set: equal to no block's


@dataclasses.dataclass(slots=True)
class _Running:
    internal_id: str
    cached_len: int
    """Cached tokens when first admitted."""
    cached: list[tuple[int, int]]
    """Ranges of positions that came from the prefix cache."""
    cause_unheld: int = EMPTY
    """Why rows are missing that no block of its table holds."""


class Reassembler:
    """Follows one worker: its KV blocks, its running sequences, its rows.

    Runs in the collector's only thread. All work of a step is vectorized over its rows; loops go
    over admissions and ends alone.

    Args:
        spec: What the worker captures.
        worker_state: Where it stands, unless its first step is yet to come. No row from before it
            is known, in no block: a later hit on one finds it missing.
        prefix_bytes: Memory for rows of blocks that leave the KV cache, and may be loaded again.
        first_weights_version: Number of the weights with which the worker's process started.
        cause_before: Why rows of before ``worker_state`` are missing.
    """

    def __init__(
        self,
        spec: CaptureSpec,
        worker_state: WorkerState | None = None,
        prefix_bytes: int = 0,
        first_weights_version: int = 0,
        cause_before: str = "restart",
    ) -> None:
        self.spec = spec
        self.cause_before = CAUSES[cause_before]
        """Why rows of before it introduced itself are missing, one of `CAUSES`' numbers."""
        self.first_weights_version = first_weights_version
        self.weights_version = first_weights_version
        """Number of the weights that the worker has now."""
        self.prefixes = PrefixStore(
            prefix_bytes,
            (spec.block_size, len(spec.layers), spec.top_k),
            spec.id_dtype,
            spec.weights_dtype,
        )
        self._held = HeldPrefixes()
        self._arena = Arena(
            num_blocks=spec.num_blocks,
            block_size=spec.block_size,
            num_layers=len(spec.layers),
            top_k=spec.top_k,
            id_dtype=spec.id_dtype,
            weights_dtype=spec.weights_dtype,
            state=EMPTY if worker_state is None else self.cause_before,
        )
        # Tables by handle; they grow, since preempted sequences keep theirs.
        self._blocks = np.zeros((64, 16), np.int64)
        self._generations = np.full((64, 16), _STALE, np.int64)
        self._num_blocks = np.zeros(64, np.int64)
        self._prompt_len = np.zeros(64, np.int64)
        self._num_rows = np.zeros(64, np.int64)
        self._settled = SettledRows(64)
        self._cached_end = np.zeros(64, np.int64)
        self._is_running = np.zeros(64, np.bool_)
        self._running: dict[int, _Running] = {}
        self._handles: dict[str, int] = {}  # of what runs, by internal id
        self._given_up: dict[int, str] = {}  # request ids by handle, which is reused after the end
        self._next = (0, 0)  # step and part
        self.gaps = 0
        """Times that steps were lost altogether and everything known had to be given up."""
        if worker_state is not None:
            self._next = (worker_state.next_step, 0)
            self.weights_version += worker_state.weights_version
            for ongoing in worker_state.ongoing:
                self._restore(ongoing)

    def apply(self, step: Step) -> tuple[list[tuple[str, Rows]], Written | None]:
        """Take one step in, or further rows of the one before.

        Returns:
            (internal id, rows) of each sequence that ended, and what was written.
        """
        if (step.number, step.part) != self._next:
            self._give_up()
        # Ended sequences first: their blocks may be allocated anew in this very step.
        ended = [self._end(handle) for handle in step.finished if self._is_known(handle)]
        ended += [(internal_id, Rows.nothing(self.spec)) for internal_id in step.finished_unseen]
        # All allocations before any table: a sequence may share a block that another one of this
        # very step fills.
        self._allocate(step)
        for admission in step.admitted:
            self._admit(admission)
        for admission in step.resumed:
            self._resume(admission)
        for handle, block_ids in step.grown:
            if handle in self._running:
                self._append_blocks(handle, block_ids)
        self._copy_blocks(step)
        self._held.add(step.filled)
        self.weights_version = max(self.weights_version, self._number_of(step))
        known = self._are_running(step.spans[:, 0])
        written = self._write(step, known)
        self._settled.add(step, known)
        # A step that failed halfway is a gap.
        self._next = (step.number, step.part + 1) if step.has_more else (step.number + 1, 0)
        return ended, written

    @property
    def next_step(self) -> int:
        """Number of the step that follows, or of the one that is not whole yet."""
        return self._next[0]

    def describe(self, step: Step) -> list[tuple[str, int, int, int]]:
        """Return (internal id, first position, rows, prompt length) of a step's sequences."""
        return [
            (self._running[handle].internal_id, start, rows, int(self._prompt_len[handle]))
            for handle, start, rows in step.spans.tolist()
            if handle in self._running
        ]

    def num_settled(self, internal_id: str) -> int:
        """Return how many rows of a running sequence are settled; 0 where it does not run here."""
        handle = self._handles.get(internal_id)
        return 0 if handle is None else self._settled[handle]

    def rows_so_far(self, internal_id: str, start: int, end: int) -> Rows:
        """Return rows of a running sequence; takes no longer with more rows before them.

        Where it was preempted and others have its blocks, they end before the first such row: it
        will be computed again.

        Args:
            internal_id: Of one that has settled rows.
            start: Position of the first one.
            end: Position behind the last one; not beyond `num_settled`.
        """
        handle = self._handles[internal_id]
        rows = self._rows(handle, self._running[handle], start, end)
        overwritten = np.flatnonzero(rows.cause == CAUSES["overwritten"])
        return rows.resized(int(overwritten[0])) if overwritten.size else rows

    def _give_up(self) -> None:
        # Blocks may have changed hands unseen: no row and no table from before can be trusted.
        self.gaps += 1
        self._arena.void_all()
        self._held.clear()
        self._given_up |= {handle: one.internal_id for handle, one in self._running.items()}
        self._running.clear()
        self._handles.clear()
        self._settled.clear()
        self._is_running[:] = False

    def _admit(self, admission: Admission) -> None:
        handle, cached = admission.handle, admission.num_cached
        while handle >= len(self._blocks):
            self._double_handles()
        self._given_up.pop(handle, None)
        self._running[handle] = _Running(
            admission.internal_id, cached, [(0, cached)] if cached else []
        )
        self._handles[admission.internal_id] = handle
        self._is_running[handle] = True
        self._num_rows[handle] = self._cached_end[handle] = cached
        self._prompt_len[handle] = admission.prompt_len
        self._settled.admit(handle, admission.prompt_len, cached)
        self._set_blocks(admission)

    def _restore(self, ongoing: Ongoing) -> None:
        self._admit(ongoing.admission)
        # A preempted sequence may have routed more than its blocks still hold.
        self._widen_tables(-(-ongoing.num_rows // self.spec.block_size))
        self._num_rows[ongoing.admission.handle] = ongoing.num_rows
        self._running[ongoing.admission.handle].cause_unheld = self.cause_before

    def _double_handles(self) -> None:
        more = len(self._blocks)
        self._blocks = np.pad(self._blocks, [(0, more), (0, 0)])
        self._generations = np.pad(self._generations, [(0, more), (0, 0)], constant_values=_STALE)
        self._num_blocks = np.pad(self._num_blocks, (0, more))
        self._prompt_len = np.pad(self._prompt_len, (0, more))
        self._num_rows = np.pad(self._num_rows, (0, more))
        self._settled.double()
        self._cached_end = np.pad(self._cached_end, (0, more))
        self._is_running = np.pad(self._is_running, (0, more))

    def _resume(self, admission: Admission) -> None:
        handle, cached = admission.handle, admission.num_cached
        if handle not in self._running:  # its admission was lost
            self._admit(admission)
            return
        running = self._running[handle]
        known = int(self._num_rows[handle])
        # What others computed beyond our last row is cached.
        self._cut_cached(handle, cached)
        if cached > known:
            running.cached.append((known, cached))
            self._cached_end[handle] = cached
        self._num_rows[handle] = max(known, cached)
        self._settled.hit(handle, cached)
        self._set_blocks(admission)

    def _cut_cached(self, handle: int, end: int) -> None:
        """Take in that a sequence computes from a position on: what is recomputed is computed."""
        running = self._running[handle]
        running.cached = [(a, min(b, end)) for a, b in running.cached if a < end]
        self._cached_end[handle] = min(self._cached_end[handle], end)
        self._settled.cut(handle, end)

    def _allocate(self, step: Step) -> None:
        """Clear blocks that are allocated anew, and recall the rows of those that are loaded."""
        fresh = [block for block, _ in step.loaded]
        fresh += [block for _, block_ids in step.grown for block in block_ids]
        for admission in (*step.admitted, *step.resumed):
            fresh += admission.block_ids[self._num_hits(admission) :]
        if not fresh:
            return
        for block, key in self._held.take(fresh):
            if (rows := self._arena.rows_of(block)) is not None:
                self.prefixes.put(key, rows)
        self._arena.allocate(fresh)
        for block, key in step.loaded:
            rows = self.prefixes.get(key)
            if rows is None and (held := self._held.block_of(key)) is not None:
                rows = self._arena.rows_of(held)
            if rows is not None:
                self._arena.recall(block, rows)

    def _copy_blocks(self, step: Step) -> None:
        if not step.block_copies or not self.spec.trust_prefix_hits:
            return
        size = self.spec.block_size
        # vLLM lists the copies of all KV-cache groups: ours are hits on a part of a block. What
        # stands behind that part is of the sequence that it is copied from.
        partly_cached = {
            admission.block_ids[admission.num_cached // size]: admission.num_cached % size
            for admission in (*step.admitted, *step.resumed)
            if admission.num_cached % size
        }
        for source, destination in step.block_copies:
            if destination in partly_cached:
                self._arena.copy(source, destination, partly_cached[destination])

    def _set_blocks(self, admission: Admission) -> None:
        self._num_blocks[admission.handle] = 0
        self._blocks[admission.handle] = 0  # vLLM's null block, whose rows are never read
        self._generations[admission.handle] = _STALE
        self._append_blocks(admission.handle, admission.block_ids)
        if not self.spec.trust_prefix_hits:
            self._generations[admission.handle, : self._num_hits(admission)] = _STALE

    def _num_hits(self, admission: Admission) -> int:
        # Whole blocks of cached tokens are hits; a partly cached block is a fresh copy.
        return admission.num_cached // self.spec.block_size

    def _append_blocks(self, handle: int, block_ids: list[int]) -> None:
        start = int(self._num_blocks[handle])
        end = start + len(block_ids)
        self._widen_tables(end)
        self._blocks[handle, start:end] = block_ids
        self._generations[handle, start:end] = self._arena.generation[block_ids]
        self._num_blocks[handle] = end

    def _widen_tables(self, num_blocks: int) -> None:
        while num_blocks > self._blocks.shape[1]:
            width = self._blocks.shape[1]
            self._blocks = np.pad(self._blocks, [(0, 0), (0, width)])
            self._generations = np.pad(
                self._generations, [(0, 0), (0, width)], constant_values=_STALE
            )

    def _write(self, step: Step, known: npt.NDArray[np.bool_]) -> Written | None:
        """Write a step's rows; ``known`` says of which of its spans the sequence runs."""
        handles, starts, lengths = step.spans.T.astype(np.int64)
        self._num_rows[handles[known]] = np.maximum(
            self._num_rows[handles[known]], (starts + lengths)[known]
        )
        handle = np.repeat(handles, lengths)
        first_row = np.repeat(np.cumsum(lengths) - lengths, lengths)
        position = np.repeat(starts, lengths) + np.arange(len(handle)) - first_row
        rows = np.repeat(known, lengths)
        slots = self._slots(handle[rows], position[rows])
        if step.topk_ids is None or step.topk_weights is None:
            self._arena.void(slots, CAUSES[step.lost or "unknown"])
            return None
        for i in np.flatnonzero(known)[starts[known] < self._cached_end[handles[known]]]:
            self._cut_cached(int(handles[i]), int(starts[i]))  # a load failed
        topk_ids, topk_weights = step.topk_ids, step.topk_weights
        version = self._number_of(step)
        if not known.all():  # sequences whose admission was lost
            handle, position = handle[rows], position[rows]
            topk_ids, topk_weights = topk_ids[rows], topk_weights[rows]
        self._arena.write(slots, topk_ids, topk_weights, version)
        return Written(topk_ids, position >= self._prompt_len[handle])

    def _are_running(self, handles: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        are_running = handles < len(self._is_running)
        are_running[are_running] = self._is_running[handles[are_running]]
        return are_running

    def _number_of(self, step: Step) -> int:
        """Return the number of the weights that computed a step's rows."""
        if step.weights_version == MIXED:
            return MIXED
        return self.first_weights_version + step.weights_version

    def _slots(self, handle: Any, position: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        size = self.spec.block_size
        return self._blocks[handle, position // size] * size + position % size

    def _is_known(self, handle: int) -> bool:
        return handle in self._running or handle in self._given_up

    def _end(self, handle: int) -> tuple[str, Rows]:
        if handle in self._given_up:
            return self._given_up.pop(handle), Rows.nothing(self.spec, CAUSES["not_captured"])
        running = self._running.pop(handle)
        self._handles.pop(running.internal_id, None)
        self._is_running[handle] = False
        return running.internal_id, self._rows(handle, running, 0, int(self._num_rows[handle]))

    def _rows(self, handle: int, running: _Running, first: int, last: int) -> Rows:
        position = np.arange(first, last)
        block = position // self.spec.block_size
        read = self._arena.read(self._slots(handle, position))
        topk_ids, topk_weights, versions, cause = read
        block_ids = self._blocks[handle, block]
        ours = self._generations[handle, block] == self._arena.generation[block_ids]
        source = np.full(len(position), Source.COMPUTED, np.uint8)
        for start, end in running.cached:
            source[max(start - first, 0) : max(end - first, 0)] = Source.CACHED
        cause[~ours] = CAUSES["overwritten"]
        cause[self._generations[handle, block] == _STALE] = running.cause_unheld
        is_recalled = cause == RECALLED
        source[is_recalled], cause[is_recalled] = Source.RECALLED, FILLED
        missing = cause != FILLED
        source[missing] = Source.MISSING
        if missing.any():  # whatever stands in those slots is not this sequence's
            topk_ids[missing], topk_weights[missing] = 0, 0
        return Rows(
            self.spec.layers, topk_ids, topk_weights, source, cause, running.cached_len, versions
        )
