"""What the differences of rounds are worth."""

import numpy as np
import pytest
from overhead_fakes import made, paired

from moescope.overhead import comparison
from moescope.overhead.arms import MOESCOPE, STOCK, STOCK_AGAIN
from moescope.overhead.rounds import Round


def difference(measured, arm=MOESCOPE, metric="s_per_token"):
    return comparison.differences(measured, 0)[arm][metric]


def test_a_tenth_more_in_every_round_is_ten_percent():
    one = difference(paired(moescope=[10.0] * 4))
    assert one.percent == pytest.approx(10.0)
    assert one.claim_percent == pytest.approx((10.0, 10.0))
    assert one.distinguishable
    assert one.noise_percent is None


def test_rounds_are_compared_with_themselves():
    # The machine gets slower from round to round, the arms alike: 5% stay 5%.
    drifting = [
        Round(order=(STOCK, MOESCOPE), passes={STOCK: made(s), MOESCOPE: made(1.05 * s)})
        for s in (1.0, 3.0, 9.0)
    ]
    one = difference(drifting)
    assert one.interval_95_percent == pytest.approx((5.0, 5.0))


def test_a_rate_and_its_inverse_agree():
    halved, doubled = made(0.5), made(2.0)
    measured = [
        Round(order=(STOCK, MOESCOPE), passes={STOCK: made(1.0), MOESCOPE: one})
        for one in (halved, doubled)
    ]
    assert difference(measured).percent == pytest.approx(0.0)
    times = [made(1.0, s_per_token=1 / v, output_throughput=v) for v in (1.1, 1.3)]
    measured = [
        Round(order=(STOCK, MOESCOPE), passes={STOCK: made(1.0), MOESCOPE: one}) for one in times
    ]
    slower = 1 + difference(measured).percent / 100
    faster = 1 + difference(measured, metric="output_throughput").percent / 100
    assert slower * faster == pytest.approx(1.0)


def test_an_interval_that_holds_zero_is_not_distinguishable():
    unclear = difference(paired(moescope=[-1.0, 1.2, -0.5, 0.6]))
    assert not unclear.distinguishable
    said = comparison.statement("capture", "s_per_token", unclear, 4)
    assert said.endswith("not distinguishable from zero")
    clear = difference(paired(moescope=[1.0, 1.2, 0.5, 0.6]))
    assert clear.distinguishable
    assert "not distinguishable" not in comparison.statement("capture", "s_per_token", clear, 4)


def test_nothing_narrower_than_the_stock_pair_is_claimed():
    quiet = difference(paired(again=[0.1, -0.2, 0.1, 0.0], moescope=[2.0, 2.1, 1.9, 2.0]))
    assert quiet.distinguishable
    assert quiet.noise_percent < 0.3
    # The second stock server is 3% slower in every round: 2% of another are no finding.
    noisy = paired(again=[3.0, 3.1, 2.9, 3.0], moescope=[2.0, 2.1, 1.9, 2.0])
    one = difference(noisy)
    assert one.interval_95_percent[0] > 1.8
    assert one.noise_percent == pytest.approx(3.1, abs=0.06)
    assert one.claim_percent == pytest.approx((1.02 / 1.031 * 100 - 100, 5.2), abs=0.15)
    assert not one.distinguishable
    assert "noise of the run ±3.1" in comparison.statement("capture", "s_per_token", one, 4)
    assert difference(noisy, STOCK_AGAIN).noise_percent is None


def test_noise_is_a_ratio_alike_in_both_directions():
    one = difference(paired(again=[-50.0] * 3, moescope=[100.0] * 3))
    assert one.noise_percent == pytest.approx(100.0)  # half is as far off as twice
    assert one.claim_percent == pytest.approx((0.0, 300.0))


