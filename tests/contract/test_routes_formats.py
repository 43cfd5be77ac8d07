"""The formats of ``/routes``, and what asks for them."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import io
import itertools

import numpy as np
import orjson
import pyarrow as pa
import pytest
from pyarrow import parquet
from vllm.utils.serial_utils import numpy2base64

from moescope import arrow, errors, formats
from moescope_service.api import bodies
from moescope_service.queries import RoutesQuery

from .fake_engine import OUTPUT, PROMPT, rows_of

NUM_ROWS = len(PROMPT) + len(OUTPUT) - 1


@pytest.fixture(scope="module")
def formats_request(deployment):
    deployment.complete("formats", n=2)


@pytest.mark.usefixtures("formats_request")
class TestFormats:
    def get(self, deployment, **params):
        answer = deployment.http.get("/routes/cmpl-formats", params=params)
        assert answer.status_code == 200, answer.text
        return answer

    def test_json(self, deployment):
        answer = self.get(deployment)
        assert answer.headers["content-type"] == "application/json"
        body = answer.json()
        assert body["request_id"] == "cmpl-formats"
        traces = [formats.from_dict(values) for values in body["traces"]]
        assert [(t.index, t.complete, t.num_rows) for t in traces] == [
            (0, True, NUM_ROWS), (1, True, NUM_ROWS),
        ]  # fmt: skip
        assert body["traces"][0]["coverage"] == 1.0
        assert body["traces"][0]["num_hidden_layers"] == 5
        assert set(body["traces"][0]["source"]) == {"computed"}

    def test_jsonl(self, deployment):
        answer = self.get(deployment, format="jsonl")
        meta, *routes = map(orjson.loads, answer.content.splitlines())
        assert (meta["type"], meta["model_id"], meta["top_k"], meta["seed"]) == (
            "meta",
            "tiny",
            2,
            7,
        )
        assert meta["layers_logged"] == [1, 3]
        assert len(routes) == 2 * NUM_ROWS * 2
        assert {r["req_id"] for r in routes} == {"cmpl-formats"}
        assert [r["index"] for r in routes] == [0] * NUM_ROWS * 2 + [1] * NUM_ROWS * 2

    def test_npz(self, deployment):
        answer = self.get(deployment, format="npz")
        assert answer.headers["content-type"] == "application/x-npz"
        assert [trace.index for trace in formats.load_npz(answer.content)] == [0, 1]
        with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
            assert arrays["topk_ids"].shape == (2 * NUM_ROWS, 2, 2)

    def test_npy_is_vllms_own_routed_experts(self, deployment):
        answer = self.get(deployment, format="npy", index=1)
        assert answer.headers["content-type"] == "application/x-npy"
        expected = np.zeros((NUM_ROWS, 5, 2), np.uint8)
        expected[:, [1, 3]] = rows_of(0, NUM_ROWS)[0]
        assert answer.content == base64.b64decode(numpy2base64(expected))

    @pytest.mark.parametrize(
        ("options", "dtype"),
        [({"dtype": "int32"}, "int32"), ({"fill": -1}, "int16"),
         ({"fill": -1, "dtype": "int32"}, "int32")],
    )  # fmt: skip
    def test_npy_in_signed_numbers(self, deployment, options, dtype):
        whole = np.load(io.BytesIO(self.get(deployment, format="npy", index=1).content))
        answer = self.get(deployment, format="npy", index=1, **options)
        array = np.load(io.BytesIO(answer.content))
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, whole)

    @pytest.mark.parametrize("form", ["json", "jsonl", "npz"])
    def test_a_part(self, deployment, form):
        params = {"format": form, "layers": "3", "index": 1, "weights": "false"}
        content = self.get(deployment, **params).content
        if form == "jsonl":
            _, *routes = map(orjson.loads, content.splitlines())
            assert {(r["index"], r["layer"], r["topk_weights"]) for r in routes} == {(1, 3, None)}
            return
        load = (
            formats.load_npz
            if form == "npz"
            else lambda b: [*map(formats.from_dict, orjson.loads(b)["traces"])]
        )
        (trace,) = load(content)
        assert (trace.index, trace.layers.tolist(), trace.topk_weights) == (1, [3], None)
        np.testing.assert_array_equal(trace.topk_ids[:, 0], rows_of(0, NUM_ROWS)[0][:, 1])

    @pytest.mark.parametrize("form", ["json", "jsonl"])
    def test_gzip(self, deployment, form):
        url = f"{deployment.url}/routes/cmpl-formats?format={form}"
        with deployment.http.stream("GET", url, headers={"Accept-Encoding": "gzip"}) as answer:
            raw = b"".join(answer.iter_raw())
        assert answer.headers["content-encoding"] == "gzip"
        for refusing in ("identity", "gzip;q=0", "gzip;q=0, *", "*;q=0"):
            plain = deployment.http.get(url, headers={"Accept-Encoding": refusing})
            assert "content-encoding" not in plain.headers, refusing
            assert gzip.decompress(raw) == plain.content
            assert all("Accept-Encoding" in one.headers["vary"] for one in (answer, plain))

    @pytest.mark.parametrize("form", ["npz", "arrow", "parquet"])
    def test_arrays_are_not_compressed(self, deployment, form):
        url = f"{deployment.url}/routes/cmpl-formats?format={form}"
        answer = deployment.http.get(url, headers={"Accept-Encoding": "gzip"})
        assert len(answer.content) > 1024
        assert "content-encoding" not in answer.headers

    @pytest.mark.parametrize(
        ("params", "words"),
        [
            ({"layers": "x"}, ["layers", "'x'", "0,5-7"]),
            ({"layers": "3,9"}, ["layers", "9", "1, 3"]),
            ({"layers": ""}, ["layers", "''"]),
            ({"layers": ",".join(["0-9999"] * 9)}, ["layers", "at most 10,000"]),
            ({"layers": "1," * 600}, ["layers", "at most 1000", "1200"]),
            ({"format": "xml"}, ["format", "'xml'", "'json'", "'jsonl'", "'npz'"]),
            ({"index": "2"}, ["index", "[0, 1]", "2"]),
            ({"index": "-1"}, ["index", "-1", "greater"]),
            ({"weights": "maybe"}, ["weights", "'maybe'"]),
            ({"wait_s": "61"}, ["wait_s", "60", "'61'"]),
            ({"format": "npy"}, ["index", "one sequence", "[0, 1]"]),
            ({"format": "npy", "layers": "3", "index": 0}, ["layers", "every layer"]),
            ({"format": "npy", "weights": "true", "index": 0}, ["weights", "ids alone"]),
            ({"format": "npz", "fill": -1}, ["fill", "only format=npy"]),
            ({"dtype": "int32"}, ["dtype", "only format=npy"]),
            ({"format": "npy", "index": 0, "fill": 0}, ["fill", "'-1'", "'0'"]),
            ({"format": "npy", "index": 0, "dtype": "int8"}, ["dtype", "'int16'", "'int8'"]),
        ],
    )
    def test_a_bad_parameter(self, deployment, params, words):
        answer = deployment.http.get("/routes/cmpl-formats", params=params)
        assert answer.status_code == 422
        message = answer.json()["error"]["message"]
        assert all(word in message for word in words), message

    def test_the_client_raises_what_it_means(self, client):
        with pytest.raises(errors.InvalidQueryError, match="1, 3"):
            client.routes("cmpl-formats", layers=[9])


@pytest.fixture
def truncated(deployment, monkeypatch):
    """A request of whose id the collector says that it left older ones out."""
    deployment.complete("truncated")
    collector = deployment.app.state.moescope_collector
    ask = collector.ask

    async def ask_and_say(query, **options):
        reply = await ask(query, **options)
        if not isinstance(query, RoutesQuery):
            return reply
        found = [dataclasses.replace(one, lacks_older=True) for one in reply.found]
        return dataclasses.replace(reply, found=found)

    monkeypatch.setattr(collector, "ask", ask_and_say)


@pytest.mark.usefixtures("truncated")
def test_every_format_says_where_older_requests_are_left_out(deployment, client):
    def get(form, **params):
        params["format"] = form
        return deployment.http.get("/routes/cmpl-truncated", params=params)

    assert get("json").json()["truncated"] is True
    assert orjson.loads(get("jsonl").content.splitlines()[0])["truncated"] is True
    assert formats.read_npz(get("npz", weights=False).content)["truncated"]
    table = pa.ipc.open_stream(get("arrow").content).read_all()
    assert orjson.loads(table.schema.metadata[b"moescope"])["truncated"] is True
    table = parquet.read_table(io.BytesIO(get("parquet").content))
    assert orjson.loads(table.schema.metadata[b"moescope"])["truncated"] is True
    assert get("npy").status_code == 422
    assert "[0] and older ones" in get("npy").json()["error"]["message"]
    assert client.routes_batch(["cmpl-truncated"]).truncated == {"cmpl-truncated"}


class TestPages:
    """Six rows of a request of five prompt tokens and three more, a few at a time."""

    numbers = itertools.count()

    @pytest.fixture
    def name(self, deployment):
        name = f"pages-{next(self.numbers)}"
        deployment.complete(name)
        return f"cmpl-{name}"

    @pytest.fixture
    def get(self, deployment, name):
        def get(form="json", **params):
            return deployment.http.get(f"/routes/{name}", params={"format": form, **params})

        return get

    def test_every_format_has_pages(self, get):
        (whole,) = formats.load_npz(get("npz").content)
        for form in ("json", "jsonl", "npz", "npy", "arrow", "parquet"):
            answer = get(form, start=2, limit=3)
            assert answer.headers["X-Moescope-Next-Start"] == "5", form
        page = get(start=2, limit=3).json()
        assert (page["truncated"], page["next_start"]) == (True, 5)
        (trace,) = page["traces"]
        assert (trace["start"], trace["topk_ids"]) == (2, whole.topk_ids[2:5].tolist())
        assert trace["token_ids"] == whole.token_ids[2:5].tolist()
        array = np.load(io.BytesIO(get("npy", start=2, limit=3).content))
        np.testing.assert_array_equal(array[:, whole.layers], whole.topk_ids[2:5])
        meta, *lines = map(orjson.loads, get("jsonl", start=2, limit=3).content.splitlines())
        assert (meta["truncated"], meta["next_start"]) == (True, 5)
        assert sorted({line["token_idx"] for line in lines}) == [2, 3, 4]
        tables = [
            pa.ipc.open_stream(get("arrow", start=2, limit=3).content).read_all(),
            parquet.read_table(io.BytesIO(get("parquet", start=2, limit=3).content)),
        ]
        for table in tables:
            assert table["position"].to_pylist() == [2, 3, 4]
            (loaded,) = arrow.from_table(table)
            np.testing.assert_array_equal(loaded.topk_ids, whole.topk_ids[2:5])

    def test_the_last_page_has_no_next_one(self, get):
        answer = get(start=5, limit=100)
        assert "X-Moescope-Next-Start" not in answer.headers
        assert "next_start" not in answer.json()
        assert "truncated" not in answer.json()
        assert len(answer.json()["traces"][0]["token_ids"]) == 3

    def test_what_is_larger_than_a_response_comes_in_pages(self, name, get, client, monkeypatch):
        (whole,) = client.routes(name)
        monkeypatch.setitem(bodies.PAGE_BYTES, "npz", 1)
        monkeypatch.setitem(bodies.PAGE_BYTES, "npy", 1)
        assert formats.read_npz(get("npz").content)["next_start"] == 1
        (trace,) = client.routes(name)
        np.testing.assert_array_equal(trace.topk_ids, whole.topk_ids)
        found = client.routes_batch([name, "never-seen", f"{name}-0"]).traces
        np.testing.assert_array_equal(found[name][0].topk_weights, whole.topk_weights)
        assert found[f"{name}-0"][0] is found[name][0]
        answer = get("npy")
        assert answer.status_code == 413
        assert "start and limit" in answer.json()["error"]["message"]

    @pytest.mark.parametrize(
        "params", [{"start": -1}, {"start": "x"}, {"limit": 0}, {"start": 2**31}]
    )
    def test_what_is_no_page(self, get, params):
        answer = get(**params)
        assert answer.status_code == 422
        assert next(iter(params)) in answer.json()["error"]["message"]


def test_nothing_is_said_where_nothing_is_left_out(deployment):
    deployment.complete("whole")
    assert "truncated" not in deployment.http.get("/routes/cmpl-whole").json()
    body = deployment.http.get("/routes/cmpl-whole?format=npz").content
    assert "truncated" not in formats.read_npz(body)
