"""What ended since a query before: each sequence once, in that order."""

from __future__ import annotations

import pytest
from builders import Bench

from moescope_service.collector import replies, store
from moescope_service.queries import EndedQuery


def names(reply):
    return [one.request_id for one in reply.sequences]


def ask(bench, before=None):
    """Ask for what came after a reply; without one where to go on."""
    if before is None:
        return bench.answered(EndedQuery())
    return bench.answered(EndedQuery(epoch=before.epoch, number=before.number))


@pytest.fixture
def bench():
    return Bench()


def test_each_once_in_the_order_in_which_they_ended(bench):
    bench.run("before")
    first = ask(bench)
    assert names(first) == []
    bench.start("long", handle=0)
    bench.run("short", handle=1, blocks=(2, 3), owner="alice")
    second = ask(bench, first)
    assert (names(second), second.owners, second.skipped) == (["short"], ["alice"], 0)
    bench.finish("long-i")
    bench.end(0)
    third = ask(bench, second)
    assert (names(third), third.owners) == (["long"], [None])
    assert third.sequences[0].status == "finished"
    assert names(ask(bench, third)) == []


def test_in_parts_where_they_are_many(bench, monkeypatch):
    monkeypatch.setattr(replies, "ENDED_AT_ONCE", 2)
    reply = ask(bench)
    for name in "abcde":
        bench.run(name)
    parts = []
    while not parts or reply.has_more:
        reply = ask(bench, reply)
        parts.append(names(reply))
    assert parts == [["a", "b"], ["c", "d"], ["e"]]


def test_one_that_is_gone_already_is_left_out(bench):
    first = ask(bench)
    bench.run("a")
    bench.run("b")
    bench.delete("a")
    reply = ask(bench, first)
    assert (names(reply), reply.skipped) == (["b"], 0)


def test_those_that_ended_too_long_ago_are_counted(monkeypatch):
    monkeypatch.setattr(store, "NUM_ADDED", 3)
    monkeypatch.setattr(replies, "NUM_ADDED", 3)
    bench = Bench()
    first = ask(bench)
    for name in "abcde":
        bench.run(name)
    reply = ask(bench, first)
    assert (names(reply), reply.skipped, reply.has_more) == (["c", "d", "e"], 2, False)


def test_of_another_collector_all_are_new():
    before = ask(Bench())
    bench = Bench(epoch=1)
    bench.run("a")
    reply = ask(bench, before)
    assert (names(reply), reply.epoch) == (["a"], 1)
