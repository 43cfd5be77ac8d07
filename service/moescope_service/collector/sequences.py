"""Sequences on their way from registration to a finished trace.

Three things are told by different processes in any order: who the sequence is (its API server, at
registration), how it ended (its API server, at finish or abort) and which rows it has (its worker,
at the end). `Sequences` brings them together.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope import version_runs
from moescope.trace import RouteTrace, Source
from moescope.version_runs import LabelSpan
from moescope_service.collector.ids import IdIndex
from moescope_service.collector.rows import CAUSES, Rows
from moescope_service.collector.store import OVERHEAD_BYTES, id_bytes
from moescope_service.messages import CaptureSpec, Register, RequestKey

Tokens = npt.NDArray[np.int32]

WORKER_TIMEOUT_S = 300.0
"""How long a finished request waits for its worker's end.

It follows within milliseconds, but for an abort in the middle of a step that takes long.
"""
REFUSED_TIMEOUT_S = 5.0
"""The same for one that ended with an error and without a token.

The engine may have refused it, and then no worker ever hears of it.
"""
API_TIMEOUT_S = 60.0
"""How long ended rows wait for their API server to say who they are or how they finished."""


@dataclasses.dataclass(slots=True)
class Sequence:
    """A registered sequence that has no trace yet."""

    uid: int
    register: Register
    prompt_ids: Tokens | None
    ids: set[str]
    keep: bool
    output_ids: Tokens | None = None
    finish_reason: str | None = None
    weight_labels: list[LabelSpan] = dataclasses.field(default_factory=list)
    """Which weights sampled ``output_ids``."""
    is_finishing: bool = False
    """Whether the API server has answered the request."""
    rows: Rows | None = None
    deadline_s: float | None = None
    """When to stop waiting for whoever has not reported."""

    @property
    def request_id(self) -> str:
        """The id in the response."""
        return self.register.request_id

    @property
    def owner(self) -> str | None:
        """As of `moescope_service.messages.Register`."""
        return self.register.owner

    @property
    def request(self) -> RequestKey:
        """Which request it belongs to."""
        return RequestKey(self.register.request_id, self.register.created_s)

    @property
    def index(self) -> int:
        """The choice's index in the response."""
        return self.register.index

    @property
    def size_bytes(self) -> int:
        """Bytes that it holds: ids, tokens, and rows that wait for its API server."""
        ids = (*self.ids, self.request_id)
        tokens = (self.prompt_ids, self.output_ids)
        size_bytes = OVERHEAD_BYTES + sum(map(id_bytes, ids))
        size_bytes += sum(array.nbytes for array in tokens if array is not None)
        size_bytes += version_runs.labels_bytes(self.weight_labels)
        return size_bytes + (0 if self.rows is None else self.rows.size_bytes)

    @property
    def is_ready(self) -> bool:
        """Whether everybody has reported."""
        return self.is_finishing and self.rows is not None

    @property
    def is_refused(self) -> bool:
        """Whether the engine gave it up before its first token."""
        has_output = self.output_ids is not None and self.output_ids.size > 0
        return self.finish_reason == "error" and not has_output

    def trace(
        self, spec: CaptureSpec, *, timed_out: bool, with_token_ids: bool
    ) -> tuple[RouteTrace, npt.NDArray[np.uint8]]:
        """Build the trace from all that is known.

        Returns:
            The trace, and why each of its rows is missing: see `Rows.cause`.
        """
        # Where its API server is gone, nobody knows which rows behind the prompt are of tokens that
        # were kept, and which of rejected drafts: they are left out.
        output = self.output_ids if self.output_ids is not None else np.empty(0, np.int32)
        num_tokens = self.register.prompt_len + len(output)
        rows = self.rows or Rows.nothing(spec)
        is_cut = self.rows is not None and self.finish_reason == "abort"
        if (is_cut or self.is_refused) and rows.cause_beyond == CAUSES["unknown"]:
            # Its worker saw the abort, or no worker saw it: the rest was never routed.
            rows = dataclasses.replace(rows, cause_beyond=CAUSES["not_routed"])
        rows = rows.resized(max(num_tokens - 1, 0))
        tokens = None
        if with_token_ids and self.is_finishing and self.prompt_ids is not None:
            tokens = np.concatenate([self.prompt_ids, output])
        is_whole = not timed_out and not bool((rows.source == Source.MISSING).any())
        trace = self._trace(
            spec,
            rows,
            0,
            num_tokens,
            token_ids=tokens,
            complete=is_whole,
            finish_reason=self.finish_reason,
        )
        return trace, rows.cause

    def page_so_far(
        self, spec: CaptureSpec, rows: Rows, start: int, num_settled: int
    ) -> RouteTrace:
        """Return a page of what is known while the sequence runs, without its tokens.

        Args:
            spec: What the deployment captures.
            rows: The page's rows.
            start: Position of the first one.
            num_settled: Rows of the sequence that are settled, from position 0 on.
        """
        num_tokens = max(self.register.prompt_len, num_settled + 1)
        if self.output_ids is not None:  # the engine may have routed beyond them
            num_tokens = self.register.prompt_len + len(self.output_ids)
            rows = rows.resized(min(len(rows.source), max(num_tokens - 1 - start, 0)))
        nothing = {"token_ids": None, "complete": False, "finish_reason": None}
        return self._trace(spec, rows, start, num_tokens, **nothing)

    def _trace(
        self, spec: CaptureSpec, rows: Rows, start: int, num_tokens: int, **at_end: Any
    ) -> RouteTrace:
        register = self.register
        return RouteTrace(
            request_id=register.request_id,
            index=register.index,
            model=register.model,
            lora=register.lora,
            num_experts=spec.num_experts,
            num_hidden_layers=spec.num_hidden_layers,
            layers=np.array(rows.layers, np.int32),
            start=start,
            topk_ids=rows.topk_ids,
            topk_weights=rows.topk_weights,
            source=rows.source,
            weights_versions=version_runs.runs_of(
                rows.weights_version, rows.source != Source.MISSING, start
            ),
            weight_labels=self.weight_labels,
            prompt_len=register.prompt_len,
            num_tokens=num_tokens,
            cached_len=rows.cached_len,
            **at_end,
            created_s=register.created_s,
            versions=spec.versions,
        )


