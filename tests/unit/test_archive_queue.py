"""What the collector hands over to the archive, and what becomes of it."""

from __future__ import annotations

from typing import Any

import pytest
from builders import Bench

from benchmarks.simulation.parts import make_spec
from moescope_service.archive_messages import unpack_traces
from moescope_service.collector.archive_queue import ArchiveQueue
from moescope_service.collector.store import Kept
from moescope_service.messages import pack, unpack
from moescope_service.queries import ArchiveFigures
from tests.unit.test_store import make_kept

SPEC = make_spec()


class Silent:
    def wake(self) -> None:
        """Nobody sleeps."""

    def close(self, timeout_s: float = 1.0) -> None:
        """Nothing was open."""


def make_queue(**bounds: int) -> ArchiveQueue:
    return ArchiveQueue(lambda queue: Silent(), **bounds)


def size_of(kept: Kept) -> int:
    return kept.trace.size_bytes + 2048


def taken(queue: ArchiveQueue) -> list[int]:
    """Return the numbers of the traces of the next messages."""
    numbers = []
    while queue:
        frames = queue.take()
        assert frames is not None
        kind, values = unpack(frames)
        assert kind == "traces"
        spec, handed, traces = unpack_traces(values, frames)
        assert spec == SPEC
        assert len(handed) == len(traces)
        numbers += [one.number for one in handed]
    return numbers


def tell(queue: ArchiveQueue, kind: str, **values: Any) -> None:
    queue.on_message(pack(kind, **values))


def fill(queue: ArchiveQueue, count: int, first: int = 1) -> None:
    for uid in range(first, first + count):
        queue.add(make_kept(uid, f"r{uid}"), SPEC)


def test_what_is_not_published_is_handed_over_again_to_the_next_process():
    queue = make_queue()
    fill(queue, 3)
    assert taken(queue) == [1, 2, 3]
    tell(queue, "archived", last=1)
    queue.on_away()
    fill(queue, 1, first=4)
    queue.introduce()
    assert taken(queue) == [2, 3, 4]
    tell(queue, "archived", last=4)
    assert (queue.info.archived, queue.info.waiting) == (4, 0)


def test_what_was_published_before_a_connection_broke_is_not_handed_over_again():
    queue = make_queue()
    fill(queue, 3)
    taken(queue)
    queue.introduce()
    tell(queue, "archived", last=2)
    assert taken(queue) == [3]
    assert queue.info.archived == 2


def test_no_more_is_handed_over_than_the_process_may_hold():
    queue = make_queue(max_sent_bytes=2 * size_of(make_kept(1, "r1")))
    fill(queue, 5)
    assert taken(queue) == [1, 2]
    tell(queue, "archived", last=1)
    assert taken(queue) == [3]


@pytest.mark.parametrize(
    ("figures", "cause"),
    [
        (None, "away"),
        (ArchiveFigures(is_failing=True), "failing"),
        (ArchiveFigures(), "behind"),
    ],
)
def test_what_finds_no_room_is_counted_by_its_cause(figures, cause):
    queue = make_queue(max_waiting_bytes=2 * size_of(make_kept(1, "r1")))
    if figures is not None:
        tell(queue, "figures", figures=figures)
    fill(queue, 5)
    info = queue.info
    assert info.waiting == 2
    assert info.dropped == {"away": 0, "failing": 0, "behind": 0, "unwritable": 0} | {cause: 3}
    assert taken(queue) == [1, 2]


def test_a_trace_that_is_larger_than_the_queue_waits_alone():
    queue = make_queue(max_waiting_bytes=1, max_sent_bytes=1)
    fill(queue, 2)
    assert taken(queue) == [1]
    assert sum(queue.info.dropped.values()) == 1


def test_what_is_deleted_is_not_handed_over_and_forgotten_where_it_was():
    queue = make_queue()
    fill(queue, 2)
    assert taken(queue) == [1, 2]
    fill(queue, 2, first=3)
    queue.forget([1, 3])
    frames = queue.take()
    assert frames is not None
    assert unpack(frames) == ("forget", {"numbers": [1]})
    assert taken(queue) == [4]
    assert queue.info.waiting == 2


def test_an_id_deletes_what_waits():
    queue = make_queue()
    fill(queue, 2)
    assert queue.delete("r1", "somebody") == set()
    assert queue.delete("r1", None) == {1}
    assert taken(queue) == [2]


def test_what_cannot_be_written_is_counted():
    queue = make_queue()
    fill(queue, 2)
    taken(queue)
    tell(queue, "archived", last=2, is_lost=True)
    info = queue.info
    assert (info.archived, info.waiting, info.dropped["unwritable"]) == (0, 0, 2)


def test_what_the_archive_s_process_cannot_take_in_is_counted():
    queue = make_queue()
    fill(queue, 3)
    taken(queue)
    tell(queue, "lost", numbers=[2])
    info = queue.info
    assert (info.archived, info.waiting, info.dropped["unwritable"]) == (0, 2, 1)


def test_an_id_that_comes_late_reaches_what_waits():
    queue = make_queue()
    fill(queue, 1)
    assert taken(queue) == [1]
    fill(queue, 1, first=2)
    for _ in range(2):
        queue.add_id("late", [1, 2, 3])
    frames = queue.take()
    assert frames is not None
    assert unpack(frames) == ("alias", {"ids": [[1, "late"]]})
    frames = queue.take()
    assert frames is not None
    (handed,) = unpack_traces(unpack(frames)[1], frames)[1]
    assert handed.ids == ("late", "r2")
    assert not queue


def test_the_id_of_a_response_deletes_what_has_it_alone():
    queue = make_queue()
    queue.add(make_kept(1, "a", "x"), SPEC)
    queue.add(make_kept(2, "b", "x"), SPEC)
    queue.add(make_kept(3, "x"), SPEC)
    assert queue.delete("b", None, own_only=True) == {2}
    assert queue.delete("y", None) == set()
    assert queue.delete("x", None, own_only=True) == {3}
    assert queue.delete("x", None, own_only=True) == set()
    assert queue.delete("x", None) == {1}


def make_collector(queue: ArchiveQueue, **settings: Any) -> Bench:
    bench = Bench(**settings)
    bench.collector.state.archive = queue
    return bench


def test_an_id_that_comes_after_the_end_of_its_request_is_archived():
    queue = make_queue()
    bench = make_collector(queue)
    bench.run("a")
    bench.alias("late", "a-i")
    frames = queue.take()
    assert frames is not None
    (handed,) = unpack_traces(unpack(frames)[1], frames)[1]
    assert handed.ids == ("a", "a-i", "late")


def test_a_deletion_reaches_what_waits_and_is_not_kept_any_more():
    queue = make_queue()
    bench = make_collector(queue)
    for created_s in (1.0, 2.0):
        bench.run("a", created_s=created_s, internal_id=f"{created_s}-i", ids=["a"])
    for uid in [*bench.collector.state.store.ids.any("a")][:1]:
        bench.collector.state.store.remove(uid)
    assert queue.info.waiting == 2
    assert bench.delete("a").deleted == 2
    assert queue.info.waiting == 0
