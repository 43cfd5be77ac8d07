"""Keeps the rows of a step on the CPU.

On the CPU Dynamo traces *through* the router: a Python side effect would run once, at the trace.
A functional custom op whose output is used downstream is opaque to it and runs in every step,
eager and compiled.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moescope_service.capture.own_rows import OwnRows
from moescope_service.capture.rows import StepRows

_running = threading.local()
"""``sink``: the `CpuSink` whose step runs in this thread.

The op has no other way to find it. A number in the graph would name an earlier worker's sink where
vLLM's compile cache hands the graph to a later one, as in a script with several `vllm.LLM`.
"""

_library = torch.library.Library("moescope", "FRAGMENT")


def _record_routing(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, column: int
) -> torch.Tensor:
    sink: CpuSink | None = getattr(_running, "sink", None)
    if sink is not None:  # None in the warm-up
        sink.write(column, topk_ids, topk_weights)
    return topk_ids.clone()


def _fake_record_routing(
    topk_ids: torch.Tensor, topk_weights: torch.Tensor, column: int
) -> torch.Tensor:
    return torch.empty_like(topk_ids)


@functools.cache
def _register_op() -> None:
    from vllm.utils.torch_utils import direct_register_custom_op

    direct_register_custom_op(
        "record_routing",
        _record_routing,
        fake_impl=_fake_record_routing,
        target_lib=_library,
        dispatch_key="CPU",
    )


class CpuSink:
    """Static buffers ``[max_tokens, num_layers, top_k]`` that each layer writes its column of.

    Lives in the worker and is written by the thread that runs the model.

    Args:
        positions: The model runner's tensor of each row's position, ``[max_tokens]``.
        num_layers: Columns of the rows.
        top_k: Experts a token and layer.
        id_dtype: numpy's dtype of the shipped ids.
        weights_dtype: numpy's dtype of the shipped weights.
        own_rows: Finds this worker's rows where routers see those of other ranks too.
    """

    def __init__(
        self,
        *,
        positions: torch.Tensor,
        num_layers: int,
        top_k: int,
        id_dtype: npt.DTypeLike,
        weights_dtype: npt.DTypeLike,
        own_rows: OwnRows | None = None,
    ) -> None:
        _register_op()
        _running.sink = None  # may be an earlier worker's: this one's warm-up must not write to it
        self._own_rows = own_rows
        self._positions = positions.numpy()
        shape = (len(positions), num_layers, top_k)
        self._topk_ids = np.zeros(shape, id_dtype)
        self._topk_weights = np.zeros(shape, weights_dtype)
        self._id_columns = torch.from_numpy(self._topk_ids).unbind(1)
        self._weight_columns = torch.from_numpy(self._topk_weights).unbind(1)
        self._rows = [0] * num_layers

    def hook(self, column: int, router: Any) -> None:
        """Let a router hand over its results; see `moescope_service.capture.rows.StepSink`.

        Call it after the weights are loaded and before the model is compiled or warmed up.
        """
        compute_routing = router._compute_routing

        def compute_and_record(
            hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None
        ) -> tuple[Any, Any]:
            topk_weights, topk_ids = compute_routing(
                hidden_states, router_logits, indices_type, input_ids=input_ids
            )
            ids = torch.ops.moescope.record_routing(topk_ids, topk_weights, column)
            return topk_weights, ids

        router._compute_routing = compute_and_record

    def write(self, column: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """Write one layer's column; called by the op."""
        if self._own_rows is not None:
            topk_ids, topk_weights = self._own_rows(topk_ids, topk_weights)
        num_tokens = topk_ids.shape[0]
        self._id_columns[column][:num_tokens].copy_(topk_ids)
        self._weight_columns[column][:num_tokens].copy_(topk_weights)
        # A second write in one step is of other tokens and overwrites the first: neither counts.
        self._rows[column] = -1 if self._rows[column] else num_tokens

    def start_step(self) -> None:
        """Forget earlier writes; layers that run in this thread afterwards write to this sink."""
        _running.sink = self
        self._rows = [0] * len(self._rows)

    def take(self, num_rows: int) -> StepRows | str:
        """Return copies of a step's rows.

        Returns:
            The rows, or ``hook_missed`` where not every layer wrote every row exactly once: they
            would be partly another step's.
        """
        if min(self._rows) < num_rows:
            return "hook_missed"
        return StepRows(
            self._positions[:num_rows].copy(),
            self._topk_ids[:num_rows].copy(),
            self._topk_weights[:num_rows].copy(),
        )
