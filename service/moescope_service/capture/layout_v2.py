"""Which row of a step belongs to which sequence, for vLLM's V2 model runner.

Relies on vLLM 0.32.0, ``v1/worker/gpu/model_runner.py`` and ``input_batch.py``: between
``execute_model`` and ``sample_tokens``, ``execute_model_state.input_batch`` describes the step; its
numpy arrays and its list are new in every step. ``input_buffers.positions`` (on the device, always
the same tensor) has the position of each row.
"""

from __future__ import annotations

from typing import Any

from moescope_service.capture.rows import Batch


def positions(runner: Any) -> Any:
    """Return the tensor that holds each row's position, ``[max_num_tokens]``, int64."""
    return runner.input_buffers.positions


def read_batch(runner: Any) -> Batch | None:
    """Return which sequence has which rows in the step that just ran; None where no model ran.

    Args:
        runner: A ``GPUModelRunner`` of V2, right after ``execute_model``.
    """
    state = runner.execute_model_state
    if state is None:
        return None
    batch = state.input_batch
    first_row = batch.query_start_loc_np[: batch.num_reqs + 1]
    return Batch(batch.req_ids, first_row, batch.num_computed_tokens_np)
