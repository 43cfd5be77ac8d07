"""A mirror of one worker's KV cache that holds routes where vLLM holds keys and values.

The row of the token at position ``p`` of a sequence stands in slot
``block_ids[p // block_size] * block_size + p % block_size``, exactly where its KV entries stand. So
a prefix-cache hit finds the rows that were computed when the block was filled, recomputation
overwrites what it recomputes, and eviction needs no bookkeeping of its own.

Every block has a generation that grows when the block is newly allocated. A sequence remembers the
generations of its blocks: rows in a block that meanwhile belongs to another sequence are missing,
never that sequence's rows.
"""

from __future__ import annotations

import mmap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

EMPTY, FILLED, RECALLED = 0, 1, 255
"""States of a slot; those between say why its row was lost. The row of one that is recalled was
computed for the same prefix, in another block."""


_PAGES_BYTES = 128 * 2**10
"""Copies of so many bytes get pages of their own."""


class RowsOfBlock(NamedTuple):
    """The rows of a whole block."""

    topk_ids: npt.NDArray[Any]
    """``[block_size, num_layers, top_k]``."""
    topk_weights: npt.NDArray[Any]
    weights_version: npt.NDArray[np.int32]
    """Which weights computed each row, ``[block_size]``."""


class RowsOfSlots(NamedTuple):
    """The rows of some slots, as of `RowsOfBlock`."""

    topk_ids: npt.NDArray[Any]
    topk_weights: npt.NDArray[Any]
    weights_version: npt.NDArray[np.int32]
    state: npt.NDArray[np.uint8]
    """See `Arena`, ``[num_slots]``."""


def _rows(array: npt.NDArray[Any], slots: Ints) -> npt.NDArray[Any]:
    """Return copies of rows; many of them in pages of their own.

    They are kept for long, among large messages that come and go. On the C library's heap they
    scatter, and it grows to three times what is in it (``python -m benchmarks.cpu.collector``).
    """
    shape = (len(slots), *array.shape[1:])
    size_bytes = int(np.prod(shape)) * array.itemsize
    if size_bytes < _PAGES_BYTES:
        return array[slots]
    try:
        pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # a process may have 65,530 such pieces, by Linux' default
        return array[slots]
    rows = np.frombuffer(pages, array.dtype).reshape(shape)
    return np.take(array, slots, axis=0, out=rows, mode="clip")


class Arena:
    """Rows by KV slot, ``[num_blocks * block_size, num_layers, top_k]``.

    Memory is committed by the operating system as slots are first written. Every slot begins with
    ``state``, which says why there is no row in it.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_layers: int,
        top_k: int,
        id_dtype: npt.DTypeLike,
        weights_dtype: npt.DTypeLike,
        state: int = EMPTY,
    ) -> None:
        slots = num_blocks * block_size
        self.block_size = block_size
        self._topk_ids = np.zeros((slots, num_layers, top_k), id_dtype)
        self._topk_weights = np.zeros((slots, num_layers, top_k), weights_dtype)
        self._weights_version = np.zeros(slots, np.int32)
        self._state = np.full(slots, state, np.uint8)
        self._state_by_block = self._state.reshape(num_blocks, block_size)
        self.generation: npt.NDArray[np.int64] = np.zeros(num_blocks, np.int64)

    def allocate(self, block_ids: list[int]) -> None:
        """Clear newly allocated blocks: no other sequence's rows may be found in them."""
        self.generation[block_ids] += 1
        self._state_by_block[block_ids] = EMPTY

    def copy(self, source: int, destination: int, count: int) -> None:
        """Copy a block's first rows, as vLLM copies its KV entries (copy on write)."""
        from_slots, to_slots = (
            self._first_slots(source, count),
            self._first_slots(destination, count),
        )
        self._topk_ids[to_slots] = self._topk_ids[from_slots]
        self._topk_weights[to_slots] = self._topk_weights[from_slots]
        self._weights_version[to_slots] = self._weights_version[from_slots]
        self._state[to_slots] = self._state[from_slots]

    def write(
        self,
        slots: Ints,
        topk_ids: npt.NDArray[Any],
        topk_weights: npt.NDArray[Any],
        weights_version: int = 0,
    ) -> None:
        """Write a step's rows, which one version of the weights computed; the last write wins."""
        self._topk_ids[slots] = topk_ids
        self._topk_weights[slots] = topk_weights
        self._weights_version[slots] = weights_version
        self._state[slots] = FILLED

    def rows_of(self, block: int) -> RowsOfBlock | None:
        """Return views of a block's rows; None where one of them is not there."""
        states = self._state_by_block[block]
        if not ((states == FILLED) | (states == RECALLED)).all():
            return None
        slots = self._first_slots(block, self.block_size)
        return RowsOfBlock(
            self._topk_ids[slots], self._topk_weights[slots], self._weights_version[slots]
        )

    def recall(self, block: int, rows: RowsOfBlock) -> None:
        """Write the rows of another block that held the same prefix."""
        slots = self._first_slots(block, self.block_size)
        self._topk_ids[slots], self._topk_weights[slots] = rows.topk_ids, rows.topk_weights
        self._weights_version[slots] = rows.weights_version
        self._state[slots] = RECALLED

    def void(self, slots: Ints, state: int) -> None:
        """Mark slots whose rows were lost: their KV entries changed, their rows did not come.

        Args:
            slots: The slots.
            state: A number above `FILLED` that says why.
        """
        self._state[slots] = state

    def void_all(self) -> None:
        """Trust nothing that was written so far."""
        self.generation += 1
        self._state[:] = EMPTY

    def read(self, slots: Ints) -> RowsOfSlots:
        """Return copies of the rows of slots, and their states."""
        return RowsOfSlots(
            _rows(self._topk_ids, slots),
            _rows(self._topk_weights, slots),
            self._weights_version[slots],
            self._state[slots],
        )

    def _first_slots(self, block: int, count: int) -> slice:
        return slice(block * self.block_size, block * self.block_size + count)
