"""The requests that a page shows: how many, how large, of which model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moescope.analyze.batches import Model
from moescope.errors import CommandError
from moescope.trace import RouteTrace

MAX_BYTES = 32 * 2**20
"""Bytes of ids, weights and text that one page holds; as a file it has at most about as many."""
TRACE_BYTES = 1024
"""What is counted for a trace besides: its facts, and its line in the list."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shown:
    """A trace, and what its input does not know of it."""

    trace: RouteTrace
    has_phases: bool = True
    """Whether ``prompt_len`` is known."""


class Selection:
    """The requests that are shown: the first ones of the inputs.

    Args:
        limit: Most requests; all where None.
        max_bytes: Bytes of ids, weights and text that they may have.
    """

    def __init__(self, limit: int | None = None, max_bytes: int = MAX_BYTES) -> None:
        self._limit, self._max_bytes = limit, max_bytes
        self._first: Path | None = None
        self._kept: set[str] = set()
        self._left_out: set[str] = set()
        self._done_bytes = 0
        self._model: Model | None = None
        self.traces: list[Shown] = []

    @property
    def name(self) -> str:
        """The model's name."""
        return (self._model and self._model.name) or "unknown model"

    @property
    def num_requests(self) -> int:
        """Requests that are shown."""
        return len(self._kept)

    @property
    def num_left_out(self) -> int:
        """Requests of the inputs that are not."""
        return len(self._left_out)

    def enter(self, path: Path, model: Model) -> None:
        """Begin with an input.

        Raises:
            CommandError: It is of another model than those before it.
        """
        if self._model is None or self._first is None:
            self._model, self._first = model, path
        else:
            self._model = self._model.joined(model, f"{self._first} and {path}")

    def wants(self, request_id: str) -> bool:
        """Return whether a request is one of those that are shown."""
        if request_id in self._kept:
            return True
        if self._limit is not None and len(self._kept) >= self._limit:
            self._left_out.add(request_id)
            return False
        self._kept.add(request_id)
        return True

    def add(self, shown: Shown) -> None:
        """Take the trace of a request that is wanted.

        Raises:
            CommandError: There is no room for it.
        """
        trace = shown.trace
        size = TRACE_BYTES + sum(len((one or "").encode()) for one in trace.tokens or ())
        size += trace.topk_ids.nbytes
        size += 0 if trace.topk_weights is None else trace.topk_weights.nbytes
        self._done_bytes += size
        if self._done_bytes > self._max_bytes:
            raise CommandError(
                f"the routes of the first {len(self._kept):,} requests have more than "
                f"{self._max_bytes // 2**20} MiB, which is the most that a page holds: --limit "
                "shows fewer, the first ones"
            )
        self.traces.append(shown)
