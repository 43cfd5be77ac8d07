import io

import numpy as np
import orjson
import pytest
from client_fakes import lines, make_trace, same

from moescope import FormatError, Source, formats
from moescope.formats import as_npz

CASES = [
    {},
    {"weights": False},
    {"token_ids": False},
    {"missing": 0.4, "num_rows": 30},
    {"num_experts": 512, "top_k": 8},
    {"num_rows": 0},
    {"versions": False},
    {"tokens": True},
    {"index": 3, "request_id": "a/b …"},
]


@pytest.mark.parametrize("case", CASES)
def test_npz_gives_every_field_back(case):
    traces = [make_trace(seed, **case) for seed in range(3)]
    loaded = formats.load_npz(formats.dump_npz(traces))
    assert all(same(a, b) for a, b in zip(traces, loaded, strict=True))


def test_npz_holds_traces_of_different_lengths():
    traces = [make_trace(n, num_rows=n, token_ids=bool(n % 2)) for n in (5, 0, 17, 1)]
    loaded = formats.load_npz(formats.dump_npz(traces))
    assert all(same(a, b) for a, b in zip(traces, loaded, strict=True))


def test_npz_of_one_trace_is_that_traces_own_arrays():
    trace = make_trace()
    with np.load(io.BytesIO(formats.dump_npz([trace])), allow_pickle=False) as archive:
        assert np.array_equal(archive["topk_ids"], trace.topk_ids)
        assert np.array_equal(archive["topk_weights"], trace.topk_weights)
        assert np.array_equal(archive["token_ids"], trace.token_ids)


def test_npz_refuses_traces_that_do_not_belong_together():
    for other in ({"layers": (0, 1)}, {"top_k": 2}, {"weights": False}):
        with pytest.raises(FormatError, match="must share"):
            formats.dump_npz([make_trace(), make_trace(**other)])


def test_npz_of_no_trace():
    assert formats.load_npz(formats.dump_npz([])) == []


def test_broken_npz_is_a_format_error_and_nothing_else():
    data = formats.dump_npz([make_trace(), make_trace(1)])
    random = np.random.default_rng(0)
    broken = [b"", b"{}", data[:100], data[:-30], np.lib.format.magic(1, 0)]
    for _ in range(150):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 20):
            damaged[place] = random.integers(0, 256)
        broken.append(bytes(damaged))
    refused = 0
    for case in broken:
        try:
            formats.load_npz(case)
        except FormatError:
            refused += 1
    assert refused > 100


def test_npz_is_read_again_where_python_failed(monkeypatch):
    trace, read = make_trace(), as_npz._npy.read_array_header_1_0
    answers = [SystemError("AST constructor recursion depth mismatch (before=150, after=204)")]

    def read_or_fail(file):
        if answers:
            raise answers.pop()
        return read(file)

    monkeypatch.setattr(as_npz._npy, "read_array_header_1_0", read_or_fail)
    assert same(formats.load_npz(formats.dump_npz([trace]))[0], trace)
    assert not answers


def test_npz_with_a_split_too_few_is_refused():
    with np.load(io.BytesIO(formats.dump_npz([make_trace(), make_trace(1)]))) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["row_splits"] = arrays["row_splits"][:-1]
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with pytest.raises(FormatError):
        formats.load_npz(buffer.getvalue())


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, "|u1"), (257, "<u2")])
def test_npy_holds_every_layer_of_the_model(num_experts, dtype):
    trace = make_trace(num_experts=num_experts, layers=(5, 2))
    array = np.load(io.BytesIO(formats.dump_npy(trace)), allow_pickle=False)
    assert (array.shape, array.dtype.str) == ((12, 8, 4), dtype)
    assert np.array_equal(array[:, [5, 2]], trace.topk_ids)
    assert not array[:, [0, 1, 3, 4, 6, 7]].any()


def test_npy_of_a_trace_without_rows():
    array = np.load(io.BytesIO(formats.dump_npy(make_trace(num_rows=0))))
    assert array.shape == (0, 8, 4)


def test_npy_refuses_an_incomplete_trace():
    with pytest.raises(FormatError, match=r"'chatcmpl-1', index 0, .*coverage 0\.\d.*fill=-1.*npz"):
        formats.dump_npy(make_trace(num_rows=30, missing=0.5))


