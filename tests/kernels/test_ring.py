"""The ring hands out room once, gives back what was written to it, and says when it is full."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from moescope_service.capture.cuda.ring import RowRing


class Event:
    """One that has always happened."""

    waited = 0

    def record(self, stream):
        pass

    def synchronize(self):
        Event.waited += 1


def make_ring(num_slots=10, id_dtype=torch.uint8):
    return RowRing(num_slots, 3, 2, id_dtype, torch.float16, pin=False, make_event=Event)


def fill(ring, reserved, number):
    """What the GPU does."""
    for tensor in ring.tensors:
        tensor[reserved.offset : reserved.offset + reserved.num_rows] = number


@pytest.mark.parametrize("id_dtype", [torch.uint8, torch.uint16])
def test_rows_come_back(id_dtype):
    ring = make_ring(id_dtype=id_dtype)
    reserved = ring.reserve(4)
    fill(ring, reserved, 7)
    assert reserved.size_bytes == 4 * ring.row_bytes == 4 * 6 * (id_dtype.itemsize + 2)
    waited = Event.waited
    reserved.wait()
    assert Event.waited == waited + 1
    rows = reserved.read()
    for array in (rows.topk_ids, rows.topk_weights, rows.positions):
        assert len(array) == 4
        assert (array == 7).all()
    assert rows.size_bytes == reserved.size_bytes
    assert (rows.topk_ids.shape, rows.topk_weights.dtype) == ((4, 3, 2), np.float16)


def test_a_row_without_a_position_spoils_the_step():
    ring = make_ring()
    reserved = ring.reserve(4)
    fill(ring, reserved, 7)
    ring.tensors[2][2] = -1
    assert reserved.read() is None


def test_a_full_ring_says_so():
    ring = make_ring()
    first, second = ring.reserve(6), ring.reserve(4)
    assert ring.reserve(1) is None
    first.release()
    assert ring.reserve(7) is None
    assert ring.reserve(6).offset == 0
    assert ring.reserve(1) is None
    assert second.offset == 6


def test_room_that_was_not_used_is_there_again():
    ring = make_ring()
    ring.reserve(5).discard()
    whole = ring.reserve(10)
    assert whole.offset == 0
    whole.discard()
    assert ring.reserve(10) is not None


def test_no_room_is_given_twice():
    """Against a list of who owns which slot."""
    rng = random.Random(0)
    ring, owner = make_ring(64), [None] * 64
    waiting, number, refused = [], 0, 0
    for _ in range(20_000):
        if rng.random() < 0.55:
            count = rng.randint(1, 20)
            reserved = ring.reserve(count)
            if reserved is None:
                refused += 1
                assert waiting, "an empty ring takes any step that is half its size"
                continue
            slots = range(reserved.offset, reserved.offset + count)
            assert all(owner[slot] is None for slot in slots)
            number = (number + 1) % 200
            fill(ring, reserved, number)
            if rng.random() < 0.1:
                reserved.discard()
                continue
            for slot in slots:
                owner[slot] = number
            waiting.append((reserved, number))
        elif waiting:
            reserved, filled = waiting.pop(0)
            assert (reserved.read().topk_ids == filled).all()
            reserved.release()
            owner[reserved.offset : reserved.offset + reserved.num_rows] = [
                None
            ] * reserved.num_rows
    assert refused > 100
