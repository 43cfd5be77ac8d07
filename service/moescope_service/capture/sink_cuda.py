"""Keeps the rows of a step on NVIDIA GPUs.

``moe_forward`` is an opaque op to torch.compile, so a router's Python runs at CUDA graph capture
and in every step that no graph replays; the kernels that it launched replay. `CudaSink` therefore
gives the routers static buffers ``[num_layers, max_tokens, top_k]``:

* `FusedTopKRouter` writes them itself: they are its kernel's outputs, in place of the fresh tensors
  that ``fused_topk`` allocates. No kernel more than stock.
* Other routers' results are copied by one small kernel a layer.

After each step one kernel packs the rows into pinned host memory (`RowRing`): there is no
device-to-host copy to wait for, and the worker's thread launches one kernel and records one event.

Relies on vLLM 0.32.0, ``model_executor/layers/fused_moe/router/fused_topk_router.py``
(``fused_topk``, ``dispatch_topk_softmax_func``, ``dispatch_topk_sigmoid_func``): no kernel behind
the router writes to ``topk_ids`` or ``topk_weights``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moescope_service.capture import kernels
from moescope_service.capture.ring import ReservedRows, RowRing


class CudaSink:
    """Static buffers that each router writes its layer of, and the ring they are packed into.

    Lives in the worker; all but the ring's reading side belongs to the thread that runs the model.

    Args:
        positions: The model runner's tensor of each row's position, ``[max_tokens]``, int64.
        num_layers: Columns of the rows.
        top_k: Experts a token and layer.
        num_experts: Ids are below it.
        index_dtype: What the MoE kernels want ids to be, such as ``torch.int32``.
        id_dtype: numpy's dtype of the shipped ids.
        weights_dtype: numpy's name of the dtype of the shipped weights.
        queue_bytes: Size of the ring; at least two steps fit in any case.
    """

    def __init__(
        self,
        *,
        positions: torch.Tensor,
        num_layers: int,
        top_k: int,
        num_experts: int,
        index_dtype: torch.dtype,
        id_dtype: str,
        weights_dtype: str,
        queue_bytes: int,
    ) -> None:
        device, self._max_tokens = positions.device, len(positions)
        shape = (num_layers, self._max_tokens, top_k)
        self._topk_ids = torch.full(shape, -1, dtype=index_dtype, device=device)
        self._topk_weights = torch.zeros(shape, dtype=torch.float32, device=device)
        self._token_expert = torch.empty(shape[1:], dtype=torch.int32, device=device)
        ids, weights = getattr(torch, id_dtype), getattr(torch, weights_dtype)
        row_bytes = num_layers * top_k * (ids.itemsize + weights.itemsize)
        num_slots = max(queue_bytes // row_bytes, 2 * self._max_tokens)
        self._ring = RowRing(num_slots, num_layers, top_k, ids, weights)
        self._pack = PackLauncher(
            self._topk_ids, self._topk_weights, positions, self._ring, num_experts
        )

    def hook(self, column: int, router: Any) -> None:
        """Let a router hand over its results; see `moescope_service.capture.rows.StepSink`.

        Call it after the weights are loaded and before CUDA graphs are captured.
        """
        from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

        record = self._recording(column, router.top_k, router._compute_routing)
        if type(router) is FusedTopKRouter:
            record = self._in_place(column, router, record)
        router._compute_routing = record

    def start_step(self) -> None:
        """Nothing to do: `take` leaves the buffers marked."""

    def take(self, num_rows: int) -> ReservedRows | str:
        """Pack the rows of the step that was just launched.

        Returns:
            The rows to come, or ``queue_full`` where the link's thread did not keep up.
        """
        reserved = self._ring.reserve(num_rows)
        if reserved is None:
            return "queue_full"
        self._pack(reserved)
        return reserved

    def _recording(self, column: int, top_k: int, compute_routing: Any) -> Callable[..., Any]:
        to_ids, to_weights = self._topk_ids[column], self._topk_weights[column]

        def compute_and_record(
            hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
        ) -> tuple[Any, Any]:
            topk_weights, topk_ids = compute_routing(
                hidden_states, router_logits, indices_type, input_ids=input_ids
            )
            record_routing(topk_ids, topk_weights, to_ids, to_weights, top_k)
            return topk_weights, topk_ids

        return compute_and_record

    def _in_place(
        self, column: int, router: Any, compute_and_record: Callable[..., Any]
    ) -> Callable[..., Any]:
        from vllm.model_executor.layers.fused_moe.router import fused_topk_router as vllm_router

        topk = {
            "softmax": vllm_router.dispatch_topk_softmax_func,
            "sigmoid": vllm_router.dispatch_topk_sigmoid_func,
        }[router.scoring_func]()
        topk_ids, topk_weights = self._topk_ids[column], self._topk_weights[column]
        token_expert, max_tokens = self._token_expert, self._max_tokens
        dtypes = (topk_ids.dtype, None) if topk_ids.dtype is torch.int32 else (topk_ids.dtype,)

        def compute_in_place(
            hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
        ) -> tuple[Any, Any]:
            num_tokens = hidden_states.shape[0]
            if num_tokens > max_tokens or indices_type not in dtypes:
                return compute_and_record(
                    hidden_states, router_logits, indices_type, input_ids=input_ids
                )
            return topk(
                topk_weights[:num_tokens],
                topk_ids[:num_tokens],
                token_expert[:num_tokens],
                router_logits,
                router.renormalize,
            )

        return compute_in_place


def record_routing(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    to_ids: torch.Tensor,
    to_weights: torch.Tensor,
    top_k: int,
) -> None:
    """Launch the kernel that copies one layer's routing; more tokens than fit are left out."""
    num_tokens = min(len(topk_ids), len(to_ids))
    grid = (-(-num_tokens * top_k // kernels.RECORD_BLOCK),)
    if num_tokens:
        kernels.record_routing[grid](
            topk_ids,
            topk_weights,
            to_ids,
            to_weights,
            num_tokens,
            *topk_ids.stride(),
            *topk_weights.stride(),
            TOP_K=top_k,
            BLOCK=kernels.RECORD_BLOCK,
        )


class PackLauncher:
    """`kernels.pack_rows`, compiled once and launched without the JIT's work in every step.

    Relies on Triton 3.6 and 3.7, ``compiler/compiler.py`` (``CompiledKernel.__getitem__``):
    pointers may be integers.
    """

    def __init__(
        self,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        positions: torch.Tensor,
        ring: RowRing,
        num_experts: int,
    ) -> None:
        num_layers, max_tokens, top_k = topk_ids.shape
        constants = kernels.pack_blocks(num_layers, top_k)
        self._block_rows = constants["BLOCK_ROWS"]
        tensors = (
            topk_ids, topk_weights, positions, ring.topk_ids, ring.topk_weights, ring.positions,
        )  # fmt: skip
        self._kernel = kernels.pack_rows.warmup(
            *(tensor.dtype for tensor in tensors), 2, 2, 2, 2, grid=(1,), **constants
        )
        # Kept alive by their owner, the sink.
        self._pointers = [tensor.data_ptr() for tensor in tensors]
        self._last = (max_tokens * top_k, num_experts, *constants.values())
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, reserved: ReservedRows) -> None:
        """Launch behind the model's kernels, and record the event."""
        if self._stream is None:  # the worker's thread has settled on it by the first step
            self._stream = torch.cuda.current_stream()
        num_rows = reserved.num_rows
        launch = self._kernel[-(-num_rows // self._block_rows), 1, 1]
        launch(
            *self._pointers,
            reserved.offset,
            num_rows,
            *self._last,
            stream=self._stream.cuda_stream,
        )
        reserved.event.record(self._stream)