@pytest.mark.parametrize("dtype", [None, np.int16, np.int32])
def test_npy_fills_missing_rows(dtype):
    trace = make_trace(num_rows=30, missing=0.5)
    array = np.load(io.BytesIO(formats.dump_npy(trace, dtype=dtype, fill=-1)))
    assert array.dtype == (dtype or np.int16)
    of_the_trace, dense = array[:, trace.layers], [n for n in range(8) if n not in trace.layers]
    np.testing.assert_array_equal(of_the_trace[trace.present], trace.topk_ids[trace.present])
    assert (of_the_trace[~trace.present] == -1).all()
    assert not array[:, dense].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fill": 0}, "fill is 0, which may be an expert"),
        ({"fill": -1, "dtype": np.uint8}, "uint8 does not hold 300 experts and -1"),
        ({"dtype": np.uint8}, "uint8 does not hold 300 experts: take int32"),
    ],
)
def test_npy_refuses_what_its_numbers_cannot_be(options, words):
    with pytest.raises(FormatError, match=words):
        formats.dump_npy(make_trace(num_experts=300), **options)


@pytest.mark.parametrize("case", CASES)
def test_json_gives_the_trace_back(case):
    trace = make_trace(5, **case)
    values = orjson.loads(formats.dump_json("r", [trace]))
    assert values["request_id"] == "r"
    loaded = formats.from_dict(values["traces"][0])
    assert np.array_equal(loaded.counts(), trace.counts())
    assert np.array_equal(loaded.source, trace.source)
    assert loaded.topk_ids.dtype == trace.topk_ids.dtype
    present = trace.present
    if trace.topk_weights is None:
        assert loaded.topk_weights is None
    else:
        assert np.allclose(loaded.topk_weights[present], trace.topk_weights[present], atol=1e-7)
    assert (loaded.index, loaded.request_id) == (trace.index, trace.request_id)


def test_json_shows_a_missing_row_as_null():
    trace = make_trace(num_rows=30, missing=0.5)
    values = orjson.loads(formats.dump_json("r", [trace]))["traces"][0]
    assert [row is None for row in values["topk_ids"]] == (~trace.present).tolist()
    assert [row is None for row in values["topk_weights"]] == (~trace.present).tolist()
    assert values["source"] == [Source(value).name.lower() for value in trace.source]
    assert values["coverage"] == trace.coverage < 1


def test_json_and_npz_of_before_there_were_versions_have_none():
    older = make_trace(versions=False)
    (values,) = orjson.loads(formats.dump_json("r", [make_trace(weights=False)]))["traces"]
    del values["weights_versions"], values["weight_labels"]
    assert same(formats.from_dict(values), make_trace(weights=False, versions=False))
    arrays = formats.arrays_of([make_trace()])
    del arrays["weights_versions"], arrays["version_splits"]
    (meta,) = orjson.loads(arrays["meta"].tobytes())
    del meta["weight_labels"]
    arrays["meta"] = np.frombuffer(orjson.dumps([meta]), np.uint8)
    assert same(formats.traces_of(arrays)[0], older)


BAD_RUNS = [
    [[1, 0]],
    [[0, 0], [0, 1]],
    [[0, 0], [12, 1]],
    [[0, -2]],
    [[0, 2**31]],
    [[0, 2**64]],
    [[0, 0.5]],
    [[0, None]],
    [0, 1],
    [[0, 1, 2]],
    [[0, 1], [2]],
    {"0": 1},
    7,
]


@pytest.mark.parametrize("runs", BAD_RUNS, ids=str)
def test_runs_of_versions_that_cannot_be_are_a_format_error(runs):
    (values,) = orjson.loads(formats.dump_json("r", [make_trace()]))["traces"]
    with pytest.raises(FormatError, match="not a trace"):
        formats.from_dict({**values, "weights_versions": runs})


@pytest.mark.parametrize("runs", BAD_RUNS[:5], ids=str)
def test_so_they_are_in_npz(runs):
    arrays = formats.arrays_of([make_trace()]) | {
        "weights_versions": np.array(runs, np.int64),
        "version_splits": np.array([0, len(runs)]),
    }
    with pytest.raises(FormatError, match=r"not an \.npz of traces.*weights_versions must"):
        formats.traces_of(arrays)


