import dataclasses
import io

import numpy as np
import pyarrow as pa
import pytest
from client_fakes import make_trace, same
from pyarrow import parquet

from moescope import FormatError, Source, arrow, version_runs
from moescope.analysis import Rows
from moescope.analyze import inputs

CASES = [
    {},
    {"weights": False},
    {"token_ids": False},
    {"missing": 0.4, "num_rows": 30},
    {"missing": 1.1},
    {"num_experts": 512, "top_k": 8},
    {"num_rows": 0},
    {"tokens": True, "num_rows": 30},
    {"tokens": True, "num_rows": 0},
    {"index": 3, "request_id": "a/b …"},
]


def blank(trace):
    """The trace with zeros where its ids and weights mean nothing."""
    for array in (trace.topk_ids, trace.topk_weights):
        if array is not None:
            array[~trace.present] = 0
    return trace


def through_parquet(traces):
    return parquet.read_table(io.BytesIO(arrow.dump_parquet(traces)))


def through_arrow(traces):
    return pa.ipc.open_stream(arrow.dump_arrow(traces)).read_all()


def test_there_is_one_row_a_token_and_the_last_is_not_routed():
    trace = make_trace(num_rows=5)
    rows = arrow.to_table([trace]).to_pylist()
    assert [row["position"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["token_id"] for row in rows] == trace.token_ids.tolist()
    assert [row["is_prompt"] for row in rows] == [True] * 3 + [False] * 3
    assert {(row["request_id"], row["index"]) for row in rows} == {("chatcmpl-1", 0)}
    names = [Source(value).name.lower() for value in trace.source]
    assert [row["source"] for row in rows] == [*names, None]
    assert [row["topk_ids"] for row in rows] == [*trace.topk_ids.tolist(), None]
    assert [row["topk_weights"] for row in rows] == [*trace.topk_weights.tolist(), None]


def test_a_missing_row_has_its_token_and_no_routing():
    trace = make_trace(num_rows=30, missing=0.5)
    rows = arrow.to_table([trace]).to_pylist()[:-1]
    for name in ("topk_ids", "topk_weights"):
        assert [row[name] is None for row in rows] == (~trace.present).tolist()
    assert [row["source"] == "missing" for row in rows] == (~trace.present).tolist()
    assert [row["token_id"] for row in rows] == trace.token_ids[:-1].tolist()


def test_every_row_that_is_there_says_which_weights_computed_it():
    trace = make_trace(num_rows=30, missing=0.5)
    rows = arrow.to_table([make_trace(1, versions=False), trace]).to_pylist()
    known = np.where(trace.present, trace.weights_version, None).tolist()
    assert [row["weights_version"] for row in rows] == [None] * 13 + [*known, None]


def test_a_table_of_before_there_were_versions_has_none():
    traces = [make_trace(), make_trace(1)]
    (first, _) = arrow.from_table(arrow.to_table(traces).drop_columns(["weights_version"]))
    assert same(first, dataclasses.replace(make_trace(), weights_versions=version_runs.unknown()))


def test_token_ids_that_are_kept_out_are_null():
    table = arrow.to_table([make_trace(), make_trace(1, token_ids=False)])
    assert table["token_id"].is_null().to_pylist() == [False] * 13 + [True] * 13


@pytest.mark.parametrize(("num_experts", "ids"), [(256, pa.uint8()), (257, pa.uint16())])
def test_the_columns(num_experts, ids):
    text = pa.dictionary(pa.int32(), pa.string())
    assert arrow.to_table([make_trace(num_experts=num_experts)]).schema.equals(
        pa.schema(
            [
                ("request_id", text),
                ("index", pa.int32()),
                ("position", pa.int32()),
                ("is_prompt", pa.bool_()),
                ("token_id", pa.int32()),
                ("source", pa.dictionary(pa.int8(), pa.string())),
                ("topk_ids", pa.list_(pa.list_(ids, 4))),
                ("topk_weights", pa.list_(pa.list_(pa.float32(), 4))),
                ("weights_version", pa.int32()),
            ]
        )
    )
    assert "topk_weights" not in arrow.to_table([make_trace(weights=False)]).column_names


@pytest.mark.parametrize("through", [arrow.to_table, through_arrow, through_parquet])
@pytest.mark.parametrize("case", CASES)
def test_a_table_gives_every_field_back(through, case):
    traces = [make_trace(seed, **case) for seed in range(3)]
    loaded = arrow.from_table(through(traces))
    assert all(same(blank(a), b) for a, b in zip(traces, loaded, strict=True))


def test_traces_of_different_lengths_and_requests():
    traces = [make_trace(n, num_rows=n, request_id=f"r{n % 2}", index=n) for n in (5, 0, 17, 1)]
    loaded = arrow.from_table(through_parquet(traces))
    assert all(same(a, b) for a, b in zip(traces, loaded, strict=True))


def test_weights_of_two_dtypes_are_as_exact_as_the_wider_one():
    half = make_trace()
    single = dataclasses.replace(half, topk_weights=half.topk_weights.astype(np.float32) / 3)
    found = arrow.from_table(arrow.to_table([half, single]))
    for one, trace in zip(found, (half, single), strict=True):
        assert one.topk_weights.dtype == np.float32
        np.testing.assert_array_equal(one.topk_weights, trace.topk_weights)


def test_a_request_of_several_choices_has_one_name_in_the_dictionary():
    table = arrow.to_table([make_trace(0), make_trace(1, index=1)])
    assert table["request_id"].chunk(0).dictionary.to_pylist() == ["chatcmpl-1"]


def test_traces_that_do_not_belong_together_are_refused():
    for other in ({"layers": (0, 1)}, {"top_k": 2}, {"weights": False}):
        with pytest.raises(FormatError, match="must share"):
            arrow.to_table([make_trace(), make_trace(**other)])
    with pytest.raises(FormatError, match="at least one"):
        arrow.to_table([])


def test_a_table_of_other_rows_than_were_written_is_refused():
    table = arrow.to_table([make_trace(0), make_trace(1, index=1)])
    backwards = pa.array(np.arange(len(table))[::-1])
    swapped = pa.concat_tables([table.slice(13), table.slice(0, 13)])
    for other in (table.slice(1), table.take(backwards), swapped):
        with pytest.raises(FormatError, match="left out, added or reordered"):
            arrow.from_table(other)


def test_a_table_that_is_none_of_ours_is_refused():
    table = arrow.to_table([make_trace()])
    optional = {"is_prompt", "weights_version"}
    for other in (
        table.replace_schema_metadata(None),
        table.replace_schema_metadata({"moescope": "[]"}),
        table.replace_schema_metadata({"moescope": "{"}),
        table.set_column(6, "topk_ids", table["position"]),
        *(table.drop_columns([name]) for name in table.column_names if name not in optional),
    ):
        with pytest.raises(FormatError, match="not a table of traces"):
            arrow.from_table(other)


@pytest.mark.parametrize("batch_rows", [2**16, 7])
@pytest.mark.parametrize("weights", [True, False])
def test_analyze_reads_parquet_some_rows_at_a_time(tmp_path, monkeypatch, batch_rows, weights):
    monkeypatch.setattr("moescope.analyze.batches.Model.batch_rows", batch_rows)
    traces = [
        make_trace(request_id=f"r{number}", missing=0.3, num_rows=25, weights=weights)
        for number in range(3)
    ]
    traces[1] = traces[1].page(5, 12)
    traces[2] = dataclasses.replace(traces[2], token_ids=None)
    (tmp_path / "a.parquet").write_bytes(arrow.dump_parquet(traces))
    batches = list(inputs.read(*inputs.find([str(tmp_path / "a.parquet")])))
    rows = Rows.joined([batch.rows for batch in batches])
    expected = Rows.joined([Rows.of(trace) for trace in traces])
    for name in ("topk_ids", "token_ids", "positions", "phases", "requests"):
        assert getattr(rows, name).tolist() == getattr(expected, name).tolist(), name
    if weights:
        assert (rows.topk_weights == expected.topk_weights).all()
    assert (rows.topk_weights is None) is not weights
    assert sum(batch.num_missing for batch in batches) == sum(
        int((~trace.present).sum()) for trace in traces
    )
    assert batches[-1].model.layers == tuple(traces[0].layers.tolist())


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: data[: len(data) // 2]])
def test_analyze_names_a_parquet_file_that_is_broken(tmp_path, damage):
    path = tmp_path / "a.parquet"
    path.write_bytes(damage(arrow.dump_parquet([make_trace()])))
    with pytest.raises(FormatError, match=r"a.parquet: no file of routes"):
        list(inputs.read(*inputs.find([str(path)])))
    parquet.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(FormatError, match=r"a.parquet: no file of routes: KeyError\(b'moescope'\)"):
        list(inputs.read(*inputs.find([str(path)])))
