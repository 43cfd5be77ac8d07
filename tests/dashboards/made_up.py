"""An hour of made-up metrics in a Prometheus: every metric of ours, and vLLM's that are shown.

The model has 6 layers of 16 experts, top-2. Layer 3 sends more and more to expert 5; expert 9 of
layer 4 is never selected; in layer 2 prefill and decode leave out five each, not the same ones.
Halfway, the collector is too slow for some minutes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moescope_service.causes import LOST_CAUSES, MISSING_CAUSES
from moescope_service.metric_names import METRICS, MetricSpec
from tests.e2e.prometheus import Query, running

HOUR_S, STEP_S = 3600, 30
NUM_LAYERS, NUM_EXPERTS, TOP_K = 6, 16, 2
LABELS = {
    "layer": [str(layer) for layer in range(NUM_LAYERS)],
    "expert": [str(expert) for expert in range(NUM_EXPERTS)],
    "phase": ["prefill", "decode"],
    "reason": LOST_CAUSES,
    "cause": MISSING_CAUSES,
    "status": ["complete", "incomplete"],
    "source": ["computed", "cached", "missing"],
    "model_name": ["tiny"],
    "engine": ["0"],
    "kind": ["prefill", "decode", "mixed"],
}
STEP_MEANS = {"prefill": (13, 60), "decode": (7, 6), "mixed": (12, 64)}
"""Distinct experts and tokens of a step, by kind."""
HISTOGRAMS = {
    "time_to_first_token": 0.08,
    "request_time_per_output_token": 0.012,
    "inter_token_latency": 0.012,
    "e2e_request_latency": 2.0,
    "request_queue_time": 0.004,
}
VLLM: dict[str, tuple[str, dict[str, str], float]] = {
    "vllm:num_requests_running": ("gauge", {}, 6),
    "vllm:num_requests_waiting": ("gauge", {}, 1.5),
    "vllm:prompt_tokens": ("counter", {}, 60),
    "vllm:generation_tokens": ("counter", {}, 240),
    "vllm:kv_cache_usage_perc": ("gauge", {}, 0.42),
    "vllm:prefix_cache_hits": ("counter", {}, 18),
    "vllm:prefix_cache_queries": ("counter", {}, 60),
    "vllm:num_preemptions": ("counter", {}, 0.02),
    "vllm:request_success": ("counter", {"finished_reason": "stop"}, 2.0),
}
"""Kind, labels, and the value or what it grows by a second."""


def share(layer: int, expert: int, at: float) -> float:
    """Return an expert's share of its layer's selections; ``at`` runs from 0 to 1."""
    weights = [1.0 + 0.5 * math.sin(1.7 * one + layer) for one in range(NUM_EXPERTS)]
    if layer == 3:
        weights[5] += 9.0 * at
    if layer == 4:
        weights[9] = 0.0
    return weights[expert] / sum(weights)


def value(spec: MetricSpec, labels: dict[str, str], at: float) -> float:
    """Return a gauge's value, or what a counter grew to, ``at`` (0 to 1) of the hour."""
    layer = int(labels.get("layer", 0))
    shares = [share(layer, expert, at) for expert in range(NUM_EXPERTS)]
    seconds, slow = HOUR_S * at, HOUR_S * min(max(at - 0.5, 0.0), 0.1)
    is_decode = labels.get("phase") == "decode"
    token_rate = 240.0 if is_decode else 42.0
    first_in = {"reason": "queue_full", "cause": "queue_full"}
    is_slow = any(labels.get(label) == name for label, name in first_in.items())
    wave = 1.0 + 0.1 * math.sin(30 * at)
    load = sum(-one * math.log(one) for one in shares if one) / math.log(NUM_EXPERTS)
    values = {
        "expert_tokens": TOP_K * token_rate * seconds * shares[int(labels.get("expert", 0))],
        "layer_normalized_entropy": load - 0.02 * is_decode,
        "layer_max_violation": max(shares) * NUM_EXPERTS - 1.0,
        "layer_max_mean_load_ratio": max(shares) * NUM_EXPERTS,
        "layer_active_experts": sum(one > 0 for one in shares) - 5 * (layer == 2),
        "layer_hottest_expert": shares.index(max(shares)),
        "layer_hottest_expert_share": max(shares),
        "layer_coldest_expert": shares.index(min(shares)),
        "layer_coldest_expert_share": min(shares),
        "window_rows": 60 * token_rate * wave,
        "experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "layers": NUM_LAYERS,
        "rows": token_rate * seconds,
        "rows_captured": 282 * seconds - 20 * slow,
        "rows_lost": 20 * slow * is_slow,
        "step_gaps": float(at > 0.6),
        "steps": 40 * seconds,
        "hook_seconds": 40 * seconds * 180e-6,
        "capture_on": 1,
        "collector_lag_seconds": 0.03 * wave + 0.4 * (0.5 < at < 0.6),
        "collector_restarts": float(at > 0.61),
        "collector_errors": float(at > 0.61),
        "links_refused": 0,
        "collector_up": 1,
        "step_expert_bytes": 40 * seconds * NUM_LAYERS * 3_000_000 * STEP_MEANS.get(
            labels.get("kind", ""), (0, 0)
        )[0],
        "traces": {"complete": 2 * seconds - slow / 4, "incomplete": slow / 4}.get(
            labels.get("status", ""), 0.0
        ),
        "trace_rows": {
            "computed": 282 * seconds - 20 * slow, "cached": 18 * seconds, "missing": 20 * slow,
        }.get(labels.get("source", ""), 0.0),
        "trace_rows_missing": 20 * slow * is_slow,
        "trace_rows_stale": 5 * slow,
        "traces_incomplete": slow / 4 * is_slow,
        "traces_kept": min(2 * seconds, 5000),
        "traces_evicted": max(2 * seconds - 5000, 0),
        "log_traces_dropped": 0.5 * slow,
        "archive_traces": 2 * seconds - slow,
        "archive_traces_dropped": slow / 4,
        "archive_traces_waiting": 600 * wave,
        "archive_up": 1,
        "archive_files": seconds / 300,
        "archive_bytes": seconds * 20_000,
        "sequences_unclaimed": 0.01 * seconds,
        "registrations_lost": 0.1 * slow,
        "prefix_bytes": min(seconds, 3000) * 20_000,
        "running_bytes": 6 * wave * 4_000_000,
        "sequences_running": 6 * wave,
        "store_bytes": min(2 * seconds, 5000) * 50_000,
        "store_limit_bytes": 268_435_456,
    }  # fmt: skip
    short = spec.name.removeprefix("moescope_")
    if short not in values:
        raise KeyError(f"{spec.name} has no made-up value: add one to tests/dashboards/made_up.py")
    return values[short]


