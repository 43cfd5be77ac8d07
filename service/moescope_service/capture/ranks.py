"""Finds a worker's engine, stage and role among the workers of its deployment.

Relies on vLLM 0.32.0, ``config/parallel.py`` (``data_parallel_index`` is the engine's number, for
dense models too) and ``distributed/parallel_state.py`` (groups, after ``Worker.init_device``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moescope_service.capture.own_rows import OwnRows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One worker's place."""

    engine: int
    """Its data-parallel engine, counted from the first that shares its collector."""
    num_engines: int
    """Engines that share one collector: those on this machine, or on all nodes."""
    stage: int
    """Its pipeline stage."""
    num_stages: int
    is_sender: bool
    """Whether it ships the rows of its stage: tensor-parallel workers route alike."""
    own_rows: OwnRows | None
    """Finds its engine's rows where routers see those of others too."""
    is_sharded: bool
    """Whether each tensor-parallel worker may route a part of the tokens alone."""


def place_of(worker: Any, *, all_nodes: bool) -> Place:
    """Return the place of a vLLM ``Worker`` whose device is initialized.

    Args:
        worker: The worker.
        all_nodes: Whether the engines of all nodes share one collector.
    """
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    parallel = worker.vllm_config.parallel_config
    tensor, pipeline = get_tp_group(), get_pp_group()
    own_rows = None
    if parallel.data_parallel_size > 1:
        own_rows = OwnRows(parallel.data_parallel_rank, tensor.world_size)
    num_engines = parallel.data_parallel_size if all_nodes else parallel.data_parallel_size_local
    return Place(
        engine=parallel.data_parallel_index % num_engines,
        num_engines=num_engines,
        stage=pipeline.rank_in_group,
        num_stages=pipeline.world_size,
        is_sender=tensor.rank_in_group == 0,
        own_rows=own_rows,
        is_sharded=parallel.use_sequence_parallel_moe,
    )
