"""Refuses configurations in which moescope would record nothing, or something wrong.

Checked before anything is loaded. What only the loaded model can tell is checked in
`moescope_service.capture.routers`.

Relies on vLLM 0.32.0, ``config/vllm.py``, ``config/model.py``, ``config/parallel.py`` and
``config/kernel.py``.
"""

from __future__ import annotations

from typing import Any

from moescope_service.errors import RefusedError
from moescope_service.settings import Settings, flag
from moescope_service.vllm_contract.nodes import needs_other_nodes


def check_config(config: Any, settings: Settings) -> None:
    """Refuse a configuration that moescope cannot capture.

    Args:
        config: A ``VllmConfig``.
        settings: What is captured.

    Raises:
        RefusedError: With the first reason found, and what to do about it.
    """
    for reason in (
        _model(config),
        _parallel(config),
        _nodes(config, settings),
        _mega_moe(config),
        _runner(config),
    ):
        if reason is not None:
            raise RefusedError(reason)


def _model(config: Any) -> str | None:
    model = config.model_config
    if not model.is_moe:
        return (
            f"{model.model} ({', '.join(model.architectures)}) is a dense model: it has no experts "
            "to record; serve it with vLLM itself, or give a mixture-of-experts model"
        )
    if model.runner_type != "generate":
        return f"the runner is {model.runner_type!r}; moescope records text generation only"
    return None


def _parallel(config: Any) -> str | None:
    parallel = config.parallel_config
    sizes = {
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size,
    }
    for option, size in sizes.items():
        if size > 1:
            return f"{option} is {size}, which splits sequences between workers: set it to 1"
    if parallel.enable_elastic_ep:
        return (
            "--enable-elastic-ep adds and removes engines while the server runs, but their numbers "
            "tell their routes apart; start without it"
        )
    if config.scheduler_config.policy != "fcfs":
        return (
            f"--scheduling-policy is {config.scheduler_config.policy!r}, under which vLLM gives "
            "a sequence's blocks to another one without telling its workers; this version of "
            "moescope records 'fcfs' alone"
        )
    if parallel.use_ubatching:
        return "micro-batches route parts of a step; start without --enable-dbo and --ubatch-size"
    return None


def _nodes(config: Any, settings: Settings) -> str | None:
    option = needs_other_nodes(config.parallel_config)
    if option is None:
        return None
    if settings.bind is None:
        return (
            f"{option}: workers of other machines reach the collector over tcp, encrypted: give "
            f"{flag('bind')} HOST:PORT and {flag('key_file')} FILE on every node"
        )
    if settings.bind.is_any:
        return (
            f"{flag('bind')} is {settings.bind}, which names no machine to the others: give the "
            "first node's name or address, on every node"
        )
    return None


def _mega_moe(config: Any) -> str | None:
    """Refuse tensor-parallel workers that route shards of a step which nothing gathers.

    Source: vLLM 0.32.0, ``models/deepseek_v4/nvidia/model.py``, ``_use_sequence_parallel``.
    """
    from vllm.config.kernel import MEGA_MOE_BACKENDS

    parallel, backend = config.parallel_config, config.kernel_config.moe_backend
    if (
        backend in MEGA_MOE_BACKENDS
        and parallel.tensor_parallel_size > 1
        and parallel.pipeline_parallel_size == 1
        and not parallel.use_sequence_parallel_moe
    ):
        return (
            f"--moe-backend {backend} splits a step's tokens between --tensor-parallel-size "
            f"{parallel.tensor_parallel_size} workers; use --data-parallel-size in its place, or "
            "another --moe-backend"
        )
    return None


def _runner(config: Any) -> str | None:
    speculative = config.speculative_config
    if speculative is not None and getattr(speculative, "enable_adaptive_verification", False):
        return "adaptive verification hides which drafts were routed; switch it off"
    if config.cache_config.kv_sharing_fast_prefill:
        return (
            "fast prefill routes only the last tokens of a prompt in some layers; start without "
            "--kv-sharing-fast-prefill"
        )
    return _device(config)


def _device(config: Any) -> str | None:
    from vllm.platforms import current_platform

    device = "rocm" if current_platform.is_rocm() else config.device_config.device_type
    if device not in {"cpu", "cuda"}:
        return f"the device is {device!r}; this version of moescope records on CPUs and NVIDIA GPUs"
    if device == "cpu" and config.use_v2_model_runner:
        return (
            "vLLM's V2 model runner is on, which moescope does not record on the CPU; "
            "set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    return None
