"""What steps read, as JSON: ``/experts?per=step``."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import orjson

from moescope_service.histogram import KINDS, MIN_TOKENS
from moescope_service.messages import CaptureSpec
from moescope_service.queries import StepsReply


def steps_body(reply: StepsReply, spec: CaptureSpec) -> bytes:
    """Return the body of a response.

    Args:
        reply: The collector's.
        spec: What is captured.
    """
    arrays = iter(reply.arrays)
    engines = [
        {"engine": engine, "steps": _by_size(spec, *itertools.islice(arrays, 4))}
        for engine in reply.engines
    ]
    body = {
        "model": spec.model,
        "since_s": reply.since_s,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "layers": spec.layers,
        "expert_bytes": spec.expert_bytes if any(spec.expert_bytes) else None,
        "engines": engines,
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _by_size(spec: CaptureSpec, *frames: Any) -> list[dict[str, Any]]:
    """Return means over the steps of each kind and size that ran."""
    steps, tokens, distinct, busiest = (
        np.frombuffer(frame, np.int64).reshape(len(KINDS), len(MIN_TOKENS), -1) for frame in frames
    )
    sizes = np.array(spec.expert_bytes)
    found = []
    for kind, size in np.argwhere(steps[:, :, 0]).tolist():
        number = int(steps[kind, size, 0])
        mean = distinct[kind, size] / number
        found.append(
            {
                "kind": KINDS[kind],
                "min_tokens": MIN_TOKENS[size],
                "steps": number,
                "tokens": int(tokens[kind, size, 0]) / number,
                "distinct_experts": mean,
                "busiest_expert_tokens": busiest[kind, size] / number,
                "expert_bytes": float(mean @ sizes) if sizes.any() else None,
            }
        )
    return found
