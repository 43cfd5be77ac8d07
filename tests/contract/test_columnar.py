"""``/routes`` as Arrow and Parquet, read by what people read them with."""

from __future__ import annotations

import io
import sys

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import polars.testing
import pyarrow as pa
import pytest
from pyarrow import parquet

from moescope import arrow, batch

from .fake_engine import OUTPUT, PROMPT, rows_of

NUM_TOKENS = len(PROMPT) + len(OUTPUT)
READ = {
    "arrow": lambda content: pa.ipc.open_stream(content).read_all(),
    "parquet": lambda content: parquet.read_table(io.BytesIO(content)),
}
MEDIA_TYPES = {
    "arrow": "application/vnd.apache.arrow.stream",
    "parquet": "application/vnd.apache.parquet",
}


@pytest.fixture(scope="module")
def get(deployment):
    deployment.complete("columnar", n=2)

    def get(form, **params):
        params["format"] = form
        answer = deployment.http.get("/routes/cmpl-columnar", params=params)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == MEDIA_TYPES[form]
        return answer.content

    return get


@pytest.mark.parametrize("form", READ)
def test_the_traces(get, form):
    traces = arrow.from_table(READ[form](get(form)))
    assert [(trace.index, trace.complete) for trace in traces] == [(0, True), (1, True)]
    for trace in traces:
        ids, weights = rows_of(0, NUM_TOKENS - 1)
        np.testing.assert_array_equal(trace.topk_ids, ids)
        np.testing.assert_array_equal(trace.topk_weights, weights)
        assert trace.token_ids.tolist() == PROMPT + OUTPUT


@pytest.mark.parametrize("form", READ)
def test_a_part(get, form):
    table = READ[form](get(form, layers="3", index=1, weights="false"))
    assert "topk_weights" not in table.column_names
    (trace,) = arrow.from_table(table)
    assert (trace.index, trace.layers.tolist()) == (1, [3])


