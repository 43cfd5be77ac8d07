import numpy as np
import pytest

from moescope import analysis


def test_even_use_has_the_highest_entropy_and_no_violation():
    counts = np.full((2, 60), 7)
    assert analysis.max_entropy_bits(60) == pytest.approx(5.9069, abs=1e-4)
    assert analysis.entropy_bits(counts) == pytest.approx(analysis.max_entropy_bits(60))
    assert analysis.normalized_entropy(counts) == pytest.approx(1.0)
    assert analysis.max_violation(counts) == pytest.approx(0.0)


def test_one_expert_alone_has_entropy_0_and_the_highest_violation():
    counts = np.array([0, 0, 9, 0])
    assert str(analysis.entropy_bits(counts)) == "0.0"
    assert analysis.max_violation(counts) == 3.0
    assert analysis.active_experts(counts) == 1


def test_values_worked_out_by_hand():
    counts = np.array([[4, 2, 1, 1], [1, 1, 0, 0]])
    assert analysis.shares(counts)[0].tolist() == [0.5, 0.25, 0.125, 0.125]
    assert analysis.entropy_bits(counts).tolist() == [1.75, 1.0]
    assert analysis.entropy(counts) == pytest.approx([1.75 * np.log(2), np.log(2)])  # in nats
    assert analysis.normalized_entropy(counts) == pytest.approx([0.875, 0.5])
    assert analysis.max_violation(counts) == pytest.approx([1.0, 1.0])
    assert analysis.active_experts(counts).tolist() == [4, 2]


def test_a_layer_without_selections_is_nan_and_leaves_the_others_alone():
    counts = np.array([[0, 0], [1, 1]])
    for function in (
        analysis.entropy_bits,
        analysis.entropy,
        analysis.normalized_entropy,
        analysis.max_violation,
    ):
        values = function(counts)
        assert np.isnan(values[0])
        assert not np.isnan(values[1])


def test_the_balance_is_of_layers_and_not_of_their_sum():
    # Every layer has one expert alone, another in each: the sum over layers would be even.
    one_each = analysis.Balance.of(np.diag([5, 5, 5, 5]))
    assert one_each.entropy_bits.mean == 0.0
    assert one_each.max_violation.mean == 3.0
    balance = analysis.Balance.of(
        np.array([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0], [6, 1, 1, 0]])
    )
    assert (balance.num_experts, balance.max_entropy_bits) == (4, 2.0)
    entropies = [2.0, 1.0, 0.75 * np.log2(4 / 3) + 0.25 * 3]
    assert balance.entropy_bits.mean == pytest.approx(np.mean(entropies))
    assert (balance.entropy_bits.worst, balance.entropy_bits.worst_place) == (1.0, 2)
    assert balance.normalized_entropy.worst == 0.5
    assert balance.max_violation.mean == pytest.approx((0 + 1 + 2) / 3)
    assert (balance.max_violation.worst, balance.max_violation.worst_place) == (2.0, 3)
    assert (balance.active_experts.mean, balance.active_experts.worst) == (3.0, 2.0)
    with pytest.raises(ValueError, match="NaN"):
        analysis.Balance.of(np.zeros((2, 4), np.int64))


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
