"""Rows of blocks that left the KV cache, within a bound."""

from __future__ import annotations

import numpy as np
import pytest

from moescope_service.collector.arena import RowsOfBlock
from moescope_service.collector.prefixes import HeldPrefixes, PrefixStore

SHAPE = (4, 2, 2)
BLOCK_BYTES = 4 * (2 * 2 * 3 + 4)
"""uint8 and float16, and the version of each row."""


def rows(value: int) -> RowsOfBlock:
    ids, weights = np.full(SHAPE, value, np.uint8), np.full(SHAPE, value / 8, np.float16)
    return RowsOfBlock(ids, weights, np.full(SHAPE[0], value + 100, np.int32))


def value(store: PrefixStore, key: str) -> int | None:
    found = store.get(key)
    if found is None:
        return None
    ids, weights, version = found
    assert (weights == ids / 8).all()
    assert (version == ids[:, 0, 0] + 100).all()
    assert len(np.unique(ids)) == 1
    return int(ids.flat[0])


@pytest.fixture
def store() -> PrefixStore:
    """Of three blocks."""
    return PrefixStore(4 * BLOCK_BYTES - 1, SHAPE, np.uint8, np.float16)


def test_the_least_recently_used_makes_room(store: PrefixStore) -> None:
    for number in range(3):
        store.put(f"{number}", rows(number))
    assert value(store, "0") == 0
    store.put("1", rows(5))
    store.put("3", rows(3))
    assert [value(store, key) for key in "0123"] == [0, 5, None, 3]
    assert store.size_bytes == 3 * BLOCK_BYTES


def test_places_are_used_again_and_again(store: PrefixStore) -> None:
    for number in range(100):
        store.put(f"{number}", rows(number))
        assert [value(store, f"{n}") for n in range(max(0, number - 2), number + 1)] == [
            *range(max(0, number - 2), number + 1)
        ]
        assert value(store, f"{number - 3}") is None


def test_without_memory_nothing_is_kept() -> None:
    store = PrefixStore(0, SHAPE, np.uint8, np.float16)
    store.put("a", rows(1))
    assert store.get("a") is None
    assert store.size_bytes == 0


def test_a_prefix_is_found_in_a_block_that_holds_it():
    held = HeldPrefixes()
    held.add([(3, "a"), (4, "b"), (5, "a")])
    assert held.block_of("a") == 5
    assert held.take([5, 9]) == [(5, "a")]
    assert held.block_of("a") is None  # its rows are kept elsewhere from here on
    assert held.take([3]) == [(3, "a")]
    held.add([(4, "c")])  # computed again after a load that failed
    assert (held.block_of("b"), held.block_of("c")) == (None, 4)
    held.clear()
    assert held.block_of("c") is None
    assert held.take([4]) == []
