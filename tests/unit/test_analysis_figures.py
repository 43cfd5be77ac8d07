"""Each figure against plain loops, closed forms, and the definitions on a trace made by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from analysis_reference import (
    NUM_EXPERTS,
    counts,
    effective,
    hit_rates,
    make_trace,
    pair_counts,
    random_trace,
    tokens_of,
    vocabulary_counts,
)

from moescope import analysis
from moescope.analysis import Profile, Rows

NUM_LAYERS, TOP_K = 3, 2
TRACES = [random_trace(number) for number in range(12)]
TOKENS = tokens_of(TRACES)
LAYERS = range(NUM_LAYERS)
EXPERTS = range(NUM_EXPERTS)


def profile_of(traces, num_experts=NUM_EXPERTS, label="", **options):
    first = traces[0]
    profile = Profile(first.num_layers, num_experts, first.top_k, **options)
    for trace in traces:
        profile.add(Rows.of(trace), label)
    return profile


@pytest.fixture(scope="module")
def profile():
    return profile_of(TRACES)


def test_rows_of_a_trace_leave_missing_rows_out():
    assert len(TOKENS) < sum(trace.num_rows for trace in TRACES)
    rows = Rows.joined([Rows.of(trace) for trace in TRACES])
    assert rows.topk_ids.tolist() == [one["ids"] for one in TOKENS]
    assert rows.positions.tolist() == [one["position"] for one in TOKENS]
    assert rows.token_ids.tolist() == [one["token"] for one in TOKENS]
    assert (rows.phases == 0).tolist() == [one["is_prompt"] for one in TOKENS]
    assert rows.ids_by_layer[1, 0].tolist() == [one["ids"][1][0] for one in TOKENS]


def test_load_by_layer_phase_and_position(profile):
    load = profile.load
    assert load.num_rows == len(TOKENS)
    for layer, expert in itertools.product(LAYERS, EXPERTS):
        assert load.total[layer, expert] == counts(TOKENS, layer)[expert]
        for phase, is_prompt in enumerate((True, False)):
            some = [one for one in TOKENS if one["is_prompt"] is is_prompt]
            assert load.by_phase[phase, layer, expert] == counts(some, layer)[expert]
        for number in range(analysis.NUM_BINS):
            first, last = analysis.bin_range(number)
            some = [one for one in TOKENS if first <= one["position"] <= last]
            assert load.by_position[number, layer, expert] == counts(some, layer)[expert]


def test_bins_of_positions_double():
    positions = np.array([0, 1, 2, 3, 4, 7, 8, 1023, 1024, 2**31 - 1])
    bins = analysis.position_bins(positions)
    assert bins.tolist() == [0, 1, 2, 2, 3, 3, 4, 10, 11, 31]
    for position, number in zip(positions.tolist(), bins.tolist(), strict=True):
        first, last = analysis.bin_range(number)
        assert first <= position <= last


def test_coverage_and_total_variation():
    load = np.array([[1, 5, 0, 2], [3, 3, 3, 3], [0, 0, 0, 0]])
    curves = analysis.coverage(load)
    assert curves[0].tolist() == [5 / 8, 7 / 8, 1, 1]
    assert curves[1] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert np.isnan(curves[2]).all()
    distance = analysis.total_variation(np.array([[4, 0], [1, 1], [1, 3]]), np.array([0, 9]))
    assert distance == pytest.approx([1, 0.5, 0.25])


def test_co_activation(profile):
    found = profile.co_activation.counts
    share = analysis.co_activation(found)
    lift = analysis.co_activation_lift(found, len(TOKENS))
    for layer, i, j in itertools.product(LAYERS, EXPERTS, EXPERTS):
        pairs, singles = pair_counts(TOKENS, layer, layer), counts(TOKENS, layer)
        assert found[layer, i, j] == pairs[i, j]
        assert share[layer, i, j] == pytest.approx(pairs[i, j] / singles[i])
        expected = singles[i] * singles[j] / len(TOKENS)
        assert lift[layer, i, j] == pytest.approx(pairs[i, j] / expected)


def test_transitions(profile):
    found = profile.transitions.counts
    share = analysis.transition(found)
    bits = analysis.mutual_information_bits(found)
    for layer in range(NUM_LAYERS - 1):
        pairs = pair_counts(TOKENS, layer, layer + 1)
        of_i, of_j, total = counts(TOKENS, layer), counts(TOKENS, layer + 1), pairs.total()
        for i, j in itertools.product(EXPERTS, EXPERTS):
            assert found[layer, i, j] == pairs[i, j]
            assert share[layer, i, j] == pytest.approx(pairs[i, j] / (of_i[i] * TOP_K))
        expected = sum(
            number / total * math.log2(number * total / (of_i[i] * of_j[j] * TOP_K**2))
            for (i, j), number in pairs.items()
        )
        assert bits[layer] == pytest.approx(expected)


def test_next_layer(profile):
    found = analysis.next_layer(profile.sample.rows)
    assert found.num_rows == len(TOKENS)
    halves = {one.request_id: analysis.request_number(one.request_id) & 1 for one in TRACES}
    assert set(halves.values()) == {0, 1}
    for layer in range(NUM_LAYERS - 1):
        expected = hit_rates(TOKENS, halves, layer, TOP_K)
        assert (found.hit_rate[layer], found.marginal_hit_rate[layer]) == pytest.approx(expected)
    # Layer 1 follows layer 0, layer 2 does not follow layer 1.
    assert found.gain_interval[0, 0] > 0.2
    assert found.gain_interval[0, 1] < 0.1


def test_vocabulary(profile):
    vocabulary = profile.vocabulary
    ids = sorted({one["token"] for one in TOKENS})
    assert vocabulary.tokens.tolist() == ids
    for layer in LAYERS:
        expected = vocabulary_counts(TOKENS, layer)
        found = vocabulary.counts(layer)
        assert found.tolist() == [[expected[token, i] for i in EXPERTS] for token in ids]
        share = analysis.vocabulary_specialization(found)
        assert share == pytest.approx(found / found.sum(axis=1, keepdims=True))
        times = {token: sum(one["token"] == token for one in TOKENS) for token in ids}
        highest = {t: max(expected[t, i] for i in EXPERTS) / times[t] for t in ids}
        mean = sum(highest.values()) / len(highest)
        assert analysis.mean_specialization(found, TOP_K) == pytest.approx(mean)
        best = analysis.most_specialized(vocabulary.tokens, found, TOP_K, num=3)
        ranked = sorted(ids, key=lambda t: (-highest[t], -times[t], t))
        assert [one.token_id for one in best] == ranked[:3]
        assert [one.share for one in best] == [highest[token] for token in ranked[:3]]
        similar = analysis.expert_similarity(found, TOP_K)
        vectors = [[expected[t, i] / times[t] for t in ids] for i in EXPERTS]
        for i, j in itertools.combinations(EXPERTS, 2):
            # The cosine of centered vectors is Pearson's correlation.
            assert similar[i, j] == pytest.approx(np.corrcoef(vectors[i], vectors[j])[0, 1])


def test_rare_token_ids_are_left_out():
    trace = make_trace("a", [[[1]]] * 12, tokens=[5] * 11 + [6] + [0], num_experts=3)
    vocabulary = profile_of([trace], 3).vocabulary
    found = analysis.most_specialized(vocabulary.tokens, vocabulary.counts(0), 1)
    assert [(one.token_id, one.expert, one.share, one.occurrences) for one in found] == [
        (5, 1, 1.0, 11)
    ]
    assert math.isnan(analysis.mean_specialization(vocabulary.counts(0)[1:], 1))


def test_effective_experts(profile):
    exponential, inverse = profile.effective.means
    for layer in LAYERS:
        expected = [effective(one["weights"][layer]) for one in TOKENS]
        assert exponential[layer] == pytest.approx(np.mean([one[0] for one in expected]), rel=1e-5)
        assert inverse[layer] == pytest.approx(np.mean([one[1] for one in expected]), rel=1e-5)
        found = profile.effective.quantile(0.3)[layer]
        assert found == pytest.approx(np.quantile([one[0] for one in expected], 0.3), abs=0.02)
    weights = np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for values in analysis.effective_experts(weights):
        assert values[:2] == pytest.approx([4, 1])
        assert np.isnan(values[2])


def test_without_weights_there_is_no_effective_number():
    profile = profile_of([make_trace("a", [[[0, 1]]])])
    assert np.isnan(profile.effective.means[0]).all()


def test_olmoe_s_definitions_on_a_trace_made_by_hand():
    # Four tokens of one layer, top-2 of 4 experts.
    ids = [[[0, 1]], [[0, 2]], [[0, 1]], [[1, 3]]]
    profile = profile_of([make_trace("a", ids, tokens=[8, 8, 8, 9, 0], num_experts=4)], 4)
    # Co-activation: of the three tokens of expert 0 two go to expert 1.
    share = analysis.co_activation(profile.co_activation.counts)[0]
    assert share[0].tolist() == [1, 2 / 3, 1 / 3, 0]
    assert share[3].tolist() == [0, 1, 0, 1]
    # Domain specialization: of four tokens three go to expert 0; the uniform share is 2 / 4.
    special = analysis.domain_specialization(profile.load.total, np.array(profile.load.num_rows))
    assert special[0].tolist() == [3 / 4, 3 / 4, 1 / 4, 1 / 4]
    assert analysis.uniform_share(2, 4) == 0.5
    # Vocabulary specialization: of the six selections of token 8 three are of expert 0.
    special = analysis.vocabulary_specialization(profile.vocabulary.counts(0))
    assert special.tolist() == [[1 / 2, 1 / 3, 1 / 6, 0], [0, 1 / 2, 0, 1 / 2]]


def test_a_uniform_load_is_its_closed_form():
    # Every pair of four experts once: all figures of the load and of pairs are known.
    pairs = [[pair] for pair in itertools.combinations(range(4), 2)]
    profile = profile_of([make_trace("a", pairs * 3, num_experts=4)], 4)
    load = profile.load.total
    assert analysis.normalized_entropy(load) == pytest.approx(1)
    assert analysis.max_violation(load) == pytest.approx(0)
    off = ~np.eye(4, dtype=bool)
    assert analysis.co_activation(profile.co_activation.counts)[0][off] == pytest.approx(1 / 3)
    lift = analysis.co_activation_lift(profile.co_activation.counts, 18)[0][off]
    assert lift == pytest.approx(1 / 2 * 4 / 3)  # (k - 1) / k * E / (E - 1)


def test_one_expert_alone():
    profile = profile_of([make_trace(one, [[[2], [2]]] * 5) for one in "abcdef"])
    assert analysis.max_violation(profile.load.total) == pytest.approx([6, 6])
    assert analysis.mutual_information_bits(profile.transitions.counts) == pytest.approx([0])
    found = analysis.next_layer(profile.sample.rows)
    assert found.hit_rate == found.marginal_hit_rate == [1.0]
    assert np.isnan(analysis.co_activation(profile.co_activation.counts)[0, 0]).all()
    entropy = profile.replicate.interval(analysis.entropy_bits)
    assert entropy == pytest.approx(np.zeros((2, 2)))


def test_copies_of_a_layer_are_predicted_perfectly():
    random = np.random.default_rng(0)
    traces = []
    for number in range(8):
        first = np.argsort(random.random((300, NUM_EXPERTS)), axis=1)[:, :3]
        traces.append(make_trace(f"r{number}", np.stack([first, first[:, ::-1]], axis=1)))
    found = analysis.next_layer(profile_of(traces).sample.rows)
    assert found.hit_rate.tolist() == [1.0]
    assert found.hit_rate_interval == pytest.approx(np.ones((2, 1)))
    assert found.marginal_hit_rate[0] == pytest.approx(3 / NUM_EXPERTS, abs=0.05)


def test_two_requests_with_disjoint_experts_do_not_predict_each_other():
    names = sorted((f"r{one}" for one in range(9)), key=lambda n: analysis.request_number(n) & 1)
    even, odd = names[0], names[-1]
    assert {analysis.request_number(one) & 1 for one in (even, odd)} == {0, 1}
    traces = [make_trace(even, [[[0], [1]]] * 9), make_trace(odd, [[[2], [3]]] * 9)]
    profile = profile_of(traces)
    found = analysis.next_layer(profile.sample.rows)
    assert (found.hit_rate[0], found.marginal_hit_rate[0]) == (0, 0)
    one, other = (profile_of([trace]).load.total for trace in traces)
    assert analysis.total_variation(one, other).tolist() == [1, 1]
    # One request is predicted by none: the hit rate is not known.
    alone = analysis.next_layer(profile_of(traces[:1]).sample.rows)
    assert np.isnan(alone.hit_rate).all()


def assert_equal(one, other):
    """Compare everything that two profiles count."""
    assert one.labels == other.labels
    assert one.num_requests == other.num_requests
    assert (one.load.counts == other.load.counts).all()
    assert (one.co_activation.counts == other.co_activation.counts).all()
    assert (one.transitions.counts == other.transitions.counts).all()
    assert one.replicate.counts == pytest.approx(other.replicate.counts)
    assert one.vocabulary.tokens.tolist() == other.vocabulary.tokens.tolist()
    assert one.vocabulary.num_rows == other.vocabulary.num_rows
    for layer in LAYERS:
        assert (one.vocabulary.counts(layer) == other.vocabulary.counts(layer)).all()
    for mine, theirs in zip(one.effective.means, other.effective.means, strict=True):
        assert mine == pytest.approx(theirs)
    mine, theirs = one.sample.rows, other.sample.rows
    assert mine.topk_ids.tolist() == theirs.topk_ids.tolist()
    assert mine.requests.tolist() == theirs.requests.tolist()


@pytest.mark.parametrize("vocabulary_bytes", [2**20, 3 * NUM_LAYERS * NUM_EXPERTS * 8])
def test_a_stream_split_anywhere_and_merged_in_any_order_is_the_whole(vocabulary_bytes):
    whole = Profile(NUM_LAYERS, NUM_EXPERTS, TOP_K, vocabulary_bytes=vocabulary_bytes)
    whole.add(Rows.joined([Rows.of(trace) for trace in TRACES]))
    if vocabulary_bytes < 2**20:  # room for three token ids: the lowest
        assert whole.vocabulary.tokens.tolist() == [0, 1, 2]
        assert whole.vocabulary.num_rows == len(TOKENS)
    random = np.random.default_rng(1)
    pages = []
    for trace in TRACES:
        cut = int(random.integers(0, trace.num_rows + 1))
        pages += [trace.page(0, cut), trace.page(cut, trace.num_rows)]
    random.shuffle(pages)
    parts = [profile_of(pages[start::3], vocabulary_bytes=vocabulary_bytes) for start in range(3)]
    assert_equal(parts[2] + parts[0] + parts[1], whole)


def test_a_sample_keeps_few_rows_and_the_same_ones_in_any_order():
    rows = Rows.joined([Rows.of(trace) for trace in TRACES])
    samples = [analysis.RowSample(50) for _ in range(3)]
    samples[0].add(rows)
    for number, start in enumerate(range(0, rows.num_rows, 37)):
        samples[1 + number % 2].add(rows[start : start + 37])
    merged = (samples[2] + samples[1]).rows
    assert merged.num_rows == 50
    assert merged.topk_ids.tolist() == samples[0].rows.topk_ids.tolist()


def test_intervals_come_from_requests_and_a_seed(profile):
    low, high = profile.replicate.interval(analysis.entropy_bits)
    value = analysis.entropy_bits(profile.load.total)
    assert (low < value).all()
    assert (value < high + 0.02).all()
    same = profile_of(TRACES).replicate.interval(analysis.entropy_bits)
    other = profile_of(TRACES, seed=1).replicate.interval(analysis.entropy_bits)
    assert (same == [low, high]).all()
    assert (other != [low, high]).any()
    # Twice the tokens of the same requests tell nothing new: the interval stays as wide.
    twice = profile_of([*TRACES, *TRACES]).replicate.interval(analysis.entropy_bits)
    assert twice == pytest.approx(np.array([low, high]))


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    requests = np.arange(400, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    values = np.random.default_rng(0).normal(size=400)
    weights = analysis.request_weights(requests, 2000)
    assert weights.mean() == pytest.approx(1, abs=0.01)
    means = values @ weights / weights.sum(axis=0)
    low, high = analysis.interval(means)
    expected = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx(
        (values.mean() - expected, values.mean() + expected), abs=0.012
    )


def test_profiles_of_other_models_do_not_add_up(profile):
    with pytest.raises(ValueError, match="of 3, 7 and top-2"):
        profile.add(Rows.of(make_trace("a", [[[0]]])))
    with pytest.raises(ValueError, match="do not add up"):
        profile + Profile(1, NUM_EXPERTS, 2)


def test_rows_that_do_not_fit_are_refused():
    rows = Rows.of(TRACES[0])
    with pytest.raises(ValueError, match="positions must be"):
        Rows(
            num_experts=7, topk_ids=rows.topk_ids, topk_weights=None, token_ids=rows.token_ids,
            positions=rows.positions[1:], phases=rows.phases, requests=rows.requests,
        )  # fmt: skip
