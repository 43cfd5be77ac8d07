"""Computes the differences between arms, their intervals and the noise of the run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from moescope.overhead import engine
from moescope.overhead.arms import AGAIN
from moescope.overhead.rounds import Pass, Round

METRICS = {
    "s_per_token": "wall time per token",
    engine.ITL: "ITL, mean, engine's clock",
    "output_throughput": "output tokens a second",
    "request_throughput": "requests a second",
    **{
        f"{statistic}_{name}_ms": f"{name.upper()}, {word}"
        for name in ("ttft", "tpot", "itl", "e2el")
        for statistic, word in (("mean", "mean"), ("median", "median"), ("p99", "99th percentile"))
    },
}
"""What is compared: the names in the file, as of ``vllm bench serve``, and in words. The client's
clock measures all but the engine's."""

HEADLINE = ("s_per_token", engine.ITL)
"""What is told in words."""
MAX_NOISE_PERCENT = 25.0
"""A metric by which the first arm and the same again may differ by more tells nothing."""

_BOOTSTRAP_SAMPLES = 10_000
_Z = NormalDist().inv_cdf(0.975)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How an arm differs from the first, in percent of the first; paired by round."""

    percent: float
    """Geometric mean of the rounds' ratios, less one: a rate and its inverse then agree."""
    interval_95_percent: tuple[float, float]
    """Bootstrap interval of that mean."""
    noise_percent: float | None
    """The most that the first arm and the same again may differ by, upwards: the far end of their
    interval, in whichever direction. None where there is no such pair, or this is its second."""

    @property
    def claim_percent(self) -> tuple[float, float]:
        """The interval that is claimed: at no side narrower than the noise, as a ratio."""
        low, high = self.interval_95_percent
        noise, mean = _log(self.noise_percent or 0.0), _log(self.percent)
        return min(low, _percent(mean - noise)), max(high, _percent(mean + noise))

    @property
    def distinguishable(self) -> bool:
        """Whether the interval that is claimed excludes zero."""
        low, high = self.claim_percent
        return not low <= 0.0 <= high

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `as_json` returned."""
        low, high = values["interval_95_percent"]
        return cls(
            percent=values["percent"],
            interval_95_percent=(low, high),
            noise_percent=values["noise_percent"],
        )

    def as_json(self) -> dict[str, Any]:
        """Return it as the file has it."""
        return {
            **dataclasses.asdict(self),
            "claim_percent": self.claim_percent,
            "distinguishable": self.distinguishable,
        }


def bootstrap_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """Return the 95% interval of the mean, by the percentile bootstrap, widened for few values.

    Of ten values the percentiles alone cover the mean in 90% of cases, of four in 80%. Their
    distances from the mean are therefore multiplied by what a t interval has on top.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; Hesterberg
    2015, "What Teachers Should Know About the Bootstrap", on the narrowness of percentiles.

    Args:
        values: One value a round.
        seed: Seed of the resampling.
    """
    low, high = np.percentile(_resampling(len(values), seed) @ np.asarray(values), (2.5, 97.5))
    mean, factor = float(np.mean(values)), _small_sample_factor(len(values))
    return mean + factor * (float(low) - mean), mean + factor * (float(high) - mean)


@functools.lru_cache(maxsize=1)  # it is the same for every arm and metric
def _resampling(num: int, seed: int) -> npt.NDArray[np.float64]:
    """Return the weight of each value in each bootstrap mean, ``[num_samples, num]``."""
    picks = np.random.default_rng(seed).integers(0, num, size=(_BOOTSTRAP_SAMPLES, num))
    picks += num * np.arange(_BOOTSTRAP_SAMPLES)[:, None]
    counts = np.bincount(picks.ravel(), minlength=picks.size).reshape(picks.shape)
    weights: npt.NDArray[np.float64] = counts / num
    return weights


def _small_sample_factor(num: int) -> float:
    """Return a t interval's width over that of the normal with the biased deviation.

    Source: Abramowitz and Stegun 1964, 26.7.5, for Student's t; 3% too small for three values, 1%
    for four.
    """
    if num < 2:
        return 1.0
    z, df = _Z, num - 1
    t = (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )
    return t / z * math.sqrt(num / df)


def _paired(
    rounds: Sequence[Round], arm: str, baseline: str, metric: str, seed: int
) -> tuple[float, tuple[float, float]]:
    """Return an arm's mean difference to the baseline in percent, and its interval."""
    logs = [
        math.log(item.passes[arm].metrics[metric] / item.passes[baseline].metrics[metric])
        for item in rounds
    ]
    low, high = bootstrap_interval(logs, seed)
    return _percent(float(np.mean(logs))), (_percent(low), _percent(high))


