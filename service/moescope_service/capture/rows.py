"""What the parts of the capture hand to each other: the rows of a step, and whose they are."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class Batch(NamedTuple):
    """Which sequence has which rows in a step; vLLM does not change the arrays and the list."""

    internal_ids: list[str]
    """The engine's internal ids, in row order."""
    first_row: npt.NDArray[np.int32]
    """Each one's first row, and the number of all rows behind the last, ``[num_reqs + 1]``."""
    scheduled_position: npt.NDArray[np.int32]
    """Each one's first position as the host has it, ``[num_reqs]``; speculation makes it too high.

    The right one is on the device: see `StepRows.positions`.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step, in host memory."""

    positions: npt.NDArray[Any]
    """Each row's position in its sequence, ``[num_rows]``."""
    topk_ids: npt.NDArray[Any]
    """``[num_rows, num_layers, top_k]``."""
    topk_weights: npt.NDArray[Any]

    @property
    def size_bytes(self) -> int:
        """Bytes of what is shipped."""
        return self.topk_ids.nbytes + self.topk_weights.nbytes

    def wait(self) -> None:
        """Return at once: the rows are in host memory."""

    def read(self) -> StepRows:
        """Return itself."""
        return self

    def release(self) -> None:
        """Do nothing: these are copies, whose room is not used again."""

    def discard(self) -> None:
        """Do nothing."""


class PendingRows(Protocol):
    """Rows that may still be on their way to host memory.

    The link's thread calls `wait`, `read` and `release`, or the worker's thread `discard`.
    """

    @property
    def size_bytes(self) -> int:
        """Bytes that they hold while they wait."""

    def wait(self) -> None:
        """Wait until these rows, and all that were taken before them, are in host memory."""

    def read(self) -> StepRows | None:
        """Return the rows, to be used until `release`.

        Returns:
            None where a layer did not write its part: the rows would be partly another step's.
        """

    def release(self) -> None:
        """Give their room back."""

    def discard(self) -> None:
        """Give up rows that were the last to be taken."""


class StepSink(Protocol):
    """Holds the rows of the step that runs, and hooks the routers that write them."""

    def hook(self, column: int, router: Any) -> None:
        """Let one router hand over its results; only this object, since drafts have routers too.

        Args:
            column: The layer's column in the rows.
            router: A ``BaseRouter`` of the target model.
        """

    def start_step(self) -> None:
        """Forget earlier rows."""

    def take(self, num_rows: int) -> PendingRows | str:
        """Take the rows of the step that just ran; called on the worker's thread.

        Returns:
            The rows, or the cause of their loss, of `moescope_service.causes.LOST_CAUSES`.
        """
