"""Keeps the rows of a step on NVIDIA GPUs.

The routers write static buffers (`RoutingBuffers`). After each step one kernel packs the rows into
pinned host memory (`RowRing`), which the GPU writes over PCIe: there is no device-to-host copy to
order, and the worker's thread launches that kernel, records one event and goes on.
"""

from __future__ import annotations

from typing import Any

import torch

from moescope_service.capture.cuda import kernels
from moescope_service.capture.cuda.buffers import RoutingBuffers
from moescope_service.capture.cuda.launch import KernelLauncher
from moescope_service.capture.cuda.ring import ReservedRows, RowRing
from moescope_service.capture.own_rows import OwnRows


class CudaSink:
    """Static buffers that each router writes its layer of, and the ring they are packed into.

    Lives in the worker; all but the ring's reading side belongs to the thread that runs the model.

    Args:
        positions: The model runner's tensor of each row's position, ``[max_tokens]``, int64.
        num_layers: Columns of the rows.
        top_k: Experts a token and layer.
        num_experts: Ids are below it.
        index_dtype: ``torch.dtype`` of ids that the MoE kernels need; None: any.
        id_dtype: numpy's name of the dtype of the shipped ids.
        weights_dtype: numpy's name of the dtype of the shipped weights.
        queue_bytes: Size of the ring; at least two steps fit in any case.
        own_rows: Finds this worker's rows where routers see those of other ranks too.
    """

    def __init__(
        self,
        *,
        positions: torch.Tensor,
        num_layers: int,
        top_k: int,
        num_experts: int,
        index_dtype: torch.dtype | None,
        id_dtype: str,
        weights_dtype: str,
        queue_bytes: int,
        own_rows: OwnRows | None = None,
    ) -> None:
        max_tokens = len(positions)
        self.buffers = RoutingBuffers(
            num_layers, max_tokens, top_k, index_dtype, positions.device, own_rows
        )
        ids, weights = getattr(torch, id_dtype), getattr(torch, weights_dtype)
        row_bytes = num_layers * top_k * (ids.itemsize + weights.itemsize)
        num_slots = max(queue_bytes // row_bytes, 2 * max_tokens)
        self._ring = RowRing(num_slots, num_layers, top_k, ids, weights)
        constants = kernels.pack_blocks(num_layers, top_k)
        tensors = (self.buffers.topk_ids, self.buffers.topk_weights, positions)
        self._pack = KernelLauncher(
            kernels.pack_rows, (*tensors, *self._ring.tensors), 4, constants
        )
        self._layer_stride, self.num_experts = max_tokens * top_k, num_experts

    def hook(self, column: int, router: Any) -> None:
        """Let a router hand over its results; see `moescope_service.capture.rows.StepSink`.

        Call it after the weights are loaded and before CUDA graphs are captured.
        """
        self.buffers.hook(column, router)

    def start_step(self) -> None:
        """Nothing to do: packing marks what it has read."""

    def take(self, num_rows: int) -> ReservedRows | str:
        """Pack the rows of the step that was just launched.

        Returns:
            The rows to come, or ``queue_full`` where the link's thread did not keep up.
        """
        reserved = self._ring.reserve(num_rows)
        if reserved is None:
            return "queue_full"
        stream = self._pack(reserved.offset, num_rows, self._layer_stride, self.num_experts)
        reserved.event.record(stream)
        return reserved
