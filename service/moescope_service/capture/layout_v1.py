"""Which row of a step belongs to which sequence, for vLLM's V1 model runner.

Relies on vLLM 0.32.0, ``v1/worker/gpu_model_runner.py`` (``cpu_model_runner.py`` is its subclass):
after ``execute_model`` returns, ``input_batch.req_ids[:num_reqs]`` are the step's requests in row
order, ``query_start_loc.np`` their first rows, ``num_computed_tokens_cpu`` their first positions as
the host has them, and ``positions`` (on the device, always the same tensor) the position of each
row. The next step changes the first three in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moescope_service.capture.rows import Batch


def positions(runner: Any) -> Any:
    """Return the tensor that holds each row's position, ``[max_num_tokens]``, int64."""
    return runner.positions


def read_batch(runner: Any) -> Batch | None:
    """Return which sequence has which rows in the step that just ran.

    Args:
        runner: A ``GPUModelRunner`` of V1 or a ``CPUModelRunner``, right after ``execute_model``.
    """
    batch = runner.input_batch
    num_reqs = batch.num_reqs
    return Batch(
        batch.req_ids[:num_reqs],
        runner.query_start_loc.np[: num_reqs + 1].copy(),
        batch.num_computed_tokens_cpu[:num_reqs].astype(np.int32),
    )
