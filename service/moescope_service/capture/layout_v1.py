"""Which row of a step is whose, for vLLM's V1 model runner.

Relies on vLLM 0.32.0, ``v1/worker/gpu_model_runner.py`` (``cpu_model_runner.py`` is its subclass):
after ``execute_model`` returns, ``input_batch.req_ids[:num_reqs]`` are the step's requests in row
order, ``query_start_loc.np`` their first rows, and ``positions`` (on the device) the position of
each row, also where speculation makes the host's counts optimistic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def read_batch(runner: Any) -> tuple[list[str], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return who has which rows in the step that just ran.

    Args:
        runner: A ``CPUModelRunner``, right after ``execute_model``.

    Returns:
        Internal request ids in row order, each one's first position ``[num_reqs]``, each one's
        number of rows ``[num_reqs]``.
    """
    batch = runner.input_batch
    num_reqs = batch.num_reqs
    first_row = runner.query_start_loc.np[: num_reqs + 1]
    first_position = runner.positions.numpy()[first_row[:-1]].astype(np.int32)
    return batch.req_ids[:num_reqs], first_position, np.diff(first_row).astype(np.int32)
