"""Whatever the transport does: no row is wrong, and no trace claims rows that it has not."""

from __future__ import annotations

import collections
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.simulation.deployment import FAULTS, Chances, Deployment

often = st.sampled_from([0.0, 0.02, 0.1])
everything = st.builds(
    Chances,
    **dict.fromkeys(FAULTS, often),
    speculation=st.sampled_from([0.0, 0.5]),
    loads=st.sampled_from([0.0, 0.5]),
    weights=st.sampled_from([0.0, 0.3]),
    optimism=st.integers(0, 1),
)
orderly = st.builds(
    Chances,
    **dict.fromkeys(["rows_lost", "pause", "kill", "abort"], often),
    speculation=st.sampled_from([0.0, 0.5]),
    loads=st.sampled_from([0.0, 0.5]),
    weights=st.sampled_from([0.0, 0.3]),
)
chance = st.randoms(use_true_random=False)
checked = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # a failure is found again; other examples: --hypothesis-seed
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@checked
@given(chance, everything, st.integers(1, 5), st.integers(10, 30))
def test_no_row_is_wrong_and_none_that_was_lost_comes_back(rng, chances, num_requests, num_blocks):
    deployment = Deployment(rng, num_requests, chances, num_blocks=num_blocks)
    deployment.run()
    deployment.check()
    deployment.check_followed(exactly=False)
    deployment.check_missing(exactly=False)


@checked
@given(chance, orderly, st.integers(1, 5), st.integers(10, 30))
def test_what_was_not_lost_is_there(rng, chances, num_requests, num_blocks):
    """Of steps that a running collector was told, every row is in the trace, after restarts too."""
    deployment = Deployment(rng, num_requests, chances, num_blocks=num_blocks)
    deployment.run()
    deployment.check()
    deployment.check_followed(exactly=True)
    deployment.check_missing(exactly=True)


@pytest.mark.parametrize(
    "chances",
    [
        Chances(speculation=0.4, abort=0.02),
        Chances(rows_lost=0.1, abort=0.05, pause=0.05, speculation=0.4),
        Chances(kill=0.03, rows_lost=0.05, speculation=0.3, abort=0.03, pause=0.03),
        Chances(**dict.fromkeys(FAULTS, 0.02), speculation=0.3, optimism=1),
        Chances(abort=0.1, loads=0.6),
        Chances(rows_lost=0.02, kill=0.01, abort=0.03, loads=0.3, speculation=0.3, weights=0.2),
    ],
    ids=["preemptions", "losses", "restarts", "everything", "loads", "weights"],
)
def test_many_requests_with_prefix_hits_on_reused_blocks(chances):
    """The short form of ``python -m benchmarks.faults``."""
    counts: collections.Counter[str] = collections.Counter()
    happened: collections.Counter[str] = collections.Counter()
    for seed in range(30):
        deployment = Deployment(random.Random(seed), 20, chances)
        deployment.run()
        counts += deployment.check()
        counts["early"] += deployment.check_followed(exactly=not chances.given_up)
        deployment.check_missing(exactly=not chances.given_up)
        happened += deployment.happened
        happened["loads"] += deployment.engine.num_loads
        happened["weights"] += deployment.weights_version
    assert counts["complete"] > 50
    assert counts["early"] > 500
    sources = ["computed", "cached", *(["missing"] if chances.rows_lost else [])]
    assert min(counts[source] for source in sources) > 500
    assert all(
        happened[fault] > 5 for fault in (*FAULTS, "loads", "weights") if getattr(chances, fault)
    )
