import dataclasses
import io

import numpy as np
import orjson
import pyarrow as pa
import pytest
from client_fakes import make_trace, same
from pyarrow import parquet

from moescope import FormatError, RoutesBatch, arrow, batch, formats

TRACES = {
    "b": [make_trace(0, num_rows=5, request_id="b"), make_trace(1, request_id="b", index=1)],
    "a": [make_trace(2, request_id="a")],
}
STATUS = {"x": "running", "b": "finished", "y": "unknown", "a": "finished", "z": "evicted"}
BATCH = RoutesBatch(status=STATUS, traces=TRACES)


def test_npz_gives_the_batch_back():
    loaded = batch.load_npz(batch.dump_npz(BATCH))
    assert list(loaded.status.items()) == list(STATUS.items())
    assert list(loaded.traces) == ["b", "a"]
    for name, traces in TRACES.items():
        assert all(same(a, b) for a, b in zip(traces, loaded.traces[name], strict=True))
    assert loaded.failed == {"x": "running", "y": "unknown", "z": "evicted"}


READ = {
    "arrow": lambda table: pa.ipc.open_stream(arrow.arrow_bytes(table)).read_all(),
    "parquet": lambda table: parquet.read_table(io.BytesIO(arrow.parquet_bytes(table))),
}


@pytest.mark.parametrize("form", READ)
def test_a_table_gives_the_batch_back(form):
    whole = dataclasses.replace(BATCH, truncated=frozenset({"b"}), next_start={"a": 12})
    table = READ[form](batch.to_table(whole))
    loaded = batch.from_table(table)
    assert [*loaded.status.items()] == [*STATUS.items()]
    assert (loaded.truncated, loaded.next_start) == ({"b"}, {"a": 12})
    for name, traces in TRACES.items():
        assert all(same(a, b) for a, b in zip(traces, loaded.traces[name], strict=True))
    assert len(arrow.from_table(table)) == 3


@pytest.mark.parametrize("form", READ)
def test_a_table_of_no_trace_has_the_statuses(form):
    nothing = RoutesBatch(status={"x": "running"}, traces={})
    table = READ[form](batch.to_table(nothing))
    assert (len(table), arrow.from_table(table)) == (0, [])
    assert batch.from_table(table) == nothing


def test_a_table_has_a_trace_once_that_several_ids_find():
    shared = RoutesBatch(
        status={"a": "finished", "A": "finished"}, traces={"a": TRACES["a"], "A": TRACES["a"]}
    )
    table = batch.to_table(shared)
    assert len(table) == TRACES["a"][0].num_tokens
    loaded = batch.from_table(table)
    assert loaded.traces["a"][0] is loaded.traces["A"][0]


def test_a_table_of_traces_is_no_batch():
    with pytest.raises(FormatError, match="table of requests"):
        batch.from_table(arrow.to_table(TRACES["a"]))
    requests = [{"request_id": "a", "status": "finished", "traces": [7]}]
    table = arrow.to_table(TRACES["a"], requests=requests)
    with pytest.raises(FormatError, match="trace 7 of 1"):
        batch.from_table(table)


def test_npz_of_a_batch_is_that_of_its_traces():
    data = batch.dump_npz(BATCH)
    expected = [*TRACES["b"], *TRACES["a"]]
    assert all(same(a, b) for a, b in zip(expected, formats.load_npz(data), strict=True))
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        requests = orjson.loads(archive["requests"].tobytes())
    assert requests[1] == {"request_id": "b", "status": "finished", "traces": [0, 1]}


def test_json_has_the_results_in_the_order_asked():
    results = orjson.loads(batch.dump_json(BATCH))["results"]
    assert {one["request_id"]: one["status"] for one in results} == STATUS
    assert [len(one["traces"]) for one in results] == [0, 2, 0, 1, 0]
    loaded = formats.from_dict(results[1]["traces"][1])
    assert np.array_equal(loaded.topk_ids, TRACES["b"][1].topk_ids)


def test_older_requests_that_are_left_out_are_told_of():
    left_out = dataclasses.replace(BATCH, truncated=frozenset({"b"}))
    assert batch.load_npz(batch.dump_npz(left_out)).truncated == {"b"}
    assert batch.load_npz(batch.dump_npz(BATCH)).truncated == set()
    results = orjson.loads(batch.dump_json(left_out))["results"]
    assert [one["request_id"] for one in results if "truncated" in one] == ["b"]
    assert results[1]["truncated"] is True


def test_a_batch_without_traces():
    loaded = batch.load_npz(batch.dump_npz(RoutesBatch(status={"x": "running"}, traces={})))
    assert (loaded.status, loaded.traces) == ({"x": "running"}, {})


@pytest.mark.parametrize(
    "requests",
    [
        b"{",
        b"[1]",
        b'[{"request_id": "a", "status": "finished"}]',
        b'[{"request_id": "a", "status": "finished", "traces": [0, 1]}]',
        b'[{"request_id": "a", "status": "finished", "num_traces": 0}]',
        b'[{"request_id": "a", "status": "finished", "num_traces": "1"}]',
    ],
)
def test_a_broken_batch_is_a_format_error(requests):
    data = formats.dump_npz([make_trace()], requests=np.frombuffer(requests, np.uint8))
    with pytest.raises(FormatError, match="requests"):
        batch.load_npz(data)


def test_traces_alone_are_no_batch():
    with pytest.raises(FormatError, match="requests"):
        batch.load_npz(formats.dump_npz([make_trace()]))


def test_ids_of_the_same_traces_have_them_once():
    (trace,) = TRACES["a"]
    found = batch.RoutesBatch(
        status=dict.fromkeys(("a", "alias"), "finished"),
        traces={"a": [trace], "alias": [trace]},
    )
    assert len(formats.load_npz(batch.dump_npz(found))) == 1
    loaded = batch.load_npz(batch.dump_npz(found))
    assert loaded.traces["a"][0] is loaded.traces["alias"][0]
    first, second = orjson.loads(batch.dump_json(found))["results"]
    assert len(first["traces"]) == 1
    assert (second["same_as"], "traces" in second) == ("a", False)


def test_a_page_says_where_the_next_one_starts():
    found = dataclasses.replace(BATCH, next_start={"a": 7})
    assert batch.load_npz(batch.dump_npz(found)).next_start == {"a": 7}
    results = orjson.loads(batch.dump_json(found))["results"]
    assert [one.get("next_start") for one in results if one["request_id"] == "a"] == [7]
