"""Pinned host memory in which the GPU leaves packed rows for the link's thread.

The worker's thread reserves room and launches the kernel that fills it; the link's thread waits
for the GPU, copies the rows into a message and gives the room back. Nothing is ever overwritten
before it was read: a full ring means that a step's rows are dropped, and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from moescope_service.capture.rows import StepRows

RowTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Ids and weights ``[num_slots, num_layers, top_k]``, positions ``[num_slots]``."""


def row_tensors(
    num_slots: int,
    num_layers: int,
    top_k: int,
    id_dtype: torch.dtype,
    weights_dtype: torch.dtype,
    *,
    pin: bool = True,
) -> RowTensors:
    """Make a ring's memory.

    Args:
        num_slots: Rows that fit, at least twice those of the largest step.
        num_layers: Layers of a row.
        top_k: Experts a token and layer.
        id_dtype: ``torch.uint8`` or ``torch.uint16``.
        weights_dtype: ``torch.float16`` or ``torch.float32``.
        pin: Whether it is pinned, so that the GPU can write to it.
    """
    shape = (num_slots, num_layers, top_k)
    return (
        torch.zeros(shape, dtype=id_dtype, pin_memory=pin),
        torch.zeros(shape, dtype=weights_dtype, pin_memory=pin),
        torch.zeros(num_slots, dtype=torch.int32, pin_memory=pin),
    )


class RowRing:
    """A ring of rows; a step's rows stand one after the other.

    Args:
        tensors: Its memory; see `row_tensors`.
        wait: Returns when the GPU has filled all room that was handed out before; called in the
            link's thread.
    """

    def __init__(self, tensors: RowTensors, wait: Callable[[], None]) -> None:
        self.num_slots = len(tensors[2])
        self.row_bytes = sum(tensor[0].nbytes for tensor in tensors[:2])
        self.wait = wait
        self._views = tuple(tensor.numpy() for tensor in tensors)
        # Rows ever reserved and ever released; each is written by one thread alone.
        self._head = self._tail = 0

    def reserve(self, num_rows: int) -> ReservedRows | None:
        """Reserve room for a step; None where there is not enough."""
        start = self._head
        offset = start % self.num_slots
        if offset + num_rows > self.num_slots:  # the rest of the ring stays empty
            start += self.num_slots - offset
            offset = 0
        if start + num_rows - self._tail > self.num_slots:
            return None
        reserved = ReservedRows(self, self._head, offset, num_rows, start + num_rows)
        self._head = start + num_rows
        return reserved

    def undo(self, reserved: ReservedRows) -> None:
        """Take the last reservation back."""
        self._head = reserved.previous_head

    def view(self, reserved: ReservedRows) -> StepRows:
        """Return a step's rows, which are the ring's own memory."""
        slots = slice(reserved.offset, reserved.offset + reserved.num_rows)
        topk_ids, topk_weights, positions = self._views
        return StepRows(positions[slots], topk_ids[slots], topk_weights[slots])

    def release(self, reserved: ReservedRows) -> None:
        """Take the room of a step back, and that of all steps before it."""
        self._tail = reserved.end


@dataclasses.dataclass(slots=True)  # a frozen one takes four times as long to make
class ReservedRows:
    """Room for the rows of one step; see `moescope_service.capture.rows.PendingRows`."""

    ring: RowRing
    previous_head: int
    offset: int
    """The first row's slot."""
    num_rows: int
    end: int
    """Rows ever reserved, these included."""

    @property
    def size_bytes(self) -> int:
        """Bytes that the rows hold while they wait."""
        return self.num_rows * self.ring.row_bytes

    def wait(self) -> None:
        """Wait until the GPU has filled this room, and so all before it."""
        self.ring.wait()

    def read(self) -> StepRows | None:
        """Return the rows in place; None where a layer did not write its part."""
        rows = self.ring.view(self)
        return None if rows.positions.min() < 0 else rows

    def release(self) -> None:
        """Give the room back."""
        self.ring.release(self)

    def discard(self) -> None:
        """Give the room back unread; the GPU may still write to it, before what comes next."""
        self.ring.undo(self)
