"""Versions, and the guard against a vLLM that moescope was not tested on."""

from __future__ import annotations

import dis
import importlib.metadata
import inspect
from collections.abc import Collection
from typing import Any

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
        RefusedError: A module, an attribute or a parameter is missing; the message names it.
    """
    try:
        for owner, names in _attributes().items():
            _refuse_without(owner, [name for name in names if not _has(owner, name)])
        for function, names in _parameters().items():
            _refuse_without(function, set(names) - set(inspect.signature(function).parameters))
    except ImportError as error:
        raise RefusedError(
            f"{error}: moescope {moescope.__version__} relies on internals of vLLM "
            f"{', '.join(TESTED_VLLM)}"
        ) from error


def _has(owner: Any, name: str) -> bool:
    """Whether a module or class has an attribute, or its instances do.

    One that a class inherits as an abstract one is none.
    """
    if name in vars(owner) or name in _set_by_constructor(owner):
        return True
    return hasattr(owner, name) and not getattr(getattr(owner, name), "__isabstractmethod__", False)


def _set_by_constructor(owner: Any) -> set[str]:
    """Return the attributes that a class's ``__init__`` sets, also that of a dataclass."""
    code = getattr(owner.__init__, "__code__", None)
    return {
        instruction.argval
        for instruction in (dis.get_instructions(code) if code is not None else ())
        if instruction.opname == "STORE_ATTR"
    }


def _refuse_without(owner: Any, missing: Collection[str]) -> None:
    if missing:
        name = owner.__name__
        if not inspect.ismodule(owner):
            name = f"{owner.__module__}.{owner.__qualname__}"
        raise RefusedError(
            f"{name} of this vLLM has no {', '.join(sorted(missing))}, on which moescope "
            f"{moescope.__version__} relies"
        )


def _attributes() -> dict[Any, tuple[str, ...]]:
    """Return what is used of vLLM's classes and modules.

    Left out: configurations, and what only a worker can import. Of those a name that is missing
    ends the start by itself.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import DPMetadata, ForwardContext
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.core.sched import output
    from vllm.v1.core.sched.interface import SchedulerInterface
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    return {
        # The front end: api/registration.py, offline.py
        EngineArgs: ("create_engine_config",),
        EngineCoreRequest: (
            *("request_id", "external_req_id", "arrival_time", "sampling_params", "resumable"),
        ),
        ParentRequest: ("external_req_id", "sampling_params"),
        RequestState: (
            *("request_id", "prompt_token_ids", "prompt_len", "lora_name", "detokenizer"),
            "make_request_output",
        ),
        OutputProcessor: (
            *("add_request", "abort_requests", "has_request", "has_unfinished_requests"),
            "request_states",
        ),
        LLMEngine: ("step", "abort_request", "output_processor", "engine_core"),
        InprocClient: ("engine_core",),
        EngineCore: ("scheduler", "batch_queue"),
        SchedulerInterface: ("has_requests",),
        # The workers: capture/
        WorkerWrapperBase: ("init_device", "initialize_from_config"),
        WorkerBase: (
            *("load_model", "compile_or_warm_up_model", "shutdown", "execute_model", "get_model"),
            *("vllm_config", "device", "model_runner"),
        ),
        MoERunner: (
            *("layer_id", "router", "routed_experts", "is_monolithic", "enable_dbo"),
            *("_quant_method", "moe_config"),
        ),
        BaseRouter: ("_compute_routing", "top_k"),
        fused_topk_router.FusedTopKRouter: ("scoring_func", "renormalize"),
        fused_topk_router: (
            *("vllm_topk_softmax", "vllm_topk_sigmoid"),
            *("dispatch_topk_softmax_func", "dispatch_topk_sigmoid_func"),
        ),
        ForwardContext: ("dp_metadata",),
        DPMetadata: ("num_tokens_across_dp_cpu",),
        output.NewRequestData: ("req_id", "prompt_len", "block_ids", "num_computed_tokens"),
        output.CachedRequestData: (
            *("req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens"),
        ),
        output.SchedulerOutput: (
            *("scheduled_new_reqs", "scheduled_cached_reqs", "finished_req_ids"),
            *("total_num_scheduled_tokens", "kv_cache_block_copies"),
        ),
    }


def _parameters() -> dict[Any, tuple[str, ...]]:
    """Return which parameters vLLM's functions are called with, or are wrapped for."""
    from vllm.model_executor.layers.fused_moe.router import fused_topk_router
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    topk = ("topk_weights", "topk_indices", "token_expert_indices", "gating_output", "renormalize")
    return {
        fused_topk_router.vllm_topk_softmax: topk,
        fused_topk_router.vllm_topk_sigmoid: topk,
        BaseRouter._compute_routing: (
            *("hidden_states", "router_logits", "indices_type", "input_ids"),
        ),
        OutputProcessor.add_request: ("request", "prompt", "parent_req", "request_index", "queue"),
        OutputProcessor.abort_requests: ("request_ids", "internal"),
        RequestState.make_request_output: ("new_token_ids", "pooling_output", "finish_reason"),
    }


def versions() -> dict[str, str]:
    """Return the versions that every trace carries."""
    return {
        "moescope": moescope.__version__,
        "vllm": vllm_version(),
        "torch": importlib.metadata.version("torch"),
    }
