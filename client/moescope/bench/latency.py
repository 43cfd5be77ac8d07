"""Figures of a load test: latencies, throughput, goodput, concurrency, lag.

Source: vLLM 0.32.0, ``vllm/benchmarks/serve.py``, ``calculate_metrics``: the definitions of TTFT,
TPOT, ITL, E2EL and goodput, and of the throughputs, are those.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moescope.bench.measured_request import MeasuredRequest
from moescope.errors import CommandError

METRICS = ("ttft", "tpot", "itl", "e2el")
"""Time to first token, time per output token after it, inter-token latency, end-to-end latency."""

GOODPUT_METRICS = ("ttft", "tpot", "e2el")
LAG_LIMIT = 0.01
"""Part of the TTFT; a larger lag is warned of."""
CPU_LIMIT = 0.8
"""Part of one core; a busier client shows in the latencies."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """A latency over all requests, or over all gaps between chunks; 0 where there are none."""

    mean_ms: float
    median_ms: float
    std_ms: float
    percentiles_ms: dict[float, float]
    """By percentile, such as 99.0."""

    @classmethod
    def of(cls, seconds: Sequence[float], percentiles: Sequence[float]) -> Distribution:
        """Summarize seconds."""
        values = np.asarray(seconds or [0.0]) * 1e3
        return cls(
            mean_ms=float(values.mean()),
            median_ms=float(np.median(values)),
            std_ms=float(values.std()),
            percentiles_ms={p: float(np.percentile(values, p)) for p in percentiles},
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """How far the client lagged behind its own schedule."""

    mean_ms: float
    p99_ms: float
    max_ms: float
    of_ttft: float
    """The larger of mean over mean TTFT and 99th percentile over 99th percentile of the TTFT."""

    @property
    def warning(self) -> str | None:
        """The warning of a lag that is too large to trust the load; None for a smaller one."""
        if self.of_ttft <= LAG_LIMIT:
            return None
        return (
            f"the client lagged behind its schedule by {self.mean_ms:.2f} ms on average and "
            f"{self.p99_ms:.2f} ms at the 99th percentile, {self.of_ttft:.1%} of the TTFT: the "
            "load was not quite the requested one (latencies count from the sending)"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A load test in figures."""

    duration_s: float
    completed: int
    failed: int
    errors: dict[str, int]
    """Failed requests by kind; see `MeasuredRequest.error_kind`."""
    total_input_tokens: int
    """Prompt tokens of completed requests, by the server's usage, like the next."""
    total_output_tokens: int
    request_throughput: float
    """Completed requests a second."""
    output_throughput: float
    """Output tokens a second."""
    total_token_throughput: float
    """Prompt and output tokens a second."""
    request_goodput: float | None
    """Completed requests within all limits a second; None without limits."""
    max_concurrent_requests: int
    """Peak of requests in flight, failed ones among them, interrupted ones not."""
    max_output_tokens_per_s: float
    """Output tokens of the best whole second; each chunk counts as the response's mean."""
    latencies: dict[str, Distribution]
    """By the names of `METRICS`."""
    queue: Distribution
    """Waiting for a free slot, where an open loop is bounded."""
    lag: Lag
    client_cpu: float
    """CPU seconds of the client a second; it uses one core at most."""

    @property
    def warnings(self) -> list[str]:
        """Reasons to doubt these figures."""
        busy = (
            f"the client's core was {self.client_cpu:.0%} busy: its own work is in the latencies; "
            "split the load between several clients"
        )
        return [
            *([self.lag.warning] if self.lag.warning else ()),
            *([busy] if self.client_cpu > CPU_LIMIT else ()),
        ]


