"""Whose a request is, to the collector: what an id finds, and for whom."""

from __future__ import annotations

import pytest
from builders import Bench

from moescope_service.queries import RecentQuery, WaitQuery

STRANGER = {"internal_id": "s-i", "ids": ["s-i", "s", "a"], "owner": "stranger"}
"""Of a request ``s`` whose client chose the response id ``a`` for its ``X-Request-Id``."""


@pytest.fixture
def bench():
    return Bench()


def status(bench, request_id, owner):
    return bench.routes(request_id, owner=owner)[0].status


class TestAResponsesOwnId:
    def test_beats_an_alias_that_is_newer(self, bench):
        bench.run("a", owner="me")
        bench.run("s", created_s=200.0, **STRANGER)
        assert [trace.request_id for trace in bench.traces("a")] == ["a"]
        assert [trace.request_id for trace in bench.traces("s")] == ["s"]

    def test_is_not_running_because_a_stranger_runs(self, bench):
        bench.run("a")
        bench.start("s", handle=1, blocks=(2, 3), **STRANGER)
        assert bench.status("a") == "finished"

    def test_runs_though_a_stranger_ended(self, bench):
        bench.start("a")
        bench.run("s", handle=1, blocks=(2, 3), **STRANGER)
        assert bench.status("a") == "running"

    def test_is_answered_when_it_ends_whoever_runs_on(self, bench):
        bench.start("a")
        bench.start("s", handle=1, blocks=(2, 3), **STRANGER)
        number = bench.wait("a", wait_s=5.0)
        assert bench.reply(number) is None
        bench.finish("a-i")
        bench.end()
        assert bench.reply(number) is not None
        assert bench.status("a") == "finished"

    def test_is_deleted_alone_and_then_the_alias_is(self, bench):
        bench.run("a")
        bench.run("s", **STRANGER)
        for left in (["s"], []):
            assert bench.delete("a").deleted == 1
            listed = bench.answered(RecentQuery(limit=9)).sequences
            assert [one.request_id for one in listed] == left


class TestOwners:
    @pytest.mark.parametrize(
        ("owner", "found"),
        [(None, "finished"), ("me", "finished"), ("", "unknown"), ("x", "unknown")],
    )
    def test_a_query_finds_what_its_owner_made(self, bench, owner, found):
        bench.run("a", owner="me")
        assert status(bench, "a", owner) == found
        listed = bench.answered(RecentQuery(limit=9, owner=owner)).sequences
        assert len(listed) == (found == "finished")

    @pytest.mark.parametrize(
        ("owner", "found"), [(None, "running"), ("me", "running"), ("", "unknown")]
    )
    def test_while_it_runs(self, bench, owner, found):
        bench.start("a", owner="me")
        assert status(bench, "a", owner) == found
        listed = bench.answered(RecentQuery(limit=9, owner=owner)).sequences
        assert len(listed) == (found == "running")

    @pytest.mark.parametrize(
        ("owner", "found"), [(None, "evicted"), ("me", "evicted"), ("x", "unknown")]
    )
    def test_after_it_made_room(self, owner, found):
        bench = Bench(memory_bytes=1)
        bench.run("a", owner="me")
        assert status(bench, "a", owner) == found

    @pytest.mark.parametrize(
        ("owner", "deleted", "others"), [(None, 1, 0), ("me", 1, 0), ("x", 0, 1), ("", 0, 1)]
    )
    def test_of_what_is_deleted(self, bench, owner, deleted, others):
        bench.run("a", owner="me")
        reply = bench.delete("a", owner)
        assert (reply.deleted, reply.others) == (deleted, others)
        assert bench.status("a") == ("unknown" if deleted else "finished")

    def test_a_request_without_a_key_is_nobodys(self, bench):
        bench.run("a")
        assert [status(bench, "a", owner) for owner in (None, "", "me")] == [
            "finished", "unknown", "unknown",
        ]  # fmt: skip

    def test_a_wait_is_not_for_strangers(self, bench):
        bench.start("s", **STRANGER)
        query = WaitQuery(request_ids=["a"], wait_s=5.0, owner="me")
        assert not bench.answered(query).is_refused  # at once
