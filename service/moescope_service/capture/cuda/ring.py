"""Pinned host memory in which the GPU leaves packed rows for the link's thread.

The worker's thread reserves room and launches the kernel that fills it; the link's thread waits
for the step's event, copies the rows into a message and gives the room back. Nothing is overwritten
before it was read: where the ring is full, a step's rows are dropped and counted.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import torch

from moescope_service.capture.rows import StepRows


class Event(Protocol):
    """The part of ``torch.cuda.Event`` that is used."""

    def record(self, stream: torch.cuda.Stream) -> None:
        """Note where the stream stands: the event happens when the GPU gets there."""

    def synchronize(self) -> None:
        """Wait until it has happened."""


# Waiting must not spin: the model needs the cores.
_cuda_event: Callable[[], Event] = functools.partial(torch.cuda.Event, blocking=True)


class RowRing:
    """A ring of rows; a step's rows stand one after the other.

    Args:
        num_slots: Rows that fit, at least twice those of the largest step.
        num_layers: Layers of a row.
        top_k: Experts a token and layer.
        id_dtype: ``torch.uint8`` or ``torch.uint16``.
        weights_dtype: ``torch.float16`` or ``torch.float32``.
        pin: Whether the memory is pinned, so that the GPU can write to it.
        make_event: Makes the events that tell when a step's rows are in host memory.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        top_k: int,
        id_dtype: torch.dtype,
        weights_dtype: torch.dtype,
        *,
        pin: bool = True,
        make_event: Callable[[], Event] = _cuda_event,
    ) -> None:
        shape = (num_slots, num_layers, top_k)
        self.num_slots = num_slots
        self.tensors = (
            torch.zeros(shape, dtype=id_dtype, pin_memory=pin),
            torch.zeros(shape, dtype=weights_dtype, pin_memory=pin),
            torch.zeros(num_slots, dtype=torch.int32, pin_memory=pin),
        )
        """Ids and weights ``[num_slots, num_layers, top_k]``, positions ``[num_slots]``."""
        self.row_bytes = num_layers * top_k * (id_dtype.itemsize + weights_dtype.itemsize)
        self._views = tuple(tensor.numpy() for tensor in self.tensors)
        # Rows ever reserved and ever released; each is written by one thread alone.
        self._head = self._tail = 0
        self._make_event = make_event
        self._events: collections.deque[Event] = collections.deque()

    def reserve(self, num_rows: int) -> ReservedRows | None:
        """Reserve room for a step; None where there is not enough."""
        start = self._head
        offset = start % self.num_slots
        if offset + num_rows > self.num_slots:  # the rest of the ring stays empty
            start += self.num_slots - offset
            offset = 0
        if start + num_rows - self._tail > self.num_slots:
            return None
        event = self._events.pop() if self._events else self._make_event()
        reserved = ReservedRows(self, event, self._head, offset, num_rows, start + num_rows)
        self._head = start + num_rows
        return reserved

    def undo(self, reserved: ReservedRows) -> None:
        """Take the last reservation back."""
        self._head = reserved.previous_head
        self._events.append(reserved.event)

    def view(self, reserved: ReservedRows) -> StepRows:
        """Return a step's rows, which are the ring's own memory."""
        slots = slice(reserved.offset, reserved.offset + reserved.num_rows)
        topk_ids, topk_weights, positions = self._views
        return StepRows(positions[slots], topk_ids[slots], topk_weights[slots])

    def release(self, reserved: ReservedRows) -> None:
        """Take the room of a step back, and that of all steps before it."""
        self._tail = reserved.end
        self._events.append(reserved.event)


@dataclasses.dataclass(slots=True)  # a frozen one takes four times as long to make
class ReservedRows:
    """Room for the rows of one step; see `moescope_service.capture.rows.PendingRows`."""

    ring: RowRing
    event: Event
    """Recorded behind the kernel that fills the room."""
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
        self.event.synchronize()

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