def test_any_arm_may_be_measured_again():
    measured = [
        Round(order=("a", "a-again", "b"), passes={
            "a": made(1.0), "a-again": made(1.03), "b": made(1.02, more=5.0)})
    ] * 3  # fmt: skip
    by_arm = comparison.differences(measured, 0)
    assert by_arm["b"]["s_per_token"].noise_percent == pytest.approx(3.0)
    assert by_arm["a-again"]["s_per_token"].noise_percent is None
    assert "more" not in by_arm["b"]  # it is not known of the others
    lone = comparison.differences(
        [Round(order=("b", "a-again"), passes={"b": made(1.0), "a-again": made(1.0)})], 0
    )
    assert lone["a-again"]["s_per_token"].noise_percent is None


def test_a_metric_that_is_not_there_is_left_out():
    measured = [
        Round(order=(STOCK, MOESCOPE), passes={
            STOCK: made(1.0, mean_tpot_ms=0.0), MOESCOPE: made(1.0)})
    ]  # fmt: skip
    by_metric = comparison.differences(measured, 0)[MOESCOPE]
    assert "mean_tpot_ms" not in by_metric
    assert set(by_metric) == set(comparison.METRICS) - {"mean_tpot_ms"}


@pytest.mark.parametrize("num", [3, 4, 10, 30])
def test_the_interval_covers_the_true_mean_about_as_often_as_it_says(num):
    random = np.random.default_rng(7)
    covered = 0
    for _ in range(400):
        low, high = comparison.bootstrap_interval(list(random.normal(3.0, 1.0, num)), 0)
        covered += low <= 3.0 <= high
    assert 0.92 * 400 <= covered <= 0.98 * 400


def test_the_interval_follows_the_seed():
    values = [1.0, 2.0, 4.0, 8.0]
    low, high = comparison.bootstrap_interval(values, 1)
    assert (low, high) == comparison.bootstrap_interval(values, 1)
    assert low < np.mean(values) < high


def test_outputs_are_compared_between_arms_and_within_an_arm():
    same, other = made(1.0, token_ids=[(1, 2), (3,)]), made(1.0, token_ids=[(1, 2), (4,)])
    measured = [
        Round(order=("a", "b"), passes={"a": same, "b": other}),
        Round(order=("a", "b"), passes={"a": same, "b": same}),
        Round(order=("a", "b"), passes={"a": same, "b": made(1.0, token_ids=[None, (3,)])}),
    ]
    assert comparison.agreement(measured) == {
        "between_arms": {"b": {"same": 4, "compared": 5}},
        "within_arm": {"same": 6, "compared": 7},
    }


def as_json(measured):
    return {
        arm: {metric: one.as_json() for metric, one in by_metric.items()}
        for arm, by_metric in comparison.differences(measured, 0).items()
    }


def test_what_equal_servers_differ_by_is_shown_of_the_headline_alone():
    quiet = as_json(paired(again=[1.0, -1.0, 0.5], moescope=[1.0, 2.0, 3.0]))
    assert comparison.telling(quiet) == comparison.METRICS
    assert comparison.left_out(quiet) == ""
    noisy = as_json(paired(again=[90.0, -60.0, 80.0], moescope=[1.0, 2.0, 3.0]))
    assert list(comparison.telling(noisy)) == ["s_per_token", "engine_itl_ms"]
    assert f"{len(comparison.METRICS) - 2} more in timing.json" in comparison.left_out(noisy)
    # Without the same again nothing is known of the noise.
    assert comparison.telling(as_json(paired(moescope=[90.0, -60.0, 80.0]))) == comparison.METRICS


def test_one_noisy_metric_is_left_out():
    wild = [made(1.0, mean_ttft_ms=value) for value in (0.3, 3.0, 9.0)]
    measured = [
        Round(order=(STOCK, STOCK_AGAIN), passes={STOCK: made(1.0), STOCK_AGAIN: one, "b": one})
        for one in wild
    ]
    differences = as_json(measured)
    assert comparison.METRICS.keys() - comparison.telling(differences) == {"mean_ttft_ms"}
    assert "1 more in timing.json" in comparison.left_out(differences)