@pytest.mark.parametrize("form", READ)
@pytest.mark.usefixtures("get")
def test_a_batch(deployment, client, form):
    """One table of all traces, and what is said of each request in its metadata."""
    asked = ["cmpl-columnar", "nobody's"]
    for more in ({}, {"layers": "3", "weights": False}, {"start": 2, "limit": 3}):
        body = {"request_ids": asked, "format": form, **more}
        answer = deployment.http.post("/routes/batch", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == MEDIA_TYPES[form]
        table = READ[form](answer.content)
        found = batch.from_table(table)
        assert found.status == {"cmpl-columnar": "finished", "nobody's": "unknown"}
        npz = deployment.http.post("/routes/batch", json={**body, "format": "npz"}).content
        expected = batch.load_npz(npz)
        assert found.next_start == expected.next_start
        assert len(table) == (6 if "limit" in more else 2 * NUM_TOKENS)
        for one, other in zip(
            found.traces["cmpl-columnar"], expected.traces["cmpl-columnar"], strict=True
        ):
            assert one.to_arrow().equals(other.to_arrow())
    whole = client.routes_batch(asked).traces["cmpl-columnar"]
    assert [trace.complete for trace in whole] == [True, True]


@pytest.mark.parametrize("form", READ)
def test_a_batch_without_traces(deployment, form):
    body = {"request_ids": ["nobody's"], "format": form}
    content = deployment.http.post("/routes/batch", json=body).content
    assert batch.from_table(READ[form](content)).status == {"nobody's": "unknown"}


@pytest.mark.parametrize("long", [False, True], ids=["wide", "long"])
def test_a_trace_in_pandas_and_polars_is_as_they_read_it_from_parquet(client, get, tmp_path, long):
    get("parquet")
    trace, _ = client.routes("cmpl-columnar")
    parquet.write_table(trace.to_arrow(long=long), tmp_path / "trace.parquet")
    pd.testing.assert_frame_equal(
        trace.to_pandas(long=long), pd.read_parquet(tmp_path / "trace.parquet")
    )
    polars.testing.assert_frame_equal(
        trace.to_polars(long=long), pl.read_parquet(tmp_path / "trace.parquet")
    )


def test_selections_in_polars(client, get):
    get("parquet")
    trace, _ = client.routes("cmpl-columnar")
    frame = trace.to_polars(long=True)
    counted = frame.group_by("layer", "expert").len()
    expected = trace.counts()
    places = {layer: place for place, layer in enumerate(trace.layers.tolist())}
    assert sum(counted["len"]) == expected.sum()
    for layer, expert, number in counted.iter_rows():
        assert expected[places[layer], expert] == number


def test_parquet_in_duckdb(get, tmp_path):
    path = tmp_path / "routes.parquet"
    path.write_bytes(get("parquet"))
    rows = duckdb.sql(
        f"SELECT token_id, source, topk_ids, topk_weights FROM '{path}' "
        "WHERE index = 1 ORDER BY position"
    ).fetchall()
    check(rows)
    ((total,),) = duckdb.sql(f"SELECT sum(topk_weights[2][1]) FROM '{path}'").fetchall()
    assert total == pytest.approx(2 * rows_of(0, NUM_TOKENS - 1)[1][:, 1, 0].sum())


def test_parquet_in_pandas(get):
    frame = pd.read_parquet(io.BytesIO(get("parquet")))
    frame = frame[frame["index"] == 1].sort_values("position")
    check(
        [
            (row.token_id, *(none_or_list(v) for v in (row.source, row.topk_ids, row.topk_weights)))
            for row in frame.itertuples()
        ]
    )


def none_or_list(value):
    if isinstance(value, np.ndarray):
        return np.stack(value).tolist()
    return None if pd.isna(value) else value


def check(rows):
    """Rows of (token id, source, ids, weights): all of one choice, the last one not routed."""
    ids, weights = rows_of(0, NUM_TOKENS - 1)
    assert [row[0] for row in rows] == PROMPT + OUTPUT
    assert [row[1] for row in rows] == ["computed"] * (NUM_TOKENS - 1) + [None]
    assert [row[2] for row in rows] == [*ids.tolist(), None]
    assert [row[3] for row in rows] == [*weights.tolist(), None]


def test_the_arrow_stream_in_duckdb_and_pandas(get):
    content = get("arrow")
    traces = pa.ipc.open_stream(content).read_all()
    ((count,),) = duckdb.sql("SELECT count(*) FROM traces").fetchall()
    assert count == len(pa.ipc.open_stream(content).read_pandas()) == 2 * NUM_TOKENS == len(traces)


def test_the_arrow_stream_is_no_arrow_file(get, tmp_path):
    """What reads Feather does not read it: the documentation says so."""
    path = tmp_path / "routes.arrow"
    path.write_bytes(get("arrow"))
    with pytest.raises(pa.ArrowInvalid, match="Not an Arrow file"):
        pa.ipc.open_file(path)
    with pytest.raises(pa.ArrowInvalid, match="Not a Feather"):
        pd.read_feather(path)
    with pytest.raises(duckdb.Error):
        duckdb.sql(f"SELECT * FROM '{path}'")


def test_the_arrow_stream_in_polars(get):
    content = get("arrow")
    assert pl.read_ipc_stream(content).height == 2 * NUM_TOKENS
    for read in (pl.read_ipc, pl.scan_ipc):
        with pytest.raises(pl.exceptions.ComputeError):
            read(io.BytesIO(content)).lazy().collect()


@pytest.mark.parametrize("form", READ)
@pytest.mark.usefixtures("get")
def test_without_pyarrow_the_server_says_what_to_install(deployment, monkeypatch, form):
    monkeypatch.delitem(sys.modules, "moescope.arrow")
    monkeypatch.delattr("moescope.arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    body = {"request_ids": ["cmpl-columnar"], "format": form}
    for answer in (
        deployment.http.get("/routes/cmpl-columnar", params={"format": form}),
        deployment.http.post("/routes/batch", json=body),
    ):
        assert answer.status_code == 501
        assert "pip install pyarrow" in answer.json()["error"]["message"]
