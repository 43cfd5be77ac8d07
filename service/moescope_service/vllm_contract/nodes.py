"""Which node of an engine this is, and what Ray carries to the others.

Relies on vLLM 0.32.0, ``config/parallel.py`` (``node_rank``, ``data_parallel_rank``),
``engine/arg_utils.py`` (``EngineArgs.create_engine_config``) and ``ray/ray_env.py``.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from moescope_service.settings import ENABLE, variable

_RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"


def is_first_node(parallel: Any, *, headless: bool) -> bool:
    """Whether this process belongs to the node that has the collector.

    It has the first API server: nodes without one are headless, or have a later rank.

    Args:
        parallel: A ``ParallelConfig`` as ``create_engine_config`` returns it, of no engine yet.
        headless: Whether the node has no API server.
    """
    return not headless and parallel.node_rank == 0 and parallel.data_parallel_rank == 0


def needs_other_nodes(parallel: Any) -> str | None:
    """Return the option by which workers may run on other nodes; None where they do not."""
    if parallel.nnodes > 1:
        return f"--nnodes is {parallel.nnodes}"
    is_balanced = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    if not is_balanced and parallel.data_parallel_size_local != parallel.data_parallel_size:
        return (
            f"--data-parallel-size-local is {parallel.data_parallel_size_local} of "
            f"{parallel.data_parallel_size}"
        )
    if "ray" in {parallel.distributed_executor_backend, parallel.data_parallel_backend}:
        return "Ray starts the workers"
    return None


def copy_to_ray(env: MutableMapping[str, str]) -> None:
    """Let Ray's workers have moescope's variables, but for the directory of this node.

    What is set there already stays.
    """
    given = [name.strip() for name in env.get(_RAY_PREFIXES, "").split(",") if name.strip()]
    env[_RAY_PREFIXES] = ",".join(dict.fromkeys([*given, ENABLE, variable("")]))
