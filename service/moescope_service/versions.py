"""Versions, and the guard against a vLLM that moescope was not tested on."""

from __future__ import annotations

import importlib.metadata
import inspect

import moescope
from moescope_service.errors import RefusedError
from moescope_service.settings import Settings, flag, variable

TESTED_VLLM = ("0.32.0",)
"""vLLM versions on which the internals that moescope relies on were checked."""


def vllm_version() -> str:
    """Return the installed vLLM's version; its CPU build is not distributed as ``vllm``."""
    import vllm

    return str(vllm.__version__).split("+")[0]


def check_vllm(settings: Settings) -> None:
    """Refuse a vLLM version that moescope was not tested on, unless told otherwise.

    Raises:
        RefusedError: The version is not among `TESTED_VLLM`.
    """
    found = vllm_version()
    if found not in TESTED_VLLM and settings.allow_untested_vllm != "on":
        name = "allow_untested_vllm"
        raise RefusedError(
            f"vLLM {found} is installed, but moescope {moescope.__version__} relies on internals "
            f"of vLLM {', '.join(TESTED_VLLM)}; install that, or try it with {flag(name)} on "
            f"({variable(name)}=on)"
        )


def check_internals() -> None:
    """Refuse a vLLM whose internals are not those that moescope relies on.

    The version guard can be switched off, and forks keep the number: the names count.

    Raises:
        RefusedError: An attribute or a parameter is missing; the message names it.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.core.sched import output
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    topk = ("topk_weights", "topk_indices", "token_expert_indices", "gating_output", "renormalize")
    parameters = {
        fused_topk_router.vllm_topk_softmax: topk,
        fused_topk_router.vllm_topk_sigmoid: topk,
        BaseRouter._compute_routing: (
            "hidden_states",
            "router_logits",
            "indices_type",
            "input_ids",
        ),
        EngineArgs.create_engine_config: (),
        MoERunner.__init__: ("layer_name", "router", "enable_dbo"),
        OutputProcessor.add_request: ("request", "prompt", "parent_req", "request_index", "queue"),
        RequestState.make_request_output: ("new_token_ids", "pooling_output", "finish_reason"),
        WorkerBase.load_model: (),
        WorkerBase.compile_or_warm_up_model: (),
        WorkerWrapperBase.init_device: (),
        output.NewRequestData: ("req_id", "block_ids", "num_computed_tokens"),
        output.CachedRequestData: (
            *("req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens"),
        ),
        output.SchedulerOutput: (
            *("scheduled_new_reqs", "scheduled_cached_reqs", "finished_req_ids"),
            *("total_num_scheduled_tokens", "kv_cache_block_copies"),
        ),
    }
    for owner, names in parameters.items():
        missing = set(names) - set(inspect.signature(owner).parameters)
        if missing:
            raise RefusedError(
                f"{owner.__module__}.{owner.__qualname__} of this vLLM has no "
                f"{', '.join(sorted(missing))}, on which moescope {moescope.__version__} relies"
            )


def versions() -> dict[str, str]:
    """Return the versions that every trace carries."""
    return {
        "moescope": moescope.__version__,
        "vllm": vllm_version(),
        "torch": importlib.metadata.version("torch"),
    }
