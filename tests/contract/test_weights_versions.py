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


def test_info_has_the_present_number_even_before_the_next_step(deployment):
    with Client(deployment.url) as client:
        before = client.info().weights_version
        change_weights(deployment.engine)
        wait_until(lambda: client.info().weights_version == before + 1, "the number is there")


def test_a_server_that_only_counts_has_none():
    with Deployment(mode="counts").running() as counting, Client(counting.url) as client:
        assert client.info().weights_version is None