def _histogram(
    name: str, labels: dict[str, str], at: float
) -> Iterator[tuple[str, str, dict[str, str], float]]:
    """Yield what steps have read: the more tokens they have, the more distinct experts."""
    mean = STEP_MEANS[labels["kind"]][name == "moescope_step_tokens"]
    count = HOUR_S * at * 40 * (1 if name == "moescope_step_tokens" else NUM_LAYERS)
    for bound in (*range(1, NUM_EXPERTS + 1), 64, math.inf):
        below = {**labels, "le": f"{bound:g}".replace("inf", "+Inf")}
        yield "histogram", f"{name}_bucket", below, count * (bound >= mean)
    yield "histogram", f"{name}_sum", labels, count * mean * (1 + 0.1 * at)
    yield "histogram", f"{name}_count", labels, count


def _samples(at: float) -> Iterator[tuple[str, str, dict[str, str], float]]:
    """Yield kind, name, labels and value of every series."""
    for spec in METRICS.values():
        for chosen in itertools.product(*(LABELS[label] for label in spec.labels)):
            labels = dict(zip(spec.labels, chosen, strict=True))
            if spec.kind == "histogram":
                yield from _histogram(spec.name, labels, at)
                continue
            yield spec.kind, spec.sample_name, labels, value(spec, labels, at)
    for name, (kind, labels, size) in VLLM.items():
        grown = size * HOUR_S * at if kind == "counter" else size * (1 + 0.2 * math.sin(25 * at))
        suffix = "_total" if kind == "counter" else ""
        yield kind, name + suffix, {"model_name": "tiny", **labels}, grown
    for name, median in HISTOGRAMS.items():
        for bound in (0.25, 0.5, 1.0, 2.0, 4.0, 16.0, math.inf):
            count = HOUR_S * at * 5 * (1 - 0.5 ** (bound * (1.1 - 0.3 * at)))
            labels = {"model_name": "tiny", "le": f"{bound * median:g}".replace("inf", "+Inf")}
            yield "histogram", f"vllm:{name}_seconds_bucket", labels, count


def _openmetrics(until_s: float) -> str:
    lines: dict[str, list[str]] = {}
    for step in range(HOUR_S // STEP_S + 1):
        at, stamp = step * STEP_S / HOUR_S, until_s - HOUR_S + step * STEP_S
        for kind, name, labels, number in _samples(at):
            family = f"{re.sub('_(total|bucket|sum|count)$', '', name)} {kind}"
            text = ",".join(f'{k}="{v}"' for k, v in {**labels, "instance": "made-up"}.items())
            lines.setdefault(family, []).append(f"{name}{{{text}}} {number:.9g} {stamp:.3f}")
    families = [f"# TYPE {family}\n" + "\n".join(rows) for family, rows in lines.items()]
    return "\n".join([*families, "# EOF\n"])


@contextlib.contextmanager
def prometheus(directory: Path) -> Iterator[Query]:
    """Run a Prometheus that holds the hour up to now and scrapes nothing."""
    (directory / "metrics.txt").write_text(_openmetrics(time.time()))
    fill = ["promtool", "tsdb", "create-blocks-from", "openmetrics",
            str(directory / "metrics.txt"), str(directory / "data")]  # fmt: skip
    try:
        subprocess.run(fill, check=True, capture_output=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("prometheus is not installed (Debian's package prometheus)")
    with running(directory, {}) as query:
        yield query
