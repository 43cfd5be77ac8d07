"""The engine's clock: vLLM's own latencies, without its HTTP server and the client.

vLLM stamps outputs in the engine's process.

Source: vLLM 0.32.0, ``v1/metrics/stats.py``, ``IterationStats.update_from_output``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from moescope import http
from moescope.overhead.rounds import Pass, Round

ITL = "engine_itl_ms"
"""The metric's name: mean time between two tokens of an output."""
ITL_S, ITLS = "vllm:inter_token_latency_seconds_sum", "vllm:inter_token_latency_seconds_count"
COUNTERS = (ITL_S, ITLS)


def read_counters(url: str, api_key: str | None = None) -> dict[str, float]:
    """Return the counters of a server that `with_itl` takes; none of one that has none.

    Raises:
        ConnectionFailedError: It does not respond.
    """
    with http.connect(url, api_key) as client:
        reply = client.get("/metrics")
    return counters(reply.text, COUNTERS) if reply.is_success else {}


def counters(text: str, names: Collection[str]) -> dict[str, float]:
    """Return the values of counters in Prometheus text, each the sum over its labels."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in names:
            values[name] = values.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return values


def with_itl(item: Round) -> Round:
    """Add `ITL` to the metrics of the passes that counted it."""

    def one(made: Pass) -> Pass:
        if not made.counted.get(ITLS):
            return made
        itl_ms = 1e3 * made.counted[ITL_S] / made.counted[ITLS]
        return dataclasses.replace(made, metrics={**made.metrics, ITL: itl_ms})

    passes = {name: one(made) for name, made in item.passes.items()}
    return dataclasses.replace(item, passes=passes)
