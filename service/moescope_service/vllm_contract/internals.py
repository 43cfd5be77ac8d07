"""What moescope relies on in vLLM and vLLM does not document: one entry a class or module.

`moescope_service.vllm_contract.guard` compares the lists with the vLLM that is installed, before a
model is loaded: `FRONT_END` in every process, `WORKER` where a model will run. What only some
kernels need, `ROUTING_REPLAY`, may be absent: they are refused then. So may `WEIGHTS`. The files
that use a name say what it means, and where it stands in vLLM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Internal:
    """A class or module of vLLM, and what is used of it."""

    modules: tuple[str, ...]
    """Where it may stand, newest vLLM first: the first module that exists counts."""
    class_name: str | None
    """None where the module itself is used."""
    attributes: tuple[str, ...]
    """What is read, called or replaced, of the module, the class or its instances."""
    parameters: Mapping[str, tuple[str, ...]]
    """By function: those that it is called with, or that its wrapper passes on."""
    used_by: tuple[str, ...]
    """Files of ``moescope_service``."""

    def load(self) -> Any:
        """Import and return the class or module.

        Raises:
            ImportError: It does not exist.
        """
        module = self._module()
        if self.class_name is None:
            return module
        if not hasattr(module, self.class_name):
            raise ImportError(f"cannot import name {self.class_name!r} from {module.__name__!r}")
        return getattr(module, self.class_name)

    def _module(self) -> Any:
        for name in self.modules[:-1]:
            with contextlib.suppress(ModuleNotFoundError):
                return importlib.import_module(name)
        return importlib.import_module(self.modules[-1])


def _internal(
    where: str, attributes: str, *, used_by: str, parameters: Mapping[str, str] | None = None
) -> Internal:
    """Make an entry of texts: ``module:Class``, and names with spaces between them."""
    modules, _, class_name = where.partition(":")
    by_function = {name: tuple(text.split()) for name, text in (parameters or {}).items()}
    return Internal(
        tuple(modules.split()),
        class_name or None,
        tuple(attributes.split()),
        by_function,
        tuple(used_by.split()),
    )


_TOPK = "topk_weights topk_indices token_expert_indices gating_output renormalize"

CLI_ENV_SETUP = _internal(
    "vllm.entrypoints.common.startup vllm.entrypoints.serve.utils.api_utils",
    "cli_env_setup",
    used_by="vllm_contract/compat.py",
)

FRONT_END = (
    # The command line.
    CLI_ENV_SETUP,
    _internal(
        "vllm.entrypoints.cli.serve:ServeSubcommand",
        "subparser_init validate cmd",
        parameters={"subparser_init": "subparsers", "validate": "args", "cmd": "args"},
        used_by="serve.py vllm_contract/compat.py",
    ),
    _internal("vllm.utils.argparse_utils:FlexibleArgumentParser", "parse_args", used_by="serve.py"),
    _internal(
        "vllm.envs",
        "VLLM_API_KEY VLLM_PLUGINS VLLM_USE_RUST_FRONTEND",
        used_by="serve.py plugin.py api/auth.py",
    ),
    # The front end.
    _internal(
        "vllm.engine.arg_utils:EngineArgs",
        "create_engine_config additional_config",
        used_by="plugin.py",
    ),
    _internal(
        "vllm.v1.engine:EngineCoreRequest",
        "request_id external_req_id arrival_time sampling_params resumable",
        used_by="frontend/registration.py",
    ),
    _internal(
        "vllm.v1.engine.parallel_sampling:ParentRequest",
        "external_req_id sampling_params",
        used_by="frontend/registration.py",
    ),
    _internal(
        "vllm.v1.engine.output_processor:RequestState",
        "request_id prompt_token_ids prompt_len lora_name detokenizer make_request_output",
        parameters={"make_request_output": "new_token_ids pooling_output finish_reason"},
        used_by="frontend/registration.py",
    ),
    _internal(
        "vllm.v1.engine.output_processor:OutputProcessor",
        "add_request abort_requests has_request has_unfinished_requests request_states"
        " _finish_request tokenizer",
        parameters={
            "add_request": "request prompt parent_req request_index queue",
            "abort_requests": "request_ids internal",
            "_finish_request": "req_state",
        },
        used_by="frontend/registration.py api/plugin.py offline.py",
    ),
    _internal(
        "vllm.tokenizers.protocol:TokenizerLike",
        "convert_ids_to_tokens convert_tokens_to_string get_added_vocab all_special_tokens"
        " max_token_id",
        parameters={
            "convert_ids_to_tokens": "ids skip_special_tokens",
            "convert_tokens_to_string": "tokens",
        },
        used_by="token_text.py",
    ),
    # The engine in a script's process.
    _internal(
        "vllm.v1.engine.llm_engine:LLMEngine",
        "step abort_request output_processor engine_core",
        used_by="offline.py",
    ),
    _internal(
        "vllm.v1.engine.core_client:InprocClient",
        "engine_core",
        used_by="offline.py",
    ),
    _internal(
        "vllm.v1.engine.core:EngineCore",
        "scheduler batch_queue",
        used_by="offline.py",
    ),
    _internal(
        "vllm.v1.core.sched.interface:SchedulerInterface",
        "has_requests",
        used_by="offline.py",
    ),
    # The scheduler.
    _internal(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "connector kv_cache_manager schedule",
        used_by="capture/loads.py",
    ),
    _internal(
        "vllm.v1.core.kv_cache_manager:KVCacheManager",
        "allocate_slots get_block_ids kv_cache_config",
        parameters={
            "allocate_slots": "request num_new_tokens num_new_computed_tokens"
            " num_external_computed_tokens",
            "get_block_ids": "request_id",
        },
        used_by="capture/loads.py",
    ),
    _internal(
        "vllm.v1.request:Request", "request_id num_computed_tokens", used_by="capture/loads.py"
    ),
    # The app.
    _internal(
        "vllm.plugins.endpoint_plugins.interface:EndpointPlugin",
        "attach_router init_state",
        parameters={"attach_router": "app", "init_state": "engine_client state args"},
        used_by="api/plugin.py",
    ),
    _internal(
        "vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware",
        "verify_token",
        parameters={"verify_token": "headers"},
        used_by="api/auth.py",
    ),
    _internal("vllm.v1.metrics.prometheus", "get_prometheus_registry", used_by="api/metrics.py"),
    _internal("vllm.usage.usage_lib:UsageContext", "OPENAI_API_SERVER", used_by="plugin.py"),
    # The configuration.
    _internal(
        "vllm.config:VllmConfig",
        "model_config parallel_config scheduler_config speculative_config cache_config"
        " device_config kernel_config use_v2_model_runner kv_transfer_config",
        used_by="capture/refusals.py capture/install.py capture/loads.py",
    ),
    _internal(
        "vllm.config:ModelConfig",
        "model architectures is_moe runner_type get_num_experts get_num_experts_per_tok",
        used_by="capture/refusals.py capture/install.py",
    ),
    _internal(
        "vllm.config:ParallelConfig",
        "prefill_context_parallel_size decode_context_parallel_size data_parallel_external_lb"
        " data_parallel_hybrid_lb data_parallel_size data_parallel_size_local data_parallel_rank"
        " data_parallel_index nnodes node_rank data_parallel_backend distributed_executor_backend"
        " enable_elastic_ep use_ubatching use_sequence_parallel_moe"
        " tensor_parallel_size pipeline_parallel_size",
        used_by="capture/refusals.py capture/ranks.py vllm_contract/nodes.py",
    ),
    _internal(
        "vllm.config:SchedulerConfig",
        "policy get_scheduler_cls",
        used_by="capture/refusals.py capture/loads.py",
    ),
    _internal("vllm.config:CacheConfig", "kv_sharing_fast_prefill", used_by="capture/refusals.py"),
    _internal("vllm.config.kernel", "MEGA_MOE_BACKENDS", used_by="capture/refusals.py"),
    _internal("vllm.config.kernel:KernelConfig", "moe_backend", used_by="capture/refusals.py"),
    _internal("vllm.config:DeviceConfig", "device_type", used_by="capture/refusals.py"),
    _internal("vllm.platforms", "current_platform", used_by="capture/refusals.py"),
    _internal(
        "vllm.v1.worker.worker_base:WorkerWrapperBase",
        "init_device initialize_from_config",
        used_by="capture/install.py",
    ),
)

WORKER = (
    # The workers.
    _internal(
        "vllm.v1.worker.worker_base:WorkerBase",
        "load_model compile_or_warm_up_model shutdown execute_model get_model"
        " vllm_config device model_runner",
        used_by="capture/install.py capture/ranks.py",
    ),
    # What a router returns, and what a step holds.
    _internal(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner",
        "layer_id router routed_experts is_monolithic enable_dbo _quant_method moe_config",
        used_by="capture/routers.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig",
        "num_logical_experts num_local_experts tp_size",
        used_by="capture/routers.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter",
        "_compute_routing top_k",
        parameters={"_compute_routing": "hidden_states router_logits indices_type input_ids"},
        used_by="capture/routers.py capture/cpu/sink.py capture/cuda/buffers.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.router.fused_topk_router:FusedTopKRouter",
        "scoring_func renormalize",
        used_by="capture/cuda/buffers.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.router.fused_topk_router",
        "dispatch_topk_softmax_func dispatch_topk_sigmoid_func"
        " vllm_topk_softmax vllm_topk_sigmoid",  # what the two before return
        parameters={"vllm_topk_softmax": _TOPK, "vllm_topk_sigmoid": _TOPK},
        used_by="capture/cuda/buffers.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.routed_experts_capturer:RoutedExpertsCaptureSource",
        "layer_id",
        used_by="capture/routers.py",
    ),
    # Kernels that route inside.
    _internal(
        "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts",
        "forward_monolithic quant_method",
        used_by="capture/triton_topk.py capture/routing_replay.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe",
        "OAITritonMxfp4ExpertsMonolithic",
        used_by="capture/triton_topk.py",
    ),
    _internal("vllm.utils.import_utils", "has_triton_kernels", used_by="capture/triton_topk.py"),
    _internal(
        "vllm.utils.torch_utils",
        "direct_register_custom_op",
        parameters={
            "direct_register_custom_op": "op_name op_func fake_impl target_lib dispatch_key"
        },
        used_by="capture/cpu/sink.py",
    ),
    # Ranks.
    _internal(
        "vllm.distributed.parallel_state",
        "get_pp_group get_tp_group",
        used_by="capture/ranks.py capture/own_rows.py",
    ),
    _internal(
        "vllm.distributed.parallel_state:GroupCoordinator",
        "rank_in_group world_size all_gather",
        used_by="capture/ranks.py capture/own_rows.py",
    ),
    _internal("vllm.forward_context", "get_forward_context", used_by="capture/own_rows.py"),
    _internal(
        "vllm.forward_context:ForwardContext",
        "dp_metadata",
        used_by="capture/own_rows.py",
    ),
    _internal(
        "vllm.forward_context:DPMetadata",
        "num_tokens_across_dp_cpu",
        used_by="capture/own_rows.py",
    ),
    _internal(
        "vllm.v1.core.sched.output:NewRequestData",
        "req_id prompt_len block_ids num_computed_tokens",
        used_by="capture/recorder.py capture/counting.py",
    ),
    _internal(
        "vllm.v1.core.sched.output:CachedRequestData",
        "req_ids resumed_req_ids new_block_ids num_computed_tokens",
        used_by="capture/recorder.py capture/control.py",
    ),
    _internal(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "scheduled_new_reqs scheduled_cached_reqs finished_req_ids"
        " total_num_scheduled_tokens kv_cache_block_copies",
        used_by="capture/recorder.py capture/counting.py",
    ),
    _internal(
        "vllm.v1.core.kv_cache_utils:KVCacheBlockCopy",
        "src_block_id dst_block_id",
        used_by="capture/control.py",
    ),
    # A step's batch, by model runner.
    _internal(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "input_batch query_start_loc positions",
        used_by="capture/layout_v1.py",
    ),
    _internal(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "num_reqs req_ids num_computed_tokens_cpu",
        used_by="capture/layout_v1.py",
    ),
    _internal(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "execute_model_state input_buffers",
        used_by="capture/layout_v2.py",
    ),
    _internal(
        "vllm.v1.worker.gpu.model_runner:ExecuteModelState",
        "input_batch",
        used_by="capture/layout_v2.py",
    ),
    _internal(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        "num_reqs req_ids query_start_loc_np num_computed_tokens_np",
        used_by="capture/layout_v2.py",
    ),
    _internal(
        "vllm.v1.worker.gpu.input_batch:InputBuffers", "positions", used_by="capture/layout_v2.py"
    ),
    # The KV cache.
    _internal(
        "vllm.v1.kv_cache_interface:KVCacheConfig", "kv_cache_groups", used_by="capture/kv_cache.py"
    ),
    _internal(
        "vllm.v1.kv_cache_interface:KVCacheGroupSpec",
        "kv_cache_spec",
        used_by="capture/kv_cache.py",
    ),
    _internal(
        "vllm.v1.kv_cache_interface",
        "FullAttentionSpec MLAAttentionSpec SinkFullAttentionSpec UniformTypeKVCacheSpecs",
        used_by="capture/kv_cache.py",
    ),
    _internal(
        "vllm.v1.kv_cache_interface:FullAttentionSpec", "block_size", used_by="capture/kv_cache.py"
    ),
    _internal(
        "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs",
        "first_spec",
        used_by="capture/kv_cache.py",
    ),
)

WEIGHTS = (
    _internal(
        "vllm.engine.protocol:EngineClient",
        "update_weight_version get_weight_version",
        parameters={"update_weight_version": "new_version"},
        used_by="api/weights.py",
    ),
    _internal(
        "vllm.v1.engine.output_processor:RequestState",
        "_weight_version_spans",
        used_by="frontend/registration.py",
    ),
    _internal(
        "vllm.v1.worker.gpu_worker:Worker",
        "start_weight_update start_draft_weight_update finish_weight_update update_weights"
        " reload_weights sleep discard wake_up add_lora remove_lora",
        parameters={
            "sleep": "level",
            "discard": "tags",
            "wake_up": "tags",
            "add_lora": "lora_request",
            "remove_lora": "lora_id",
        },
        used_by="capture/weights.py",
    ),
    _internal(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "reload_weights",
        used_by="capture/weights.py",
    ),
    _internal(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        "reload_weights",
        used_by="capture/weights.py",
    ),
    _internal(
        "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager",
        "_load_adapter",
        parameters={"_load_adapter": "lora_request"},
        used_by="capture/weights.py",
    ),
    _internal(
        "vllm.lora.request:LoRARequest",
        "lora_name lora_int_id lora_path load_inplace",
        used_by="capture/weights.py",
    ),
)
"""Of calls that change weights: what a version does not have is not called there either."""

ROUTING_REPLAY = (
    _internal(
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExpertsMonolithic",
        "supports_routing_replay_capture apply moe_config",
        parameters={"apply": "hidden_states router_logits routing_replay_out"},
        used_by="capture/routing_replay.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernelMonolithicImpl",
        "fused_experts",
        used_by="capture/routing_replay.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernel",
        "impl",
        used_by="capture/routing_replay.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts",
        "routed_scaling_factor",
        used_by="capture/routing_replay.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.routed_experts_capturer:RoutedExpertsSink",
        "buffer",
        used_by="capture/routing_replay.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig",
        "routing_method",
        used_by="capture/routing_replay.py",
    ),
    _internal(
        "vllm.model_executor.layers.fused_moe.config:RoutingMethodType",
        "Renormalize RenormalizeNaive DeepSeekV3 MiniMax2 SigmoidRenorm Sigmoid Llama4",
        used_by="capture/routing_replay.py",
    ),
)
"""Of kernels that route inside and can tell the ids; see `compat.offers_routing_replay`."""
