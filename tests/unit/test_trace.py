import dataclasses

import numpy as np
import pytest
from client_fakes import make_trace

from moescope import LayerNotCapturedError, Source, version_runs


def test_counts_are_those_of_a_plain_loop_over_rows_that_are_not_missing():
    for seed in range(20):
        trace = make_trace(seed, num_rows=seed, missing=0.3, num_experts=9 + 20 * seed)
        counts = np.zeros((3, trace.num_experts), np.int64)
        for row in range(trace.num_rows):
            for column in range(3):
                for expert in trace.topk_ids[row, column]:
                    counts[column, expert] += trace.source[row] != Source.MISSING
        assert np.array_equal(trace.counts(), counts)


def test_a_missing_row_is_not_counted_as_expert_0():
    trace = make_trace(num_rows=1)
    blank = dataclasses.replace(
        trace, topk_ids=np.zeros_like(trace.topk_ids), source=np.array([Source.MISSING], np.uint8)
    )
    assert blank.counts().sum() == 0
    assert blank.coverage == 0.0


def test_shapes():
    trace = make_trace(num_rows=12)
    assert (trace.num_rows, trace.num_layers, trace.top_k) == (12, 3, 4)
    num_runs = len(trace.weights_versions)
    labels = version_runs.labels_bytes(trace.weight_labels)
    assert trace.size_bytes == 3 * 4 + 12 * 3 * 4 * (1 + 2) + 12 + 13 * 4 + num_runs * 16 + labels


def test_coverage():
    trace = dataclasses.replace(make_trace(num_rows=4), source=np.array([0, 2, 1, 0], np.uint8))
    assert trace.present.tolist() == [True, False, True, True]
    assert trace.coverage == 0.75
    assert make_trace(num_rows=0).coverage == 1.0


def test_select_keeps_the_layers_in_the_order_asked_for():
    trace = make_trace(layers=(2, 5, 9))
    part = trace.select(layers=[9, 2])
    assert part.layers.tolist() == [9, 2]
    assert np.array_equal(part.topk_ids, trace.topk_ids[:, [2, 0]])
    assert np.array_equal(part.topk_weights, trace.topk_weights[:, [2, 0]])
    assert np.array_equal(part.counts(), trace.counts()[[2, 0]])


def test_select_without_weights():
    part = make_trace().select(weights=False)
    assert part.topk_weights is None
    assert part.layers.tolist() == [0, 1, 3]


def test_select_names_the_layer_that_is_not_there_and_those_that_are():
    with pytest.raises(LayerNotCapturedError, match=r"layer 7 is not captured.*0, 1, 3"):
        make_trace().select(layers=[1, 7])


def test_entropy_and_top_experts_are_per_layer():
    ids = np.array([[[0, 1], [5, 4]], [[1, 0], [5, 2]]], np.uint8)
    trace = dataclasses.replace(
        make_trace(num_rows=2, layers=(0, 3), top_k=2, weights=False), topk_ids=ids
    )
    assert trace.entropy_bits() == pytest.approx([1.0, 1.5])
    assert trace.entropy() == pytest.approx([np.log(2), 1.5 * np.log(2)])
    assert trace.top_experts(1) == {0: [(0, 2, 0.5)], 3: [(5, 2, 0.5)]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("topk_ids", np.zeros((12, 3), np.uint8)),
        ("topk_ids", np.zeros((12, 2, 4), np.uint8)),
        ("topk_weights", np.zeros((12, 3, 5), np.float16)),
        ("source", np.zeros(11, np.uint8)),
        ("token_ids", np.zeros(12, np.int32)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(make_trace(num_rows=12), **{name: value})