def _percent(log_ratio: float) -> float:
    return 100.0 * math.expm1(log_ratio)


def _log(percent: float) -> float:
    return math.log1p(percent / 100.0)


def differences(rounds: Sequence[Round], seed: int) -> dict[str, dict[str, Difference]]:
    """Compare every arm with the first in every metric.

    Metrics that a pass lacks, such as a TPOT of outputs of one token, are left out.

    Args:
        rounds: The rounds that are done, one at least.
        seed: Seed of the bootstrap.

    Returns:
        By arm and metric, the first arm left out.
    """
    baseline, *others = rounds[0].passes
    named = rounds[0].passes[baseline].metrics
    measured = [metric for metric in named if all(_has(item, metric) for item in rounds)]

    def one(arm: str, metric: str, noise: float | None) -> Difference:
        percent, interval = _paired(rounds, arm, baseline, metric, seed)
        return Difference(percent=percent, interval_95_percent=interval, noise_percent=noise)

    noise: dict[str, float] = {}
    if (again := baseline + AGAIN) in others:
        noise = {
            metric: _percent(
                max(abs(_log(end)) for end in one(again, metric, None).interval_95_percent)
            )
            for metric in measured
        }
    return {
        arm: {
            metric: one(arm, metric, None if arm == again else noise.get(metric))
            for metric in measured
        }
        for arm in others
    }


def telling(differences: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the metrics that tell something, in words: `HEADLINE`, and what noise leaves.

    Args:
        differences: By arm and metric, as `Difference.as_json` has them.
    """
    arms = differences.values()
    noises = {
        metric: max(by_metric[metric]["noise_percent"] or 0.0 for by_metric in arms)
        for metric in next(iter(arms))
    }
    return {
        metric: words
        for metric, words in METRICS.items()
        if metric in noises and (metric in HEADLINE or noises[metric] <= MAX_NOISE_PERCENT)
    }


def left_out(differences: Mapping[str, Mapping[str, Any]]) -> str:
    """Return in words how many metrics `telling` leaves out; nothing where there is none."""
    number = len(METRICS.keys() & next(iter(differences.values()))) - len(telling(differences))
    if not number:
        return ""
    return (
        f"{number} more in timing.json: there equal servers may differ by more than "
        f"{MAX_NOISE_PERCENT:.0f}%"
    )


def _has(item: Round, metric: str) -> bool:
    return all(made.metrics.get(metric, 0.0) > 0 for made in item.passes.values())


def statement(what: str, metric: str, difference: Difference, num_rounds: int) -> str:
    """Return a difference in words.

    Args:
        what: Whose it is, such as ``capture``.
        metric: Of `METRICS`; another is called by its name.
        difference: The difference.
        num_rounds: Of how many rounds.
    """
    low, high = difference.claim_percent
    text = (
        f"{what} changes the {METRICS.get(metric, metric)} by {difference.percent:+.2f}% "
        f"(95% interval {low:+.2f}% to {high:+.2f}%, {num_rounds} paired rounds)"
    )
    if difference.noise_percent is not None:
        text += f"; noise of the run ±{difference.noise_percent:.2f}%"
    if not difference.distinguishable:
        text += ": not distinguishable from zero"
    return text


def agreement(rounds: Sequence[Round]) -> dict[str, Any]:
    """Count equal outputs between each arm and the first, and within arms between rounds.

    The second is the measure of the first: a batch's make-up alone can change a token.
    """
    baseline, *others = rounds[0].passes
    between = {
        arm: _equal([(item.passes[baseline], item.passes[arm]) for item in rounds])
        for arm in others
    }
    pairs = itertools.pairwise(rounds)
    within = [
        (one.passes[name], other.passes[name])
        for one, other in pairs
        for name in (baseline, *others)
    ]
    return {"between_arms": between, "within_arm": _equal(within)}


def _equal(pairs: Sequence[tuple[Pass, Pass]]) -> dict[str, int]:
    outputs = [
        (a, b)
        for one, other in pairs
        for a, b in zip(one.token_ids, other.token_ids, strict=True)
        if a is not None and b is not None
    ]
    return {"same": sum(a == b for a, b in outputs), "compared": len(outputs)}


def means(passes: Sequence[Pass]) -> Mapping[str, float]:
    """Return the mean of every metric over an arm's passes, of those that all of them have."""
    return {
        metric: float(np.mean([made.metrics[metric] for made in passes]))
        for metric in METRICS
        if all(metric in made.metrics for made in passes)
    }
