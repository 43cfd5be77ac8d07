"""The long form of a table of traces: one row a selection."""

import io
import sys

import pyarrow as pa
import pytest
from client_fakes import make_trace
from pyarrow import parquet

from moescope import FormatError, Source, arrow

CASES = [
    {},
    {"weights": False},
    {"token_ids": False},
    {"missing": 0.4, "num_rows": 30},
    {"missing": 1.1},
    {"num_experts": 512, "top_k": 8},
    {"num_rows": 0},
    {"tokens": True, "num_rows": 30},
    {"versions": False},
    {"index": 3, "request_id": "a/b …"},
]


def selections(trace, *, missing):
    """What a plain loop says."""
    versions = trace.weights_version
    for row, source in enumerate(trace.source.tolist()):
        is_here = source != Source.MISSING
        if not (is_here or missing):
            continue
        for column, layer in enumerate(trace.layers.tolist()):
            for rank in range(trace.top_k):
                place = (row, column, rank)
                weights = trace.topk_weights
                yield {
                    "request_id": trace.request_id,
                    "index": trace.index,
                    "position": trace.start + row,
                    "is_prompt": trace.start + row < trace.prompt_len,
                    "token_id": None if trace.token_ids is None else int(trace.token_ids[row]),
                    **({} if trace.tokens is None else {"token": trace.tokens[row]}),
                    "layer": layer,
                    "rank": rank,
                    "expert": int(trace.topk_ids[place]) if is_here else None,
                    **(
                        {}
                        if weights is None
                        else {"weight": float(weights[place]) if is_here else None}
                    ),
                    "source": Source(source).name.lower(),
                    "weights_version": None
                    if versions is None or not is_here
                    else int(versions[row]),
                }


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("changes", CASES)
def test_the_rows_are_those_of_a_plain_loop(changes, missing):
    trace = make_trace(**changes)
    table = trace.to_arrow(long=True, missing=missing)
    table.validate(full=True)
    assert table.to_pylist() == [*selections(trace, missing=missing)]
    assert trace.to_arrow().equals(arrow.to_table([trace]))


def test_several_traces_and_a_page():
    traces = [make_trace(0), make_trace(1, request_id="b", missing=0.5).page(4, 5)]
    expected = [one for trace in traces for one in selections(trace, missing=False)]
    assert arrow.to_long_table(traces).to_pylist() == expected


def test_columns_have_the_types_of_the_wide_form():
    trace = make_trace(tokens=True, num_experts=512)
    wide, long = trace.to_arrow().schema, trace.to_arrow(long=True).schema
    for name in set(wide.names) & set(long.names):
        assert long.field(name).type == wide.field(name).type, name
    assert long.field("expert").type == wide.field("topk_ids").type.value_type.value_type
    assert long.field("weight").type == wide.field("topk_weights").type.value_type.value_type
    assert (long.field("layer").type, long.field("rank").type) == (pa.int32(), pa.int16())


def test_parquet_keeps_it_and_traces_are_not_made_of_it():
    table = make_trace(missing=0.3).to_arrow(long=True)
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    assert parquet.read_table(buffer).equals(table)
    with pytest.raises(FormatError, match="wide form"):
        arrow.from_table(table)


@pytest.mark.parametrize("package", ["pandas", "polars"])
def test_what_is_not_installed_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}: pip install {package}"):
        getattr(make_trace(), f"to_{package}")()


def test_without_pyarrow_it_is_said_too(monkeypatch):
    monkeypatch.delitem(sys.modules, "moescope.arrow")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="extra `arrow`"):
        make_trace().to_arrow()
