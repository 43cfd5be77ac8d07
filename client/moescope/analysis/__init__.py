"""Figures of routes: functions on arrays, and counters that add up.

What is counted from routed tokens (`Rows`, made of a trace by `Rows.of`) adds up: a counter takes
rows in any number of calls, and ``a + b`` is the counter of both, so that a day of traffic need not
fit in memory. A figure is a function of the counts.

===================  ===========================================================================
`Loads`              selections by layer, phase and position: `shares`, `entropy_bits`,
                     `max_violation`, `coverage`, `total_variation`, `domain_specialization` …
`CoActivation`       pairs within a layer: `co_activation`, `co_activation_lift`
`Transitions`        pairs from a layer to the next: `transition`, `mutual_information_bits`
`RowSample`          rows, for `next_layer`: how well a layer is predicted from the one before
`Vocabulary`         selections by token id: `vocabulary_specialization`, `most_specialized`,
                     `mean_specialization`, `expert_similarity`
`EffectiveExperts`   the weights' spread: `effective_experts`
`LoadReplicates`     the load in resampled requests: `interval`, `lower_bounds`
`Differences`        the same tokens on two servers: `jaccard`, `weight_differences`,
                     `exchange_gap`, `jensen_shannon_bits`
`Profile`            all of one server
===================  ===========================================================================

The functions of the load take counts ``[..., num_experts]`` and work along the last axis; an axis
without any selection gives NaN.
"""

from moescope.analysis.balance import (
    Balance,
    Counts,
    Floats,
    OverLayers,
    active_experts,
    coverage,
    entropy,
    entropy_bits,
    jensen_shannon_bits,
    max_entropy_bits,
    max_violation,
    normalized_entropy,
    shares,
    top_experts,
    total_variation,
)
from moescope.analysis.bootstrap import LoadReplicates, interval, lower_bounds, request_weights
from moescope.analysis.difference import (
    FIGURES,
    Differences,
    Differing,
    exchange_gap,
    jaccard,
    slots_in,
    weight_differences,
)
from moescope.analysis.effective import EffectiveExperts, effective_experts
from moescope.analysis.loads import (
    NUM_BINS,
    Loads,
    bin_range,
    domain_specialization,
    position_bins,
    uniform_share,
)
from moescope.analysis.pairs import (
    CoActivation,
    Transitions,
    co_activation,
    co_activation_lift,
    mutual_information_bits,
    transition,
)
from moescope.analysis.prediction import NextLayer, RowSample, next_layer
from moescope.analysis.profile import Profile
from moescope.analysis.rows import NO_TOKEN, PHASES, Rows, request_number
from moescope.analysis.vocabulary import (
    SpecializedToken,
    Vocabulary,
    expert_similarity,
    mean_specialization,
    most_specialized,
    vocabulary_specialization,
)

__all__ = [
    "FIGURES",
    "NO_TOKEN",
    "NUM_BINS",
    "PHASES",
    "Balance",
    "CoActivation",
    "Counts",
    "Differences",
    "Differing",
    "EffectiveExperts",
    "Floats",
    "LoadReplicates",
    "Loads",
    "NextLayer",
    "OverLayers",
    "Profile",
    "RowSample",
    "Rows",
    "SpecializedToken",
    "Transitions",
    "Vocabulary",
    "active_experts",
    "bin_range",
    "co_activation",
    "co_activation_lift",
    "coverage",
    "domain_specialization",
    "effective_experts",
    "entropy",
    "entropy_bits",
    "exchange_gap",
    "expert_similarity",
    "interval",
    "jaccard",
    "jensen_shannon_bits",
    "lower_bounds",
    "max_entropy_bits",
    "max_violation",
    "mean_specialization",
    "most_specialized",
    "mutual_information_bits",
    "next_layer",
    "normalized_entropy",
    "position_bins",
    "request_number",
    "request_weights",
    "shares",
    "slots_in",
    "top_experts",
    "total_variation",
    "transition",
    "uniform_share",
    "vocabulary_specialization",
    "weight_differences",
]
