import numpy as np
import orjson
import pytest
from client_fakes import make_trace

from moescope import FormatError, formats, routes_log


def logged(path, *traces, num_experts=60):
    """Write a log of traces, as a server does."""
    layers = traces[0].layers.tolist()
    meta = formats.meta_line(**{**META, "layers": layers, "top_k": 4}, num_experts=num_experts)
    lines = [line for trace in traces for line in formats.route_lines(trace)]
    path.write_bytes(meta + b"".join(lines))
    return path


def test_what_is_read_is_what_was_logged(tmp_path):
    traces = [
        make_trace(seed, request_id=f"r{seed}", num_rows=20 + seed, missing=0.2)
        for seed in range(5)
    ]
    routes = routes_log.read(logged(tmp_path / "log", *traces))
    assert np.array_equal(routes.counts, sum(trace.counts() for trace in traces))
    assert routes.layers == [0, 1, 3]
    assert (routes.sequences, routes.rows) == (5, sum(trace.num_rows for trace in traces))
    assert routes.missing_rows == sum((~t.present).sum() for t in traces) > 0
    assert routes.inferred == ()


def test_a_log_of_no_request_can_be_read(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(formats.meta_line(**META, num_experts=60))
    routes = routes_log.read(path)
    assert routes.counts.shape == (2, 60)
    assert (routes.rows, routes.sequences) == (0, 0)


META = {"model": "m", "versions": {}, "device": "cpu", "seed": 0, "layers": [0, 5], "top_k": 2}
ROUTE = (
    b'{"type":"route","req_id":"a","token_idx":0,"layer":%d,'
    b'"topk_ids":[%d,1],"topk_weights":null}\n'
)


def test_a_log_that_does_not_name_the_number_of_experts(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(formats.meta_line(**META) + ROUTE % (0, 3) + ROUTE % (5, 2))
    routes = routes_log.read(path, num_experts=6)
    assert routes.counts.tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]]
    assert (routes.rows, routes.inferred) == (1, ())
    routes = routes_log.read(path)
    assert routes.counts.tolist() == [[0, 1, 0, 1], [0, 1, 1, 0]]
    assert len(routes.inferred) == 1
    assert "4 experts a layer, by the highest" in routes.inferred[0]


@pytest.mark.parametrize(
    "first_line", [b"", b'{"type": "meta"}\n', b'{"type": "meta", "model_id": null, "seed": 3}\n']
)
def test_a_log_whose_meta_line_says_little_or_is_not_there(tmp_path, first_line):
    """As other writers of the schema have it."""
    path = tmp_path / "log"
    path.write_bytes(first_line + ROUTE % (5, 2) + ROUTE % (0, 3) + ROUTE % (5, 0))
    routes = routes_log.read(path)
    assert routes.layers == [5, 0]
    assert routes.counts.tolist() == [[1, 2, 1, 0], [0, 1, 0, 1]]
    assert (routes.rows, routes.sequences) == (2, 1)
    assert routes.meta["top_k"] == 2
    assert routes.meta["model_id"] is None
    assert [words.split(":")[0] for words in routes.inferred] == [
        "layers 5, 0", "top-2", "4 experts a layer, by the highest that was selected",
    ]  # fmt: skip
    given = routes_log.read(path, num_experts=8, top_k=2)
    assert given.counts.shape == (2, 8)
    assert given.inferred == ("layers 5, 0",)


def test_what_is_given_must_not_contradict_the_log(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(formats.meta_line(**META, num_experts=4) + ROUTE % (0, 3))
    for given in ({"num_experts": 8}, {"top_k": 3}):
        with pytest.raises(FormatError, match=r"line 1.*in the meta line, not [83]"):
            routes_log.read(path, **given)
    path.write_bytes(ROUTE % (0, 3))
    with pytest.raises(FormatError, match=r"line 1.*2 experts, and top_k is 3"):
        routes_log.read(path, top_k=3)
    with pytest.raises(FormatError, match="names expert 3 in layer 0, of 2 experts"):
        routes_log.read(path, num_experts=2)


@pytest.mark.parametrize(
    ("given", "option"), [({}, "--num-experts"), ({"num_experts": 4}, "--top-k")]
)
def test_a_log_with_nothing_to_infer_from_names_the_option(tmp_path, given, option):
    path = tmp_path / "log"
    path.write_bytes(b'{"type": "meta"}\n')
    with pytest.raises(FormatError, match=f"add {option}"):
        routes_log.read(path, **given)


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
        (b"", "is empty: expected a meta line or a route"),
        (
            ROUTE % (5, 1) + formats.meta_line(**{**META, "layers": [0]}),
            "line 2.*layer 5 is not in",
        ),
        (ROUTE % (5, 1) + formats.meta_line(**{**META, "top_k": 3}), "line 2.*top_k is 3"),
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
    foreign = part.replace(b'{"type":"meta"', b'{"type": "meta"')
    path.write_bytes(part + cut + b"\n" + foreign + cut)
    routes = routes_log.read(path, 4)
    assert (routes.counts.sum(), routes.torn_lines) == (4, 2)
    path.write_bytes(part + cut + b"\n" + ROUTE % (5, 2))
    with pytest.raises(FormatError, match="line 3"):
        routes_log.read(path, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": "4"}, "num_experts is '4'"),
        ({"layers_logged": "0"}, "layers_logged is '0'"),
        ({"model_id": 3}, "line 1: not a route: model_id is 3 in the meta line"),
    ],
)
def test_a_malformed_meta_line_is_told(tmp_path, change, message):
    path = tmp_path / "log"
    path.write_bytes(orjson.dumps({**orjson.loads(formats.meta_line(**META)), **change}))
    with pytest.raises(FormatError, match=message):
        routes_log.read(path)
