import httpx
import numpy as np
import orjson
import pytest
from client_fakes import INFO, lines, make_trace, server

from moescope import Client, FormatError, formats, routes_log


def fetch(path, traces, request_ids, layers=None):
    """Fetch from a server that keeps traces by id and ignores nothing."""

    def answer(request_id):
        def respond(request):
            wanted = request.url.params.get("layers")
            numbers = [int(part) for part in wanted.split(",")] if wanted else None
            found = [trace.select(layers=numbers) for trace in traces[request_id]]
            return httpx.Response(200, content=formats.dump_npz(found))

        return respond

    routes = {f"GET /routes/{name}": answer(name) for name in traces}
    transport = server({"GET /moescope/info": INFO, **routes})
    with Client("http://moe", transport=transport) as client:
        return routes_log.fetch(client, request_ids, path, layers)


def test_the_log_has_a_meta_line_and_one_line_a_row_and_layer(tmp_path):
    path = tmp_path / "log"
    traces = {
        "a": [make_trace(0, request_id="a", num_rows=5)],
        "b": [make_trace(n, request_id="b", num_rows=n, index=n) for n in (1, 2)],
    }
    fetched = fetch(path, traces, ["a", "b"])
    meta, *records = lines(path.read_bytes())
    assert meta["type"] == "meta"
    assert (meta["model_id"], meta["layers_logged"], meta["num_experts"]) == ("demo", [0, 1, 3], 60)
    assert len(records) == (5 + 1 + 2) * 3
    assert (fetched.sequences, fetched.rows, fetched.missing_rows) == (3, 8, 0)
    keys = {(r["req_id"], r.get("index", 0), r["token_idx"], r["layer"]) for r in records}
    assert len(keys) == len(records)
    assert routes_log.read(path).sequences == 3


def test_what_is_read_is_what_was_fetched(tmp_path):
    path = tmp_path / "log"
    traces = [
        make_trace(seed, request_id=f"r{seed}", num_rows=20 + seed, missing=0.2)
        for seed in range(5)
    ]
    fetched = fetch(path, {t.request_id: [t] for t in traces}, [t.request_id for t in traces])
    routes = routes_log.read(path)
    assert np.array_equal(routes.counts, sum(trace.counts() for trace in traces))
    assert routes.layers == [0, 1, 3]
    assert (routes.sequences, routes.rows) == (5, fetched.rows)
    assert routes.missing_rows == fetched.missing_rows == sum((~t.present).sum() for t in traces)
    assert routes.missing_rows > 0


def test_some_layers_only(tmp_path):
    path = tmp_path / "log"
    trace = make_trace(3, request_id="a")
    fetch(path, {"a": [trace]}, ["a"], layers="3,0")
    routes = routes_log.read(path)
    assert routes.layers == [3, 0]
    assert np.array_equal(routes.counts, trace.counts()[[2, 0]])


def test_a_request_without_routes_is_noted_and_the_others_are_written(tmp_path):
    path = tmp_path / "log"
    fetched = fetch(path, {"a": [make_trace(request_id="a")]}, ["gone", "a"])
    assert list(fetched.failed) == ["gone"]
    assert "HTTP 404" in fetched.failed["gone"]
    assert (fetched.sequences, routes_log.read(path).sequences) == (1, 1)


def test_a_log_of_no_request_can_be_read(tmp_path):
    path = tmp_path / "log"
    fetch(path, {}, [])
    routes = routes_log.read(path)
    assert routes.counts.shape == (3, 60)
    assert (routes.rows, routes.sequences) == (0, 0)


META = {"model": "m", "versions": {}, "device": "cpu", "seed": 0, "layers": [0, 5], "top_k": 2}
ROUTE = (
    b'{"type":"route","req_id":"a","token_idx":0,"layer":%d,'
    b'"topk_ids":[%d,1],"topk_weights":null}\n'
)


def test_a_servers_log_names_no_number_of_experts(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(formats.meta_line(**META) + ROUTE % (0, 3) + ROUTE % (5, 2))
    with pytest.raises(FormatError, match="--num-experts"):
        routes_log.read(path)
    routes = routes_log.read(path, num_experts=6)
    assert routes.counts.tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]]
    assert routes.rows == 1


def test_a_server_that_started_again_writes_the_meta_line_again(tmp_path):
    path = tmp_path / "log"
    part = formats.meta_line(**META) + ROUTE % (0, 3) + ROUTE % (5, 2)
    path.write_bytes(part + part)
    assert routes_log.read(path, 4).counts.sum() == 8
    path.write_bytes(part + formats.meta_line(**{**META, "layers": [0]}))
    with pytest.raises(FormatError, match=r"line 4.*layers_logged"):
        routes_log.read(path, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no meta line"),
        (ROUTE % (0, 1), "line 1.*no meta line"),
        (formats.meta_line(**META) + ROUTE % (7, 1), "line 2.*layer 7"),
        (formats.meta_line(**META) + ROUTE % (0, 4), "names expert 4 in layer 0"),
        (formats.meta_line(**META) + ROUTE % (0, 70000), "line 2"),
        (formats.meta_line(**META) + ROUTE[:30] + b"\n", "line 2"),
        (b"[]\n", "line 1"),
    ],
)
def test_a_malformed_log_is_refused_with_the_place(tmp_path, data, message):
    path = tmp_path / "log"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        routes_log.read(path, 4)


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(FormatError, match="nowhere"):
        routes_log.read(tmp_path / "nowhere")


def test_lines_that_a_killed_server_cut_off_are_left_out_and_counted(tmp_path):
    path = tmp_path / "log"
    part = formats.meta_line(**META) + ROUTE % (0, 3)
    cut = ROUTE[:30]
    path.write_bytes(part + cut + b"\n" + part + cut)
    routes = routes_log.read(path, 4)
    assert (routes.counts.sum(), routes.torn_lines) == (4, 2)
    path.write_bytes(part + cut + b"\n" + ROUTE % (5, 2))
    with pytest.raises(FormatError, match="line 3"):
        routes_log.read(path, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": "4"}, "num_experts is '4'"),
        ({"layers_logged": None}, "layers_logged is None"),
        ({"model_id": ...}, "line 1: it has no 'model_id'"),
    ],
)
def test_a_malformed_meta_line_is_told(tmp_path, change, message):
    meta = {**orjson.loads(formats.meta_line(**META)), **change}
    path = tmp_path / "log"
    path.write_bytes(orjson.dumps({k: v for k, v in meta.items() if v is not ...}))
    with pytest.raises(FormatError, match=message):
        routes_log.read(path)
