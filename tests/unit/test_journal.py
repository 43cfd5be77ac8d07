"""What the collector has to be told of requests: kept until it is sent, and in order."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import make_register

from moescope_service.frontend import journal as journal_module
from moescope_service.frontend import outbox as outbox_module
from moescope_service.frontend.journal import Journal
from moescope_service.frontend.outbox import Outbox
from moescope_service.ids import MAX_ID_CHARS, id_hash, short_id
from moescope_service.messages import RequestKey, pack, unpack


def register(journal, name, request="", created_s=1.0, num_tokens=0, **changes):
    """Tell of a sequence; returns the message."""
    message = make_register(name, **{"ids": [f"{name}-i", request or name], **changes})
    frames = pack("register", [np.zeros(num_tokens, np.int32)], **dataclasses.asdict(message))
    journal.register(f"{name}-i", RequestKey(request or name, created_s), frames)
    return frames


def finish(journal, name, num_tokens=0):
    frames = pack("finish", [np.zeros(num_tokens, np.int32)], internal_id=f"{name}-i", reason="s")
    journal.finish(f"{name}-i", frames)
    return frames


def alias(journal, alias, *names):
    frames = pack("alias", internal_ids=[f"{name}-i" for name in names], alias=alias)
    journal.alias([f"{name}-i" for name in names], alias, frames)
    return frames


def taken(journal):
    return list(iter(journal.take, None))


def introduced(journal):
    begin = journal.introduce()
    assert unpack(begin) == ("server", {})
    return taken(journal)


@pytest.fixture
def journal():
    return Journal()


def test_messages_are_taken_in_order_once(journal):
    told = [register(journal, "a"), register(journal, "b"), alias(journal, "x", "a")]
    told += [finish(journal, "a"), finish(journal, "b")]
    assert taken(journal) == told
    assert not journal.has_unsent
    assert (len(journal), journal.size_bytes) == (0, 0)


def test_a_new_collector_is_told_of_what_runs_and_of_nothing_else(journal):
    told = [register(journal, name) for name in ("runs", "over", "deleted")]
    told.append(alias(journal, "other", "runs"))
    finish(journal, "over")
    taken(journal)
    journal.forget(["deleted-i", "unknown"])
    assert introduced(journal) == [told[0], told[3]]
    assert [f"{name}-i" in journal for name in ("runs", "over", "deleted")] == [True, False, False]
    finish(journal, "runs")
    finish(journal, "deleted")  # the collector that is there still waits for it
    assert len(taken(journal)) == 2
    assert (len(journal), journal.size_bytes) == (0, 0)


def test_what_ended_and_was_not_told_is_told_to_the_next_collector(journal):
    told = [register(journal, "a")]
    taken(journal)
    told += [finish(journal, "a"), register(journal, "b"), finish(journal, "b")]
    told += [alias(journal, "x", "b")]
    assert introduced(journal) == told
    assert (len(journal), journal.size_bytes) == (0, 0)


def test_ended_choices_of_a_request_that_runs_are_told_again(journal):
    told = [register(journal, name, "r") for name in ("a", "b", "c")]
    # The same id, but another request: it does not hold the first.
    register(journal, "later", "r", created_s=2.0)
    told.append(finish(journal, "a"))
    finish(journal, "later")
    taken(journal)
    assert introduced(journal) == told
    journal.forget(["b-i"])
    finish(journal, "c")
    taken(journal)
    assert (len(journal), journal.size_bytes) == (0, 0)
    assert "a-i" not in journal


def test_an_alias_that_comes_after_the_end_is_told(journal):
    told = [register(journal, "a"), finish(journal, "a")]
    assert taken(journal) == told
    told = [alias(journal, "x", "a")]
    assert taken(journal) == told
    assert journal.size_bytes == 0


def lost_of(frames):
    kind, values = unpack(frames)
    assert kind == "lost"
    return values["count"], {key for key, _ in values["lost"]}


def hashes(*ids):
    return {id_hash(one) for one in ids}


def test_beyond_its_bytes_what_ended_is_given_up_and_said():
    journal = Journal(max_bytes=100_000)
    kept = [register(journal, "runs", num_tokens=50_000)]  # already more than that
    register(journal, "a", num_tokens=1000)
    register(journal, "b", keep=False)
    finish(journal, "a")
    finish(journal, "b")
    alias(journal, "x", "a")  # the response's header comes last
    kept.append(finish(journal, "runs"))
    register(journal, "c")
    kept_bytes = journal.size_bytes
    assert kept_bytes < 210_000
    # What ran was given up too: nothing of it was sent.
    count, lost = lost_of(taken(journal)[-1])
    assert (count, lost) == (2, hashes("a", "a-i", "x", "runs", "runs-i"))
    assert not journal.has_unsent
    *told, lost = introduced(journal)  # a new collector does not know it
    assert len(told) == 1
    assert lost_of(lost) == (0, hashes("a", "a-i", "x", "runs", "runs-i"))


def test_what_the_collector_knows_is_told_to_its_end(journal):
    journal = Journal(max_bytes=0)
    register(journal, "a")
    assert taken(journal)
    told = finish(journal, "a", num_tokens=10**6)
    assert taken(journal) == [told]
    assert journal.size_bytes == 0


def test_a_request_is_given_up_as_a_whole_or_not_at_all():
    journal = Journal(max_bytes=0)
    first = register(journal, "a", "r")
    assert journal.take() == first
    told = [register(journal, "b", "r"), finish(journal, "b"), finish(journal, "a")]
    assert taken(journal) == told
    for name in ("c", "d"):
        register(journal, name, "s")
    finish(journal, "c")
    assert len(journal) == 1
    finish(journal, "d")
    assert (len(journal), journal.size_bytes) == (0, 0)
    assert lost_of(journal.take())[0] == 2


def test_ids_of_given_up_requests_are_bounded(monkeypatch):
    monkeypatch.setattr(journal_module, "MAX_LOST", 4)
    journal = Journal(max_bytes=-1)
    for number in range(5):
        register(journal, str(number))
        finish(journal, str(number))
    assert lost_of(journal.take()) == (5, hashes("3", "3-i", "4", "4-i"))


class TestReceipts:
    """A link may break while the collector lives on: what was sent need not have arrived."""

    @pytest.fixture
    def journal(self):
        journal = Journal(name="one")
        assert unpack(journal.introduce()) == ("server", {"name": "one"})
        return journal

    def test_what_has_no_receipt_is_told_again_in_order(self, journal):
        told = [register(journal, "a"), finish(journal, "a"), finish(journal, "unknown")]
        assert taken(journal) == told
        journal.received(1)
        told += [register(journal, "b")]
        journal.introduce()
        assert taken(journal) == told  # all of a request, though its first message arrived
        journal.received(4)
        assert len(journal) == 1
        told = [told[3], finish(journal, "b")]
        journal.introduce()
        assert taken(journal) == told
        journal.received(2)
        assert (len(journal), journal.size_bytes) == (0, 0)

    def test_what_is_over_is_kept_until_its_receipt(self, journal):
        for name in ("a", "b"):
            register(journal, name)
            finish(journal, name)
        taken(journal)
        size_bytes = journal.size_bytes
        journal.received(1)
        assert (len(journal), journal.size_bytes) == (2, size_bytes)
        journal.received(3)
        assert len(journal) == 1
        journal.received(9)  # of what it never sent
        assert (len(journal), journal.size_bytes) == (0, 0)

    def test_a_deleted_one_is_not_told_again(self, journal):
        register(journal, "a")
        kept = [register(journal, "b")]
        taken(journal)
        journal.forget(["a-i"])
        journal.received(2)
        journal.introduce()
        assert taken(journal) == kept
        journal.forget(["b-i"])
        assert len(journal) == 0
        journal.received(1)
        assert journal.size_bytes == 0


class TestOutbox:
    def test_registrations_go_first_and_metrics_before_other_queries(self):
        outbox = Outbox()
        assert outbox.query(1, [b"routes"])
        assert outbox.query(2, [b"metrics"], is_urgent=True)
        told = [register(outbox, "a"), finish(outbox, "a")]
        assert [*told, [b"metrics"], [b"routes"]] == list(iter(outbox.take, None))
        assert not outbox

    def test_queries_have_a_number(self, monkeypatch):
        monkeypatch.setattr(outbox_module, "MAX_QUERIES", 3)
        outbox = Outbox()
        assert [outbox.query(n, [b"q"]) for n in range(4)] == [True, True, True, False]
        assert outbox.query(5, [b"m"], is_urgent=True)
        outbox.withdraw(1, [b"c"])  # it was not sent: there is nothing to take back
        assert outbox.query(6, [b"q"])
        register(outbox, "a")
        assert len(list(iter(outbox.take, None))) == 5

    def test_queries_have_bytes(self):
        outbox = Outbox()
        piece = bytes(outbox_module.MAX_QUERY_BYTES // 2)
        assert [outbox.query(n, [piece]) for n in range(4)] == [True, True, True, False]
        assert outbox.take() == [piece]
        assert outbox.take() == [piece]
        assert outbox.query(5, [piece])

    def test_one_that_was_sent_is_taken_back(self):
        outbox = Outbox()
        outbox.query(1, [b"q"])
        assert outbox.take() == [b"q"]
        outbox.withdraw(1, [b"c"])
        assert outbox.take() == [b"c"]

    def test_the_next_collector_gets_no_queries_of_before(self):
        outbox = Outbox()
        outbox.query(1, [b"q"])
        told = register(outbox, "a")
        outbox.drop_queries()
        assert outbox.introduce() == [pack("server")]
        assert list(iter(outbox.take, None)) == [told]


class TestShortId:
    @pytest.mark.parametrize("text", ["", "cmpl-1", "ä" * MAX_ID_CHARS])
    def test_one_that_is_short_stays(self, text):
        assert short_id(text) == text

    def test_a_long_one_is_cut_and_hashed(self):
        text = "x" * 512 + "1"
        short = short_id(text)
        assert short == "x" * 448 + "...45b8ecc4d7316aa3b6ee64e1e0c7ea6e"
        assert short != short_id("x" * 512 + "2")
        assert short_id(short) == short
        assert len(short_id("ä" * 10**6)) == 483
