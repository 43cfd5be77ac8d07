"""Which rows of running sequences are settled: here, and of tokens that stay."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moescope_service.messages import Step


class SettledRows:
    """Counts the settled rows of running sequences, by handle, from position 0 on.

    The first row of a span is of a token that was sampled. The others, behind the prompt, are of
    drafts until a later span begins behind them. A sequence that was preempted computes its rows
    again, of tokens that are known to stay. Cached rows may be computed in the very step that
    admits their sequence, so that counts rise when all pieces of a step are here.

    Args:
        num_handles: For how many handles there is room.
    """

    def __init__(self, num_handles: int) -> None:
        self._settled = np.zeros(num_handles, np.int64)
        self._known = np.zeros(num_handles, np.int64)  # tokens that stay: the prompt's, and sampled
        # Of the step whose pieces come in: cached rows by handle, and the spans.
        self._cached: dict[int, int] = {}
        self._spans: list[npt.NDArray[np.int64]] = []

    def __getitem__(self, handle: int) -> int:
        return int(self._settled[handle])

    def double(self) -> None:
        """Make room for twice as many handles."""
        self._settled = np.pad(self._settled, (0, len(self._settled)))
        self._known = np.pad(self._known, (0, len(self._known)))

    def admit(self, handle: int, prompt_len: int, num_cached: int) -> None:
        """Take in a new sequence, whose first rows are cached."""
        self._settled[handle], self._known[handle] = 0, prompt_len
        self.hit(handle, num_cached)

    def hit(self, handle: int, num_cached: int) -> None:
        """Take in that a sequence's first rows are cached."""
        self._cached[handle] = num_cached

    def cut(self, handle: int, end: int) -> None:
        """Take in that a sequence computes its rows again from a position on."""
        self._settled[handle] = min(self._settled[handle], end)

    def add(self, step: Step, is_known: npt.NDArray[np.bool_]) -> None:
        """Take in which rows a piece of a step has.

        Args:
            step: The piece.
            is_known: Whether each of its spans is of a running sequence.
        """
        self._spans.append(step.spans[is_known].astype(np.int64))
        if step.has_more:
            return
        for handle, num_cached in self._cached.items():
            self._settled[handle] = max(self._settled[handle], num_cached)
        handles, starts, lengths = np.concatenate(self._spans).T
        sampled = starts + 1
        sampled[1:][handles[1:] == handles[:-1]] = 0  # the rest of a span that was cut
        np.maximum.at(self._known, handles, sampled)
        np.maximum.at(self._settled, handles, np.minimum(starts + lengths, self._known[handles]))
        self.clear()

    def clear(self) -> None:
        """Forget a step of which not all pieces came."""
        self._cached.clear()
        self._spans.clear()
