"""Puts the capture into a worker.

``WorkerWrapperBase.init_device`` is wrapped once (it runs in every worker: in-process,
multiprocess, Ray); from there on only *instances* are wrapped. Relies on vLLM 0.32.0,
``v1/worker/worker_base.py`` and ``gpu_worker.py``: ``load_model`` comes before the warm-up,
``initialize_from_config`` knows the KV cache, ``compile_or_warm_up_model`` ends the start;
``execute_model`` is called once a step. ``utils/ompmultiprocessing.py`` binds CPU workers.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from moescope import formats
from moescope_service import runtime
from moescope_service.capture import layout_v1, layout_v2
from moescope_service.capture.control import ControlEncoder
from moescope_service.capture.counting import CountRecorder, CountSink
from moescope_service.capture.ranks import Place, place_of
from moescope_service.capture.recorder import Recorder
from moescope_service.capture.routers import RoutedLayer, find_routed_layers
from moescope_service.capture.rows import StepSink
from moescope_service.errors import RefusedError
from moescope_service.link import cores_of_parent
from moescope_service.messages import Hello
from moescope_service.settings import Settings
from moescope_service.versions import versions

_MARK = "_moescope_wrapped"


def install(wrapper_class: Any) -> None:
    """Wrap ``WorkerWrapperBase.init_device``; a second call does nothing."""
    init_device = wrapper_class.init_device
    if getattr(init_device, _MARK, False):
        return

    @functools.wraps(init_device)
    def init_device_and_capture(self: Any) -> None:
        init_device(self)
        with runtime.reported_refusal():
            WorkerCapture(self.worker, Settings.from_env(), place_of(self.worker))

    setattr(init_device_and_capture, _MARK, True)
    wrapper_class.init_device = init_device_and_capture


class WorkerCapture:
    """Follows one worker from loading its model to its last step.

    Of the tensor-parallel workers of a stage the first one ships the rows; the others do nothing,
    unless it needs their part of them.

    Args:
        worker: A vLLM ``Worker`` whose device is initialized.
        settings: What is captured.
        place: Where it stands among the others.
    """

    def __init__(self, worker: Any, settings: Settings, place: Place) -> None:
        self._worker = worker
        self._runner = worker.model_runner
        self._settings = settings
        self._place = place
        self._layers: list[RoutedLayer] = []
        self._sink: Any = None
        self._recorder: Recorder | CountRecorder | None = None
        self._read_batch, self._positions = (
            (layout_v2.read_batch, layout_v2.positions)
            if worker.vllm_config.use_v2_model_runner
            else (layout_v1.read_batch, layout_v1.positions)
        )
        if self._place.is_sender:
            self._wrap(worker, "load_model", after=self._hook_routers)
            self._wrap(worker, "initialize_from_config", after=self._start)
            self._wrap(worker, "compile_or_warm_up_model", after=self._record)
            self._wrap(worker, "shutdown", before=self._stop)
        elif self._place.is_sharded:
            self._wrap(worker, "load_model", after=self._take_part)

    @staticmethod
    def _wrap(target: Any, name: str, *, before: Any = None, after: Any = None) -> None:
        original = getattr(target, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            result = original(*args, **kwargs)
            if after is not None:
                after(*args, **kwargs)
            return result

        setattr(target, name, wrapped)

    def _take_part(self, *_: Any, **__: Any) -> None:
        for found in find_routed_layers(self._runner.get_model(), may_lack=True):
            found.router._compute_routing = _sharing(
                found.router._compute_routing, self._place.own_rows
            )

    def _hook_routers(self, *_: Any, **__: Any) -> None:
        is_only_stage = self._place.num_stages == 1
        with runtime.reported_refusal():
            self._layers = find_routed_layers(self._runner.get_model(), may_lack=not is_only_stage)
            captured = [found.layer for found in self._layers]
            # Of several stages none has all layers: the collector looks at them together.
            if is_only_stage and (reason := self._settings.log_refusal(captured)):
                raise RefusedError(reason)
        if not self._layers:
            return
        self._sink = self._make_sink()
        for column, found in enumerate(self._layers):
            self._sink.hook(column, found.router)

    def _make_sink(self) -> StepSink | CountSink:
        first = self._layers[0]
        shape: dict[str, Any] = {
            "positions": self._positions(self._runner),
            "num_layers": len(self._layers),
            "top_k": first.router.top_k,
            "own_rows": self._place.own_rows,
        }
        dtypes: dict[str, Any] = {
            "id_dtype": self._id_dtype,
            "weights_dtype": self._settings.weights_dtype,
        }
        num_experts = first.num_experts
        if self._worker.device.type == "cpu":
            from moescope_service.capture.counts_cpu import CpuCounts
            from moescope_service.capture.sink_cpu import CpuSink

            sink = CpuSink(**shape, **dtypes)
            return CpuCounts(sink, len(self._layers), num_experts) if self._counts_only else sink
        shape |= {"num_experts": num_experts, "index_dtype": first.index_dtype}
        if self._counts_only:
            from moescope_service.capture.counts_cuda import CudaCounts

            return CudaCounts(**shape)
        from moescope_service.capture.sink_cuda import CudaSink

        return CudaSink(**shape, **dtypes, queue_bytes=self._settings.queue)

    @property
    def _counts_only(self) -> bool:
        return self._settings.mode == "counts"

    @property
    def _num_experts(self) -> int:
        if self._layers:
            return self._layers[0].num_experts
        return self._worker.vllm_config.model_config.get_num_experts()

    @property
    def _top_k(self) -> int:
        if self._layers:
            return self._layers[0].router.top_k
        return self._worker.vllm_config.model_config.get_num_experts_per_tok()

    @property
    def _id_dtype(self) -> str:
        return np.dtype(formats.id_dtype(self._num_experts)).name

    def _start(self, kv_cache_config: Any) -> None:
        read_batch = functools.partial(self._read_batch, self._runner)
        # vLLM binds its CPU workers, and so this thread, to cores that the model needs.
        cores = cores_of_parent() if self._worker.device.type == "cpu" else None
        if self._counts_only:
            # No row is kept by its KV block: any model that routes can be counted.
            self._recorder = CountRecorder(
                runtime.collector_address(), self._hello(1, 1), sink=self._sink,
                read_batch=read_batch, cores=cores,
            )  # fmt: skip
            return
        with runtime.reported_refusal():
            group, block_size = full_attention_group(kv_cache_config)
        config = self._worker.vllm_config
        overshoot = config.num_speculative_tokens * config.max_concurrent_batches
        self._recorder = Recorder(
            runtime.collector_address(),
            self._hello(kv_cache_config.num_blocks, block_size),
            sink=self._sink,
            read_batch=read_batch,
            encoder=ControlEncoder(group, block_size, overshoot),
            max_rows_bytes=self._settings.queue,
            cores=cores,
        )

    def _record(self) -> None:
        """Record from here on; the steps of the warm-up are nobody's."""
        recorder = self._recorder
        if recorder is None or not self._layers:  # a stage without experts says hello alone
            return
        execute_model = self._runner.execute_model

        @functools.wraps(execute_model)
        def execute_and_record(
            scheduler_output: Any, *args: Any, dummy_run: bool = False, **kwargs: Any
        ) -> Any:
            if dummy_run:
                return execute_model(scheduler_output, *args, dummy_run=True, **kwargs)
            recorder.start_step(scheduler_output)
            result = execute_model(scheduler_output, *args, **kwargs)
            recorder.record_step(scheduler_output)
            return result

        self._runner.execute_model = execute_and_record

    def _stop(self, *_: Any, **__: Any) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def _hello(self, num_blocks: int, block_size: int) -> Hello:
        config = self._worker.vllm_config
        served = config.model_config.served_model_name
        return Hello(
            engine=self._place.engine,
            num_engines=self._place.num_engines,
            stage=self._place.stage,
            num_stages=self._place.num_stages,
            layers=[found.layer for found in self._layers],
            num_hidden_layers=config.model_config.get_total_num_hidden_layers(),
            num_experts=self._num_experts,
            top_k=self._top_k,
            id_dtype=self._id_dtype,
            weights_dtype=self._settings.weights_dtype,
            router_types=sorted({type(found.router).__name__ for found in self._layers}),
            block_size=block_size,
            num_blocks=num_blocks,
            trust_prefix_hits=config.kv_transfer_config is None,
            model=served[0] if isinstance(served, list) else served,
            device=str(config.device_config.device),
            seed=config.model_config.seed,
            versions=versions(),
        )


