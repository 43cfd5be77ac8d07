"""Which tokens went to an expert: cut out of the store page by page, and counted."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
from builders import Bench, make_rows, make_spec

from moescope import RouteTrace
from moescope.trace import Source
from moescope_service.collector import layer_rows
from moescope_service.expert_tokens import ExpertTokens
from moescope_service.queries import LayerQuery

SPEC = make_spec()
LAYER = SPEC.layers[1]


def pages_of(bench, **query):
    """All pages of a layer's rows."""
    query = LayerQuery(layer=LAYER, **query)
    while True:
        reply = bench.answered(query)
        yield reply
        if reply.next_before is None:
            return
        query = dataclasses.replace(query, before=reply.next_before, start=reply.next_start)


def rows_of(pages):
    """(request, position) of every row, in order."""
    return [
        (trace.request_id, trace.start + row)
        for reply in pages
        for trace in reply.traces()
        for row in range(trace.num_rows)
    ]


ALL_ROWS = [(name, row) for name in "cba" for row in range(5)]


@pytest.fixture
def bench():
    """Three requests of five rows."""
    made = Bench()
    for name, owner in (("a", "alice"), ("b", "bob"), ("c", "alice")):
        made.run(name, owner=owner)
    return made


class TestPages:
    @pytest.mark.parametrize("page_bytes", [1, 8, 20, 50, 90, 1000])
    def test_have_every_row_once_the_newest_trace_first(self, bench, monkeypatch, page_bytes):
        monkeypatch.setattr(layer_rows, "PAGE_BYTES", page_bytes)
        assert rows_of(pages_of(bench)) == ALL_ROWS

    def test_hold_few_traces_each(self, bench, monkeypatch):
        monkeypatch.setattr(layer_rows, "AT_ONCE", 2)
        assert [len(reply.traces()) for reply in pages_of(bench)] == [2, 1]

    def test_have_one_layer_and_no_weights(self, bench):
        (reply,) = pages_of(bench)
        for trace in reply.traces():
            assert (trace.layers.tolist(), trace.topk_weights) == ([LAYER], None)
            np.testing.assert_array_equal(trace.topk_ids[:, 0], make_rows(0, 5)[0][:, 1])
            assert trace.token_ids.tolist() == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize(("owner", "found"), [("alice", "ca"), ("bob", "b"), ("", "")])
    def test_are_of_an_owner(self, bench, owner, found):
        rows = rows_of(pages_of(bench, owner=owner))
        assert rows == [(name, row) for name in found for row in range(5)]

    def test_go_on_behind_a_trace_that_was_deleted_meanwhile(self, bench, monkeypatch):
        monkeypatch.setattr(layer_rows, "PAGE_BYTES", 30)
        pages = pages_of(bench)
        first = rows_of([next(pages)])
        assert 0 < len(first) < 5
        bench.delete("c")
        assert first + rows_of(pages) == [("c", row) for row in range(len(first))] + ALL_ROWS[5:]

    def test_of_a_layer_without_experts_are_empty(self, bench):
        reply = bench.answered(LayerQuery(layer=99))
        assert (reply.traces(), reply.next_before, reply.spec.layers) == ([], None, SPEC.layers)

    def test_before_any_worker_told_of_itself(self):
        assert Bench(spec=False).answered(LayerQuery(layer=0)).spec is None


def make_trace(rng, name, *, start=0, num_rows=40, index=0):
    """Rows of one layer, some of them missing, of few tokens and experts."""
    missing = rng.random(num_rows) < 0.1
    return RouteTrace(
        request_id=name, index=index, model="tiny", lora=None, layers=np.array([3], np.int32),
        topk_ids=np.argsort(rng.random((num_rows, 1, 6)), -1)[..., :2].astype(np.uint8),
        topk_weights=None, num_experts=6, num_hidden_layers=5, start=start,
        source=np.where(missing, Source.MISSING, Source.COMPUTED).astype(np.uint8),
        token_ids=rng.integers(0, 9, num_rows).astype(np.int32), prompt_len=4, num_tokens=1000,
        cached_len=0, finish_reason="stop", complete=False, created_s=1.0,
    )  # fmt: skip


def plainly(traces, expert):
    """Count row by row."""
    counts, totals, places = collections.Counter(), collections.Counter(), {}
    for trace in traces:
        for row in range(trace.num_rows):
            token = int(trace.token_ids[row])
            if trace.source[row] == Source.MISSING:
                continue
            totals[token] += 1
            if expert in trace.topk_ids[row, 0]:
                counts[token] += 1
                places.setdefault(token, (trace.request_id, trace.index, trace.start + row))
    order = sorted(counts, key=lambda token: (-counts[token], token))
    return [(token, counts[token], totals[token], places[token]) for token in order]


class TestExpertTokens:
    @pytest.mark.parametrize("expert", range(6))
    @pytest.mark.parametrize("limit", [3, 100])
    def test_counts_as_a_plain_loop_does(self, expert, limit):
        rng = np.random.default_rng(expert)
        traces = [make_trace(rng, f"r{n // 2}", start=40 * (n % 2)) for n in range(6)]
        counted = ExpertTokens(expert, 200, 10**6)
        counted.add(traces[:2])
        counted.add(traces[2:])
        found = counted.top(limit)
        assert [
            (one.token_id, one.count, one.total, (one.request_id, one.index, one.position))
            for one in found
        ] == plainly(traces, expert)[:limit]
        assert [one.share for one in found] == [one.count / one.total for one in found]
        present = sum(int(trace.present.sum()) for trace in traces)
        assert (counted.num_rows, counted.num_missing) == (present, 240 - present)
        assert counted.num_requests == 3
        assert counted.num_selected == sum(count for _, count, _, _ in plainly(traces, expert))

    def test_takes_so_many_requests_with_all_their_choices(self):
        rng = np.random.default_rng(0)
        traces = [make_trace(rng, name, index=n) for name in "abc" for n in range(2)]
        counted = ExpertTokens(0, 2, 10**6)
        counted.add(traces)
        assert (counted.num_requests, counted.is_full) == (2, True)
        assert counted.num_rows + counted.num_missing == 4 * 40

    def test_takes_no_more_rows_than_are_enough(self):
        rng = np.random.default_rng(0)
        counted = ExpertTokens(0, 200, 60)
        counted.add([make_trace(rng, name) for name in "abc"])
        assert (counted.num_requests, counted.is_full) == (2, True)

    def test_has_nothing_of_nothing(self):
        counted = ExpertTokens(0, 200, 60)
        counted.add([])
        assert (counted.top(5), counted.num_rows, counted.is_full) == ([], 0, False)

    def test_of_an_expert_that_no_token_went_to(self):
        counted = ExpertTokens(77, 200, 1000)
        counted.add([make_trace(np.random.default_rng(0), "a")])
        assert (counted.top(5), counted.num_selected) == ([], 0)

    def test_refuses_rows_without_token_ids(self):
        trace = dataclasses.replace(make_trace(np.random.default_rng(0), "a"), token_ids=None)
        with pytest.raises(ValueError, match="'a' has no token ids"):
            ExpertTokens(0, 200, 60).add([trace])
