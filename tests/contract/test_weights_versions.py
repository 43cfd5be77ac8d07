"""Which weights computed a row: from the worker's count to every format that a client reads."""

from __future__ import annotations

import io

import numpy as np
import orjson
import pyarrow as pa
import pytest
from vllm.v1.engine import FinishReason

from moescope import Client, arrow, formats
from moescope.version_runs import MIXED
from tests.waiting import wait_until

from .deployment import Deployment
from .fake_engine import OUTPUT, PROMPT

RUNS = [[0, 0], [5, 1], [6, MIXED], [7, 2]]
"""Of a prompt of five tokens and four more, which 0, 1, no one and 2 computed."""


def change_weights(engine):
    """Do what vLLM's worker does when an update ends."""
    engine.weights._count()


@pytest.fixture(scope="module")
def deployment():
    """A request runs while the weights are updated, twice."""
    with Deployment().running() as deployment:
        engine, frontend = deployment.engine, deployment.frontend
        engine.weights._on_change = engine.recorder.tell_weights
        (name,) = frontend.add("updated")
        running = engine.start(name)
        change_weights(engine)
        engine.step([(running, 1)])
        engine.weights._start()
        engine.step([(running, 1)])
        engine.weights._update = None
        change_weights(engine)
        engine.step([(running, 2)])
        frontend.put(name, [*OUTPUT, *OUTPUT][:5], FinishReason.STOP)
        engine.step(finished=[running])
        yield deployment


def get(deployment, **params):
    answer = deployment.http.get("/routes/updated", params=params)
    assert answer.status_code == 200, answer.text
    return answer


def test_the_client_has_them(deployment):
    with Client(deployment.url) as client:
        (trace,) = client.routes("updated")
        assert len(PROMPT) == 5
        assert trace.weights_versions.tolist() == RUNS
        assert trace.weights_version.tolist() == [0] * 5 + [1, MIXED, 2, 2]
        (later,) = client.routes("updated", start=6)
        assert later.weights_versions.tolist() == RUNS[2:]
        assert (
            client.routes_batch(["updated"]).traces["updated"][0].weights_versions.tolist() == RUNS
        )


def test_json_has_pairs_also_in_pages(deployment):
    (values,) = get(deployment).json()["traces"]
    assert values["weights_versions"] == RUNS
    (page,) = get(deployment, start=3, limit=3).json()["traces"]
    assert page["weights_versions"] == [[3, 0], [5, 1]]


def test_npz_has_an_array(deployment):
    with np.load(io.BytesIO(get(deployment, format="npz").content)) as arrays:
        assert arrays["weights_versions"].tolist() == RUNS
        assert arrays["version_splits"].tolist() == [0, len(RUNS)]


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_tables_have_a_column(deployment, form):
    data = get(deployment, format=form).content
    read = pa.ipc.open_stream if form == "arrow" else pa.parquet.ParquetFile
    table = read(pa.BufferReader(data))
    table = table.read_all() if form == "arrow" else table.read()
    assert table["weights_version"].to_pylist() == [0] * 5 + [1, MIXED, 2, 2, None]
    assert arrow.from_table(table)[0].weights_versions.tolist() == RUNS


def test_json_lines_say_it_of_each_row(deployment):
    _, *routes = map(orjson.loads, get(deployment, format="jsonl", layers="1").iter_lines())
    assert [route["weights_version"] for route in routes] == [0] * 5 + [1, MIXED, 2, 2]


def test_npy_is_as_it_was(deployment):
    with Client(deployment.url) as client:
        (trace,) = client.routes("updated")
    assert get(deployment, format="npy").content == formats.dump_npy(trace)


STALE = [True] * 7 + [False] * 2
"""Where the present weights are 2: see `RUNS`."""


@pytest.mark.parametrize("form", ["json", "npz"])
def test_stale_rows_are_missing_on_request(deployment, form):
    def traces(**params):
        content = get(deployment, format=form, **params).content
        if form == "npz":
            return formats.load_npz(content)
        return [formats.from_dict(values) for values in orjson.loads(content)["traces"]]

    (whole,) = traces()
    assert whole.complete
    for params, missing in (
        ({"max_staleness": 0}, STALE),
        ({"max_staleness": 1}, [True] * 5 + [False, True, False, False]),
        ({"max_staleness": 2}, [False] * 6 + [True] + [False] * 2),
        ({"weights_version": 0}, [False] * 5 + [True] * 4),
        ({"weights_version": 7}, [True] * 9),
        ({"weights_version": 1, "max_staleness": 0}, [True] * 9),
    ):
        (trace,) = traces(**params)
        assert (~trace.present).tolist() == missing, params
        assert not trace.complete
        assert trace.weights_versions.tolist() == RUNS
        (page,) = traces(**params, start=7)
        assert ((~page.present).tolist(), page.complete) == (missing[7:], False)


def test_the_client_asks_for_rows_that_are_new_enough(deployment):
    with Client(deployment.url) as client:
        (trace,) = client.routes("updated", max_staleness=0)
        (first,) = client.routes("updated", weights_version=0)
        batch = client.routes_batch(["updated"], max_staleness=0)
    assert (~trace.present).tolist() == STALE
    assert (~batch.traces["updated"][0].present).tolist() == STALE
    assert first.present.tolist() == [True] * 5 + [False] * 4


def test_a_batch_in_json(deployment):
    body = {"request_ids": ["updated"], "weights_version": 2}
    answer = deployment.http.post("/routes/batch", json=body)
    (values,) = answer.json()["results"][0]["traces"]
    assert [source == "missing" for source in values["source"]] == STALE


def test_npy_refuses_stale_rows_or_fills_them(deployment):
    params = {"format": "npy", "max_staleness": 0}
    answer = deployment.http.get("/routes/updated", params=params)
    assert answer.status_code == 409
    assert "is incomplete (coverage 0.222)" in answer.text
    array = np.load(io.BytesIO(get(deployment, **params, fill="-1").content))
    assert (array[:, 1, 0] == -1).tolist() == STALE


@pytest.mark.parametrize("name", ["weights_version", "max_staleness"])
@pytest.mark.parametrize("value", ["-1", "x", "1.5", str(2**31)])
def test_a_number_that_cannot_be_is_refused(deployment, name, value):
    answer = deployment.http.get("/routes/updated", params={name: value})
    assert answer.status_code in {400, 422}
    assert name in answer.text
    body = {"request_ids": ["updated"], name: value}
    answer = deployment.http.post("/routes/batch", json=body)
    assert answer.status_code in {400, 422}
    assert name in answer.text


def test_the_list_and_the_metric_say_which_are_stale(deployment):
    with Client(deployment.url) as client:
        (one,) = client.recent().sequences
    assert (one.oldest_weights_version, one.newest_weights_version) == (0, 2)
    assert 'moescope_trace_rows_stale_total{model_name="tiny"} 7.0' in (
        deployment.http.get("/metrics").text
    )


def test_info_has_the_present_number_even_before_the_next_step(deployment):
    with Client(deployment.url) as client:
        before = client.info().weights_version
        change_weights(deployment.engine)
        wait_until(lambda: client.info().weights_version == before + 1, "the number is there")


def test_a_server_that_only_counts_has_none():
    with Deployment(mode="counts").running() as counting, Client(counting.url) as client:
        assert client.info().weights_version is None