def _sharing(compute_routing: Any, own_rows: Any) -> Any:
    """Let a router's results take part in the gathering of a stage's shards."""

    @functools.wraps(compute_routing)
    def compute_and_share(*args: Any, **kwargs: Any) -> Any:
        topk_weights, topk_ids = compute_routing(*args, **kwargs)
        own_rows(topk_ids, topk_weights)
        return topk_weights, topk_ids

    return compute_and_share


def full_attention_group(kv_cache_config: Any) -> tuple[int, int]:
    """Return the KV-cache group whose blocks hold every token of a sequence.

    Args:
        kv_cache_config: vLLM's ``KVCacheConfig``.

    Returns:
        The group's number and its tokens a block.

    Raises:
        RefusedError: No layer of the model attends to the whole sequence.
    """
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        MLAAttentionSpec,
        SinkFullAttentionSpec,
        UniformTypeKVCacheSpecs,
    )

    # Not their other subclasses: some of those give blocks back while a sequence runs.
    whole = {FullAttentionSpec, MLAAttentionSpec, SinkFullAttentionSpec}
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        first = spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec
        if type(first) in whole:
            return number, int(spec.block_size)
    raise RefusedError(
        "no layer of the model attends to the whole sequence; moescope keeps a running sequence's "
        "rows by its full-attention KV blocks"
    )
