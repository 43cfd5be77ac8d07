"""Whatever bytes say that they hold traces: traces, or `FormatError` in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import struct
import zipfile

import httpx
import numpy as np
import orjson
import pyarrow as pa
import pytest
from client_fakes import make_trace
from hostile import CAP, DEEP, arrays_of, bounded, checked, client, mutated, npz, use
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from moescope import MoescopeError, arrow, formats, routes_log
from moescope.errors import FormatError

ARRAYS = st.sampled_from([
    np.array(5), np.array("x"), np.array(b"x"), np.array([], np.int64), np.array([-1, 3]),
    np.array([0, 2**40]), np.array([0, 12, 24]), np.array([0, 24, 12, 24]), np.array([0.0, 24]),
    np.zeros((24, 3, 4), np.int64), np.full((24, 3, 4), 255, np.uint8), np.zeros((24, 3, 0)),
    np.zeros((24, 3, 4), ">u2"), np.zeros((0, 3, 2**40), np.uint8), np.zeros(24, np.int8),
    np.full(24, 3, np.uint8), np.array([0, 1, 99], np.int32), np.array([-1, 0, 1], np.int32),
    np.array([(1, 2)], "i4,i4"), np.array(["2020-01-01"], "M8[D]"), np.zeros(24, np.float16),
    np.array([0, 2**63], np.uint64), np.frombuffer(b"[]", np.uint8), np.frombuffer(DEEP, np.uint8),
])  # fmt: skip


@checked
@given(data=st.data())
def test_arrays_of_an_npz(data):
    arrays = arrays_of(next_start=np.array(7))
    for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), min_size=1, max_size=2)):
        arrays[name] = data.draw(ARRAYS)
    answer = npz(arrays)
    with bounded(4), contextlib.suppress(MoescopeError):
        use(client(lambda _: httpx.Response(200, content=answer)).routes("x"))


@checked
@given(data=st.data())
def test_the_json_within_an_npz(data):
    arrays = arrays_of()
    metas = mutated(data, orjson.loads(arrays["meta"].tobytes()))
    requests = mutated(data, [
        {"request_id": "a", "status": "finished", "traces": [0, 1], "next_start": 5},
        {"request_id": "b", "status": "finished", "traces": [1], "truncated": True},
        {"request_id": "c", "status": "running", "traces": []},
    ])  # fmt: skip
    arrays["meta"] = np.frombuffer(orjson.dumps(metas), np.uint8)
    arrays["requests"] = np.frombuffer(orjson.dumps(requests), np.uint8)
    answer = npz(arrays)
    moe = client(lambda _: httpx.Response(200, content=answer))
    with bounded(4), contextlib.suppress(MoescopeError):
        use(moe.routes("x"))
    with bounded(4), contextlib.suppress(MoescopeError):
        for traces in moe.routes_batch(["a", "b", "c"]).traces.values():
            use(traces)


@checked
@given(data=st.data())
def test_damaged_bytes_of_an_npz(data):
    whole = bytearray(npz(arrays_of(), deflate=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with bounded(4), contextlib.suppress(MoescopeError):
        use(formats.load_npz(bytes(whole), CAP))


@pytest.mark.parametrize(
    ("name", "array", "match"),
    [
        ("topk_ids", np.full((24, 3, 4), 60, np.uint8), "topk_ids must be 0 to 59, got 60 to 60"),
        ("source", np.full(24, 4, np.uint8), "source must be 0 to 3, got 4 to 4"),
        ("source", np.full(24, 2, np.uint8), "complete, and rows are missing"),
        ("layers", np.array([0, 1, 8], np.int32), "layers must be 0 to 7, got 0 to 8"),
        ("layers", np.array([-1, 1, 2], np.int32), "layers must be 0 to 7"),
        ("row_splits", np.array([0, 12, 2**40]), "row_splits must rise from 0 to 24"),
        ("row_splits", np.array([0, -12, 24]), "row_splits must rise from 0 to 24"),
        ("row_splits", np.array([0, 12, 23]), "row_splits must rise from 0 to 24"),
        ("row_splits", np.array(0), "row_splits must be integers"),
        ("token_splits", np.array([0, 13.0, 26]), "token_splits must be integers"),
        ("token_ids", np.zeros(26), "token_ids must be int32, got float64"),
        ("topk_ids", np.zeros((24, 3, 4), ">u2"), "topk_ids must be uint8 or uint16"),
        ("topk_ids", np.array(0), "len"),
        ("meta", np.array("[]"), "is .*U2"),
    ],
)
def test_arrays_that_are_refused(name, array, match):
    with pytest.raises(FormatError, match=match):
        formats.load_npz(npz(arrays_of(**{name: array})))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_len": -1}, {"prompt_len": 14}, {"num_tokens": 12}, {"num_tokens": 2**31},
        {"cached_len": -1}, {"index": -1}, {"index": True}, {"index": 0.5}, {"start": -1},
        {"num_experts": 2**40}, {"num_hidden_layers": 2**40}, {"request_id": 5}, {"lora": []},
        {"versions": {"a": 1}}, {"created_s": "x"}, {"complete": 1}, {"finish_reason": {}},
        {"model": None}, {"surprise": 1},
    ],
)  # fmt: skip
def test_numbers_of_a_trace_that_are_refused(change):
    arrays = arrays_of(make_trace())
    (meta,) = orjson.loads(arrays["meta"].tobytes())
    arrays["meta"] = np.frombuffer(orjson.dumps([{**meta, **change}]), np.uint8)
    with pytest.raises(FormatError, match=r"not an \.npz of traces"):
        formats.load_npz(npz(arrays))


def test_ids_of_a_missing_row_mean_nothing():
    trace = make_trace(num_rows=30, missing=0.5)
    trace.topk_ids[~trace.present] = 255
    (loaded,) = formats.load_npz(formats.dump_npz([trace]))
    assert np.array_equal(loaded.counts(), trace.counts())


class TestArchives:
    """The directory of a zip says how much there is before anything of it is read."""

    def refused(self, data, match, factor=4):
        with bounded(factor), pytest.raises(FormatError, match=match):
            formats.load_npz(data, CAP)

    def test_deflated_members(self):
        bomb = npz(arrays_of(more=np.zeros(32 * CAP, np.uint8)), deflate=True)
        self.refused(bomb, "its arrays have .* more than max_bytes=1,048,576")
        assert len(formats.load_npz(npz(arrays_of(), deflate=True), CAP)) == 2

    def test_a_member_whose_size_is_a_lie(self):
        bomb = npz({"meta": np.zeros(32 * CAP, np.uint8)}, deflate=True)
        real, lie = struct.pack("<I", 32 * CAP + 128), struct.pack("<I", 1128)
        assert real in bomb
        self.refused(bomb.replace(real, lie), "not an .npz: ")

    def test_a_header_that_is_too_long(self):
        head = np.lib.format.magic(2, 0) + struct.pack("<I", 2**31) + bytes(32 * CAP)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("meta.npy", head)
        real = struct.pack("<I", len(head))
        self.refused(buffer.getvalue().replace(real, struct.pack("<I", CAP)), "version")

    def test_a_shape_that_is_more_than_its_member(self):
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "<i8", "fortran_order": False, "shape": (2**40,)}
        )
        with zipfile.ZipFile(whole := io.BytesIO(), "w") as archive:
            archive.writestr("meta.npy", buffer.getvalue())
        self.refused(whole.getvalue(), r"takes 8,796,093,022,336")

    def test_members_that_overlap(self):
        data = npz({"a": np.zeros(CAP // 2, np.uint8)})
        entry, tail = data[data.rindex(b"PK\1\2") : data.rindex(b"PK\5\6")], bytearray(data[-22:])
        many = b"".join(entry.replace(b"a.npy", b"%c.npy" % (97 + n)) for n in range(20))
        tail[8:16] = struct.pack("<HHI", 20, 20, len(many))
        self.refused(data[: -22 - len(entry)] + many + bytes(tail), "more than max_bytes")

    @pytest.mark.parametrize(
        ("number", "match"),
        [(5000, "its directory has 268,890 bytes"), (65, "it has 65 members: more than 64")],
    )
    def test_a_directory_of_many_members(self, number, match):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for one in range(number):
                archive.writestr(f"{one}.npy", b"")
        self.refused(buffer.getvalue(), match, factor=1)

    def test_an_end_that_another_follows(self):
        """zipfile would believe the other one."""
        data = npz(arrays_of())
        self.refused(data[:-2] + b"\1\0x", "does not end as numpy ends one", factor=1)
        locator = b"PK\6\7" + bytes(16)
        self.refused(data[:-22] + locator + data[-22:], "does not end as", factor=1)

    def test_experts_that_look_like_members(self):
        trace = make_trace(num_rows=200)
        trace.topk_ids[:] = np.frombuffer(b"PK\1\2", np.uint8)[: trace.top_k]
        trace = dataclasses.replace(trace, num_experts=128)
        data = formats.dump_npz([trace])
        assert data.count(b"PK\1\2") > 64
        (loaded,) = formats.load_npz(data)
        assert np.array_equal(loaded.topk_ids, trace.topk_ids)

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_other_methods(self, method):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr("meta.npy", bytes(32 * CAP))
        self.refused(buffer.getvalue(), "more than max_bytes")
        with zipfile.ZipFile(buffer := io.BytesIO(), "w", method) as archive:
            archive.writestr("meta.npy", b"x")
        self.refused(buffer.getvalue(), "neither stored nor deflated")

    def test_pickles(self):
        self.refused(npz({"meta": np.array([{}], object)}), "not an .npz")


@checked
@given(data=st.data())
def test_values_of_a_trace_as_json(data):
    trace = make_trace(num_rows=4, missing=0.3)
    values = orjson.loads(formats.dump_json("r", [trace]))["traces"][0]
    with bounded(4), contextlib.suppress(MoescopeError):
        use([formats.from_dict(mutated(data, values), CAP)])


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 2**40}, {"top_k": -1}, {"top_k": "4"}, {"topk_ids": [None] * 5, "top_k": 60000},
        {"topk_ids": [[[0.5] * 4] * 3] * 4}, {"topk_ids": [[[300] * 4] * 3] * 4},
        {"topk_ids": [[[60] * 4] * 3] * 4}, {"topk_ids": [[[-1] * 4] * 3] * 4},
        {"token_ids": [2**40] * 5}, {"layers": [0, 1, 2**40]}, {"num_experts": 2**40},
        {"source": ["__class__"] * 4}, {"source": [5] * 4},
        {"topk_weights": [[[1e39] * 4] * 3] * 4}, {"topk_weights": [[[-1e308] * 4] * 3] * 4},
        {"topk_weights": [[["0.5"] * 4] * 3] * 4},
    ],
)  # fmt: skip
def test_json_that_is_refused(change):
    values = orjson.loads(formats.dump_json("r", [make_trace(num_rows=4)]))["traces"][0]
    with bounded(4), pytest.raises(FormatError, match="not a trace in moescope's JSON"):
        formats.from_dict({**values, **change}, CAP)


class TestTables:
    def changed(self, shared):
        table = arrow.to_table([make_trace(), make_trace(1)])
        return table.replace_schema_metadata({"moescope": orjson.dumps(shared)})

    def shared(self):
        return orjson.loads(self.changed({}) and arrow.to_table(
            [make_trace(), make_trace(1)]).schema.metadata[b"moescope"])  # fmt: skip

    @checked
    @given(data=st.data())
    def test_metadata(self, data):
        table = self.changed(mutated(data, self.shared()))
        with bounded(4), contextlib.suppress(MoescopeError):
            use(arrow.from_table(table, CAP))

    @pytest.mark.parametrize(
        "change", [{"num_rows": 2**31 - 1, "num_tokens": 2**31 - 1}, {"start": 2**40}]
    )
    def test_rows_that_are_not_there(self, change):
        shared = self.shared()
        shared["traces"][0] |= change
        with bounded(4), pytest.raises(FormatError, match="not a table of traces"):
            arrow.from_table(self.changed(shared), CAP)

    def test_an_array_that_is_too_large(self):
        with pytest.raises(FormatError, match="more than max_bytes"):
            arrow.from_table(self.changed(self.shared() | {"top_k": 2**40}), CAP)

    @pytest.mark.parametrize("weights_dtype", ["float16", "float32"])
    @pytest.mark.parametrize("weight", [1e6, 1e39, -1e308])
    def test_a_weight_beyond_its_dtype(self, weights_dtype, weight):
        table = self.changed(self.shared() | {"weights_dtype": weights_dtype})
        place = table.column_names.index("topk_weights")
        rows = table["topk_weights"].to_pylist()
        rows[3][1][2] = weight
        wide = pa.list_(pa.list_(pa.float64(), 4))
        table = table.set_column(place, "topk_weights", pa.array(rows, wide))
        if abs(weight) <= float(np.finfo(weights_dtype).max):
            assert arrow.from_table(table)[0].topk_weights[3, 1, 2] == np.float32(weight)
        else:
            with pytest.raises(FormatError, match="overflow"):
                arrow.from_table(table)

    def test_an_id_beyond_its_dtype(self):
        table = self.changed(self.shared())
        place = table.column_names.index("topk_ids")
        rows = table["topk_ids"].to_pylist()
        rows[3][1][2] = 256 + 5
        table = table.set_column(place, "topk_ids", pa.array(rows, pa.list_(pa.list_(pa.int32()))))
        with pytest.raises(FormatError, match="do not fit into uint8"):
            arrow.from_table(table)

    @pytest.mark.parametrize("form", ["arrow", "parquet"])
    @checked
    @given(data=st.data())
    def test_damaged_bytes(self, form, data):
        dump = arrow.dump_arrow if form == "arrow" else arrow.dump_parquet
        whole = bytearray(dump([make_trace()]))
        for _ in range(data.draw(st.integers(1, 4))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        source = pa.BufferReader(bytes(whole))
        try:
            table = (
                pa.ipc.open_stream(source).read_all()
                if form == "arrow"
                else parquet.read_table(source)
            )
        except (pa.ArrowException, OSError, MemoryError):
            return  # pyarrow's own: the user calls it
        with bounded(4), contextlib.suppress(MoescopeError):
            use(arrow.from_table(table, CAP))


@pytest.mark.parametrize("number", [0, -1, 2**40])
def test_a_route_log_of_any_number_of_experts(tmp_path, number):
    path = tmp_path / "log"
    path.write_bytes(formats.meta_line(
        model="m", versions={}, device="cpu", seed=1, layers=[0], top_k=1, num_experts=number
    ))  # fmt: skip
    with bounded(1), pytest.raises(FormatError, match=f"{number} experts a layer"):
        routes_log.read(path)
