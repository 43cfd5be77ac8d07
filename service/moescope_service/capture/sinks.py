"""Chooses what holds, or counts, the rows of a worker's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moescope_service.capture.counting import CountSink
from moescope_service.capture.own_rows import OwnRows
from moescope_service.capture.routers import RoutedLayer
from moescope_service.capture.rows import StepSink
from moescope_service.settings import Settings


def make_sink(
    layers: Sequence[RoutedLayer],
    device_type: str,
    settings: Settings,
    *,
    positions: Any,
    id_dtype: str,
    own_rows: OwnRows | None,
) -> StepSink | CountSink:
    """Return a sink for a worker's layers; no router is hooked yet.

    Args:
        layers: At least one; all of the same top-k and number of experts.
        device_type: ``cpu`` or ``cuda``.
        settings: What is captured.
        positions: The model runner's tensor of each row's position, on the device.
        id_dtype: numpy's name of the dtype of the shipped ids.
        own_rows: Finds this worker's rows where routers see those of other ranks too.
    """
    shape: dict[str, Any] = {
        "positions": positions,
        "num_layers": len(layers),
        "top_k": layers[0].router.top_k,
        "own_rows": own_rows,
    }
    dtypes = {"id_dtype": id_dtype, "weights_dtype": settings.weights_dtype}
    if device_type == "cpu":
        return _cpu_sink(settings, shape | dtypes, layers[0])
    return _cuda_sink(settings, shape, dtypes, layers[0])


def _cpu_sink(
    settings: Settings, arguments: dict[str, Any], layer: RoutedLayer
) -> StepSink | CountSink:
    from moescope_service.capture.cpu.counts import CpuCounts
    from moescope_service.capture.cpu.sink import CpuSink

    sink = CpuSink(**arguments)
    if settings.mode == "counts":
        return CpuCounts(sink, arguments["num_layers"], layer.num_experts)
    return sink


def _cuda_sink(
    settings: Settings, shape: dict[str, Any], dtypes: dict[str, Any], layer: RoutedLayer
) -> StepSink | CountSink:
    from moescope_service.capture.cuda.counts import CudaCounts
    from moescope_service.capture.cuda.sink import CudaSink

    shape |= {"num_experts": layer.num_experts, "index_dtype": layer.index_dtype}
    if settings.mode == "counts":
        return CudaCounts(**shape)
    return CudaSink(**shape, **dtypes, queue_bytes=settings.queue_bytes)
