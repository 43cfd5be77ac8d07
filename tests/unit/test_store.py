"""Finished traces, bounded in bytes."""

from __future__ import annotations

import numpy as np
import pytest

from moescope.trace import RouteTrace
from moescope_service.collector.store import OVERHEAD_BYTES, Kept, TraceStore, id_bytes


def make_kept(uid, *ids, num_rows=3, created_s=0.0, index=0):
    trace = RouteTrace(
        request_id=ids[0], index=index, model="tiny", num_experts=8, num_hidden_layers=4,
        layers=np.array([1, 3], np.int32), topk_ids=np.zeros((num_rows, 2, 2), np.uint8),
        topk_weights=np.zeros((num_rows, 2, 2), np.float16), source=np.zeros(num_rows, np.uint8),
        token_ids=None, prompt_len=1, num_tokens=num_rows + 1, cached_len=0, finish_reason="stop",
        complete=True, created_s=created_s,
    )  # fmt: skip
    return Kept(uid, trace, ids)


SIZE = make_kept(1, "a").size_bytes


def found(store, request_id):
    return store.newest(store.ids.any(request_id)).kept


def uids(kept):
    return [one.uid for one in kept]


def test_a_trace_costs_its_arrays_and_some_more():
    arrays = 10 * (4 + 8 + 1) + 8
    kept = make_kept(1, "a", num_rows=10)
    assert kept.size_bytes == OVERHEAD_BYTES + arrays + 2 * id_bytes("a")  # one is the trace's own
    longer = make_kept(1, "ä" * 500, num_rows=10)
    assert 2 * 499 <= longer.size_bytes - kept.size_bytes <= 2 * 1100


def test_every_id_finds_a_trace():
    store = TraceStore(10 * SIZE)
    store.add(make_kept(1, "a", "b/c", "a-internal"))
    for request_id in ("a", "b/c", "a-internal"):
        assert uids(found(store, request_id)) == [1]
    assert found(store, "c") == []
    assert len(store) == 1


def test_the_newest_request_comes_first_and_its_choices_in_order():
    store = TraceStore(10 * SIZE)
    for uid, created_s, index in (
        (1, 10.0, 1),
        (2, 10.0, 0),
        (3, 20.0, 2),
        (4, 20.0, 1),
        (5, 20.0, 0),
    ):
        store.add(make_kept(uid, "a", created_s=created_s, index=index))
    assert uids(found(store, "a")) == [5, 4, 3, 2, 1]


def test_the_oldest_make_room_and_are_remembered():
    store = TraceStore(3 * SIZE)
    for uid, request_id in enumerate("abcde"):
        store.add(make_kept(uid, request_id))
    assert (uids(store), store.size_bytes, store.num_evicted) == ([2, 3, 4], 3 * SIZE, 2)
    assert [store.was_evicted(request_id) for request_id in "abcde"] == [True, True] + [False] * 3
    assert found(store, "a") == []


def test_a_trace_that_does_not_fit_at_all_is_evicted_itself():
    store = TraceStore(3 * SIZE)
    store.add(make_kept(1, "large", num_rows=10_000))
    assert (len(store), store.size_bytes) == (0, 0)
    assert store.was_evicted("large")


def test_a_trace_that_does_not_fit_at_all_costs_no_other_one():
    store = TraceStore(3 * SIZE)
    store.add(make_kept(1, "a"))
    store.add(make_kept(2, "large", num_rows=10_000))
    assert uids(store) == [1]
    assert store.was_evicted("large")
    assert not store.was_evicted("a")


class TestARequestIsKeptAsAWhole:
    """Its choices end one by one, others between them."""

    def add(self, store, *names, created_s=0.0):
        for name in names:
            request_id, index = name
            uid = self.uid = getattr(self, "uid", 0) + 1
            ids = (request_id, f"{name}-internal", "shared")
            store.add(make_kept(uid, *ids, index=int(index), created_s=created_s))

    def found(self, store, request_id):
        return [kept.trace.index for kept in found(store, request_id)]

    @pytest.fixture
    def store(self):
        return TraceStore(4 * make_kept(1, "a", "a0-internal", "shared").size_bytes)

    def test_its_choices_make_room_together(self, store):
        self.add(store, "a0", "b0", "a1", "c0")
        assert (self.found(store, "a"), self.found(store, "b")) == ([0, 1], [0])
        self.add(store, "d0")
        assert (self.found(store, "a"), self.found(store, "b")) == ([0, 1], []), "b ended first"
        self.add(store, "e0")
        assert self.found(store, "a") == []
        assert all(map(store.was_evicted, ("a", "b", "a0-internal", "a1-internal")))
        assert not store.was_evicted("c")
        assert (len(store), store.num_evicted) == (3, 3)
        assert store.size_bytes == 3 * store.limit_bytes // 4

    def test_a_choice_that_ends_later_does_not_come_back(self, store):
        self.add(store, "a0", "b0", "c0", "d0", "e0")
        assert store.was_evicted("a")
        self.add(store, "a1")
        assert (self.found(store, "a"), store.num_evicted) == ([], 2)
        assert [self.found(store, name) for name in "bcde"] == [[0]] * 4
        assert store.was_evicted("a1-internal")

    def test_one_that_is_larger_than_the_store_leaves_nothing(self, store):
        self.add(store, "a0", "a1", "a2", "a3")
        assert self.found(store, "a") == [0, 1, 2, 3]
        self.add(store, "a4", "b0", "a5")
        assert (self.found(store, "a"), self.found(store, "b")) == ([], [0])
        assert (len(store), store.num_evicted) == (1, 6)

    def test_a_choice_that_does_not_fit_at_all_takes_the_others_with_it(self, store):
        self.add(store, "a0", "b0")
        store.add(make_kept(9, "a", index=1, num_rows=10_000))
        assert (self.found(store, "a"), self.found(store, "b")) == ([], [0])
        assert store.num_evicted == 2

    def test_requests_of_one_id_are_several(self, store):
        self.add(store, "a0", "a1", created_s=1.0)
        self.add(store, "a0", "a1", created_s=2.0)
        self.add(store, "a0", created_s=3.0)
        assert [kept.trace.created_s for kept in found(store, "a")] == [3.0, 2.0, 2.0]
        assert (store.num_evicted, len(found(store, "shared"))) == (2, 3)
        for kept in found(store, "shared"):
            store.remove(kept.uid)
        assert (len(store), store.size_bytes, store._requests) == (0, 0, {})


def test_removing_gives_every_byte_back():
    store = TraceStore(10 * SIZE)
    store.add(make_kept(1, "a", "shared"))
    store.add(make_kept(2, "b", "shared"))
    store.add_id("later", to="b")
    assert uids(found(store, "later")) == [2]
    store.remove(found(store, "later")[0].uid)
    assert uids(found(store, "shared")) == [1]
    assert (found(store, "b"), found(store, "later"), store.was_evicted("b")) == (
        [],
        [],
        False,
    )
    store.remove(found(store, "a")[0].uid)
    assert (len(store), store.size_bytes, store._requests) == (0, 0, {})
    assert (store.ids._own, store.ids._any) == ({}, {})


def test_one_more_id_is_added_once():
    store = TraceStore(10 * SIZE)
    store.add(make_kept(1, "a"))
    for _ in range(2):
        store.add_id("b", to="a")
    assert found(store, "a")[0].ids == ("a", "b")
    assert uids(found(store, "b")) == [1]


@pytest.mark.parametrize("limit", [1, OVERHEAD_BYTES])
def test_a_tiny_limit(limit):
    store = TraceStore(limit)
    store.add(make_kept(1, "a"))
    assert len(store) == 0
