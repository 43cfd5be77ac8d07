"""Sequences on their way from registration to a finished trace.

Three things are told by different processes in any order: who the sequence is (its API server, at
registration), how it ended (its API server, at finish or abort) and which rows it has (its worker,
at the end). `Sequences` brings them together.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from moescope.trace import RouteTrace, Source
from moescope_service.collector.reassembly import CAUSES, Rows
from moescope_service.messages import Hello, Register

Tokens = npt.NDArray[np.int32]

WORKER_TIMEOUT_S = 300.0
"""How long a finished request waits for its worker's end.

It follows within milliseconds, but for an abort in the middle of a step that takes long.
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
    is_finishing: bool = False
    """Whether the API server has answered the request."""
    rows: Rows | None = None
    deadline_s: float | None = None
    """When to stop waiting for whoever has not reported."""

    @property
    def is_ready(self) -> bool:
        """Whether everybody has reported."""
        return self.is_finishing and self.rows is not None

    def trace(
        self, hello: Hello, *, timed_out: bool, with_token_ids: bool
    ) -> tuple[RouteTrace, npt.NDArray[np.uint8]]:
        """Build the trace from all that is known.

        Returns:
            The trace, and why each of its rows is missing: see `Rows.cause`.
        """
        # Where its API server is gone, nobody knows which rows behind the prompt are of tokens that
        # were kept, and which of rejected drafts: they are left out.
        output = self.output_ids if self.output_ids is not None else np.empty(0, np.int32)
        num_tokens = self.register.prompt_len + len(output)
        rows = self.rows or Rows.nothing(hello)
        if (
            self.rows is not None
            and self.finish_reason == "abort"
            and rows.lacking == CAUSES["unknown"]
        ):  # its worker saw the abort: tokens beyond the last row were never routed
            rows = dataclasses.replace(rows, lacking=CAUSES["not_routed"])
        rows = rows.resized(max(num_tokens - 1, 0))
        tokens = None
        if with_token_ids and self.is_finishing and self.prompt_ids is not None:
            tokens = np.concatenate([self.prompt_ids, output])
        register = self.register
        trace = RouteTrace(
            request_id=register.request_id,
            index=register.index,
            model=register.model,
            lora=register.lora,
            num_experts=hello.num_experts,
            num_hidden_layers=hello.num_hidden_layers,
            layers=np.array(rows.layers, np.int32),
            topk_ids=rows.topk_ids,
            topk_weights=rows.topk_weights,
            source=rows.source,
            token_ids=tokens,
            prompt_len=register.prompt_len,
            num_tokens=num_tokens,
            cached_len=rows.cached_len,
            finish_reason=self.finish_reason,
            complete=not timed_out and not bool((rows.source == Source.MISSING).any()),
            created_s=register.created_s,
            versions=hello.versions,
        )
        return trace, rows.cause


class Sequences:
    """Every sequence that is registered and has no trace yet, by internal id.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._uids = itertools.count(1)
        self._open: dict[str, Sequence] = {}
        self._by_id: dict[str, list[Sequence]] = {}
        self._unclaimed: dict[str, tuple[Rows, float]] = {}
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
        if sequence.keep:
            for request_id in sequence.ids:
                self._by_id.setdefault(request_id, []).append(sequence)
        if register.internal_id in self._unclaimed:
            sequence.rows, _ = self._unclaimed.pop(register.internal_id)
            sequence.deadline_s = self._clock() + API_TIMEOUT_S
        return sequence

    def find(self, request_id: str) -> list[Sequence]:
        """Return the sequences that an id finds and that have no trace yet."""
        return list(self._by_id.get(request_id, ()))

    def add_id(self, sequence: Sequence, request_id: str) -> None:
        """Let one more id find a sequence."""
        if sequence.keep and request_id not in sequence.ids:
            sequence.ids.add(request_id)
            self._by_id.setdefault(request_id, []).append(sequence)

    def finish(self, internal_id: str, reason: str, output_ids: Tokens) -> Sequence | None:
        """Take in how a sequence ended."""
        sequence = self._open.get(internal_id)
        if sequence is not None:
            sequence.is_finishing = True
            sequence.finish_reason, sequence.output_ids = reason, output_ids
            sequence.deadline_s = self._clock() + WORKER_TIMEOUT_S
        return sequence

    def end(self, internal_id: str, rows: Rows) -> Sequence | None:
        """Take in the rows of a sequence that its worker saw end."""
        sequence = self._open.get(internal_id)
        if sequence is None:
            self._unclaimed[internal_id] = rows, self._clock() + API_TIMEOUT_S
            return None
        sequence.rows = rows
        if not sequence.is_finishing:
            sequence.deadline_s = self._clock() + API_TIMEOUT_S
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
        self.discard_ids(sequence)

    def discard_ids(self, sequence: Sequence) -> None:
        """Let nobody find a sequence any more; it runs on and no trace of it is kept."""
        for request_id in sequence.ids if sequence.keep else ():
            self._by_id[request_id].remove(sequence)
            if not self._by_id[request_id]:
                del self._by_id[request_id]
        sequence.keep = False

    def overdue(self) -> list[Sequence]:
        """Return sequences that somebody will not report on any more; drop unclaimed rows."""
        now = self._clock()
        for internal_id, (rows, deadline_s) in list(self._unclaimed.items()):
            if deadline_s <= now:
                del self._unclaimed[internal_id]
                self.num_unclaimed += rows.lacking != CAUSES["restart"]  # some say so in vain
        return [s for s in self if s.deadline_s is not None and s.deadline_s <= now]
