"""Counts the routing of steps in the memory of an NVIDIA GPU.

The routers write static buffers (`RoutingBuffers`); behind the model one kernel for each stretch of
prompt or generated rows adds them to a histogram. The reporting thread copies that on a stream of
its own, without waiting for the worker's stream: totals only grow, and what is added during the
copy is in the next one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moescope_service.capture.counting import Totals, phase_runs
from moescope_service.capture.cuda import kernels
from moescope_service.capture.cuda.buffers import RoutingBuffers
from moescope_service.capture.cuda.launch import KernelLauncher
from moescope_service.capture.own_rows import OwnRows
from moescope_service.histogram import PHASES


class CudaCounts:
    """See `moescope_service.capture.counting.CountSink`.

    Args:
        positions: The model runner's tensor of each row's position, ``[max_tokens]``.
        num_layers: Layers that route.
        top_k: Experts a token and layer.
        num_experts: Ids are below it.
        index_dtype: ``torch.dtype`` of ids that the MoE kernels need; None: any.
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
        own_rows: OwnRows | None = None,
    ) -> None:
        device = positions.device
        self.buffers = RoutingBuffers(
            num_layers, len(positions), top_k, index_dtype, device, own_rows
        )
        self._shape = (len(PHASES), num_layers, num_experts)
        # Behind the selections stands the number of rows that a layer did not write.
        self._counts = torch.zeros(int(np.prod(self._shape)) + 1, dtype=torch.int64, device=device)
        constants = kernels.pack_blocks(num_layers, top_k)
        tensors = (self.buffers.topk_ids, self._counts)
        self._count = KernelLauncher(kernels.count_rows, tensors, 5, constants)
        self._layer_stride = len(positions) * top_k
        self._stream: torch.cuda.Stream | None = None

    def hook(self, column: int, router: Any) -> None:
        """Let one router hand over its results."""
        self.buffers.hook(column, router)

    def start_step(self) -> None:
        """Nothing to do: counting marks what it has read."""

    def count(self, first_row: npt.NDArray[np.int32], is_decode: npt.NDArray[np.bool_]) -> None:
        """Add the step that was just launched."""
        for start, num_rows, phase in phase_runs(first_row, is_decode):
            self._count(start, num_rows, self._layer_stride, self._shape[2], int(phase))

    def skip(self, num_rows: int) -> None:
        """Leave out the step that was just launched, and mark its rows all the same."""
        self.buffers.topk_ids[:, :num_rows] = -1

    def totals(self) -> Totals:
        """Return what was counted so far."""
        if not self._counts.is_cuda:
            return self._totals(self._counts)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._counts.device)
        with torch.cuda.stream(self._stream):
            return self._totals(self._counts.cpu())

    def _totals(self, counts: torch.Tensor) -> Totals:
        values = counts.numpy()
        return Totals(values[:-1].reshape(self._shape).copy(), int(values[-1]))
