"""Rows stand where KV entries stand."""

from __future__ import annotations

import numpy as np
import pytest
from builders import make_rows

from moescope_service.collector.arena import EMPTY, FILLED, Arena


@pytest.fixture
def arena():
    return Arena(
        num_blocks=4, block_size=4, num_layers=2, top_k=2, id_dtype="uint8", weights_dtype="float16"
    )


def write(arena, slots, first):
    arena.write(np.array(slots), *make_rows(first, len(slots)))


def check(arena, slots, first):
    ids, weights, _, state = arena.read(np.array(slots))
    assert (state == FILLED).all()
    np.testing.assert_array_equal(ids, make_rows(first, len(slots))[0])
    np.testing.assert_array_equal(weights, make_rows(first, len(slots))[1])


def filled(arena):
    return np.flatnonzero(arena.read(np.arange(16)).state == FILLED).tolist()


def test_nothing_is_filled_at_first(arena):
    assert filled(arena) == []


def test_what_is_written_is_read_and_the_last_write_wins(arena):
    write(arena, [3, 9, 4], 10)
    check(arena, [3, 9, 4], 10)
    write(arena, [9], 50)
    check(arena, [9], 50)
    check(arena, [3], 10)
    assert filled(arena) == [3, 4, 9]


def test_read_returns_copies(arena):
    write(arena, [1], 5)
    ids, _, _, here = arena.read(np.array([1]))
    write(arena, [1], 6)
    arena.allocate([0])
    np.testing.assert_array_equal(ids, make_rows(5, 1)[0])
    assert here.all()


@pytest.mark.parametrize("pages", [True, False])
def test_many_rows_are_copies_too(pages, monkeypatch):
    if not pages:

        def no_more(*args, **kwargs):
            raise OSError("too many maps")

        monkeypatch.setattr("moescope_service.collector.arena.mmap.mmap", no_more)
    arena = Arena(
        num_blocks=512, block_size=16, num_layers=4, top_k=4, id_dtype="uint16",
        weights_dtype="float32",
    )  # fmt: skip
    generator = np.random.default_rng(0)
    sent = generator.integers(0, 300, (8192, 4, 4)).astype(np.uint16)
    arena.write(np.arange(8192), sent, sent.astype(np.float32))
    slots = generator.permutation(8192)[:8000]
    ids, weights, _, _ = arena.read(slots)
    arena.write(np.arange(8192), np.zeros_like(sent), np.zeros(sent.shape, np.float32))
    np.testing.assert_array_equal(ids, sent[slots])
    np.testing.assert_array_equal(weights, sent[slots])
    assert ids.dtype == np.uint16
    ids[0] = 1


def test_a_newly_allocated_block_holds_nobodys_rows(arena):
    write(arena, range(16), 0)
    before = arena.generation.copy()
    arena.allocate([1, 3])
    assert filled(arena) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert (arena.generation - before).tolist() == [0, 1, 0, 1]
    arena.allocate([])
    assert (arena.generation - before).tolist() == [0, 1, 0, 1]


def test_a_copied_block_brings_rows_and_gaps(arena):
    write(arena, [4, 6], 10)
    write(arena, [12, 13], 90)
    arena.copy(1, 3, 3)
    assert filled(arena) == [4, 6, 12, 14]
    check(arena, [12, 14], 10)
    write(arena, [12], 70)  # the copy is the new owner's own
    check(arena, [4], 10)


def test_a_copy_ends_where_the_hit_does(arena):
    write(arena, range(4, 8), 10)
    arena.allocate([3])
    arena.copy(1, 3, 2)
    assert filled(arena) == [4, 5, 6, 7, 12, 13]


def test_the_version_goes_with_the_row(arena):
    arena.write(np.array([4, 5, 6]), *make_rows(0, 3), weights_version=2)
    arena.write(np.array([5, 7]), *make_rows(0, 2), weights_version=3)
    arena.copy(1, 3, 3)
    arena.recall(0, arena.rows_of(1))
    version = arena.read(np.arange(16)).weights_version
    assert version.tolist() == [2, 3, 2, 3, 2, 3, 2, 3, 0, 0, 0, 0, 2, 3, 2, 0]
    write(arena, [4], 0)
    assert arena.read(np.array([0, 4])).weights_version.tolist() == [2, 0]


def test_void(arena):
    write(arena, range(8), 0)
    before = arena.generation.copy()
    arena.void(np.array([0, 5]), 7)
    assert filled(arena) == [1, 2, 3, 4, 6, 7]
    assert arena.read(np.array([5, 6, 9])).state.tolist() == [7, FILLED, EMPTY]
    np.testing.assert_array_equal(arena.generation, before)
    arena.void_all()
    assert filled(arena) == []
    assert (arena.generation - before == 1).all()
