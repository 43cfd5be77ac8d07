"""Rows of blocks that left the KV cache: a KV connector may bring the blocks back."""

from __future__ import annotations

import collections
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from moescope_service.collector.arena import RowsOfBlock


class HeldPrefixes:
    """The keys of the prefixes that full blocks hold.

    A connector also loads what another block still holds: vLLM finds no prefix in its cache beyond
    the first block that has left it.
    """

    def __init__(self) -> None:
        self._keys: dict[int, str] = {}
        self._blocks: dict[str, int] = {}

    def add(self, filled: Iterable[tuple[int, str]]) -> None:
        """Note (block, key) of blocks that are full."""
        for block, key in filled:
            self._keys[block] = key
            self._blocks[key] = block  # of several, any: their rows are alike

    def take(self, blocks: Iterable[int]) -> list[tuple[int, str]]:
        """Forget blocks; return (block, key) of those that were full."""
        taken = [(block, self._keys.pop(block)) for block in blocks if block in self._keys]
        for block, key in taken:
            if self._blocks.get(key) == block:
                del self._blocks[key]
        return taken

    def block_of(self, key: str) -> int | None:
        """Return a block that holds a prefix; None where none is known to."""
        block = self._blocks.get(key)
        return block if block is not None and self._keys.get(block) == key else None

    def clear(self) -> None:
        """Forget all blocks."""
        self._keys.clear()
        self._blocks.clear()


class PrefixStore:
    """The rows of full blocks by the key of their prefix; the least recently used make room.

    Memory is committed by the operating system as it is first used.

    Args:
        limit_bytes: Of the rows.
        shape: ``(block_size, num_layers, top_k)``.
        id_dtype: Of the expert ids.
        weights_dtype: Of the weights.
    """

    def __init__(
        self,
        limit_bytes: int,
        shape: tuple[int, int, int],
        id_dtype: npt.DTypeLike,
        weights_dtype: npt.DTypeLike,
    ) -> None:
        row_bytes = np.dtype(id_dtype).itemsize + np.dtype(weights_dtype).itemsize
        self._block_bytes = max(1, int(np.prod(shape)) * row_bytes + shape[0] * 4)
        self._num_places = limit_bytes // self._block_bytes
        self._topk_ids = np.zeros((self._num_places, *shape), id_dtype)
        self._topk_weights = np.zeros((self._num_places, *shape), weights_dtype)
        self._weights_version = np.zeros((self._num_places, shape[0]), np.int32)
        self._places: collections.OrderedDict[str, int] = collections.OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Bytes of the rows that are kept."""
        return len(self._places) * self._block_bytes

    def put(self, key: str, rows: RowsOfBlock) -> None:
        """Keep a block's rows."""
        if not self._num_places:
            return
        place = self._places.pop(key, None)
        if place is None:
            place = len(self._places)
            if place == self._num_places:
                _, place = self._places.popitem(last=False)
        self._places[key] = place
        self._topk_ids[place], self._topk_weights[place] = rows.topk_ids, rows.topk_weights
        self._weights_version[place] = rows.weights_version

    def get(self, key: str) -> RowsOfBlock | None:
        """Return a block's rows, as views; None where they are not kept."""
        if key not in self._places:
            return None
        self._places.move_to_end(key)
        place = self._places[key]
        return RowsOfBlock(
            self._topk_ids[place], self._topk_weights[place], self._weights_version[place]
        )
