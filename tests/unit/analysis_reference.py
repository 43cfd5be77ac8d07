"""Plain loops that compute what `moescope.analysis` does, and traces at random."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from moescope import formats, replay
from moescope.trace import RouteTrace, Source

NUM_EXPERTS = 7


def make_trace(
    request_id: str,
    ids: Any,
    *,
    weights: Any = None,
    tokens: Any = None,
    prompt_len: int = 1,
    num_experts: int = NUM_EXPERTS,
    missing: Any = (),
    **changes: Any,
) -> RouteTrace:
    """A whole trace of expert ids ``[num_rows, num_layers, top_k]``."""
    ids = np.array(ids, np.uint8)
    num_rows, num_layers, _ = ids.shape
    source = np.zeros(num_rows, np.uint8)
    source[list(missing)] = Source.MISSING
    fields: dict[str, Any] = {
        "request_id": request_id,
        "index": 0,
        "model": "tiny",
        "num_experts": num_experts,
        "num_hidden_layers": 2 * num_layers,
        "layers": np.arange(num_layers, dtype=np.int32) * 2,
        "topk_ids": ids,
        "topk_weights": None if weights is None else np.array(weights, np.float32),
        "source": source,
        "token_ids": None if tokens is None else np.array(tokens, np.int32),
        "prompt_len": prompt_len,
        "num_tokens": num_rows + 1,
        "cached_len": 0,
        "finish_reason": "stop",
        "complete": not len(missing),
        "created_s": 1.0,
    }
    return RouteTrace(**(fields | changes))


def random_trace(
    number: int, num_rows: int = 40, num_layers: int = 3, top_k: int = 2
) -> RouteTrace:
    """A trace with missing rows; its first layers say something about the next ones."""
    random = np.random.default_rng(number)
    favor = random.random((num_rows, num_layers, NUM_EXPERTS)) + np.arange(NUM_EXPERTS) / 10
    ids = np.argsort(-favor, axis=2)[:, :, :top_k]
    ids[:, 1] = (ids[:, 0] + (random.random((num_rows, 1)) < 0.2)) % NUM_EXPERTS
    return make_trace(
        f"r{number}",
        ids,
        weights=random.random((num_rows, num_layers, top_k)) + 0.01,
        tokens=random.integers(0, 6, num_rows + 1),
        prompt_len=num_rows // 3,
        missing=np.flatnonzero(random.random(num_rows) < 0.1),
    )


def tokens_of(traces: list[RouteTrace]) -> list[dict[str, Any]]:
    """Every row that is not missing, in plain Python."""
    found = []
    for trace in traces:
        for row in range(trace.num_rows):
            if trace.source[row] == Source.MISSING:
                continue
            weights = trace.topk_weights
            found.append(
                {
                    "request": trace.request_id,
                    "position": trace.start + row,
                    "is_prompt": trace.start + row < trace.prompt_len,
                    "token": None if trace.token_ids is None else int(trace.token_ids[row]),
                    "ids": trace.topk_ids[row].tolist(),
                    "weights": None if weights is None else weights[row].tolist(),
                }
            )
    return found


def counts(tokens: list[dict[str, Any]], layer: int) -> Counter[int]:
    return Counter(expert for one in tokens for expert in one["ids"][layer])


def pair_counts(tokens: list[dict[str, Any]], layer: int, other: int) -> Counter[tuple[int, int]]:
    return Counter((i, j) for one in tokens for i in one["ids"][layer] for j in one["ids"][other])


def vocabulary_counts(tokens: list[dict[str, Any]], layer: int) -> Counter[tuple[int, int]]:
    return Counter((one["token"], i) for one in tokens for i in one["ids"][layer])


def effective(weights: list[float]) -> tuple[float, float]:
    shares = [one / sum(weights) for one in weights]
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    return math.exp(entropy), 1 / sum(p * p for p in shares)


def hit_rates(
    tokens: list[dict[str, Any]], halves: dict[str, int], layer: int, top_k: int
) -> tuple[float, float]:
    """The hit rates of `next_layer` for layer ``layer + 1``."""
    hits, usual_hits = [], []
    for half in (0, 1):
        fit = [one for one in tokens if halves[one["request"]] != half]
        test = [one for one in tokens if halves[one["request"]] == half]
        pairs, singles = pair_counts(fit, layer, layer + 1), counts(fit, layer)
        after = counts(fit, layer + 1)
        marginal = [after[j] / len(fit) for j in range(NUM_EXPERTS)]
        usual = sorted(range(NUM_EXPERTS), key=lambda j: (-marginal[j], j))[:top_k]
        for one in test:
            score = []
            for j in range(NUM_EXPERTS):
                absent = 1.0
                for i in one["ids"][layer]:
                    absent *= 1 - (pairs[i, j] + marginal[j]) / (singles[i] + 1)
                score.append(1 - absent)
            best = sorted(range(NUM_EXPERTS), key=lambda j: -score[j])[:top_k]
            actual = set(one["ids"][layer + 1])
            hits.append(len(actual & set(best)) / top_k)
            usual_hits.append(len(actual & set(usual)) / top_k)
    return sum(hits) / len(hits), sum(usual_hits) / len(usual_hits)


def row_difference(
    ids: list[int], weights: list[float], others: list[int], other_weights: list[float]
) -> dict[str, Any]:
    """What `moescope.analysis.Differences` counts of a row in a layer."""
    mine, theirs = (
        dict(zip(ids, weights, strict=True)),
        dict(zip(others, other_weights, strict=True)),
    )
    both = mine.keys() & theirs.keys()
    cut = min(*weights, *other_weights)
    exchanged = [mine[e] for e in mine.keys() - both] + [theirs[e] for e in theirs.keys() - both]
    return {
        "differs": mine.keys() != theirs.keys(),
        "gap": max(exchanged) / cut - 1 if exchanged else 0.0,
        "order": mine.keys() == theirs.keys() and ids != others,
        "jaccard": len(both) / len(mine.keys() | theirs.keys()),
        "weights": [abs(mine[e] - theirs[e]) for e in both],
    }


def jensen_shannon(p: list[float], q: list[float]) -> float:
    """The divergence in bits, as the entropy of the mean less the mean entropy."""

    def entropy(shares: list[float]) -> float:
        return -sum(one * math.log2(one) for one in shares if one > 0)

    return entropy([(a + b) / 2 for a, b in zip(p, q, strict=True)]) - (entropy(p) + entropy(q)) / 2


def log_of(traces: Sequence[RouteTrace]) -> bytes:
    """A route log of traces as `random_trace` makes them, with null lines for missing rows."""
    head = formats.meta_line(
        model="tiny", versions={}, device="cpu", seed=0, layers=[0, 2, 4], top_k=2, num_experts=7
    )
    return head + b"".join(line for trace in traces for line in formats.route_lines(trace))


def response_of(trace: RouteTrace, index: int) -> replay.Response:
    """What a run directory says of a request."""
    tokens = trace.token_ids.tolist()
    return replay.Response(
        index=index, prompt="?", request_id=trace.request_id, text="", finish_reason="stop",
        prompt_tokens=trace.prompt_len, completion_tokens=trace.num_tokens - trace.prompt_len,
        prompt_token_ids=tokens[: trace.prompt_len], token_ids=tokens[trace.prompt_len :],
        started_s=0.0, latency_s=1.0,
    )  # fmt: skip
