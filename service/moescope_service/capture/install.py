"""Puts the capture into a worker.

``WorkerWrapperBase.init_device`` is wrapped once (it runs in every worker: in-process,
multiprocess, Ray); from there on only *instances* are wrapped. Relies on vLLM 0.32.0,
``v1/worker/worker_base.py`` and ``gpu_worker.py``: ``load_model`` comes before the warm-up,
``initialize_from_config`` knows the KV cache, ``compile_or_warm_up_model`` ends the start;
``execute_model`` is called once a step. ``utils/ompmultiprocessing.py`` binds CPU workers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from moescope import formats
from moescope_service import runtime
from moescope_service.capture import layout_v1, layout_v2
from moescope_service.capture.control import ControlEncoder
from moescope_service.capture.counting import CountRecorder
from moescope_service.capture.kv_cache import full_attention_group
from moescope_service.capture.loads import are_told
from moescope_service.capture.ranks import Place, place_of
from moescope_service.capture.recorder import Recorder
from moescope_service.capture.routers import RoutedLayer, find_routed_layers
from moescope_service.capture.sinks import make_sink
from moescope_service.capture.weights import WeightsVersion
from moescope_service.errors import RefusedError
from moescope_service.link import cores_of_parent
from moescope_service.messages import CaptureSpec
from moescope_service.settings import Settings
from moescope_service.vllm_contract.guard import check_internals
from moescope_service.vllm_contract.internals import WORKER
from moescope_service.vllm_contract.patching import followed_by, preceded_by, wrap_once
from moescope_service.vllm_contract.versions import versions


def install(wrapper_class: Any) -> None:
    """Wrap ``WorkerWrapperBase.init_device``; a second call does nothing."""
    wrap_once(wrapper_class, "init_device", _capturing)


def _capturing(init_device: Callable[..., None]) -> Callable[..., None]:
    def init_device_and_capture(self: Any) -> None:
        init_device(self)
        with runtime.reported_refusal():
            check_internals(WORKER)
            runtime.join_if_elsewhere()  # Ray starts workers where no process of ours looked
            settings = Settings.from_env()
            place = place_of(self.worker, all_nodes=settings.bind is not None)
            WorkerCapture(self.worker, settings, place)

    return init_device_and_capture


class WorkerCapture:
    """Follows one worker from loading its model to its last step.

    Of the tensor-parallel workers of a stage the first one ships the rows. The others do nothing,
    unless each of them routes a part of the tokens: then they pass their part to the first one.

    Args:
        worker: A vLLM ``Worker`` whose device is initialized.
        settings: What is captured.
        place: Its engine, stage and role among the deployment's workers.
    """

    def __init__(self, worker: Any, settings: Settings, place: Place) -> None:
        self._worker = worker
        self._runner = worker.model_runner
        self._settings = settings
        self._place = place
        self._layers: list[RoutedLayer] = []
        self._sink: Any = None
        self._recorder: Recorder | CountRecorder | None = None
        self._weights = WeightsVersion()
        self._read_batch, self._positions = (
            (layout_v2.read_batch, layout_v2.positions)
            if worker.vllm_config.use_v2_model_runner
            else (layout_v1.read_batch, layout_v1.positions)
        )
        if self._place.is_sender:
            wrap_once(worker, "load_model", followed_by(self._hook_routers))
            wrap_once(worker, "initialize_from_config", followed_by(self._start))
            wrap_once(worker, "compile_or_warm_up_model", followed_by(self._record))
            wrap_once(worker, "shutdown", preceded_by(self._stop))
        elif self._place.is_sharded:
            wrap_once(worker, "load_model", followed_by(self._take_part))

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
            # Of several stages none has all layers: the collector checks them together.
            if is_only_stage and (reason := self._settings.log_refusal(captured)):
                raise RefusedError(reason)
        if not self._layers:
            return
        self._sink = make_sink(
            self._layers,
            self._worker.device.type,
            self._settings,
            positions=self._positions(self._runner),
            id_dtype=self._id_dtype,
            own_rows=self._place.own_rows,
        )
        for column, found in enumerate(self._layers):
            self._sink.hook(column, found.router)

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
                runtime.link_address(), self._spec(1, 1), sink=self._sink,
                read_batch=read_batch, cores=cores,
            )  # fmt: skip
            return
        with runtime.reported_refusal():
            group, block_size = full_attention_group(kv_cache_config)
        config = self._worker.vllm_config
        overshoot = config.num_speculative_tokens * config.max_concurrent_batches
        self._recorder = Recorder(
            runtime.link_address(),
            self._spec(kv_cache_config.num_blocks, block_size),
            sink=self._sink,
            read_batch=read_batch,
            encoder=ControlEncoder(group, block_size, overshoot),
            weights=self._weights,
            max_rows_bytes=self._settings.queue_bytes,
            cores=cores,
        )

    def _record(self) -> None:
        """Record every step from here on; the warm-up's steps belong to no request."""
        recorder = self._recorder
        if recorder is None or not self._layers:  # a stage without experts only introduces itself
            return

        def recording(execute_model: Callable[..., Any]) -> Callable[..., Any]:
            def execute_and_record(
                scheduler_output: Any, *args: Any, dummy_run: bool = False, **kwargs: Any
            ) -> Any:
                if dummy_run:
                    return execute_model(scheduler_output, *args, dummy_run=True, **kwargs)
                recorder.start_step(scheduler_output)
                result = execute_model(scheduler_output, *args, **kwargs)
                recorder.record_step(scheduler_output)
                return result

            return execute_and_record

        wrap_once(self._runner, "execute_model", recording)
        if isinstance(recorder, Recorder):
            self._weights.follow(self._worker, self._runner.get_model(), recorder.tell_weights)

    def _stop(self, *_: Any, **__: Any) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def _spec(self, num_blocks: int, block_size: int) -> CaptureSpec:
        config = self._worker.vllm_config
        served = config.model_config.served_model_name
        return CaptureSpec(
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
            trust_prefix_hits=are_told(config),
            model=served[0] if isinstance(served, list) else served,
            device=str(config.device_config.device),
            seed=config.model_config.seed,
            versions=versions(),
            expert_bytes=[found.expert_bytes for found in self._layers],
        )


def _sharing(compute_routing: Any, own_rows: Any) -> Any:
    """Let a router's results take part in the gathering of a stage's shards, a collective."""

    @functools.wraps(compute_routing)
    def compute_and_share(*args: Any, **kwargs: Any) -> Any:
        topk_weights, topk_ids = compute_routing(*args, **kwargs)
        own_rows(topk_ids, topk_weights)
        return topk_weights, topk_ids

    return compute_and_share