@pytest.mark.parametrize(
    "spans",
    [
        [("a", 0, 11)],
        [("a", -1, 2)],
        [("a", 2, 1)],
        [("a", 0, 3), ("b", 2, 4)],
        [("a", 0, 1.5)],
        [("a", 0, True)],
        [(7, 0, 1)],
        [("a", 0, None)],
        [("a", 0)],
    ],
    ids=str,
)
def test_labels_that_cannot_be_are_a_format_error(spans):
    """Of ten output tokens, in JSON and in the JSON of an .npz."""
    trace = make_trace()
    assert trace.num_tokens - trace.prompt_len == 10
    wrong = [dict(zip(("version", "start", "end"), span, strict=False)) for span in spans]
    (values,) = orjson.loads(formats.dump_json("r", [trace]))["traces"]
    with pytest.raises(FormatError, match="weight_labels must"):
        formats.from_dict({**values, "weight_labels": wrong})
    arrays = formats.arrays_of([trace])
    (meta,) = orjson.loads(arrays["meta"].tobytes())
    meta = orjson.dumps([{**meta, "weight_labels": wrong}])
    with pytest.raises(FormatError, match="weight_labels must"):
        formats.traces_of(arrays | {"meta": np.frombuffer(meta, np.uint8)})


def test_json_that_is_no_trace_is_a_format_error():
    values = orjson.loads(formats.dump_json("r", [make_trace()]))["traces"][0]
    for name in values.keys() - {"coverage", "top_k", "start", "weights_versions", "weight_labels"}:
        with pytest.raises(FormatError):
            formats.from_dict({key: value for key, value in values.items() if key != name})
    with pytest.raises(FormatError):
        formats.from_dict({**values, "source": ["guessed"] * 12})


def test_ids_take_two_bytes_from_257_experts_on():
    assert formats.id_dtype(256) is np.uint8
    assert formats.id_dtype(257) is np.uint16


META = {
    "model": "demo",
    "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
    "device": "cpu",
    "seed": 7,
    "layers": [0, 5],
    "top_k": 4,
}


def test_the_meta_line_has_the_schema_of_vllm_log_moe():
    assert formats.meta_line(**META) == (
        b'{"type":"meta","model_id":"demo","vllm_version":"0.32.0","torch_version":"2.13.0",'
        b'"device":"cpu","seed":7,"layers_logged":[0,5],"top_k":4}\n'
    )


def test_the_meta_line_names_the_experts_where_they_are_known():
    assert orjson.loads(formats.meta_line(**META, num_experts=60))["num_experts"] == 60


def test_there_is_one_route_line_a_row_and_layer():
    trace = make_trace(num_rows=5, layers=(2, 7))
    records = lines(b"".join(formats.route_lines(trace)))
    assert [(r["token_idx"], r["layer"]) for r in records] == [
        (row, layer) for row in range(5) for layer in (2, 7)
    ]
    for record in records:
        assert list(record) == [
            "type", "req_id", "index", "token_idx", "layer", "topk_ids", "topk_weights",
            "weights_version",
        ]  # fmt: skip
        column = (2, 7).index(record["layer"])
        assert record["req_id"] == "chatcmpl-1"
        assert record["weights_version"] == trace.weights_version[record["token_idx"]]
        assert record["topk_ids"] == trace.topk_ids[record["token_idx"], column].tolist()
        assert record["topk_weights"] == pytest.approx(
            trace.topk_weights[record["token_idx"], column].astype(float)
        )


@pytest.mark.parametrize("index", [0, 2])
def test_every_route_line_carries_the_index(index):
    """A reader that takes its columns from the first lines, as polars does, finds it there."""
    records = lines(b"".join(formats.route_lines(make_trace(index=index))))
    assert {record["index"] for record in records} == {index}


def test_route_lines_of_a_missing_row_are_null():
    trace = make_trace(num_rows=20, missing=0.5, layers=(0,))
    for record, here in zip(formats.route_lines(trace), trace.present, strict=True):
        assert (orjson.loads(record)["topk_ids"] is not None) == here
        assert (orjson.loads(record)["topk_weights"] is not None) == here


def test_route_lines_after_a_selection_of_layers():
    trace = make_trace(layers=(0, 1, 3)).select(layers=[3])
    records = lines(b"".join(formats.route_lines(trace)))
    assert [record["topk_ids"] for record in records] == trace.topk_ids[:, 0].tolist()


@pytest.mark.parametrize("missing", [0.0, 0.1])
def test_json_written_in_pieces_is_what_it_would_be_in_one(missing):
    traces = [
        make_trace(seed, num_rows=rows, missing=missing) for seed, rows in ((1, 300), (2, 128))
    ]
    want = {"request_id": "x", "traces": [*map(formats.to_dict, traces)]}
    plain = orjson.dumps(want, option=orjson.OPT_SERIALIZE_NUMPY)
    assert formats.dump_json("x", traces) == plain
