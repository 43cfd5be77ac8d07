import numpy as np
import pytest

from moescope import analysis


def test_even_use_has_normalized_entropy_1_and_no_violation():
    counts = np.full((2, 60), 7)
    assert analysis.entropy(counts) == pytest.approx(np.log(60))
    assert analysis.normalized_entropy(counts) == pytest.approx(1.0)
    assert analysis.max_violation(counts) == pytest.approx(0.0)


def test_one_expert_alone_has_entropy_0_and_the_highest_violation():
    counts = np.array([0, 0, 9, 0])
    assert analysis.entropy(counts) == 0.0
    assert analysis.max_violation(counts) == 3.0
    assert analysis.active_experts(counts) == 1


def test_values_worked_out_by_hand():
    counts = np.array([[4, 2, 1, 1], [1, 1, 0, 0]])
    assert analysis.shares(counts)[0].tolist() == [0.5, 0.25, 0.125, 0.125]
    assert analysis.entropy(counts) == pytest.approx([1.75 * np.log(2), np.log(2)])
    assert analysis.normalized_entropy(counts) == pytest.approx([0.875, 0.5])
    assert analysis.max_violation(counts) == pytest.approx([1.0, 1.0])
    assert analysis.active_experts(counts).tolist() == [4, 2]


def test_a_layer_without_selections_is_nan_and_leaves_the_others_alone():
    counts = np.array([[0, 0], [1, 1]])
    for function in (analysis.entropy, analysis.normalized_entropy, analysis.max_violation):
        values = function(counts)
        assert np.isnan(values[0])
        assert not np.isnan(values[1])


def test_a_model_with_one_expert_does_not_divide_by_zero():
    assert analysis.normalized_entropy(np.array([5])) == 0.0


def test_normalized_entropy_stays_in_0_1_and_ignores_the_order():
    random = np.random.default_rng(1)
    for _ in range(50):
        counts = random.integers(0, 1000, random.integers(2, 300))
        value = analysis.normalized_entropy(counts)
        assert 0.0 <= value <= 1.0 + 1e-12
        assert analysis.normalized_entropy(random.permutation(counts)) == pytest.approx(value)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint8])
def test_top_experts_come_busiest_first_and_ties_by_number(dtype):
    counts = np.array([0, 5, 9, 5, 1], dtype)
    assert analysis.top_experts(counts) == [(2, 9, 0.45), (1, 5, 0.25), (3, 5, 0.25)]
    assert len(analysis.top_experts(counts, k=9)) == 5