def summarize(
    requests: Sequence[MeasuredRequest],
    duration_s: float,
    *,
    cpu_s: float = 0.0,
    percentiles: Sequence[float] = (50.0, 90.0, 99.0),
    goodput_ms: Mapping[str, float] | None = None,
) -> Summary:
    """Compute the figures of a run.

    Args:
        requests: All requests that ended.
        duration_s: Seconds of the run.
        cpu_s: CPU seconds of the client during the run.
        percentiles: Percentiles of every latency.
        goodput_ms: Limits in milliseconds by name: of `GOODPUT_METRICS`.
    """
    good = [request for request in requests if request.error is None]
    prompt_tokens = sum(request.prompt_tokens for request in good)
    output_tokens = sum(request.completion_tokens for request in good)
    seconds = duration_s or float("inf")
    return Summary(
        duration_s=duration_s,
        completed=len(good),
        failed=len(requests) - len(good),
        errors=dict(
            collections.Counter(one.error_kind for one in requests if one.error_kind).most_common()
        ),
        total_input_tokens=prompt_tokens,
        total_output_tokens=output_tokens,
        request_throughput=len(good) / seconds,
        output_throughput=output_tokens / seconds,
        total_token_throughput=(prompt_tokens + output_tokens) / seconds,
        request_goodput=within(good, goodput_ms) / seconds if goodput_ms else None,
        max_concurrent_requests=peak_concurrency(requests),
        max_output_tokens_per_s=float(max(tokens_by_second(good), default=0.0)),
        latencies={
            name: Distribution.of(values, percentiles) for name, values in samples(good).items()
        },
        queue=Distribution.of([request.queue_s for request in good], percentiles),
        lag=lag(requests),
        client_cpu=cpu_s / seconds,
    )


def samples(good: Iterable[MeasuredRequest]) -> dict[str, list[float]]:
    """Return the samples of each latency in seconds, by the names of `METRICS`."""
    every = list(good)
    tpots = [request.tpot_s for request in every]
    return {
        "ttft": [request.ttft_s for request in every],
        "tpot": [tpot for tpot in tpots if tpot is not None],
        "itl": [gap for request in every for gap in request.itls_s],
        "e2el": [request.e2el_s for request in every],
    }


def parse_goodput(items: Iterable[str]) -> dict[str, float]:
    """Parse limits such as ``ttft:500``, in milliseconds.

    Raises:
        CommandError: The name is another one, or the value is not a positive number.
    """
    limits = {}
    for item in items:
        name, _, value = item.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            name = ""
        if name not in GOODPUT_METRICS or not limits[name] > 0:
            raise CommandError(
                f"invalid --goodput {item!r}: expected one of {', '.join(GOODPUT_METRICS)}, a "
                "colon and milliseconds, such as ttft:500"
            )
    return limits


def within(good: Iterable[MeasuredRequest], limits_ms: Mapping[str, float]) -> int:
    """Count the requests within all limits; an output of one token has a TPOT of 0."""
    return sum(
        all(_value_ms(request, name) <= limit for name, limit in limits_ms.items())
        for request in good
    )


def _value_ms(request: MeasuredRequest, name: str) -> float:
    values = {"ttft": request.ttft_s, "tpot": request.tpot_s or 0.0, "e2el": request.e2el_s}
    return 1e3 * values[name]


def peak_concurrency(requests: Sequence[MeasuredRequest]) -> int:
    """Return how many requests were in flight at once, at most, of those that ended."""
    if not requests:
        return 0
    starts = np.array([request.sent_s for request in requests])
    ends = starts + [request.e2el_s for request in requests]
    times = np.concatenate((ends, starts))
    change = np.repeat((-1, 1), len(requests))
    order = np.lexsort((change, times))  # at the same time an end comes before a start
    return int(np.cumsum(change[order]).max())


def tokens_by_second(good: Sequence[MeasuredRequest]) -> npt.NDArray[np.float64]:
    """Return the output tokens that came in each second of the run, ``[num_seconds]``."""
    if not good:
        return np.zeros(0)
    times = np.concatenate([request.sent_s + np.asarray(request.chunk_s) for request in good])
    tokens = np.concatenate(
        [
            np.full(len(request.chunk_s), request.completion_tokens / len(request.chunk_s))
            for request in good
        ]
    )
    return np.bincount(times.astype(np.int64), weights=tokens).astype(np.float64)


def lag(requests: Sequence[MeasuredRequest]) -> Lag:
    """Return how far the client lagged behind its schedule."""
    lags = Distribution.of([request.lag_s for request in requests], (99.0, 100.0))
    ttfts = [request.ttft_s for request in requests if request.chunk_s]
    ttft = Distribution.of(ttfts, (99.0,))
    p99_ms, max_ms = lags.percentiles_ms[99.0], lags.percentiles_ms[100.0]
    ratios = (lags.mean_ms, ttft.mean_ms), (p99_ms, ttft.percentiles_ms[99.0])
    return Lag(
        mean_ms=lags.mean_ms,
        p99_ms=p99_ms,
        max_ms=max_ms,
        of_ttft=max((late / whole for late, whole in ratios if whole), default=0.0),
    )