TOLD_AGAIN = frozenset({CAUSES["restart"], CAUSES["link_broken"]})
"""Of ends that a worker tells once more when it comes again: some are told in vain."""


class Sequences:
    """Every sequence that is registered and has no trace yet, by internal id.

    No call takes longer with more sequences that run.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._uids = itertools.count(1)
        self._open: dict[str, Sequence] = {}
        self.ids: IdIndex[Sequence] = IdIndex()
        """Of those of which a trace is kept."""
        self._unclaimed: dict[str, tuple[Rows, float]] = {}  # the oldest first
        # (deadline, internal id), the next one first; what moved or ended is passed over.
        self._deadlines: dict[float, collections.deque[tuple[float, str]]] = {
            timeout_s: collections.deque()
            for timeout_s in (WORKER_TIMEOUT_S, REFUSED_TIMEOUT_S, API_TIMEOUT_S)
        }
        self.size_bytes = 0
        """Memory of the sequences, and of rows that no API server asked for yet.

        The rows of what runs are in the arena, which is as large as the engine's KV cache.
        """
        self.num_finishing = 0
        """Sequences whose request was answered and whose rows are yet to come."""
        self.num_unclaimed = 0
        """Ended rows that no API server ever asked for."""

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._open.values())

    def register(self, register: Register, prompt_ids: Tokens | None) -> Sequence | None:
        """Take in who a sequence is; None where it was told already, on another connection.

        One that has its trace already is not to be told of again.
        """
        if register.internal_id in self._open:
            return None
        sequence = Sequence(
            next(self._uids), register, prompt_ids, set(register.ids), register.keep
        )
        self._open[register.internal_id] = sequence
        self.size_bytes += sequence.size_bytes
        if sequence.keep:
            self.ids.add(sequence)
        if register.internal_id in self._unclaimed:
            sequence.rows, _ = self._unclaimed.pop(register.internal_id)
            self.size_bytes -= id_bytes(register.internal_id)
            self._wait(sequence, API_TIMEOUT_S)
        return sequence

    def add_id(self, sequence: Sequence, request_id: str) -> None:
        """Let one more id find a sequence."""
        if sequence.keep and request_id not in sequence.ids:
            sequence.ids.add(request_id)
            self.size_bytes += id_bytes(request_id)
            self.ids.add_ids(sequence, [request_id])

    def finish(
        self,
        internal_id: str,
        reason: str,
        output_ids: Tokens,
        labels: list[LabelSpan] | None = None,
    ) -> Sequence | None:
        """Take in how a sequence ended."""
        sequence = self._open.get(internal_id)
        if sequence is not None:
            self.num_finishing += not sequence.is_finishing
            sequence.is_finishing = True
            self.size_bytes -= sequence.size_bytes
            sequence.finish_reason, sequence.output_ids = reason, output_ids
            sequence.weight_labels = labels or []
            self.size_bytes += sequence.size_bytes
            self._wait(sequence, REFUSED_TIMEOUT_S if sequence.is_refused else WORKER_TIMEOUT_S)
        return sequence

    def end(self, internal_id: str, rows: Rows) -> Sequence | None:
        """Take in the rows of a sequence that its worker saw end."""
        sequence = self._open.get(internal_id)
        if sequence is None:
            self._drop_unclaimed(internal_id)
            self._unclaimed[internal_id] = rows, self._clock() + API_TIMEOUT_S
            self.size_bytes += id_bytes(internal_id) + rows.size_bytes
            return None
        self.size_bytes -= sequence.size_bytes
        sequence.rows = rows
        self.size_bytes += sequence.size_bytes
        if not sequence.is_finishing:
            self._wait(sequence, API_TIMEOUT_S)
        return sequence

    def end_unless_told(self, internal_id: str, nothing: Rows) -> Sequence | None:
        """Take in that a sequence ended whose rows nobody has, unless they came already."""
        sequence = self._open.get(internal_id)
        if internal_id in self._unclaimed or (sequence is not None and sequence.rows is not None):
            return None
        return self.end(internal_id, nothing)

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence: it has its trace, or nobody wants one."""
        del self._open[sequence.register.internal_id]
        self.size_bytes -= sequence.size_bytes
        self.num_finishing -= sequence.is_finishing
        self.discard_ids(sequence)

    def discard_ids(self, sequence: Sequence) -> None:
        """Let no id find a sequence any more; it runs on and no trace of it is kept."""
        if sequence.keep:
            self.ids.remove(sequence)
            sequence.keep = False

    def overdue(self) -> list[Sequence]:
        """Return sequences that nothing more will be told of; drop unclaimed rows."""
        now = self._clock()
        while self._unclaimed:
            internal_id, (rows, deadline_s) = next(iter(self._unclaimed.items()))
            if deadline_s > now:
                break
            self._drop_unclaimed(internal_id)
            self.num_unclaimed += rows.cause_beyond not in TOLD_AGAIN
        overdue = []
        for waiting in self._deadlines.values():
            while waiting and waiting[0][0] <= now:
                deadline_s, internal_id = waiting.popleft()
                sequence = self._open.get(internal_id)
                if sequence is not None and sequence.deadline_s == deadline_s:
                    sequence.deadline_s = None  # it may stand here twice: once is enough
                    overdue.append(sequence)
        return overdue

    def _drop_unclaimed(self, internal_id: str) -> None:
        if internal_id in self._unclaimed:
            rows, _ = self._unclaimed.pop(internal_id)
            self.size_bytes -= id_bytes(internal_id) + rows.size_bytes

    def _wait(self, sequence: Sequence, timeout_s: float) -> None:
        sequence.deadline_s = self._clock() + timeout_s
        self._deadlines[timeout_s].append((sequence.deadline_s, sequence.register.internal_id))
